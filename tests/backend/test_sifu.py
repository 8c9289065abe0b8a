# SPDX-License-Identifier: GPL-3.0-or-later
"""The networks of SIFU and GTA: names and shapes of the released files, and float64 twins that spell the papers out."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from backend.families.sifu.config import Config, from_metadata, to_metadata
from backend.families.sifu.networks import (
    ImageFeatures,
    NormalGenerator,
    PointDecoder,
    PointDecoders,
    Reconstructor,
    RefineFilter,
)
from backend.families.sifu.transformer import (
    CrossTransformer,
    LearnedDecoder,
    NormalDecoder,
    SelfTransformer,
    position_table,
)
from tests.backend.golden_numbers import FOLDER

TINY = Config.tiny()


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every number random, so that nothing is hidden by a zero or a one; float64."""
    torch.manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not name.endswith("_pos_embedding"):
            scale = 0.3 if tensor.ndim < 2 else 1 / math.sqrt(tensor[0].numel())
            tensor.copy_(scale * torch.randn_like(tensor) + (tensor.ndim == 1 and "norm" in name))
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)
    return module.double().eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["gta", "sifu"])
def test_names_and_shapes_are_those_of_the_released_files(kind) -> None:
    path = FOLDER / f"{kind}_keys.json"
    if not path.is_file():
        pytest.skip(f"no golden numbers at {FOLDER}; set GOLDEN_NUMBERS")
    released = {name: tuple(shape) for name, shape in json.loads(path.read_text("utf-8")).items()}
    with torch.device("meta"):
        network = Reconstructor(Config.published(kind))
    state = network.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == released
    assert len(state) == {"gta": 938, "sifu": 714}[kind]
    millions = {"gta": 420.1, "sifu": 413.1}[kind]
    assert sum(tensor.numel() for tensor in state.values()) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("kind", ["gta", "sifu"])
def test_shortcuts_are_one_tensor_under_two_names(kind) -> None:
    network = Reconstructor(Config.tiny(kind))
    twice = [name for name in network.state_dict() if ".downsample.0." in name]
    assert len(twice) == (4 if kind == "gta" else 2)
    for name in twice:
        one, other = network.get_parameter(name), network.get_parameter(name.replace(".downsample.0.", ".bn4."))
        assert one is other
    assert any(name.endswith("conv3.bn4.weight") for name in network.state_dict())  # where nothing uses it, too


def test_positions_are_sines_of_column_and_row() -> None:
    table = position_table(32, 256)[0].double()
    for row, column in ((0, 0), (3, 7), (31, 30)):
        for k in (0, 5, 63):
            w = 10000 ** (-k / 64)
            token = table[row * 32 + column]
            wanted = [math.sin(column * w), math.cos(column * w), math.sin(row * w), math.cos(row * w)]
            assert torch.allclose(token[[k, 64 + k, 128 + k, 192 + k]], torch.tensor(wanted).double(), atol=1e-6)


def norm(x: Tensor, module: nn.Module) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, size: int) -> Tensor:
    """[N, heads * size] each, one head and one query after the other."""
    out = torch.zeros_like(q)
    for h in range(heads):
        at = slice(h * size, (h + 1) * size)
        for n in range(len(q)):
            logits = torch.stack([(q[n, at] * k[m, at]).sum() / math.sqrt(size) for m in range(len(k))])
            share = logits.exp() / logits.exp().sum()
            out[n, at] = sum(s * v[m, at] for m, s in enumerate(share))
    return out


def self_attention(x: Tensor, module: nn.Module, config: Config) -> Tensor:
    inner = config.heads * config.head_dim
    qkv = x @ module.get_parameter("to_qkv.weight").T
    found = attend(qkv[:, :inner], qkv[:, inner : 2 * inner], qkv[:, 2 * inner :], config.heads, config.head_dim)
    return found @ module.get_parameter("to_out.weight").T + module.get_parameter("to_out.bias")


def feed(x: Tensor, module: nn.Module) -> Tensor:
    part = module.get_parameter
    hidden = torch.tanh(x @ part("net.0.weight").T + part("net.0.bias"))
    return hidden @ part("net.2.weight").T + part("net.2.bias")


def self_twin(x: Tensor, net: SelfTransformer, config: Config) -> Tensor:
    unit = net.get_submodule
    for i in range(len(net.layers)):
        x = x + self_attention(norm(x, unit(f"layers.{i}.0.norm")), unit(f"layers.{i}.0.fn"), config)
        x = x + feed(norm(x, unit(f"layers.{i}.1.norm")), unit(f"layers.{i}.1.fn"))
    return norm(x, net.norm)


def cross_twin(z: Tensor, memory: Tensor, net: CrossTransformer, config: Config) -> Tensor:
    unit, inner = net.get_submodule, config.heads * config.head_dim
    for i in range(len(net.layers)):
        name = f"layers.{i}.0"
        inside = norm(z, unit(f"{name}.multi_head_attention.norm"))
        a = norm(self_attention(inside, unit(f"{name}.multi_head_attention.fn"), config) + z, unit(f"{name}.norm"))
        kv = memory @ net.get_parameter(f"{name}.to_kv.weight").T
        q = a @ net.get_parameter(f"{name}.to_q.weight").T
        found = attend(q, kv[:, :inner], kv[:, inner:], config.heads, config.head_dim)
        z = found @ net.get_parameter(f"{name}.to_out.weight").T + net.get_parameter(f"{name}.to_out.bias") + a
        z = feed(norm(z, unit(f"layers.{i}.1.norm")), unit(f"layers.{i}.1.fn")) + z
    return norm(z, net.norm)


def test_transformers_are_their_slow_twins() -> None:
    one = filled(SelfTransformer(TINY, 2))
    x, memory = torch.randn(9, TINY.dim).double(), torch.randn(7, TINY.dim).double()
    assert isinstance(one, SelfTransformer)
    assert (one(x[None])[0] - self_twin(x, one, TINY)).abs().max() < 1e-10
    other = filled(CrossTransformer(TINY, 2))
    assert isinstance(other, CrossTransformer)
    assert (other(x[None], memory[None])[0] - cross_twin(x, memory, other, TINY)).abs().max() < 1e-10
    single = other.float()(x[None].float(), memory[None].float())[0]
    assert (single - cross_twin(x, memory, other.double(), TINY)).abs().max() < 1e-4


def patches(picture: Tensor, weight: Tensor, bias: Tensor, size: int) -> Tensor:
    """Tokens row by row: each square of the picture times the weights."""
    side = picture.shape[1] // size
    out = []
    for row in range(side):
        for column in range(side):
            square = picture[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
            out.append((weight * square).sum((1, 2, 3)) + bias)
    return torch.stack(out)


def pixels(tokens: Tensor, weight: Tensor, bias: Tensor, side: int) -> Tensor:
    """Each token spread over its square."""
    size = weight.shape[2]
    out = torch.zeros(weight.shape[1], side * size, side * size).double()
    for n, token in enumerate(tokens):
        row, column = divmod(n, side)
        square = torch.einsum("d,dcij->cij", token, weight) + bias[:, None, None]
        out[:, row * size : (row + 1) * size, column * size : (column + 1) * size] = square
    return out


def test_decoders_ask_as_the_papers_say() -> None:
    config = Config.tiny("sifu")
    h = torch.randn(config.tokens**2, config.dim).double()
    picture = torch.randn(3, config.image, config.image).double()
    net = filled(NormalDecoder(config))
    part = net.get_parameter
    table = position_table(config.tokens, config.dim)[0].double()
    state = patches(picture, part("to_patch_embedding.0.weight"), part("to_patch_embedding.0.bias"), config.patch)
    transformer = net.get_submodule("transformer")
    assert isinstance(transformer, CrossTransformer)
    plane = pixels(transformer((state + table)[None], (h + table)[None])[0], part("to_pixel.1.weight"),
                   part("to_pixel.1.bias"), config.tokens)  # fmt: skip
    assert (net(h[None], picture[None])[0] - plane).abs().max() < 1e-10
    learned = filled(LearnedDecoder(Config.tiny("gta")))
    transformer = learned.get_submodule("transformer")
    assert isinstance(transformer, CrossTransformer)
    state = learned.get_parameter("query") + table
    plane = pixels(transformer(state[None], (h + table)[None])[0], learned.get_parameter("to_pixel.1.weight"),
                   learned.get_parameter("to_pixel.1.bias"), config.tokens)  # fmt: skip
    assert (learned(h[None])[0] - plane).abs().max() < 1e-10


def group_norm(x: Tensor, module: nn.Module, groups: int) -> Tensor:
    parts = []
    for chunk in x.chunk(groups):
        parts.append((chunk - chunk.mean()) / (chunk.var(unbiased=False) + 1e-5).sqrt())
    weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
    return torch.cat(parts) * weight[:, None, None] + bias[:, None, None]


def conv3(x: Tensor, module: nn.Module) -> Tensor:
    """A 3x3 convolution as nine shifted products, without bias."""
    weight, padded = module.get_parameter("weight"), functional.pad(x, (1, 1, 1, 1))
    h, w = x.shape[1:]
    return sum(
        (torch.einsum("oi,ihw->ohw", weight[:, :, i, j], padded[:, i : i + h, j : j + w]) for i in range(3)
         for j in range(3)), torch.zeros(len(weight), h, w).double(),
    )  # fmt: skip


def block(x: Tensor, net: nn.Module, groups: int) -> Tensor:
    part = net.get_submodule
    a = conv3(group_norm(x, part("bn1"), groups).clamp(min=0), part("conv1"))
    b = conv3(group_norm(a, part("bn2"), groups).clamp(min=0), part("conv2"))
    c = conv3(group_norm(b, part("bn3"), groups).clamp(min=0), part("conv3"))
    out = torch.cat([a, b, c])
    if len(out) == len(x):
        return out + x
    weight = net.get_parameter("downsample.2.weight")[:, :, 0, 0]
    return out + torch.einsum("oi,ihw->ohw", weight, group_norm(x, part("bn4"), groups).clamp(min=0))


def bicubic_twice(x: Tensor) -> Tensor:
    """Twice as many pixels, corners onto corners; Keys' kernel with a = -0.75, borders repeated."""

    def line(size: int) -> Tensor:
        matrix, a = torch.zeros(2 * size, size).double(), -0.75
        for i in range(2 * size):
            at = i * (size - 1) / (2 * size - 1)
            low = math.floor(at)
            for tap in range(low - 1, low + 3):
                d = abs(at - tap)
                near = ((a + 2) * d - (a + 3)) * d * d + 1
                share = near if d <= 1 else (((d - 5) * d + 8) * d - 4) * a if d < 2 else 0.0
                matrix[i, min(max(tap, 0), size - 1)] += share
        return matrix

    return torch.einsum("yh,xw,chw->cyx", line(x.shape[1]), line(x.shape[2]), x)


def hourglass(x: Tensor, net: nn.Module, groups: int, level: int = 2) -> Tensor:
    part = net.get_submodule
    up = block(x, part(f"b1_{level}"), groups)
    low = x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).mean((2, 4))
    low = block(low, part(f"b2_{level}"), groups)
    low = hourglass(low, net, groups, level - 1) if level > 1 else block(low, part("b2_plus_1"), groups)
    return up + bicubic_twice(block(low, part(f"b3_{level}"), groups))


def features_twin(net: nn.Module, picture: Tensor, groups: int, beside: Tensor | None = None) -> Tensor:
    part, value = net.get_submodule, net.get_parameter

    def dense(x: Tensor, name: str) -> Tensor:
        return (
            torch.einsum("oi,ihw->ohw", value(f"{name}.weight")[:, :, 0, 0], x) + value(f"{name}.bias")[:, None, None]
        )

    x = functional.conv2d(picture[None], value("conv1.weight"), value("conv1.bias"), stride=2, padding=3)[0]
    x = block(group_norm(x, part("bn1"), groups).clamp(min=0), part("conv2"), groups)
    x = functional.conv2d(x[None], value("down_conv2.weight"), value("down_conv2.bias"), stride=2, padding=1)[0]
    if beside is not None:
        x = torch.cat([x, beside])
    x = block(block(x, part("conv3"), groups), part("conv4"), groups)
    out = x
    for i in range(2):
        y = block(hourglass(x, part(f"m{i}"), groups), part(f"top_m_{i}"), groups)
        y = group_norm(dense(y, f"conv_last{i}"), part(f"bn_end{i}"), groups).clamp(min=0)
        out = dense(y, f"l{i}")
        if i == 0:
            x = x + dense(y, "bl0") + dense(out, "al0")
    return out


def test_hourglasses_are_their_slow_twins() -> None:
    config = Config.tiny("gta")
    picture = torch.randn(3, 64, 64).double()
    net = filled(ImageFeatures(config, config.normal_channels))
    assert (net(picture[None])[0] - features_twin(net, picture, config.groups)).abs().max() < 1e-9
    refine = filled(RefineFilter(config))
    assert isinstance(refine, RefineFilter)
    xy = torch.randn(config.plane, 16, 16).double()
    inner = features_twin(refine, picture, config.groups, xy)
    value = refine.get_parameter
    wanted = torch.zeros(config.side_plane, 32, 32).double() + value("up_conv.bias")[:, None, None]
    for i in range(2):
        for j in range(2):
            wanted[:, i::2, j::2] += torch.einsum("io,ihw->ohw", value("up_conv.weight")[:, :, i, j], inner)
    assert (refine.refine(picture[None], xy[None])[0] - wanted).abs().max() < 1e-9


def test_point_decoders_append_their_input_before_layers_2_3_and_4() -> None:
    net = filled(PointDecoder(10, (16, 12, 8, 6), 3))
    x = torch.randn(10, 40).double()
    y, value = x, net.get_parameter
    for i in range(5):
        y = torch.cat([y, x]) if i >= 2 else y
        y = value(f"filters.{i}.weight")[:, :, 0] @ y + value(f"filters.{i}.bias")[:, None]
        if i < 4:
            state = net.state_dict()
            y = (y - state[f"norms.{i}.running_mean"][:, None]) / (
                state[f"norms.{i}.running_var"][:, None] + 1e-5
            ).sqrt()
            y = y * value(f"norms.{i}.weight")[:, None] + value(f"norms.{i}.bias")[:, None]
            y = torch.where(y > 0, y, 0.01 * y)
    assert (net(x[None])[0] - y).abs().max() < 1e-10
    both = PointDecoders(TINY).eval()
    points = torch.randn(1, TINY.features, 30)
    assert torch.allclose(both.occupancy(points), 1 / (1 + (-both.geo_mlp(points)[:, 0]).exp()))
    assert torch.allclose(both.color(points), both.color_mlp(points).tanh().transpose(1, 2) / 2 + 0.5)


def test_normals_are_unit_vectors_where_there_is_a_person() -> None:
    net = NormalGenerator(TINY).eval()
    image = torch.randn(1, 3, 64, 64)
    image[:, :, :20] = 0
    found = net(image, torch.randn(1, 3, 64, 64))
    assert (found[:, :, :20] == 0).all()
    assert torch.allclose(found[:, :, 20:].norm(dim=1), torch.ones(1, 44, 64), atol=1e-5)
    layers = dict(net.model.named_children())
    assert [name for name, layer in layers.items() if isinstance(layer, nn.Conv2d)] == ["1", "4", "7", "18"]
    with torch.device("meta"):
        full = NormalGenerator(Config())
    assert sum(p.numel() for p in full.parameters()) == pytest.approx(182.5e6, abs=0.1e6)


@pytest.mark.parametrize("kind", ["gta", "sifu"])
def test_planes_of_all_stages_have_their_sizes(kind) -> None:
    config = Config.tiny(kind)
    network = Reconstructor(config).eval()
    image = torch.randn(2, 3, config.image, config.image)
    body = {side: torch.randn_like(image) for side in "FBRL"}
    front, back = network.normals(image, body)
    planes = network.planes(image, front, back, body)
    quarter = config.image // 4
    if kind == "gta":
        assert planes["xy"].shape == (2, config.side_plane, 2 * quarter, 2 * quarter)
        assert planes["yz"].shape == planes["xz"].shape == (2, config.side_plane, quarter, quarter)
    else:
        assert all(planes[side].shape == (2, config.plane, quarter, quarter) for side in "FBRL")
    assert planes["N"].shape == (2, 12, quarter, quarter)
    assert torch.allclose(planes["N"][:, 6:], network.F_filter(back))


def test_sizes_travel_with_the_weights() -> None:
    config = Config.small("gta")
    assert from_metadata(to_metadata(config)) == config
    with pytest.raises(ValueError, match="sizes"):
        from_metadata({})
    with pytest.raises(ValueError, match="unexpected"):
        from_metadata({"sifu": '{"wings": 2}'})
