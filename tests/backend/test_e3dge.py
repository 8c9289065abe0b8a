# SPDX-License-Identifier: GPL-3.0-or-later
"""E3DGE's networks against the authors' numbers, and what its construction promises."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from backend.families.e3dge import local
from backend.families.e3dge.camera import Cameras
from backend.families.e3dge.config import FAR, HALF_SIDE, NEAR, Config
from backend.families.e3dge.generator import Generator, Renderer
from backend.families.e3dge.inversion import Codes, E3dge
from tests.backend.golden_numbers import Golden, detweights, normal

FRONT, SIDE = (0.2, -0.1), (-0.25, 0.05)  # the golden photo's camera and the wanted view's


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("e3dge")


def equalised(name: str) -> bool:
    return (".decoder." in name and not name.endswith("kernel")) or ".linear.weight" in name


def filled(golden: Golden) -> E3dge:
    """The authors' networks with a decoder up to 256, and their weights made from names."""
    net = E3dge(replace(Config(), picture=256)).eval().requires_grad_(False)
    state = {name: tensor for name, tensor in net.state_dict().items() if not name.endswith("_avg")}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == golden.shapes
    rules = detweights()
    for name, tensor in state.items():
        if tensor.is_floating_point() and not name.endswith("kernel"):
            shape = tuple(tensor.shape)
            value = rules.e3dge_rule(name, shape)
            value = rules.fill(name, shape, equalised) if value is None else value
            tensor.copy_(torch.from_numpy(np.asarray(value, np.float32)))
    return net


@pytest.fixture(scope="module")
def made(golden: Golden) -> dict[str, Tensor]:
    """Everything that the golden run computes, in its order."""
    net, found = filled(golden), {}
    front, side = (net.cameras(torch.tensor([angles])) for angles in (FRONT, SIDE))
    found |= {"cam_poses": front.c2w, "cam_extrinsics": front.w2c, "cam_calibs": front.projection()}
    z = normal("e3_z", 1, 256)
    found["w"] = net.generator.style(z)
    codes = net.sample(z)
    view = net.render(codes, front, 8)
    found |= {"z_gen_thumb_imgs": view.thumb, "z_depth": view.depth.permute(0, 2, 3, 1)[..., None],
              "z_sdf": view.sdf[..., None], "z_features": view.features, "z_xyz": view.xyz}  # fmt: skip
    found["z_gen_imgs"] = net.picture(view, codes)
    photo = found["input_image"] = found["z_gen_imgs"].clamp(-1, 1)
    found["offsets_renderer"], found["offsets_decoder"] = net.encoder(photo)
    found["camera_logit"], _ = net.camera(functional.interpolate(photo, [64, 64], mode="area"))
    found["camera_angles"] = net.pose(photo)
    codes = Codes(codes.renderer + 0.05 * found["offsets_renderer"],
                  codes.decoder + 0.05 * found["offsets_decoder"][:, : codes.decoder.shape[1]])  # fmt: skip
    seen = net.see(photo, net.render(codes, front, 8), front)
    found["ref_features"] = seen.features
    detailed, view = net.render_detail(codes, side, seen, 8)
    points = view.points.flatten(1, 3)
    found |= {"proj_xy": front.project(points).transpose(1, 2), "aligned_residual": net.align(seen, view)}
    fused = torch.cat([net.fused(seen, view, side), local.positional_code(points)], 2)
    found["local_features"] = fused.unflatten(1, view.points.shape[1:4])
    found |= {"final_thumb": detailed.thumb, "final_image": net.picture(detailed, codes)}
    return found


NAMES = ["cam_poses", "cam_extrinsics", "cam_calibs", "w", "z_gen_thumb_imgs", "z_depth", "z_sdf", "z_features",
         "z_xyz", "z_gen_imgs", "input_image", "offsets_renderer", "offsets_decoder", "camera_logit", "camera_angles",
         "ref_features", "proj_xy", "aligned_residual", "local_features", "final_thumb", "final_image"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_number_is_the_authors(golden: Golden, made: dict[str, Tensor], name: str) -> None:
    assert set(NAMES) == set(golden.facts["arrays"]) - {"cam_focal", "cam_near", "cam_far"}
    # depth is normalised by its own small deviation before the hourglass, which makes rounding ten times larger there
    limit = 3e-4 if name in ("ref_features", "local_features") else 1e-4
    assert golden.error(name, made[name]) < limit


def test_sizes_of_the_published_networks() -> None:
    with torch.device("meta"):
        net, published = E3dge(replace(Config(), picture=256)), E3dge(Config())

    def count(module: nn.Module) -> int:
        return sum(tensor.numel() for tensor in module.state_dict().values())

    assert {name: count(module) for name, module in net.named_children()} == {
        "generator": 23_187_305, "encoder": 258_612_724, "grid_align": 600_295, "fuse": 591_872, "camera": 12_098_003,
    }  # fmt: skip
    names = published.state_dict().keys()
    assert "generator.decoder.to_rgbs.3.conv.weight" in names
    assert "generator.decoder.noises.noise_8" in names
    assert (published.config.decoder_rows, published.config.tex_rows) == (10, 21)


def test_camera_of_the_golden_run(golden: Golden) -> None:
    assert Cameras(torch.zeros(1, 2), 64).focal == pytest.approx(float(golden.arrays["cam_focal"].item()), rel=1e-6)
    assert pytest.approx((golden.arrays["cam_near"].item(), golden.arrays["cam_far"].item())) == (NEAR, FAR)


# ------------------------------------------------------------------------------------- what needs no golden numbers


@pytest.fixture
def tiny() -> E3dge:
    torch.manual_seed(0)
    net = E3dge(Config.tiny()).eval().requires_grad_(False)
    net.average(500, torch.randn(500, 16))
    return net


def person(net: E3dge, seed: int = 0) -> Codes:
    return net.sample(torch.randn(1, net.config.style_dim, generator=torch.Generator().manual_seed(seed)))


def photo_of(net: E3dge, codes: Codes, angles: tuple[float, float]) -> Tensor:
    view = net.render(codes, net.cameras(torch.tensor([angles])))
    noise = torch.randn(1, 3, net.config.photo, net.config.photo, generator=torch.Generator().manual_seed(5))
    return (net.enlarged(view.thumb) + 0.2 * noise).clamp(-1, 1)


def test_without_modulation_the_picture_is_the_global_one(tiny: E3dge) -> None:
    codes, front, side = person(tiny), *(tiny.cameras(torch.tensor([a])) for a in (FRONT, SIDE))
    seen = tiny.see(photo_of(tiny, codes, FRONT), tiny.render(codes, front), front)
    changed, plain = tiny.render_detail(codes, side, seen)
    assert not torch.equal(changed.thumb, plain.thumb)
    tiny.local.start_at_zero()
    started, plain = tiny.render_detail(codes, side, seen)
    assert torch.equal(started.thumb, plain.thumb)
    assert torch.equal(tiny.picture(started, codes), tiny.picture(plain, codes))


def test_no_local_feature_touches_the_distance(tiny: E3dge) -> None:
    codes, cameras = person(tiny), tiny.cameras(torch.tensor([SIDE]))
    plain = tiny.render(codes, cameras)
    modulation = 10 * torch.randn(1, *plain.sdf.shape[1:], 2 * tiny.config.width)
    loud = tiny.generator.renderer(codes.renderer, cameras, tiny.config.samples, modulation)
    for name in ("sdf", "depth", "xyz", "weights"):
        assert torch.equal(getattr(loud, name), getattr(plain, name))
    assert (loud.features - plain.features).abs().max() > 0.1


def test_weights_of_every_ray_sum_to_one(tiny: E3dge) -> None:
    view = tiny.render(person(tiny), tiny.cameras(torch.tensor([FRONT, SIDE, (0.0, 0.0)])[:1]))
    torch.testing.assert_close(view.weights.sum(-1), torch.ones(1, 16, 16), atol=1e-6, rtol=0)
    assert (view.weights[..., :-1] >= 0).all()


class Sphere(nn.Module):
    """In place of the field: a ball about the origin."""

    radius = 0.06

    def hidden(self, points: Tensor, ws: Tensor) -> Tensor:
        return points

    def sigma_linear(self, points: Tensor) -> Tensor:
        return points.norm(dim=-1, keepdim=True) - self.radius

    def texture(self, hidden: Tensor, directions: Tensor, ws: Tensor, modulation: Tensor | None) -> Tensor:
        return hidden

    def rgb_linear(self, features: Tensor) -> Tensor:
        return features


def test_depth_of_a_ball_is_analytic_within_a_sample() -> None:
    renderer = Renderer(Config.tiny(), None)
    renderer.network.netGlobal = Sphere()
    renderer.sigmoid_beta.data.fill_(0.001)
    cameras, samples = Cameras(torch.tensor([[0.4, -0.2]]), 32), 64
    view = renderer(torch.zeros(1, 9, 16), cameras, samples)
    origin, directions, _ = cameras.rays()
    b = (origin[:, None, None] * directions).sum(-1)
    a, c = directions.square().sum(-1), 1 - Sphere.radius**2
    root = b**2 - a * c
    exact = (-b - root.clamp(min=0).sqrt()) / a
    inside = root > 1e-3
    assert inside.sum() > 100
    step = (FAR - NEAR) / samples
    assert ((view.depth[:, 0] - exact).abs()[inside] < step).all()
    assert (view.foreground[:, 0] == (root > 0))[(root.abs() > 1e-3)].all()
    torch.testing.assert_close(view.depth[:, 0][root < -1e-3].min(), torch.tensor(FAR - step), atol=1e-3, rtol=0)


def test_reading_a_map_of_coordinates_gives_the_projected_place() -> None:
    """Pixel areas: the first pixel's centre is at -1 + 1/64."""
    cameras = Cameras(torch.tensor([list(FRONT)]), 64)
    centres = (torch.arange(64) + 0.5) / 32 - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    points = (torch.rand(1, 400, 3, generator=torch.Generator().manual_seed(1)) - 0.5) * HALF_SIDE
    xy = cameras.project(points)
    found, inside = local.read_map(torch.stack([x, y])[None], xy)
    assert inside.all()
    torch.testing.assert_close(found, xy, atol=1e-5, rtol=0)
    origin, directions, _ = cameras.rays()  # a point on the ray of pixel (row 9, column 50) is seen there
    there = cameras.project((origin + 1.03 * directions[:, 9, 50])[:, None])
    torch.testing.assert_close(there[0, 0], torch.tensor([centres[50], centres[9]]), atol=1e-5, rtol=0)
    assert not local.read_map(torch.ones(1, 1, 64, 64), torch.tensor([[[1.2, 0.0]]]))[0].any()


def test_camera_in_front_looks_back_along_z() -> None:
    front = Cameras(torch.zeros(1, 2), 64)
    torch.testing.assert_close(front.c2w[0], torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]]))
    xy = front.project(torch.tensor([[[0.05, 0.0, 0.0], [0.0, 0.05, 0.0]]]))[0]
    assert xy[0, 0] > 0.4  # right is +x for who looks at the face
    assert xy[1, 1] < -0.4  # up is a smaller row
    right = Cameras(torch.tensor([[math.pi / 2, 0.0]]), 64)
    torch.testing.assert_close(right.c2w[0, :, 3], torch.tensor([1.0, 0, 0]), atol=1e-6, rtol=0)


def test_the_photos_own_view_is_inside_the_photo_everywhere(tiny: E3dge, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, front = person(tiny), tiny.cameras(torch.tensor([FRONT]))
    view, flags = tiny.render(codes, front), []
    fuse = tiny.fuse.forward
    monkeypatch.setattr(tiny.fuse, "forward", lambda there, flag, own: (flags.append(flag), fuse(there, flag, own))[1])
    seen = tiny.see(photo_of(tiny, codes, FRONT), view, front)
    tiny.render_detail(codes, front, seen)
    tiny.render_detail(codes, tiny.cameras(torch.tensor([[1.2, 0.0]])), seen)
    assert (flags[0] == 1).all()
    assert 0 < flags[1].mean() < 1


def test_positional_code() -> None:
    p = torch.tensor([[0.3, -0.2, 0.11]])
    code = local.positional_code(p)[0]
    assert len(code) == 45
    expected = [*p[0].tolist()]
    for octave in range(7):
        expected += [math.sin(2**octave * v) for v in p[0].tolist()] + [math.cos(2**octave * v) for v in p[0].tolist()]
    torch.testing.assert_close(code, torch.tensor(expected), atol=1e-5, rtol=0)


def test_decoder_rows_drive_the_layers_they_are_said_to(tiny: E3dge) -> None:
    """conv1 0, to_rgb1 1, then i, i + 1 for convolutions and i + 2 for the picture: a later row leaves earlier sums."""
    features, codes = torch.randn(1, 16, 16, 16), person(tiny)
    assert [b.shape[-1] for _, b in sorted(tiny.generator.decoder.noises.named_buffers())] == [16, 32, 32, 64, 64]
    plain, parts = tiny.generator.decoder(features, codes.decoder), {}
    for row in range(6):
        rows = codes.decoder.clone()
        rows[:, row] += 1
        parts[row] = (tiny.generator.decoder(features, rows) - plain).abs().amax()
    assert all(change > 0 for change in parts.values())
    with torch.no_grad():
        for to_rgb in (tiny.generator.decoder.to_rgb1, *tiny.generator.decoder.to_rgbs[:-1]):
            to_rgb.conv.weight.zero_()
    rows = codes.decoder.clone()
    rows[:, 5] += 1  # the last picture's own
    only = tiny.generator.decoder(features, rows) - tiny.generator.decoder(features, codes.decoder)
    assert only.abs().amax() > 0


def test_generators_start_smooth() -> None:
    torch.manual_seed(3)
    net = Generator(Config.tiny())
    points = (torch.rand(1, 2000, 3) - 0.5) * 0.24
    ws, _ = net.rows(torch.randn(1, 16))
    near = net.field.sdf(points + 1e-4, ws) - net.field.sdf(points, ws)
    assert near.abs().max() < 0.05
