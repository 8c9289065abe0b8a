# SPDX-License-Identifier: GPL-3.0-or-later
"""Critics of the adversarial stage: pictures (colour with silhouette, silhouette alone) and small feature volumes.

After StyleGAN2 (Karras et al. 2020, residual discriminator) with the camera as condition by projection, as in GET3D:
score = <x, c> / sqrt(dim). Weights are equalised: stored with unit variance, multiplied by 1 / sqrt(fan in).
Losses are the non-saturating logistic ones with R1 on reals (Mescheder et al. 2018), taken lazily.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from backend.networks.stylegan2 import EqualLinear, leaky_relu

GROUP = 4  # pictures that share one minibatch standard deviation
VIEW_FREQUENCIES = (1, 2, 4)
KINDS = ("body", "head")  # framings of a picture


class EqualConv(nn.Module):
    """Convolution in 2 or 3 dimensions that keeps the size; `down` low-passes and halves first."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, dims: int = 2, down: bool = False, activate: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, *[kernel] * dims))
        self.bias = nn.Parameter(torch.zeros(outputs)) if activate else None
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        if self.down:
            x = halve(x)
        weight = self.weight.to(x.dtype) / math.sqrt(self.weight[0].numel())
        convolve = functional.conv2d if x.ndim == 4 else functional.conv3d
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = convolve(x, weight, bias, padding=self.weight.shape[2] // 2)
        return y if self.bias is None else leaky_relu(y)


def halve(x: Tensor) -> Tensor:
    """Low-pass [1, 3, 3, 1] / 8 along every axis of [B, C, ...], zeros beyond the border, every second sample kept."""
    taps = x.new_tensor([1, 3, 3, 1]) / 8
    channels = x.shape[1]
    for axis in range(2, x.ndim):
        shape = [1] * x.ndim
        shape[axis] = 4
        stride, padding = [1] * (x.ndim - 2), [0] * (x.ndim - 2)
        stride[axis - 2], padding[axis - 2] = 2, 1
        convolve = functional.conv2d if x.ndim == 4 else functional.conv3d
        kernel = taps.reshape(shape).expand(channels, *shape[1:])
        x = convolve(x, kernel, stride=stride, padding=padding, groups=channels)
    return x


def minibatch_deviation(x: Float[Tensor, "B C ..."], group: int = GROUP) -> Float[Tensor, "B C1 ..."]:
    """One more channel: the standard deviation over each group of consecutive samples, averaged over everything else
    (Karras et al. 2018, sec. 3). Consecutive, so that processes which share a batch in whole groups agree with one
    process that has it all. A batch that no group divides is one group."""
    size = group if len(x) % group == 0 else len(x)
    groups = x.reshape(len(x) // size, size, -1)
    deviation = (groups.var(1, unbiased=False) + 1e-8).sqrt().mean(1)
    extra = deviation.repeat_interleave(size).reshape(-1, 1, *[1] * (x.ndim - 2)).expand(-1, 1, *x.shape[2:])
    return torch.cat([x, extra], 1)


def view_code(views: Float[Tensor, "B 3"]) -> Float[Tensor, "B 14"]:
    """(azimuth, elevation in radians, index of the framing) -> sines and cosines of 1, 2, 4 times the azimuth and the
    elevation, and which framing it is."""
    angles = views[:, :2]
    waves = [f(k * angles) for k in VIEW_FREQUENCIES for f in (torch.sin, torch.cos)]
    kind = functional.one_hot(views[:, 2].long(), len(KINDS)).to(views.dtype)
    return torch.cat([*waves, kind], 1)


class Residual(nn.Module):
    """Two convolutions beside a short cut; halves the picture or volume."""

    def __init__(self, inputs: int, outputs: int, dims: int) -> None:
        super().__init__()
        self.first = EqualConv(inputs, inputs, 3, dims)
        self.second = EqualConv(inputs, outputs, 3, dims, down=True)
        self.skip = EqualConv(inputs, outputs, 1, dims, down=True, activate=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.second(self.first(x)) + self.skip(x)) / math.sqrt(2)


class Discriminator(nn.Module):
    """Pictures [B, C, H, W] or volumes [B, C, D, H, W] -> scores [B]; `condition` numbers speak by projection."""

    def __init__(
        self,
        channels: int,
        size: tuple[int, ...],
        base: int = 32,
        limit: int = 256,
        condition: int = 0,
        group: int = GROUP,
    ) -> None:
        """`size` is that of the input, each a power of two times the last features' size; it is halved until its
        largest side is 4. `base` channels at full size, doubled at each step up to `limit`."""
        super().__init__()
        dims, self.group = len(size), group
        steps = max(0, int(math.log2(max(size) / 4)))
        if any(s % (1 << steps) for s in size):
            raise ValueError(f"{size} cannot be halved {steps} times")
        widths = [min(base << i, limit) for i in range(steps + 1)]
        self.read = EqualConv(channels, widths[0], 1, dims)
        self.blocks = nn.Sequential(*(Residual(widths[i], widths[i + 1], dims) for i in range(steps)))
        self.last = EqualConv(widths[-1] + 1, widths[-1], 3, dims)
        cells = math.prod(s >> steps for s in size)
        self.features = EqualLinear(widths[-1] * cells, widths[-1], activate=True)
        self.score = EqualLinear(widths[-1], 1)
        self.embed = EqualLinear(condition, widths[-1]) if condition else None

    def forward(self, x: Tensor, condition: Float[Tensor, "B C"] | None = None) -> Float[Tensor, " B"]:
        y = self.blocks(self.read(x))
        y = self.features(self.last(minibatch_deviation(y, self.group)).flatten(1))
        score = self.score(y).squeeze(1)
        if self.embed is not None:
            assert condition is not None, "this discriminator was made with a condition"
            score = score + (y * self.embed(condition.to(y.dtype))).sum(1) / math.sqrt(y.shape[1])
        return score


def generator_loss(fake: Float[Tensor, " B"]) -> Tensor:
    """Non-saturating: mean softplus(-D(fake))."""
    return functional.softplus(-fake).mean()


def discriminator_loss(real: Float[Tensor, " B"], fake: Float[Tensor, " B"]) -> Tensor:
    """Mean softplus(-D(real)) + mean softplus(D(fake))."""
    return functional.softplus(-real).mean() + functional.softplus(fake).mean()


def r1_penalty(scores: Float[Tensor, " B"], reals: Tensor) -> Tensor:
    """Mean over the batch of |grad of the score with respect to the sample|^2. `reals` needs a gradient; the result
    has one with respect to the discriminator. Multiply by gamma / 2, and by the interval if taken lazily."""
    (gradient,) = torch.autograd.grad(scores.sum(), reals, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()
