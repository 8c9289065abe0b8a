# SPDX-License-Identifier: GPL-3.0-or-later
"""StyleGAN2's blocks against plain float64 versions written from the equations; gradients by finite differences."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from backend.networks.stylegan2 import (
    EqualLinear,
    Head,
    MappingNetwork,
    SynthesisLayer,
    SynthesisNetwork,
    modulated_conv,
    modulated_linear,
    own_rows,
    shared_rows,
    upsample,
)
from backend.networks.stylegan2_discriminator import Conv, Discriminator, DiscriminatorBlock, minibatch_deviation

F64 = torch.float64
TAPS = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def correlate(x: np.ndarray, kernel: np.ndarray, stride: int = 1) -> np.ndarray:
    """[I, H, W] with [O, I, k, k], pixel by pixel, no padding."""
    k = kernel.shape[2]
    size = [(n - k) // stride + 1 for n in x.shape[1:]]
    out = np.zeros([len(kernel), *size])
    for r in range(size[0]):
        for c in range(size[1]):
            patch = x[:, r * stride : r * stride + k, c * stride : c * stride + k]
            out[:, r, c] = (kernel * patch).sum((1, 2, 3))
    return out


def filtered(x: np.ndarray, kernel: np.ndarray, stride: int = 1) -> np.ndarray:
    """Every channel by itself."""
    return np.concatenate([correlate(channel[None], kernel[None, None], stride) for channel in x])


def padded(x: np.ndarray, before: int, behind: int) -> np.ndarray:
    return np.pad(x, ((0, 0), (before, behind), (before, behind)))


def plain_kernel(weight: np.ndarray, style: np.ndarray) -> np.ndarray:
    kernel = weight * style[None, :, None, None]
    return kernel / np.sqrt((kernel**2).sum((1, 2, 3), keepdims=True) + 1e-8)


def plain_layer(layer: SynthesisLayer, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Section 2 of the description, one sample: the transposed convolution as a sum of stamped kernels."""
    value = {name: tensor.detach().numpy() for name, tensor in layer.state_dict().items()}
    style = w @ value["affine.weight"].T / math.sqrt(len(w)) + value["affine.bias"]
    kernel = plain_kernel(value["weight"], style)
    if layer.up:
        size = x.shape[1]
        y = np.zeros([len(kernel), 2 * size + 1, 2 * size + 1])
        for r in range(size):
            for c in range(size):
                y[:, 2 * r : 2 * r + 3, 2 * c : 2 * c + 3] += np.tensordot(kernel, x[:, r, c], (1, 0))
        y = filtered(padded(y, 1, 1), 4 * TAPS)
    else:
        y = correlate(padded(x, 1, 1), kernel)
    y = y + value["noise_const"] * value["noise_strength"] + value["bias"][:, None, None]
    return np.clip(np.sqrt(2) * np.where(y > 0, y, 0.2 * y), -layer.clamp, layer.clamp)


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("samples", [1, 3])
def test_a_synthesis_layer_is_its_equations(up: bool, samples: int) -> None:
    torch.manual_seed(0)
    layer = SynthesisLayer(3, 5, 7, 12 if up else 6, up, clamp=2.5).double()
    with torch.no_grad():
        layer.bias.normal_()
        layer.noise_strength.fill_(0.3)
    x, w = noise(samples, 3, 6, 6), noise(samples, 7, seed=1)
    found = layer(x, w).detach().numpy()
    assert np.abs(found).max() == 2.5  # the clamp is at work
    for i in range(samples):
        assert np.allclose(found[i], plain_layer(layer, x[i].numpy(), w[i].numpy()), atol=1e-12)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("up", [False, True])
def test_scaling_weights_and_scaling_activations_agree(dims: int, up: bool) -> None:
    x, weight, styles = noise(2, 4, *[5] * dims), noise(6, 4, *[3] * dims, seed=1), noise(2, 4, seed=2)
    ways = [modulated_conv(x, weight, styles, noise(6, seed=3), up, 1.7, way) for way in (True, False)]
    assert torch.allclose(*ways, atol=1e-12)
    single = modulated_conv(x[:1], weight, styles[:1], noise(6, seed=3), up, 1.7)
    assert torch.allclose(single, ways[0][:1], atol=1e-12)
    assert ways[0].shape[2:] == torch.Size([11 if up else 5] * dims)
    in_single = [modulated_conv(x.float(), weight.float(), styles.float(), None, up, 1.0, way) for way in (True, False)]
    assert (in_single[0] - in_single[1]).abs().max() < 1e-5 * in_single[0].square().mean().sqrt()


def test_upsampling_is_zero_insertion_and_the_filter() -> None:
    x = noise(2, 3, 5, 5).numpy()
    for sample, found in zip(x, upsample(torch.from_numpy(x)).numpy()):
        spread = np.zeros([3, 10, 10])
        spread[:, ::2, ::2] = sample
        assert np.allclose(found, filtered(padded(spread, 2, 1), 4 * TAPS), atol=1e-12)


def test_a_head_neither_demodulates_nor_activates() -> None:
    torch.manual_seed(0)
    head = Head(4, 6, 5, clamp=1.5).double()
    with torch.no_grad():
        head.bias.normal_()
    x, w = noise(2, 4, 3, 3), noise(2, 5, seed=1)
    styles = head.affine(w) / 2  # sqrt(4) inputs
    expected = torch.einsum("oi,bi,bihw->bohw", head.weight[:, :, 0, 0], styles, x) + head.bias[:, None, None]
    assert torch.allclose(head(x, w), expected.clamp(-1.5, 1.5), atol=1e-12)


def test_mapping_layers_truncation_and_rows() -> None:
    torch.manual_seed(0)
    mapping = MappingNetwork(6, 4, num_ws=3, layers=2).double()
    with torch.no_grad():
        mapping.w_avg.normal_()
        mapping.fc0.bias.normal_(0, 100)
    z = noise(2, 6)
    x = z.numpy() / np.sqrt((z.numpy() ** 2).mean(1, keepdims=True) + 1e-8)
    for layer in (mapping.fc0, mapping.fc1):
        weight, bias = layer.weight.detach().numpy() * 0.01 / math.sqrt(x.shape[1]), 0.01 * layer.bias.detach().numpy()
        x = x @ weight.T + bias
        x = math.sqrt(2) * np.where(x > 0, x, 0.2 * x)
    assert np.allclose(mapping(z).detach().numpy(), np.repeat(x[:, None], 3, 1), atol=1e-12)
    average = mapping.w_avg.numpy()
    assert np.allclose(mapping(z, 0.7)[:, 2].detach().numpy(), average + 0.7 * (x - average), atol=1e-12)
    assert np.allclose(mapping(z, 0.0)[:, 0].detach().numpy(), average, atol=1e-12)


def test_every_row_of_w_reaches_exactly_its_layer() -> None:
    """b4: conv1 0, head 1; b8: conv0 2, conv1 3, head 4; with shared rows b8's head and the next conv0 take one."""
    assert own_rows(3) == ([0, 2, 3, 5, 6], [1, 4, 7])
    assert shared_rows(3) == ([0, 1, 2, 3, 4], [1, 3, 5])
    torch.manual_seed(0)
    net = SynthesisNetwork(4, 16, {"a": 3, "b": 3}, base=64, limit=8).double()
    ws, other = noise(1, 8, 4), noise(1, 8, 4, seed=1)
    convs, heads = own_rows(3)

    def run(rows: Tensor, for_b: Tensor) -> dict[str, Tensor]:
        take = [rows[:, i] for i in convs], {"a": [rows[:, i] for i in heads], "b": [for_b[:, i] for i in heads]}
        with torch.no_grad():
            return net(*take)

    before, swapped = run(ws, ws), run(ws, other)
    assert torch.equal(before["a"], swapped["a"])  # the other head's rows change no bit
    assert not torch.allclose(before["b"], swapped["b"])
    for row in range(8):
        changed = ws.clone()
        changed[:, row] += 1
        assert not torch.allclose(run(changed, ws)["a"], before["a"]), f"row {row} has no effect"


def test_noise_is_constant_fresh_or_absent() -> None:
    torch.manual_seed(0)
    layer = SynthesisLayer(3, 3, 4, 8)
    x, w = torch.randn(1, 3, 8, 8), torch.randn(1, 4)
    with torch.no_grad():
        plain = layer(x, w, "none")
        assert torch.equal(layer(x, w, "const"), plain)  # the strength is still zero
        layer.noise_strength.fill_(0.5)
        assert torch.equal(layer(x, w, "const"), layer(x, w, "const"))
        assert not torch.equal(layer(x, w, "const"), plain)
        assert not torch.equal(layer(x, w, "random"), layer(x, w, "random"))


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    for up in (False, True):
        layer = SynthesisLayer(2, 3, 4, 8 if up else 4, up, clamp=None).double()
        assert torch.autograd.gradcheck(lambda x, w, layer=layer: layer(x, w), (
            noise(2, 2, 4, 4).requires_grad_(), noise(2, 4, seed=1).requires_grad_()), fast_mode=True)  # fmt: skip
    head = Head(2, 3, 4, clamp=None).double()
    inputs = noise(2, 2, 4, 4).requires_grad_(), noise(2, 4).requires_grad_()
    assert torch.autograd.gradcheck(head, inputs, fast_mode=True)
    linear = [noise(2, 5, 3), noise(4, 3, seed=1), noise(4, seed=2), noise(2, 3, seed=3)]
    assert torch.autograd.gradcheck(modulated_linear, tuple(x.requires_grad_() for x in linear), fast_mode=True)
    for way in (True, False):
        volumes = [noise(2, 2, 3, 3, 3), noise(2, 2, 3, 3, 3, seed=1), noise(2, 2, seed=2), noise(2, seed=3)]
        inputs = tuple(x.requires_grad_() for x in volumes)
        conv = functools.partial(modulated_conv, modulate_weights=way)
        assert torch.autograd.gradcheck(conv, inputs, fast_mode=True)


def test_equal_layers_start_with_unit_variance_whatever_the_rate() -> None:
    torch.manual_seed(0)
    layer = EqualLinear(400, 300, activate=True, lr_mul=0.01)
    assert abs(float(layer.weight.detach().std()) - 100) < 2
    y = layer(torch.randn(200, 400))
    # lrelu keeps (1 + 0.04) / 2 of the variance, its gain doubles that
    assert abs(float(y.detach().square().mean()) - 1.04) < 0.1


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("down", [False, True])
def test_a_discriminators_convolution_is_its_equations(kernel: int, down: bool) -> None:
    torch.manual_seed(0)
    conv = Conv(3, 4, kernel, down=down, clamp=1.0).double()
    with torch.no_grad():
        conv.bias.normal_()
    x = noise(2, 3, 8, 8)
    weight = conv.weight.detach().numpy() / math.sqrt(3 * kernel**2)
    for sample, found in zip(x.numpy(), conv(x, gain=0.5).detach().numpy()):
        if not down:
            y = correlate(padded(sample, kernel // 2, kernel // 2), weight)
        elif kernel == 3:
            y = correlate(filtered(padded(sample, 2, 2), TAPS), weight, 2)
        else:
            y = correlate(filtered(padded(sample, 1, 1), TAPS, 2), weight)
        y = y + conv.bias.detach().numpy()[:, None, None]
        y = np.clip(0.5 * np.sqrt(2) * np.where(y > 0, y, 0.2 * y), -0.5, 0.5)
        assert np.allclose(found, y, atol=1e-12)


def test_minibatch_deviation_groups_as_published() -> None:
    x = noise(8, 3, 4, 4)
    found = minibatch_deviation(x)
    assert torch.equal(found[:, :3], x)
    for first in range(2):  # samples first, first + 2, ...
        expected = (x[first::2].var(0, unbiased=False) + 1e-8).sqrt().mean()
        assert torch.allclose(found[first::2, 3], expected.expand(4, 4, 4), atol=1e-12)
    assert torch.allclose(minibatch_deviation(x[:1])[:, 3], torch.full((1, 4, 4), 1e-4, dtype=F64), atol=1e-12)


def test_the_penalty_on_gradients_has_a_gradient() -> None:
    torch.manual_seed(0)
    block = DiscriminatorBlock(2, 2, 3, "skip", clamp=None).double()
    for conv in (block.fromrgb, block.conv0, block.conv1):
        torch.nn.init.normal_(conv.bias)

    def penalty(image: Tensor) -> Tensor:
        x, left = block(None, image)
        return torch.cat([x.flatten(), left.flatten()])

    image = noise(1, 2, 8, 8).requires_grad_()
    assert torch.autograd.gradcheck(penalty, (image,), fast_mode=True)
    assert torch.autograd.gradgradcheck(penalty, (image,), atol=1e-4, fast_mode=True)
    with torch.device("meta"):
        critic = Discriminator(256, 128, limit=512, architecture="resnet")
    assert [n for n, _ in critic.b64.named_children()] == ["conv0", "conv1", "skip"]
