# SPDX-License-Identifier: GPL-3.0-or-later
"""Each block of Get3DHuman against a slow float64 version written from the equations; gradients by differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from backend.families.get3dhuman import losses
from backend.families.get3dhuman.config import DEPTH_UNITS, OUTSIDE, Config
from backend.families.get3dhuman.networks import (
    Backbone,
    Get3DHuman,
    HourglassFilter,
    PictureNorm,
    PointDecoder,
    RefineNet,
    UNet,
    decode_shape,
    decode_texture,
    read_volume,
)
from backend.families.get3dhuman.teacher import GlobalGenerator, Teacher
from backend.families.get3dhuman.tracer import estimate
from backend.networks.hourglass import Block, Hourglass

F64 = torch.float64
SMALL = Config(z_dim=6, w_dim=6, resolution=32, channel_base=64, channel_max=6, feature_channels=3, stem=8, volume=8,
               groups=2, shape_widths=(7, 5), texture_widths=(7, 6, 5), refine_width=2)  # fmt: skip


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def shaken(module: nn.Module) -> nn.Module:
    """In float64, every parameter random: ones and zeros of a fresh norm would hide mistakes."""
    module = module.double().eval()
    for i, parameter in enumerate(module.parameters()):
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        parameter.data = noise(*parameter.shape, seed=i) / math.sqrt(fan_in)
    return module.requires_grad_(False)


def convolved(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | float = 0.0, stride: int = 1, pad: int = 0):
    """[I, H, W] with [O, I, k, k], pixel by pixel."""
    x, k = np.pad(x, ((0, 0), (pad, pad), (pad, pad))), weight.shape[2]
    rows, columns = ((n - k) // stride + 1 for n in x.shape[1:])
    out = np.zeros((len(weight), rows, columns))
    for r in range(rows):
        for c in range(columns):
            patch = x[:, r * stride : r * stride + k, c * stride : c * stride + k]
            out[:, r, c] = (weight * patch).sum((1, 2, 3)) + bias
    return out


def grouped(x: np.ndarray, norm: nn.GroupNorm) -> np.ndarray:
    parts = x.reshape(norm.num_groups, -1)
    parts = (parts - parts.mean(1, keepdims=True)) / np.sqrt(parts.var(1, keepdims=True) + 1e-5)
    return parts.reshape(x.shape) * norm.weight.numpy()[:, None, None] + norm.bias.numpy()[:, None, None]


def halved(x: np.ndarray) -> np.ndarray:
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4


def plain_block(block: Block, x: np.ndarray) -> np.ndarray:
    def part(y: np.ndarray, norm: nn.GroupNorm, conv: nn.Conv2d) -> np.ndarray:
        return convolved(np.maximum(grouped(y, norm), 0), conv.weight.numpy(), pad=conv.weight.shape[2] // 2)

    a = part(x, block.bn1, block.conv1)
    b = part(a, block.bn2, block.conv2)
    c = part(b, block.bn3, block.conv3)
    skip = x if block.downsample is None else part(x, block.downsample[0], block.downsample[2])
    return np.concatenate([a, b, c]) + skip


def doubled(x: np.ndarray) -> np.ndarray:
    """Cubic convolution with a = -0.75 between pixels whose corners stay in the corners, borders repeated."""

    def along(y: np.ndarray) -> np.ndarray:  # last axis
        n, out = y.shape[-1], np.zeros((*y.shape[:-1], 2 * y.shape[-1]))
        for i in range(2 * n):
            at = i * (n - 1) / (2 * n - 1)
            first = math.floor(at)
            for k in range(-1, 3):
                t, a = abs(at - first - k), -0.75
                share = ((a + 2) * t**3 - (a + 3) * t**2 + 1) if t <= 1 else a * (t**3 - 5 * t**2 + 8 * t - 4)
                out[..., i] += share * y[..., min(max(first + k, 0), n - 1)]
        return out

    return along(along(x).swapaxes(1, 2)).swapaxes(1, 2)


def plain_hourglass(glass: Hourglass, x: np.ndarray, n: int) -> np.ndarray:
    up = plain_block(glass.get_submodule(f"b1_{n}"), x)
    low = plain_block(glass.get_submodule(f"b2_{n}"), halved(x))
    low = plain_hourglass(glass, low, n - 1) if n > 1 else plain_block(glass.b2_plus_1, low)
    return up + doubled(plain_block(glass.get_submodule(f"b3_{n}"), low))


@pytest.mark.parametrize("outputs", [8, 16])
def test_block(outputs: int) -> None:
    block, x = shaken(Block(8, outputs, 2)), noise(1, 8, 5, 6)
    np.testing.assert_allclose(block(x)[0].numpy(), plain_block(block, x[0].numpy()), atol=1e-12)


def test_hourglass() -> None:
    glass, x = shaken(Hourglass(8, 2, 2)), noise(1, 8, 8, 8)
    np.testing.assert_allclose(glass(x)[0].numpy(), plain_hourglass(glass, x[0].numpy(), 2), atol=1e-11)


def test_hourglass_filter() -> None:
    net, x = shaken(HourglassFilter(3, SMALL)), noise(1, 3, 32, 32)
    y = convolved(x[0].numpy(), net.conv1.weight.numpy(), net.conv1.bias.numpy(), stride=2, pad=3)
    assert y.shape[1:] == (17, 17)
    y = halved(plain_block(net.conv2, np.maximum(grouped(y, net.bn1), 0)))
    y = plain_hourglass(net.m0, plain_block(net.conv4, plain_block(net.conv3, y)), 2)
    y = convolved(plain_block(net.top_m_0, y), net.conv_last0.weight.numpy(), net.conv_last0.bias.numpy())
    y = convolved(np.maximum(grouped(y, net.bn_end0), 0), net.l0.weight.numpy(), net.l0.bias.numpy())
    np.testing.assert_allclose(net(x)[0].numpy(), y, atol=1e-11)


def plain_features(volume: np.ndarray, x: float, y: float) -> np.ndarray:
    _, height, width = volume.shape
    column, row = (x + 1) / 2 * (width - 1), (y + 1) / 2 * (height - 1)
    total = np.zeros(len(volume))
    for r in range(height):
        for c in range(width):
            total += volume[:, r, c] * max(0, 1 - abs(row - r)) * max(0, 1 - abs(column - c))
    return total


def plain_decoder(decoder: PointDecoder, x: np.ndarray) -> np.ndarray:
    hidden = x
    for i, layer in enumerate(decoder.filters):
        seen = np.concatenate([hidden, x]) if i in decoder.again else hidden
        hidden = layer.weight[:, :, 0].numpy() @ seen + layer.bias.numpy()
        if i < len(decoder.filters) - 1:
            hidden = np.where(hidden > 0, hidden, 0.01 * hidden)
    return 1 / (1 + np.exp(-hidden))


def test_points_are_decoded_with_depth_and_features_again() -> None:
    shape, texture = noise(1, 4, 5, 7), noise(1, 4, 5, 7, seed=1)
    one = shaken(PointDecoder(5, (7, 6, 5), 1, again=(1, 2)))
    three = shaken(PointDecoder(9, (7, 6, 5, 4), 3, again=(2, 3)))
    ndc = torch.cat([noise(12, 3, seed=2).clamp(-0.95, 0.95), torch.tensor([[1.02, 0, 0], [0, -1.5, 0]], dtype=F64)])
    value = decode_shape(one, shape, ndc[None])[0]
    color = decode_texture(three, shape, texture, ndc[None])[0]
    for (x, y, z), found, rgb in zip(ndc.tolist(), value.tolist(), color.numpy()):
        v = plain_features(shape[0].numpy(), x, y)
        t = plain_features(texture[0].numpy(), x, y)
        inside = abs(x) <= 1 and abs(y) <= 1
        want = plain_decoder(one, np.array([*v, z * DEPTH_UNITS]))[0] if inside else OUTSIDE
        assert found == pytest.approx(want, abs=1e-12)
        np.testing.assert_allclose(rgb, plain_decoder(three, np.array([*v, *t, z * DEPTH_UNITS])), atol=1e-12)


def test_features_are_zero_beyond_the_picture() -> None:
    far = torch.tensor([[[3.0, 0, 0], [0, -3.0, 0]]], dtype=F64)
    assert not read_volume(noise(1, 4, 5, 7), far).any()


@pytest.mark.parametrize("of_the_picture", [True, False])
def test_u_net(of_the_picture: bool) -> None:
    net = shaken(UNet(3, 2, 2, of_the_picture))
    for i, module in enumerate(m for m in net.modules() if isinstance(m, PictureNorm)):
        module.running_mean.copy_(noise(len(module.running_mean), seed=50 + i))
        module.running_var.copy_(noise(len(module.running_var), seed=90 + i).abs() + 0.5)

    def unit(i: int, x: np.ndarray) -> np.ndarray:
        conv, norm = net.get_submodule(f"Conv{i}").conv[:2]
        y = convolved(x, conv.weight.numpy(), conv.bias.numpy(), pad=1)
        mean = y.mean((1, 2)) if of_the_picture else norm.running_mean.numpy()
        variance = y.var((1, 2)) if of_the_picture else norm.running_var.numpy()
        y = (y - mean[:, None, None]) / np.sqrt(variance + 1e-5)[:, None, None]
        return np.maximum(y * norm.weight.numpy()[:, None, None] + norm.bias.numpy()[:, None, None], 0)

    def pooled(x: np.ndarray) -> np.ndarray:
        return np.maximum(np.maximum(x[:, ::2, ::2], x[:, 1::2, ::2]), np.maximum(x[:, ::2, 1::2], x[:, 1::2, 1::2]))

    def merged(x: np.ndarray, skip: np.ndarray) -> np.ndarray:
        return np.concatenate([x.repeat(2, 1).repeat(2, 2), skip])

    x = noise(1, 3, 16, 32)
    one = unit(2, unit(1, unit(0, x[0].numpy())))
    two = unit(3, pooled(one))
    three = unit(4, pooled(two))
    four = unit(5, pooled(three))
    y = unit(8, unit(7, unit(6, pooled(four))))
    for first, skip in ((9, four), (11, three), (13, two), (15, one)):
        y = unit(first + 1, unit(first, merged(y, skip)))
    y = convolved(y, net.Conv_out.weight.numpy(), net.Conv_out.bias.numpy())
    np.testing.assert_allclose(net(x)[0].numpy(), y, atol=1e-10)


def test_training_the_refine_net_moves_its_stored_statistics() -> None:
    net = RefineNet(2).train()
    net(torch.rand(2, 3, 16, 16))
    assert float(net.rnet.Conv0.conv[1].running_mean.abs().sum()) > 0


def test_backbone_gives_rows_to_convolutions_and_heads_in_order() -> None:
    net = shaken(Backbone(SMALL))
    for module in net.modules():  # heads alone speak, each with its own number
        if hasattr(module, "noise_const"):
            module.noise_const.zero_()
    w = noise(1, 8, 6)
    reference = net(w)
    touched = []
    for row in range(8):
        changed = w.clone()
        changed[:, row] += 1.0
        touched.append(float((net(changed) - reference).abs().amax()) > 1e-9)
    assert touched == [True] * 8
    heads = [net.synthesis.get_submodule(f"b{r}").torgb for r in (4, 8, 16, 32)]
    for head in heads:
        head.weight.zero_()
        head.bias.zero_()
    heads[0].weight.fill_(1.0)
    below = w.clone()
    below[:, 2:] += 1.0  # the first block knows rows 0 and 1
    torch.testing.assert_close(net(below), net(w))


def test_texture_filter_sees_texture_then_shape() -> None:
    net = shaken(Get3DHuman(SMALL))
    ws = noise(1, 8, 6)
    shape = noise(1, 3, 32, 32, seed=3)
    picture, volume = net.texture_features(ws, shape)
    torch.testing.assert_close(volume, net.filter_texture(torch.cat([net.backbone_texture(ws), shape], 1)))
    torch.testing.assert_close(picture, net.backbone_texture(ws))


def test_gradients_of_blocks_and_decoders() -> None:
    block = shaken(Block(4, 8, 2))
    assert torch.autograd.gradcheck(block, noise(1, 4, 4, 4).requires_grad_())
    glass = shaken(Hourglass(4, 1, 1))
    assert torch.autograd.gradcheck(glass, noise(1, 4, 4, 4).requires_grad_())
    decoder = shaken(PointDecoder(5, (7, 6, 5), 1, again=(1, 2)))
    ndc = noise(1, 3, 3, seed=5).clamp(-0.9, 0.9).requires_grad_()
    assert torch.autograd.gradcheck(lambda v, p: decode_shape(decoder, v, p), (noise(1, 4, 5, 5).requires_grad_(), ndc))
    refine = shaken(RefineNet(1))
    assert torch.autograd.gradcheck(refine, noise(1, 3, 32, 32)[..., :32].requires_grad_(), fast_mode=True)


def test_gradients_from_code_to_estimate() -> None:
    net = shaken(Get3DHuman(SMALL))
    places = noise(5, 3, seed=7).clamp(-0.9, 0.9)

    def value(w: Tensor) -> Tensor:
        volume = net.shape_features(w.expand(8, -1)[None])[1]
        return estimate(lambda ndc: decode_shape(net.mlp_shape, volume, ndc[None])[0], places)

    assert torch.autograd.gradcheck(value, noise(1, 6, seed=8).requires_grad_(), fast_mode=True)


def test_teacher_has_the_published_size_and_hands_its_decoders_over() -> None:
    with torch.device("meta"):
        teacher = Teacher(Config())
    assert sum(t.numel() for t in teacher.state_dict().values()) == pytest.approx(248.7e6, rel=2e-4)
    small, student = Teacher(SMALL, residues=1), Get3DHuman(SMALL)
    small.hand_over(student)
    for own, given in ((student.mlp_shape, small.mlp_shape), (student.mlp_texture, small.mlp_texture)):
        assert all(torch.equal(a, b) for a, b in zip(own.state_dict().values(), given.state_dict().values()))
    prior = small.eval()(torch.rand(2, 3, 32, 32) * 2 - 1, torch.ones(2, 1, 32, 32, dtype=torch.bool))
    assert prior.shape_volume.shape == prior.texture_volume.shape == (2, 8, 8, 8)
    assert prior.normal.shape == (2, 3, 32, 32)
    assert (prior.depth.abs() <= 1).all()


def test_teacher_puts_the_background_far_and_shows_its_filters_only_the_person() -> None:
    teacher = Teacher(SMALL, residues=1).eval()
    mask = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    mask[..., 8:24, 8:24] = True
    picture = torch.rand(1, 3, 32, 32)
    prior, other = teacher(picture, mask), teacher(torch.where(mask, picture, torch.rand(1, 3, 32, 32)), mask)
    assert (prior.depth[~mask] == 1).all()
    assert torch.equal(prior.texture_volume, other.texture_volume)
    assert torch.equal(prior.shape_volume, other.shape_volume)


def test_global_generator_keeps_the_size() -> None:
    assert GlobalGenerator(3, 3, 4, downs=2, residues=1)(torch.rand(1, 3, 16, 24)).shape == (1, 3, 16, 24)


# -------------------------------------------------------------------------------------------------------------- losses


def test_series_of_arccos() -> None:
    c = torch.linspace(-0.7, 0.7, 29, dtype=F64)
    torch.testing.assert_close(losses.arccos_series(c), torch.arccos(c), atol=1.5e-3, rtol=0)
    one = torch.ones(1, dtype=F64, requires_grad=True)
    losses.arccos_series(one).backward()
    assert float(one.grad) == pytest.approx(-(1 + 3 / 6 + 15 / 40 + 35 / 112 + 315 / 1152))  # where arccos has no slope


def test_normal_loss_is_the_mean_angle_over_the_foreground() -> None:
    angles = torch.tensor([0.9, 1.2, 0.3], dtype=F64)
    ours = torch.stack([angles.sin(), torch.zeros(3), angles.cos()])[None, :, None].double() * 5  # not of unit length
    theirs = torch.tensor([0.0, 0, 2], dtype=F64)[None, :, None, None].expand(1, 3, 1, 3)
    foreground = torch.tensor([True, True, False])[None, None, None]
    expected = losses.arccos_series(angles[:2].cos()).mean()
    torch.testing.assert_close(losses.normal_loss(ours, theirs, foreground), expected)
    assert float(losses.normal_loss(ours, theirs, foreground & False)) == 0


def test_normals_of_depth_of_a_ball() -> None:
    size, radius = 65, 0.6
    line = (torch.arange(size, dtype=F64) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(-line, line, indexing="ij")
    depth = -(radius**2 - x**2 - y**2).clamp(min=0).sqrt()
    normal = losses.normals_of_depth(depth[None, None])[0]
    inner = x**2 + y**2 < 0.4**2
    exact = torch.stack([x, y, -depth]) / radius
    assert (normal - exact)[:, inner].abs().amax() < 2e-3


def test_r1_is_half_gamma_times_the_squared_gradient() -> None:
    real = noise(3, 2, 4, 4).requires_grad_()
    scores = (real**3).sum((1, 2, 3))[:, None]
    expected = 2.5 * (3 * real.detach() ** 2).square().sum((1, 2, 3)).mean()
    torch.testing.assert_close(losses.r1(scores, real, gamma=5.0), expected)


def test_adversarial_losses() -> None:
    real, fake = torch.tensor([[2.0], [-1.0]]), torch.tensor([[0.5], [3.0]])

    def softplus(x: float) -> float:
        return math.log1p(math.exp(x))

    assert float(losses.adversarial(fake)) == pytest.approx((softplus(-0.5) + softplus(-3)) / 2)
    want = (softplus(-2) + softplus(1)) / 2 + (softplus(0.5) + softplus(3)) / 2
    assert float(losses.discrimination(real, fake)) == pytest.approx(want)


def test_agreement_and_priors() -> None:
    a, b = torch.tensor([0.2, 0.6]), torch.tensor([0.5, 0.5])
    assert float(losses.agreement(a, b)) == pytest.approx((0.3 + 0.1) / 2 + (0.09 + 0.01) / 2)
    assert float(losses.latent_prior(a, b)) == float(losses.depth_loss(a, b)) == pytest.approx(0.2)


def test_surface_points_lie_about_the_surface() -> None:
    depth = torch.ones(64, 64)
    depth[20:40, 10:50] = -0.25
    generator = torch.Generator().manual_seed(0)
    points = losses.surface_points(depth, 10_000, generator)
    assert points.shape == (10_000, 3)
    spread = points[:, 2] - 0.25
    assert float(spread.mean()) == pytest.approx(0, abs=1e-3)
    assert float(spread.std()) == pytest.approx(3 / 107.789, rel=0.03)
    exact = losses.surface_points(depth, 500, generator, displaced_cm=0.0)
    assert (exact[:, 1] >= 2 * 20 / 63 - 1 - 1e-6).all()
    assert (exact[:, 1] <= 2 * 39 / 63 - 1 + 1e-6).all()
    assert (exact[:, 0] >= 2 * 10 / 63 - 1 - 1e-6).all()
    assert len(losses.surface_points(torch.ones(8, 8), 10, generator)) == 0
