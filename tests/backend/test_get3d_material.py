# SPDX-License-Identifier: GPL-3.0-or-later
"""GET3D with materials: light of spherical Gaussians against the sphere summed up, heads, pictures, maps."""

from __future__ import annotations

import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from backend import pipeline
from backend.families.get3d import inversion, surfaces
from backend.families.get3d.config import Config
from backend.families.get3d.model import Get3dModel, load, metadata_of
from backend.families.get3d.networks import BEND, Generator
from backend.protocol import GenerateRequest
from backend.render.gaussian_light import Light, inner, random_light, shade
from backend.tensors import dump_tensors
from backend.weights import Weights
from tests.backend.get3d_taught import taught

F64 = torch.float64
CPU = torch.device("cpu")


def sphere(count: int = 40_000) -> tuple[Tensor, float]:
    """Directions spread evenly, and how much of the sphere each stands for."""
    index = torch.arange(count, dtype=F64) + 0.5
    z, turn = 1 - 2 * index / count, math.pi * (1 + math.sqrt(5)) * index
    flat = (1 - z * z).sqrt()
    return torch.stack([flat * turn.cos(), flat * turn.sin(), z], 1), 4 * math.pi / count


def radiance(light: Light, directions: Tensor) -> Tensor:
    return ((light.sharpness * (directions @ light.axis.T - 1)).exp()[..., None] * light.amplitude).sum(1)


def exact(base: Tensor, roughness: float, metallic: float, n: Tensor, v: Tensor, light: Light) -> Tensor:
    """Lambert and GGX with Smith and Schlick, summed over the sphere."""
    directions, share = sphere()
    n_l, n_v = (directions @ n).clamp(min=0), float(n @ v)
    h = functional.normalize(directions + v, dim=1)
    a2 = roughness**4
    d = a2 / (math.pi * ((h @ n) ** 2 * (a2 - 1) + 1) ** 2)

    def smith(c: Tensor | float) -> Tensor:
        c = torch.as_tensor(c, dtype=F64)
        return 2 * c / (c + (a2 + (1 - a2) * c * c).sqrt())

    f0 = 0.04 * (1 - metallic) + base * metallic
    fresnel = f0 + (1 - f0) * (1 - (h @ v)[:, None]) ** 5
    specular = fresnel * (d * smith(n_l) * smith(n_v) / (4 * n_v) * (n_l > 0))[:, None]
    brdf = base * (1 - metallic) / math.pi * n_l[:, None] + specular
    return (brdf * radiance(light, directions)).sum(0) * share


def test_products_of_lobes_have_their_integral() -> None:
    directions, share = sphere(200_000)
    a, b = functional.normalize(torch.tensor([[1.0, 2, 0.5], [-0.3, 0.2, 1]], dtype=F64), dim=1)
    for s, t in ((3.0, 7.0), (0.0, 5.0), (40.0, 2.0)):
        summed = ((s * (directions @ a - 1)).exp() * (t * (directions @ b - 1)).exp()).sum() * share
        found = inner(a[None], torch.tensor([s], dtype=F64), b[None], torch.tensor([t], dtype=F64))
        assert float(found) == pytest.approx(float(summed), rel=1e-3)
    nothing = torch.zeros(1, dtype=F64)
    assert float(inner(a[None], nothing, b[None], nothing)) == pytest.approx(4 * math.pi, rel=1e-3)


def test_shading_is_about_the_integral_over_the_sphere() -> None:
    rng = torch.Generator().manual_seed(0)
    errors = []
    for k in range(16):
        light = random_light([k]).to(torch.empty(0, dtype=F64))
        n = functional.normalize(torch.randn(3, dtype=F64, generator=rng), dim=0)
        v = functional.normalize(n + 0.8 * functional.normalize(torch.randn(3, dtype=F64, generator=rng), dim=0), dim=0)
        base, roughness = torch.rand(3, dtype=F64, generator=rng), 0.3 + 0.4 * float(torch.rand(1, generator=rng))
        metallic = float(k % 2)
        numbers = (torch.tensor([x], dtype=F64) for x in (roughness, metallic))
        found = shade(base[None], *numbers, n[None], v[None], light)
        expected = exact(base, roughness, metallic, n, v, light)
        errors.append(float((found[0] - expected).abs().mean() / expected.mean()))
    assert np.median(errors) < 0.2
    assert max(errors) < 0.6


def test_shading_has_gradients_and_metals_mirror() -> None:
    light = Light(torch.tensor([[0.0, 0, 1]], dtype=F64), torch.tensor([40.0], dtype=F64), torch.ones(1, 3, dtype=F64))
    n = torch.tensor([[0.0, 0, 1], [0.0, 0, 1]], dtype=F64)
    v = functional.normalize(torch.tensor([[0.0, 0.05, 1], [0, 1.0, 1]], dtype=F64), dim=1)
    args = [torch.full((2, 3), 0.5, dtype=F64), torch.full((2,), 0.3, dtype=F64), torch.full((2,), 0.5, dtype=F64)]
    args = [x.requires_grad_() for x in args] + [n.clone().requires_grad_()]
    assert torch.autograd.gradcheck(lambda *a: shade(*a, v, light), args, fast_mode=True)
    at, aside = shade(torch.full((2, 3), 0.9, dtype=F64), args[1], torch.ones(2, dtype=F64), n, v, light)
    assert float(at.detach().mean()) > 20 * float(aside.detach().mean())  # in the mirror, and beside it


def test_environments_are_bright_alike() -> None:
    up = torch.tensor([[0.0, 1.0, 0.0]])
    one, none = torch.ones(1), torch.zeros(1)
    bright = [float(shade(torch.ones(1, 3), one, none, up, up, random_light([k])).mean()) for k in range(200)]
    assert np.percentile(bright, 5) > 0.5
    assert np.percentile(bright, 95) < 2.0
    assert torch.equal(random_light([3]).axis, random_light([3]).axis)
    turned = random_light([3]).turned(math.pi)
    assert torch.allclose(turned.axis[:, 1], random_light([3]).axis[:, 1])
    assert torch.allclose(turned.axis[:, 0], -random_light([3]).axis[:, 0], atol=1e-6)


def with_material(rough: float = 0.5, metallic: float = -3.0, bend: float = 0.0) -> Generator:
    torch.manual_seed(0)
    net = Generator(dataclasses.replace(taught().config, material=True)).eval().requires_grad_(False)
    net.load_state_dict({**net.state_dict(), **taught().state_dict()})
    net.synthesis.to_material.bias.copy_(torch.tensor([rough, metallic, bend, 0.0, 0.0]))
    return net


def test_only_the_variant_has_the_head() -> None:
    extra = set(with_material().state_dict()) - set(taught().state_dict())
    assert {name.rsplit("material.")[0] for name in extra} == {"synthesis.to_"}
    assert with_material().synthesis.to_material.weight.shape[0] == 5


def test_pictures_in_light_depend_on_view_light_and_material() -> None:
    surfacer = surfaces.Surfacer(taught().config, 20, CPU)
    z = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(1))
    cameras = inversion.Cameras(torch.tensor([0.0, 0.4]), torch.zeros(2), torch.zeros(2, 2), torch.zeros(2))
    eyes = surfaces.c2w_of(cameras.azimuth, cameras.polar)[None, :, :3, 3]
    seen = {}
    dull, metal, bent = with_material(4.0), with_material(-2.0, 6.0), with_material(4.0, bend=2.0)
    for name, net, key in (("dull", dull, 1), ("metal", metal, 1), ("other light", dull, 2), ("bent", bent, 1)):
        decoded = net(z[0], z[1])
        shapes = surfacer(decoded)
        seen[name], mask = surfaces.see(decoded, shapes, cameras.mvp()[None], 32, eyes, [random_light([key])])
        flat, _ = surfaces.see(decoded, shapes, cameras.mvp()[None], 32)
        empty = mask[0, 0, 0] == 0
        assert torch.allclose(seen[name][0, 0][:, empty], flat[0, 0][:, empty])  # around the object nothing is lit
        assert not torch.allclose(seen[name], flat)
        assert seen[name].isfinite().all()
    for name in ("metal", "other light", "bent"):
        assert float((seen[name] - seen["dull"]).abs().max()) > 0.05
    net = with_material()
    net.synthesis.to_material.requires_grad_(True)
    decoded = net(z[0], z[1])
    colors, _ = surfaces.see(decoded, surfacer(decoded), cameras.mvp()[None], 32, eyes, [random_light([1])])
    (gradient,) = torch.autograd.grad(colors.square().sum(), net.synthesis.to_material.bias)
    assert (gradient != 0).all()


def maps(model: Get3dModel) -> tuple[np.ndarray, np.ndarray]:
    request = GenerateRequest(family="get3d", seed=3, grid_resolution=24, faces=800, texture_size=512)
    part = pipeline.generate(request, model)[0].parts[0]
    orm, normal = (np.array(Image.open(io.BytesIO(png or b""))) for png in (part.orm_png, part.normal_png))
    return orm, normal


def test_materials_become_maps() -> None:
    plain, metal = (maps(Get3dModel(net, CPU)) for net in (taught(), with_material(-1.5, 5.0)))
    assert (plain[0][..., 1] == round(0.6 * 255)).all()
    assert (plain[0][..., 2] == 0).all()
    rough, shiny = metal[0][..., 1].mean() / 255, metal[0][..., 2].mean() / 255
    assert rough == pytest.approx(1 / (1 + math.exp(1.5)), abs=0.1)
    assert shiny > 0.95
    bent = maps(Get3dModel(with_material(bend=1.0), CPU))
    assert np.abs(bent[1].astype(int) - plain[1]).mean() > 10
    model = Get3dModel(with_material(), CPU)
    field = model.decode(model.sample(3, 0.7))[0]
    assert field.bend is not None
    assert float(field.bend(torch.rand(50, 3) - 0.5).abs().max()) <= BEND
    assert Get3dModel(taught(), CPU).decode(model.sample(3, 0.7))[0].bend is None


def test_weights_say_that_they_know_materials(tmp_path) -> None:
    net = with_material()
    path = tmp_path / "a.safetensors"
    arrays = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    path.write_bytes(b"".join(dump_tensors(arrays, metadata_of(net.config))))
    loaded = load(CPU, Weights("get3d", "0" * 64, (path,)))
    assert loaded.config.material
    assert Config.tiny().material is False
