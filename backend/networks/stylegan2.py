# SPDX-License-Identifier: GPL-3.0-or-later
"""StyleGAN2's generator (Karras et al. 2020, "skip" architecture) as GET3D and Get3DHuman use it.

    z --MappingNetwork--> w --affine--> s    one number per input channel of every convolution: the style
    const --block 4--> --block 8--> ... x    each block doubles the picture: conv0 (up), conv1
    planes_r = upsample(planes_{r/2}) + heads(x_r)

Parameters are named and shaped as in the published files; nothing is computed in another order than written here, so
`load_state_dict` of such a file gives its networks. Pictures are [B, C, H, W] in channels-last memory: on a CPU that
makes the transposed convolutions and the low-pass up to twice as fast, and nothing slower.

Equalised learning rate: a layer stores numbers of unit variance and multiplies them by `lr_mul / sqrt(fan_in)` when it
runs. Convolutions that demodulate need no such factor: demodulation takes every scale away.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

NoiseMode = Literal["const", "random", "none"]
SLOPE = 0.2  # of the leaky rectifier
GAIN = math.sqrt(2)  # keeps the variance behind it
EPSILON = 1e-8
CLAMP = 256.0


def leaky_relu(x: Tensor) -> Tensor:
    """sqrt(2) * lrelu(x): the variance of x stays."""
    return functional.leaky_relu(x, SLOPE) * GAIN


def normalize_second_moment(x: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """x / sqrt(mean(x^2) + eps) over the channels."""
    return x * (x.square().mean(1, keepdim=True) + EPSILON).rsqrt()


def widths(resolution: int, base: int = 32768, limit: int = 512) -> int:
    """Channels at a resolution."""
    return min(base // resolution, limit)


class EqualLinear(nn.Module):
    """y = x (W lr_mul / sqrt(in))^T + b lr_mul, then sqrt(2) lrelu if `activate`."""

    def __init__(
        self, inputs: int, outputs: int, activate: bool = False, lr_mul: float = 1.0, bias: float = 0.0
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / lr_mul)
        self.bias = nn.Parameter(torch.full((outputs,), bias))
        self.activate, self.lr_mul = activate, lr_mul

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        weight = self.weight.to(x.dtype) * (self.lr_mul / math.sqrt(self.weight.shape[1]))
        y = functional.linear(x, weight, self.bias.to(x.dtype) * self.lr_mul)
        return leaky_relu(y) if self.activate else y


class MappingNetwork(nn.Module):
    """z [B, Z] -> w, `layers` equalised layers with lr_mul 0.01.

    With `num_ws` the result is repeated to [B, num_ws, W] and can be truncated; without, it is [B, W] and there is no
    average. With `embed` the input is first put through a linear layer: a discriminator's condition.
    """

    w_avg: Tensor

    def __init__(
        self, inputs: int, w_dim: int, num_ws: int | None = None, layers: int = 8, embed: bool = False
    ) -> None:
        super().__init__()
        self.num_ws, self.layers = num_ws, layers
        self.embed = EqualLinear(inputs, w_dim) if embed else None
        for i in range(layers):
            first = inputs if i == 0 and not embed else w_dim
            setattr(self, f"fc{i}", EqualLinear(first, w_dim, activate=True, lr_mul=0.01))
        if num_ws is not None:
            self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(self, z: Float[Tensor, "B Z"], truncation_psi: float = 1.0) -> Tensor:
        x = normalize_second_moment(z if self.embed is None else self.embed(z))
        for i in range(self.layers):
            x = getattr(self, f"fc{i}")(x)
        if self.num_ws is None:
            return x
        if truncation_psi != 1:
            x = self.w_avg.lerp(x, truncation_psi)  # w_avg + psi (w - w_avg)
        return x[:, None].expand(-1, self.num_ws, -1)


def modulated_linear(
    x: Float[Tensor, "B N I"],
    weight: Float[Tensor, "O I"],
    bias: Float[Tensor, " O"],
    styles: Float[Tensor, "B I"],
    demodulate: bool = True,
) -> Float[Tensor, "B N O"]:
    """y = x W'^T + bias with W' = d (W s), s per input, and with `demodulate` d = 1 / sqrt(sum (W s)^2 + 1e-8) per
    output. Points have no neighbours, so the weights of every sample are modulated."""
    kernel = weight * styles[:, None]  # [B, O, I]
    if demodulate:
        kernel = kernel * (kernel.square().sum(2, keepdim=True) + EPSILON).rsqrt()
    return torch.baddbmm(bias, x, kernel.transpose(1, 2))


def modulated_conv(
    x: Float[Tensor, "B I ..."],
    weight: Float[Tensor, "O I ..."],
    styles: Float[Tensor, "B I"],
    bias: Float[Tensor, " O"] | None = None,
    up: bool = False,
    gain: float = 1.0,
    modulate_weights: bool | None = None,
) -> Float[Tensor, "B O ..."]:
    """Convolution in 2 or 3 dimensions with the kernel W' = gain d (W s), s per input channel and
    d = 1 / sqrt(sum over (I, k, ...) of (W s)^2 + 1e-8) per output channel; plus `bias`.

    Odd kernels keep the size; `up` is the transposed convolution of stride 2 without padding: H -> 2 H + 1.

    There are two ways: scale the weights, or scale the activations before (s) and behind (d). They agree to rounding.
    Left to itself it takes the one that touches fewer numbers; several samples share their weights unscaled.
    """
    dims, spatial, samples = weight.ndim - 2, list(range(2, weight.ndim)), len(x)
    if modulate_weights is None:
        modulate_weights = samples == 1 and weight.numel() < x.numel()
    if modulate_weights and samples > 1:
        pairs = zip(x.split(1), styles.split(1), strict=True)
        return torch.cat([modulated_conv(a, weight, s, bias, up, gain, True) for a, s in pairs])
    if modulate_weights:
        weight = weight * styles.view(1, -1, *[1] * dims)
        weight = weight * (gain * (weight.square().sum([1, *spatial], keepdim=True) + EPSILON).rsqrt())
    else:
        x = x * styles.view(samples, -1, *[1] * dims)
        norms = styles.square() @ weight.square().sum(spatial).T  # [B, O]
    before = bias if modulate_weights else None
    if up:
        transposed = functional.conv_transpose2d if dims == 2 else functional.conv_transpose3d
        y = transposed(x, weight.transpose(0, 1), before, stride=2)
    else:
        convolve = functional.conv2d if dims == 2 else functional.conv3d
        y = convolve(x, weight, before, padding=weight.shape[2] // 2)
    if modulate_weights:
        return y
    behind = (gain * (norms + EPSILON).rsqrt()).view(samples, -1, *[1] * dims)
    return y * behind if bias is None else torch.addcmul(bias.view(-1, *[1] * dims), y, behind)


def activate(x: Tensor, clamp: float | None) -> Tensor:
    """Leaky rectifier without its gain, then clamp; overwrites `x`."""
    x = functional.leaky_relu(x, SLOPE, inplace=True)
    if clamp is None:
        return x
    return x.clamp(-clamp, clamp) if x.requires_grad else x.clamp_(-clamp, clamp)


def filter_taps() -> Float[Tensor, "4 4"]:
    """The low-pass of all resampling: outer product of [1, 3, 3, 1] / 8 with itself."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    return taps[:, None] * taps


def upsample(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C 2H 2W"]:
    """Zeros between the pixels, two rows of them before and one behind, then the low-pass times 4.

    Written out per axis: y[2i] = x[i-1]/4 + 3 x[i]/4, y[2i+1] = 3 x[i]/4 + x[i+1]/4 with zeros beyond the border. That
    is bilinear interpolation of the picture inside a frame of zeros, which is one fast kernel.
    """
    framed = functional.pad(x, (1, 1, 1, 1))
    return functional.interpolate(framed, scale_factor=2, mode="bilinear", align_corners=False)[..., 2:-2, 2:-2]


class SynthesisLayer(nn.Module):
    """Modulated 3x3 convolution, noise, bias, sqrt(2) lrelu, clamp; `up` doubles the picture first.

    The factor sqrt(2) is drawn through the rectifier into kernel, noise and bias, which saves a pass over the picture.
    """

    resample_filter: Tensor
    noise_const: Tensor

    def __init__(
        self, inputs: int, outputs: int, w_dim: int, resolution: int, up: bool = False, clamp: float | None = CLAMP
    ) -> None:
        super().__init__()
        self.up, self.clamp = up, clamp
        self.affine = EqualLinear(w_dim, inputs, bias=1.0)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3).contiguous(memory_format=torch.channels_last))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.register_buffer("resample_filter", filter_taps())

    def forward(
        self, x: Float[Tensor, "B I H W"], w: Float[Tensor, "B W"], noise_mode: NoiseMode = "const"
    ) -> Float[Tensor, "B O H W"]:
        bias = GAIN * self.bias
        y = modulated_conv(x, self.weight, self.affine(w), None if self.up else bias, self.up, GAIN)
        if self.up:  # 2 H + 1 -> 2 H
            taps = (4 * self.resample_filter).expand(y.shape[1], 1, 4, 4)
            y = functional.conv2d(y, taps, bias, padding=1, groups=y.shape[1])
        if noise_mode != "none":
            noise = self.noise_const if noise_mode == "const" else torch.randn_like(y[:, :1])
            y = y + GAIN * self.noise_strength * noise
        return activate(y, self.clamp)


class Head(nn.Module):
    """Features to picture or planes ("toRGB"): modulated 1x1 convolution without demodulation, bias, clamp."""

    def __init__(self, inputs: int, outputs: int, w_dim: int, clamp: float | None = CLAMP) -> None:
        super().__init__()
        self.clamp = clamp
        self.affine = EqualLinear(w_dim, inputs, bias=1.0)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 1, 1))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Float[Tensor, "B I H W"], w: Float[Tensor, "B W"]) -> Float[Tensor, "B O H W"]:
        styles = self.affine(w) / math.sqrt(x.shape[1])
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
        y = modulated_linear(pixels, self.weight[:, :, 0, 0], self.bias, styles, demodulate=False)
        y = y if self.clamp is None else y.clamp(-self.clamp, self.clamp)
        return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class SynthesisBlock(nn.Module):
    """One resolution: conv0 (up) unless it is the first, conv1, and heads that each give planes."""

    resample_filter: Tensor

    def __init__(
        self, inputs: int, outputs: int, w_dim: int, resolution: int, heads: Mapping[str, int], clamp: float | None
    ) -> None:
        super().__init__()
        self.heads = tuple(heads)
        self.register_buffer("resample_filter", filter_taps())
        if inputs:
            self.conv0 = SynthesisLayer(inputs, outputs, w_dim, resolution, up=True, clamp=clamp)
        else:
            self.const = nn.Parameter(torch.randn(outputs, resolution, resolution))
        self.conv1 = SynthesisLayer(outputs, outputs, w_dim, resolution, clamp=clamp)
        for name, channels in heads.items():
            setattr(self, name, Head(outputs, channels, w_dim, clamp))

    def forward(
        self,
        x: Float[Tensor, "B I h w"] | None,
        planes: Mapping[str, Float[Tensor, "B P h w"]],
        convs: Sequence[Float[Tensor, "B W"]],
        heads: Mapping[str, Float[Tensor, "B W"]],
        noise_mode: NoiseMode,
    ) -> tuple[Float[Tensor, "B O H W"], dict[str, Float[Tensor, "B P H W"]]]:
        if x is None:
            x = self.const.expand(len(convs[0]), -1, -1, -1).contiguous(memory_format=torch.channels_last)
        else:
            x = self.conv0(x, convs[0], noise_mode)
        x = self.conv1(x, convs[-1], noise_mode)
        news = {name: getattr(self, name)(x, heads[name]) for name in self.heads}
        return x, {name: upsample(planes[name]) + new if planes else new for name, new in news.items()}


class SynthesisNetwork(nn.Module):
    """Blocks `b4` ... `b{resolution}`. Which row of w goes where is the caller's business: see `own_rows` and
    `shared_rows`."""

    def __init__(
        self,
        w_dim: int,
        resolution: int,
        heads: Mapping[str, int],
        base: int = 32768,
        limit: int = 512,
        clamp: float | None = CLAMP,
    ) -> None:
        super().__init__()
        self.resolutions = tuple(4 << i for i in range(int(math.log2(resolution)) - 1))
        if self.resolutions[-1] != resolution:
            raise ValueError(f"{resolution} is not a power of two")
        before = 0
        for r in self.resolutions:
            now = widths(r, base, limit)
            setattr(self, f"b{r}", SynthesisBlock(before, now, w_dim, r, heads, clamp))
            before = now

    def forward(
        self,
        convs: Sequence[Float[Tensor, "B W"]],
        heads: Mapping[str, Sequence[Float[Tensor, "B W"]]],
        noise_mode: NoiseMode = "const",
    ) -> dict[str, Float[Tensor, "B P R R"]]:
        """Planes by head, from one w per convolution (2 n - 1 of them for n blocks) and per head and block (n)."""
        x, planes = None, {}
        for i, r in enumerate(self.resolutions):
            two = convs[max(2 * i - 1, 0) : 2 * i + 1]
            x, planes = getattr(self, f"b{r}")(x, planes, two, {k: v[i] for k, v in heads.items()}, noise_mode)
        return planes


def own_rows(blocks: int) -> tuple[list[int], list[int]]:
    """Rows of w for the convolutions and for the head when every layer takes the next row (GET3D):
    b4 conv1 0, head 1; b8 conv0 2, conv1 3, head 4; ... 3 n - 1 rows."""
    heads = [3 * i + 1 for i in range(blocks)]
    return [row for row in range(3 * blocks - 1) if row not in heads], heads


def shared_rows(blocks: int) -> tuple[list[int], list[int]]:
    """Rows of w in StyleGAN2's own order, where a head shares its row with the next block's conv0: 2 n rows."""
    return list(range(2 * blocks - 1)), [2 * i + 1 for i in range(blocks)]
