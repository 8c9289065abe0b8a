# SPDX-License-Identifier: GPL-3.0-or-later
"""Get3DHuman against the authors' numbers, and its space, tracer and decoders against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from backend.families.get3dhuman import tracer
from backend.families.get3dhuman.config import DISTANCE, INVERSE, OUTSIDE, Config, grid_points, to_ndc, to_world
from backend.families.get3dhuman.networks import Get3DHuman, PointDecoder, RefineNet, decode_shape, decode_texture
from backend.families.get3dhuman.reading import Reader
from tests.backend.golden_numbers import Golden, normal

CPU = torch.zeros(1)
SPHERES = (((0.1, -0.2, 0.15), 0.4), ((-0.2, 0.35, -0.1), 0.3))  # what the golden views look at; y up


def spheres(ndc: Tensor, mirror: float = 1.0, of: tuple = SPHERES) -> Tensor:
    """Occupancy whose estimate is the exact distance, as far as it is not truncated."""
    places = ndc * ndc.new_tensor([mirror, -1, mirror])
    distance = torch.stack([(places - places.new_tensor(c)).norm(dim=1) - r for c, r in of]).amin(0)
    return (distance / (2 * DISTANCE) + 0.5).clamp(0, 1)


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("get3dhuman")


@pytest.fixture(scope="module")
def made(golden: Golden) -> dict[str, Tensor | Get3DHuman]:
    """The authors' reduced network with its discriminators, filled, and what follows from the two codes."""
    network = Get3DHuman(Config(channel_base=2048, channel_max=32), discriminators=True).eval().requires_grad_(False)
    golden.fill(network, lambda name: name.startswith(("backbone_", "Dis_")))
    w_shape = network.backbone_shape.mapping(normal("z_shape", 1, 512))
    feature_shape, shape_volume = network.shape_features(w_shape)
    w_texture = network.backbone_texture.mapping(normal("z_tex", 1, 512))
    texture_volume = network.texture_features(w_texture, feature_shape)[1]
    return {"network": network, "w_shape": w_shape[:, 0], "feature_shape": feature_shape,
            "shape_volume": shape_volume, "texture_volume": texture_volume}  # fmt: skip


@pytest.mark.parametrize("name", ["w_shape", "feature_shape", "shape_volume", "texture_volume"])
def test_codes_features_and_volumes_are_the_authors(golden: Golden, made: dict, name: str) -> None:
    assert golden.error(name, made[name]) < 3e-5


def test_points_are_decoded_as_the_authors_decode_them(golden: Golden, made: dict) -> None:
    net, shape, texture = made["network"], made["shape_volume"], made["texture_volume"]
    ndc = to_ndc(torch.from_numpy(golden.arrays["points"]).transpose(1, 2))
    value = decode_shape(net.mlp_shape, shape, ndc)
    assert golden.error("occupancy", value[:, None]) < 1e-5
    outside = (ndc[..., :2].abs() > 1).any(-1)
    assert outside.sum() > 100
    assert (value[outside] == torch.tensor(OUTSIDE)).all()
    color = decode_texture(net.mlp_texture, shape, texture, ndc)
    assert golden.error("rgb", color.transpose(1, 2)) < 2e-5
    inside = ~outside[0]  # the fast twins
    torch.testing.assert_close(Reader(net.mlp_shape, shape[0])(ndc[0, inside])[:, 0], value[0, inside],
                               atol=3e-6, rtol=0)  # fmt: skip
    both = torch.cat([shape, texture], 1)[0]
    torch.testing.assert_close(Reader(net.mlp_texture, both)(ndc[0, inside]), color[0, inside], atol=3e-6, rtol=0)


def test_published_grid_is_sampled_as_published(golden: Golden, made: dict) -> None:
    net, grid = made["network"], grid_points(48)
    homogeneous = torch.cat([torch.tensor([[0.0, 0, 0], [47, 0, 0], [5, 17, 40]]), torch.ones(3, 1)], 1).double()
    expected = (torch.from_numpy(golden.arrays["grid_matrix"]) @ homogeneous.T).T[:, :3]
    torch.testing.assert_close(grid[[0, 47, 5], [0, 0, 17], [0, 0, 40]].double(), expected, atol=1e-4, rtol=0)
    ndc = to_ndc(grid.reshape(-1, 3))
    inside = (ndc[:, :2].abs() <= 1).all(1)
    values = torch.full((len(ndc),), OUTSIDE)
    values[inside] = Reader(net.mlp_shape, made["shape_volume"][0])(ndc[inside])[:, 0]
    assert golden.error("occ_grid", values.reshape(48, 48, 48)) < 1e-5


@pytest.mark.parametrize("degrees", [180, 0, 30])
def test_views_are_the_authors_pixel_by_pixel(golden: Golden, made: dict, degrees: int) -> None:
    view = tracer.trace(spheres, 64, math.radians(degrees), CPU)
    depth = torch.from_numpy(golden.arrays[f"depth_{degrees}"][0])
    assert torch.equal(view.depth < 1e5, depth < 1e5)
    met = depth < 1e5
    torch.testing.assert_close(view.depth[met], depth[met], atol=5e-6, rtol=0)
    points = view.points.permute(2, 0, 1).reshape(1, 3, -1)
    assert golden.error(f"min_points_{degrees}", points) < 1e-5  # also where nothing is met
    net = made["network"]
    rgb = decode_texture(net.mlp_texture, made["shape_volume"], made["texture_volume"], view.ndc.reshape(1, -1, 3))
    assert golden.error(f"trace_rgb_{degrees}", rgb.transpose(1, 2).reshape(1, 3, 64, 64)) < 5e-5


def test_discriminators_score_volumes_as_the_authors_do(golden: Golden, made: dict) -> None:
    net = made["network"]
    assert golden.error("dis_shape", net.Dis_shape(made["shape_volume"])) < 1e-5
    both = torch.cat([made["shape_volume"], made["texture_volume"]], 1)
    assert golden.error("dis_texture", net.Dis_texture(both)) < 1e-5


@pytest.mark.parametrize(("mode", "of_the_picture"), [("train", True), ("eval", False)])
def test_refine_net_in_both_ways_of_normalising(mode: str, of_the_picture: bool) -> None:
    golden = Golden("get3dhuman-refine")
    net = RefineNet(batch_statistics=of_the_picture).eval()
    golden.fill(net, lambda name: False)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with torch.no_grad():
        picture = torch.sigmoid(normal("refine", 1, 3, 64, 64))
        assert golden.error(mode, net.raw(picture)) < 1e-5
        torch.testing.assert_close(net(picture), (net.raw(picture) + 1) / 2)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())  # nothing is learned


def test_sizes_of_the_published_networks() -> None:
    with torch.device("meta"):
        net, refine = Get3DHuman(Config(), discriminators=True), RefineNet()

    def count(part: torch.nn.Module) -> int:
        return sum(tensor.numel() for tensor in part.state_dict().values())

    own = {name: count(part) for name, part in net.named_children()}
    assert sum(size for name, size in own.items() if not name.startswith("Dis_")) == 68_464_546
    assert count(refine) == 28_375_956
    assert own["mlp_shape"] == 395_137
    assert own["mlp_texture"] == 1_412_739
    assert sum(p.numel() for p in net.backbone_shape.mapping.parameters()) == 525_312
    assert own["Dis_shape"] == pytest.approx(28.5e6, rel=0.01)
    assert count(net.backbone_texture.synthesis) == pytest.approx(28.9e6, rel=0.01)
    assert own["filter_shape"] == pytest.approx(3.9e6, rel=0.01)


def test_a_picture_of_512_becomes_257_then_128() -> None:
    sizes = []
    net = Get3DHuman(Config(channel_base=512, channel_max=4)).eval()
    net.filter_shape.conv1.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[-1]))
    with torch.no_grad():
        volume = net.filter_shape(torch.zeros(1, 16, 512, 512))
    assert sizes == [257]
    assert tuple(volume.shape) == (1, 256, 128, 128)
    assert Config().volume_size == 128


def test_world_and_picture() -> None:
    corners = torch.tensor([[-1.0, -1, -1], [0, 0, 0], [1, 1, 1]])
    world = to_world(corners)
    torch.testing.assert_close(world[2] - world[0], torch.tensor([2, -2, 2]) * INVERSE, atol=2e-3, rtol=0)
    assert float(world[1, 1]) == pytest.approx(95.0, abs=1e-3)
    torch.testing.assert_close(to_ndc(world), corners, atol=1e-6, rtol=0)
    assert float(to_ndc(torch.tensor([0.0, 180.0, 0.0]))[1]) < float(to_ndc(torch.zeros(3))[1])  # heads are on top


@pytest.mark.parametrize("degrees", [0, 30, 180])
def test_silhouette_and_depth_of_two_spheres_are_analytic(degrees: int) -> None:
    size, angle = 96, math.radians(degrees)  # apart in every view: past a close edge 55 steps may be too few
    apart = (((0.1, -0.4, 0.15), 0.3), ((-0.1, 0.45, -0.1), 0.35))
    view = tracer.trace(lambda ndc: spheres(ndc, of=apart), size, angle, CPU)
    start, direction = tracer.rays(size, angle, CPU.double())
    depths = []
    for centre, radius in apart:  # |start + t direction - centre| = radius
        to = start - start.new_tensor(centre)
        along = (to * direction).sum(-1)
        depths.append(-along - (along**2 - (to**2).sum(-1) + radius**2).sqrt())  # NaN beside the sphere
    exact = torch.stack(depths).nan_to_num(math.inf).amin(0)
    silhouette = exact < math.inf

    def shrunk(mask: Tensor) -> Tensor:
        return ~torch.nn.functional.max_pool2d((~mask)[None].double(), 3, 1, 1).bool()[0]

    assert (view.mask <= ~shrunk(~silhouette)).all()  # within a pixel, both ways
    assert (shrunk(silhouette) <= view.mask).all()
    grazing = view.mask & silhouette
    inner = shrunk(shrunk(grazing))
    assert inner.sum() > 500
    assert (view.depth[inner] - exact[inner]).abs().amax() < 1e-3


def test_back_view_of_a_turned_field_is_its_front_view() -> None:
    front = tracer.trace(spheres, 48, 0.0, CPU)
    back = tracer.trace(lambda ndc: spheres(ndc, mirror=-1), 48, math.pi, CPU)  # x and z change sign: a half turn
    assert torch.equal(front.mask, back.mask)
    torch.testing.assert_close(front.depth[front.mask], back.depth[back.mask], atol=1e-5, rtol=0)
    mirrored = tracer.trace(lambda ndc: spheres(ndc * ndc.new_tensor([1, 1, -1])), 48, math.pi, CPU)  # z alone
    assert torch.equal(front.mask, mirrored.mask.flip(1))


@pytest.mark.parametrize("degrees", [0, 77, 180])
def test_quick_tracing_sees_what_the_published_one_sees(degrees: int) -> None:
    asked = []

    def occupancy(ndc: Tensor) -> Tensor:
        asked.append(len(ndc))
        return spheres(ndc)

    slow = tracer.trace(occupancy, 128, math.radians(degrees), CPU)
    cost, _ = sum(asked), asked.clear()
    quick = tracer.trace_quickly(occupancy, 128, math.radians(degrees), CPU)
    assert torch.equal(slow.mask, quick.mask)
    assert (slow.depth - quick.depth)[slow.mask].abs().amax() < tracer.TOUCHES
    assert sum(asked) < cost / 8


def test_chunks_of_points_do_not_matter() -> None:
    torch.manual_seed(0)
    config = Config.tiny()
    decoder = PointDecoder(config.volume + 1, config.shape_widths, 1, again=(1, 2)).requires_grad_(False)
    read = Reader(decoder, torch.randn(config.volume, 16, 16))
    ndc = torch.rand(10_500, 3) * 2 - 1
    whole = read(ndc)
    for size in (999, 10_000):
        assert torch.equal(torch.cat([read(chunk) for chunk in ndc.split(size)]), whole)
    assert torch.equal(torch.cat([read(chunk) for chunk in ndc[:300].split(1)]), whole[:300])
    assert read(ndc[:0]).shape == (0, 1)


def test_reader_is_the_decoder() -> None:
    torch.manual_seed(1)
    decoder = PointDecoder(33, (24, 16, 12, 8), 3, again=(2, 3)).requires_grad_(False)
    volume = torch.randn(32, 9, 13)  # not square: rows and columns must not be exchanged
    corners = torch.tensor([[x, y, 0.3] for x in (-1.0, 1.0) for y in (-1.0, 1.0)])
    ndc = torch.cat([corners, torch.rand(500, 3) * 2 - 1])
    slow = decode_texture(decoder, volume[None, :20], volume[None, 20:], ndc[None])[0]
    torch.testing.assert_close(Reader(decoder, volume)(ndc), slow, atol=1e-6, rtol=0)
    assert np.ptp(slow.numpy()) > 0.05
