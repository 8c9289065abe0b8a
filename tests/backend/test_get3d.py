# SPDX-License-Identifier: GPL-3.0-or-later
"""GET3D's networks against the authors' numbers, and against slow float64 versions written from the description."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from backend.families.get3d import dmtet
from backend.families.get3d.config import Config
from backend.families.get3d.discriminator import DualDiscriminator, camera_code
from backend.families.get3d.fields import FieldMLP, on_axes, read_planes, read_volume, stack_planes, to_unit
from backend.families.get3d.networks import Decoded, Generator, mixed_rows
from backend.families.get3d.volume import VolumeBlock, VolumeLayer
from backend.geometry.mesh import signed_volume
from backend.protocol import PopulaceError
from tests.backend.golden_numbers import Golden, normal

F64 = torch.float64
BOUND = 1e-4  # of the root mean square


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def config(kind: str, **changes) -> Config:
    return Config.tiny(kind=kind, **changes)


def filled(kind: str) -> tuple[Golden, Generator]:
    golden, net = Golden(f"get3d-{kind}"), Generator(config(kind)).eval()
    golden.fill(net)  # names and shapes are compared here
    return golden, net


@torch.no_grad()
def decoded(net: Generator) -> Decoded:
    ws_tex, ws_geo = net.mapping(normal("tex_z", 2, 32)), net.mapping_geo(normal("geo_z", 2, 32))
    return net.synthesis(ws_geo + 0.3 * normal("ws_geo_delta", *ws_geo.shape),
                         ws_tex + 0.3 * normal("ws_tex_delta", *ws_tex.shape))  # fmt: skip


@pytest.mark.parametrize("kind", ["unified", "separate"])
@torch.no_grad()
def test_codes_and_colours_are_the_authors(kind: str) -> None:
    golden, net = filled(kind)
    assert net.config.tex_rows == golden.facts["num_ws_tex"]
    assert net.config.geo_rows == golden.facts["num_ws_geo"]
    assert golden.error("ws_tex", net.mapping(normal("tex_z", 2, 32))[:, 0]) < 1e-6
    assert golden.error("ws_geo", net.mapping_geo(normal("geo_z", 2, 32))[:, 0]) < 1e-6
    assert golden.error("ws_tex_psi07", net.mapping(normal("tex_z", 2, 32), 0.7)[:, 0]) < 1e-6
    fields = decoded(net)
    if kind == "unified":
        for name, planes in (("sdf_plane", fields.geometry[0]), ("tex_plane", fields.texture)):
            assert golden.error(name, planes.permute(0, 1, 4, 2, 3).flatten(1, 2)) < BOUND
    points = (0.35 * normal("points", 2, 4096, 3)).clamp(-0.6, 0.6)
    assert golden.error("tex_feat", fields.features(points)) < BOUND
    assert golden.error("rgb_at_points", fields.color(points).transpose(1, 2).unflatten(2, (64, 64))) < BOUND


def test_the_critics_are_the_authors() -> None:
    golden, net = Golden("get3d-disc"), DualDiscriminator(64, base=1024, limit=32, clamp=None)
    golden.fill(net)
    colour, mask = torch.tanh(normal("d_rgb", 4, 3, 64, 64)), (normal("d_mask", 4, 1, 64, 64) > 0).float()
    pictures = torch.cat([colour, mask], 1).requires_grad_()
    scores = net(pictures, normal("d_cam", 4, 2))
    for name, score in zip(("rgb", "mask"), scores):
        assert golden.error(f"logits_{name}", score) < BOUND
        (gradient,) = torch.autograd.grad(score.sum(), pictures, retain_graph=True)
        assert golden.error(f"r1_{name}", gradient.square().sum((1, 2, 3))) < BOUND


def count(module: torch.nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values())


def test_published_sizes() -> None:
    with torch.device("meta"):
        unified, separate = Generator(Config()), Generator(Config(kind="separate"))
        critics = DualDiscriminator(1024)
    assert count(unified) == 34_490_260
    assert count(separate) == 53_648_334
    assert count(critics) == 60_340_928
    assert (unified.config.geo_rows, unified.config.tex_rows) == (22, 9)
    assert (separate.config.geo_rows, separate.config.tex_rows) == (11, 22)
    assert count(unified.mapping) == count(unified.mapping_geo) == 8 * (512 * 512 + 512) + 512
    names = set(unified.state_dict())
    plane = "synthesis.generator.tri_plane_synthesis.b256."
    for name in ("conv0.weight", "conv1.noise_const", "togeo.affine.bias", "totex.weight", "resample_filter"):
        assert plane + name in names
    flexible = Generator(config("unified", surface="flexicubes"))
    extra = set(flexible.state_dict()) - set(Generator(config("unified")).state_dict())
    assert {name.split(".")[2] for name in extra} == {"mlp_synthesis_weight"}


def plain_bilinear(plane: np.ndarray, u: float, v: float) -> np.ndarray:
    """[C, R, R] at (column, row) coordinates in -1..1 that span the pixels' areas; nothing beyond the border."""
    size = plane.shape[1]
    x, y = (u + 1) * size / 2 - 0.5, (v + 1) * size / 2 - 0.5
    total = np.zeros(len(plane))
    for row in range(math.floor(y), math.floor(y) + 2):
        for column in range(math.floor(x), math.floor(x) + 2):
            if 0 <= row < size and 0 <= column < size:
                total += plane[:, row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def test_planes_are_read_pixel_by_pixel_and_summed() -> None:
    planes, points = noise(2, 12, 8, 8), 0.6 * noise(2, 20, 3, seed=1)
    g = to_unit(points, 0.8)
    assert torch.allclose(g, 2 * ((points + 0.4) / 0.8).clamp(0, 1) - 1)
    found = read_planes(stack_planes(planes), g).numpy()
    for sample in range(2):
        for n, (x, y, z) in enumerate(g[sample].tolist()):
            xy, yz, xz = planes[sample].numpy().reshape(3, 4, 8, 8)
            expected = plain_bilinear(xy, x, y) + plain_bilinear(yz, y, z) + plain_bilinear(xz, x, z)
            assert np.allclose(found[sample, n], expected, atol=1e-12)
    at = (0.9 * torch.tanh(noise(1, 5, 3, seed=2))).requires_grad_()
    assert torch.autograd.gradcheck(read_planes, (stack_planes(planes[:1]).requires_grad_(), at), fast_mode=True)


def test_volumes_are_read_at_voxel_centres_with_x_along_the_last_axis() -> None:
    volume = noise(1, 2, 5, 5, 5)
    node = torch.tensor([[[-1.0, 0.0, 1.0], [0.5, -0.5, 0.0], [3.0, 0.0, 0.0]]], dtype=F64)
    found = read_volume(volume, node)[0]
    assert torch.allclose(found[0], volume[0, :, 4, 2, 0])
    assert torch.allclose(found[1], volume[0, :, 2, 1, 3])
    assert torch.allclose(found[2], volume[0, :, 2, 2, 4])  # beyond the border: the border


def test_the_values_on_a_lattice_are_those_of_its_points() -> None:
    torch.manual_seed(0)
    mlp, planes = FieldMLP(8, 8, 1, 4), torch.randn(1, 3, 16, 16, 8)
    for layer in mlp.layers:
        torch.nn.init.normal_(layer.bias)
    ws = [torch.randn(1, 4), torch.randn(1, 4)]
    axes = [torch.linspace(-1, 1, 9), torch.linspace(-0.7, 0.9, 12), torch.linspace(-1, 0.3, 7)]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(1, -1, 3)
    with torch.no_grad():
        expected = mlp(read_planes(planes, points), ws).reshape(9, 12, 7).numpy()
    assert np.abs(on_axes(planes, mlp, ws, axes) - expected).max() < 1e-5 * expected.std()


def test_a_field_mlp_normalises_its_last_layer_too() -> None:
    torch.manual_seed(0)
    mlp = FieldMLP(3, 4, 2, 5).double()
    x, ws = noise(1, 6, 3), [noise(1, 5, seed=1), noise(1, 5, seed=2)]
    y = x[0].numpy()
    for i, (layer, w) in enumerate(zip(mlp.layers, ws)):
        style = w[0].numpy() @ layer.affine.weight.detach().numpy().T / math.sqrt(5) + 1
        kernel = layer.weight.detach().numpy() * style
        kernel = kernel / np.sqrt((kernel**2).sum(1, keepdims=True) + 1e-8)
        y = (np.sqrt(2) * np.where(y > 0, y, 0.2 * y) if i else y) @ kernel.T
    assert np.allclose(mlp(x, ws)[0].detach().numpy(), y, atol=1e-12)


def test_a_volume_layer_and_block_are_their_equations() -> None:
    torch.manual_seed(0)
    layer = VolumeLayer(3, 4, 5, 4, clamp=1.0).double()
    torch.nn.init.normal_(layer.bias)
    x, w = noise(1, 3, 4, 4, 4), noise(1, 5, seed=1)
    style = layer.affine(w)[0].detach()
    kernel = layer.weight.detach() * style.view(1, -1, 1, 1, 1)
    kernel = kernel / (kernel.square().sum((1, 2, 3, 4), keepdim=True) + 1e-8).sqrt()
    padded = np.pad(x[0].numpy(), ((0, 0), (1, 1), (1, 1), (1, 1)))
    expected = np.zeros((4, 4, 4, 4))
    for i, j, k in np.ndindex(4, 4, 4):
        patch = padded[:, i : i + 3, j : j + 3, k : k + 3]
        expected[:, i, j, k] = (kernel.numpy() * patch).sum((1, 2, 3, 4)) + layer.bias.detach().numpy()
    expected = np.sqrt(2) * np.where(expected > 0, expected, 0.2 * expected)
    for gain in (1.0, 0.5):
        found = layer(x, w, gain)[0].detach().numpy()
        assert np.allclose(found, np.clip(gain * expected, -gain, gain), atol=1e-12)
    block = VolumeBlock(3, 2, 5, 8, clamp=None).double()
    large = torch.nn.functional.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)
    body = block.conv1(block.conv0(large, w), w) + torch.einsum(
        "oi,bidhw->bodhw", block.skip.weight[:, :, 0, 0, 0], large) / math.sqrt(3)  # fmt: skip
    assert torch.allclose(block(x, [w, w]), body / math.sqrt(2), atol=1e-12)


@torch.no_grad()
def test_texture_codes_leave_the_surface_alone() -> None:
    torch.manual_seed(0)
    net = Generator(config("unified", resolution=16)).eval()
    points, z = 0.4 * torch.randn(1, 100, 3), torch.randn(3, 1, 32)
    a, b, c = net(z[0], z[1]), net(z[0], z[2]), net(z[2], z[1])
    assert torch.equal(a.sdf(points), b.sdf(points))
    assert torch.equal(a.offset(points), b.offset(points))
    assert not torch.allclose(a.color(points), b.color(points))
    assert not torch.allclose(a.color(points), c.color(points))  # the convolutions are shared: geometry colours too
    assert float(a.offset(points).abs().max()) <= 1 / 64


def test_mixed_styles_take_whole_rows() -> None:
    ws, other = noise(2, 5, 3), noise(2, 5, 3, seed=1)
    mixed = mixed_rows(ws, other, 2)
    assert torch.equal(mixed[:, :2], ws[:, :2])
    assert torch.equal(mixed[:, 2:], other[:, 2:])


def test_nothing_to_colour_gives_the_bias() -> None:
    torch.manual_seed(0)
    net = Generator(config("unified", resolution=8)).eval()
    torch.nn.init.normal_(net.synthesis.to_rgb.bias)
    fields = net(torch.randn(1, 32), torch.randn(1, 32))
    assert torch.allclose(fields.to_rgb(torch.zeros(1, 2, 16)), net.synthesis.to_rgb.bias.expand(1, 2, 3))


def test_camera_code_orders_azimuth_before_polar_angle() -> None:
    code = camera_code(torch.tensor([[0.3, 1.2]], dtype=F64))[0].tolist()
    expected = [f(k * angle) for k in (1, 2, 4) for f in (math.sin, math.cos) for angle in (0.3, 1.2)] + [0.3, 1.2]
    assert np.allclose(code, expected)


def sphere(points: Tensor, radius: float = 0.3) -> Tensor:
    return radius - points.norm(dim=1)


def test_marching_gives_closed_outward_surfaces_with_ordered_vertices() -> None:
    grid = dmtet.TetGrid.cubic(24, 0.8)
    assert float(grid.vertices.abs().max()) == pytest.approx(0.4)
    assert float(grid.vertices[grid.centre].norm()) < 1e-6
    s = torch.stack([sphere(grid.vertices), 0.08 - torch.hypot(
        torch.hypot(grid.vertices[:, 0], grid.vertices[:, 2]) - 0.24, grid.vertices[:, 1])])  # fmt: skip
    for values, euler, volume in zip(s, (2, 0), (4 / 3 * math.pi * 0.3**3, 2 * math.pi**2 * 0.24 * 0.08**2)):
        vertices, faces = dmtet.march(grid.vertices, values, grid.tets)
        edges = torch.stack([faces, faces.roll(-1, 1)], 2).reshape(-1, 2)
        keys = (edges[:, 0] * len(vertices) + edges[:, 1]).sort().values
        back = (edges[:, 1] * len(vertices) + edges[:, 0]).sort().values
        assert torch.equal(keys, back)
        assert (keys.diff() > 0).all()
        assert len(vertices) - len(edges) // 2 + len(faces) == euler
        assert signed_volume(vertices, faces) == pytest.approx(volume, rel=0.04)
        inside = values > 0
        crossing = grid.edges[inside[grid.edges[:, 0]] != inside[grid.edges[:, 1]]]
        assert len(crossing) == len(vertices)  # vertex i lies on the i-th crossing edge, in lexicographic order
        a, b = grid.vertices[crossing].unbind(1)
        along = ((vertices - a) * (b - a)).sum(1) / (b - a).square().sum(1)
        assert torch.allclose(a + along[:, None] * (b - a), vertices, atol=1e-6)
        assert ((along > -1e-5) & (along < 1 + 1e-5)).all()


def test_marching_numbers_tets_of_one_triangle_first() -> None:
    grid = dmtet.TetGrid.cubic(8, 1.0)
    values = sphere(grid.vertices)
    _, faces = dmtet.march(grid.vertices, values, grid.tets)
    inside = (values > 0)[grid.tets].sum(1)
    singles = int(((inside == 1) | (inside == 3)).sum())
    assert len(faces) == singles + 2 * int((inside == 2).sum())
    _, alone = dmtet.march(grid.vertices, values, grid.tets[(inside == 1) | (inside == 3)])
    assert len(alone) == singles
    quads = faces[singles:].reshape(-1, 2, 3)  # the two triangles of a tet share their diagonal
    assert torch.equal(quads[:, 0, 0], quads[:, 1, 0])
    assert torch.equal(quads[:, 0, 2], quads[:, 1, 1])


def test_vertices_and_the_cross_entropy_are_their_formulas_with_gradients() -> None:
    grid = dmtet.TetGrid.cubic(4, 1.0)
    places, values = grid.vertices.double(), noise(len(grid.vertices), seed=3)
    inside = values > 0
    crossing = [(a, b) for a, b in grid.edges.tolist() if inside[a] != inside[b]]
    found, _ = dmtet.march(places, values, grid.tets)
    for vertex, (a, b) in zip(found, crossing):
        assert torch.allclose(vertex, (places[a] * -values[b] + places[b] * values[a]) / (values[a] - values[b]))
    terms = np.zeros((len(crossing), 2))
    for i, (a, b) in enumerate(crossing):
        p, q = 1 / (1 + math.exp(-values[a])), 1 / (1 + math.exp(-values[b]))
        terms[i] = -math.log(p if values[b] > 0 else 1 - p), -math.log(q if values[a] > 0 else 1 - q)
    loss = dmtet.sign_cross_entropy(values, grid.edges)
    assert float(loss) == pytest.approx(terms.mean(0).sum(), rel=1e-12)
    few = values[:].clone().requires_grad_()
    moving = places.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v, s: dmtet.march(v, s, grid.tets)[0], (moving, few), fast_mode=True)
    assert torch.autograd.gradcheck(lambda s: dmtet.sign_cross_entropy(s, grid.edges), (few,), fast_mode=True)


def test_empty_and_full_shapes_are_repaired_and_learn_only_by_their_loss() -> None:
    grid = dmtet.TetGrid.cubic(6, 1.0)
    s = torch.stack([sphere(grid.vertices), -1 - noise(len(grid.vertices)).abs().float(),
                     torch.full((len(grid.vertices),), 0.5)]).requires_grad_()  # fmt: skip
    fixed, loss = dmtet.repair(s, grid.centre, grid.border)
    assert torch.equal(fixed[0], s[0])
    values, now = s.detach(), fixed.detach()
    for i in (1, 2):
        assert float(now[i, grid.centre]) == pytest.approx(1 - float(values.min()))
        assert torch.allclose(now[i, grid.border], -1 - values.max())
        assert len(dmtet.march(grid.vertices, now[i], grid.tets)[1]) > 0
    assert loss.tolist() == pytest.approx([0.0, float(values[1].abs().mean()), 0.5])
    (by_value,) = torch.autograd.grad(fixed.sum(), s, retain_graph=True)
    assert (by_value[0] == 1).all()
    assert (by_value[1:] == 0).all()
    (by_loss,) = torch.autograd.grad(loss.sum(), s)
    assert (by_loss[0] == 0).all()
    assert (by_loss[1] < 0).all()
    assert (by_loss[2] > 0).all()


def test_grid_files_are_read_and_refused(tmp_path: Path) -> None:
    grid = dmtet.TetGrid.cubic(3, 1.0)
    np.savez(tmp_path / "a.npz", vertices=5 + 2 * grid.vertices.numpy(), tets=grid.tets.numpy())
    again = dmtet.TetGrid.load(tmp_path / "a.npz", 0.8)
    assert torch.allclose(again.vertices, 0.8 * grid.vertices, atol=1e-6)
    np.savez(tmp_path / "b.npz", vertices=grid.vertices.numpy(), tets=grid.tets.numpy() + 1)
    np.savez(tmp_path / "c.npz", vertices=grid.vertices.numpy())
    (tmp_path / "d.npz").write_bytes(b"nothing")
    for name in "bcd":
        with pytest.raises(PopulaceError, match=f"{name}.npz is no tetrahedral grid"):
            dmtet.TetGrid.load(tmp_path / f"{name}.npz", 1.0)
