# SPDX-License-Identifier: GPL-3.0-or-later
"""StyleGAN2's discriminator (Karras et al. 2020) in both architectures, with the published names.

    "skip":   x = x + fromrgb(image at r) at every resolution, the image itself halved by the low-pass   (GET3D)
    "resnet": fromrgb once, x = (conv1(conv0(x)) + skip(x)) / sqrt(2)                                    (Get3DHuman)

Weights are equalised: stored with unit variance, times 1 / sqrt(fan in) when they run. Penalties on gradients (R1) need
gradients of gradients: everything here has them.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from backend.networks.stylegan2 import CLAMP, EPSILON, GAIN, EqualLinear, filter_taps, widths

Architecture = Literal["skip", "resnet"]
GROUP = 4  # most samples that share one minibatch standard deviation


def low_pass(x: Float[Tensor, "B C H W"], stride: int, padding: int) -> Float[Tensor, "B C h w"]:
    """The filter of all resampling; zeros beyond the border."""
    taps = filter_taps().to(x).expand(x.shape[1], 1, 4, 4)
    return functional.conv2d(x, taps, stride=stride, padding=padding, groups=x.shape[1])


def halve(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H/2 W/2"]:
    return low_pass(x, stride=2, padding=1)


class Conv(nn.Module):
    """Equalised convolution of odd kernel that keeps the size, or halves it by low-pass and stride. With a bias it ends
    in sqrt(2) lrelu and a clamp, without one it is linear. `gain` scales the result and the clamp."""

    resample_filter: Tensor

    def __init__(
        self, inputs: int, outputs: int, kernel: int, down: bool = False, bias: bool = True, clamp: float | None = CLAMP
    ) -> None:
        super().__init__()
        self.down, self.clamp = down, clamp
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.register_buffer("resample_filter", filter_taps())

    def forward(self, x: Float[Tensor, "B I H W"], gain: float = 1.0) -> Float[Tensor, "B O h w"]:
        kernel = self.weight.shape[2]
        scale = 1 / math.sqrt(self.weight[0].numel()) * (gain if self.bias is None else 1)
        weight = self.weight.to(x.dtype) * scale
        if not self.down:
            y = functional.conv2d(x, weight, padding=kernel // 2)
        elif kernel == 1:  # fewer pixels first
            y = functional.conv2d(halve(x), weight)
        else:
            y = functional.conv2d(low_pass(x, stride=1, padding=kernel // 2 + 1), weight, stride=2)
        if self.bias is None:
            return y
        y = functional.leaky_relu(y + self.bias.to(x.dtype)[:, None, None], 0.2) * (GAIN * gain)
        return y if self.clamp is None else y.clamp(-self.clamp * gain, self.clamp * gain)


class DiscriminatorBlock(nn.Module):
    """One resolution: the image comes in (always with "skip", at the first block with "resnet"), the size halves."""

    resample_filter: Tensor

    def __init__(
        self, channels: int, inputs: int, outputs: int, architecture: Architecture, clamp: float | None = CLAMP
    ) -> None:
        """`channels` of the image, 0 if none comes in here."""
        super().__init__()
        self.register_buffer("resample_filter", filter_taps())
        self.fromrgb = Conv(channels, inputs, 1, clamp=clamp) if channels else None
        self.conv0 = Conv(inputs, inputs, 3, clamp=clamp)
        self.conv1 = Conv(inputs, outputs, 3, down=True, clamp=clamp)
        self.skip = Conv(inputs, outputs, 1, down=True, bias=False) if architecture == "resnet" else None

    def forward(self, x: Tensor | None, image: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.fromrgb is not None:
            assert image is not None, "this block was made to see the image"
            seen = self.fromrgb(image)
            x = seen if x is None else x + seen
            image = halve(image) if self.skip is None else None
        assert x is not None, "the first block sees the image"
        if self.skip is None:
            return self.conv1(self.conv0(x)), image
        half = math.sqrt(0.5)
        return self.skip(x, half) + self.conv1(self.conv0(x), half), image


def minibatch_deviation(x: Float[Tensor, "B C H W"], group: int = GROUP) -> Float[Tensor, "B C1 H W"]:
    """One more channel: the standard deviation over each group of samples, averaged over everything else. Sample n is
    in group n mod (B / size), as in the published code; a batch that `group` does not divide is one group."""
    size = min(group, len(x)) if len(x) % min(group, len(x)) == 0 else len(x)
    wide = torch.promote_types(x.dtype, torch.float32)  # half would overflow
    groups = x.to(wide).reshape(size, len(x) // size, -1)
    deviation = (groups.var(0, unbiased=False) + EPSILON).sqrt().mean(1)
    extra = deviation.repeat(size).to(x.dtype).reshape(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
    return torch.cat([x, extra], 1)


class DiscriminatorEpilogue(nn.Module):
    """4 x 4 features -> `outputs` numbers, the scores; with a condition of as many channels, their product with it."""

    def __init__(
        self, channels: int, inputs: int, outputs: int, clamp: float | None = CLAMP, group: int = GROUP
    ) -> None:
        """`channels` of the image, 0 if none comes in here."""
        super().__init__()
        self.group = group
        self.fromrgb = Conv(channels, inputs, 1, clamp=clamp) if channels else None
        self.conv = Conv(inputs + 1, inputs, 3, clamp=clamp)
        self.fc = EqualLinear(16 * inputs, inputs, activate=True)
        self.out = EqualLinear(inputs, outputs)

    def forward(
        self, x: Float[Tensor, "B I 4 4"], image: Tensor | None, condition: Float[Tensor, "B O"] | None = None
    ) -> Float[Tensor, "B S"]:
        if self.fromrgb is not None:
            x = x + self.fromrgb(image)
        y = self.out(self.fc(self.conv(minibatch_deviation(x, self.group)).flatten(1)))
        if condition is None:
            return y
        return (y * condition).sum(1, keepdim=True) / math.sqrt(condition.shape[1])


class Discriminator(nn.Module):
    """Blocks `b{resolution}` ... `b8` and the epilogue `b4`, without a condition."""

    def __init__(
        self,
        channels: int,
        resolution: int,
        base: int = 32768,
        limit: int = 512,
        architecture: Architecture = "resnet",
        clamp: float | None = CLAMP,
    ) -> None:
        super().__init__()
        self.resolutions = block_resolutions(resolution)
        add_blocks(self, "", channels, self.resolutions, base, limit, architecture, 1, clamp)

    def forward(self, image: Float[Tensor, "B C R R"]) -> Float[Tensor, "B 1"]:
        return run_blocks(self, "", self.resolutions, image)


def block_resolutions(resolution: int) -> tuple[int, ...]:
    """From the image's down to 8."""
    return tuple(resolution >> i for i in range(resolution.bit_length() - 3))


def add_blocks(
    module: nn.Module, prefix: str, channels: int, resolutions: tuple[int, ...], base: int, limit: int,
    architecture: Architecture, outputs: int | None, clamp: float | None,
) -> None:  # fmt: skip
    """Give `module` the blocks of one discriminator; `outputs` None: as many as the last features have channels."""
    skip = architecture == "skip"
    for r in resolutions:
        image = channels if skip or r == resolutions[0] else 0
        block = DiscriminatorBlock(
            image, widths(r, base, limit), widths(r // 2, base, limit), architecture, clamp
        )  # fmt: skip
        setattr(module, f"{prefix}b{r}", block)
    last = widths(4, base, limit)
    setattr(module, f"{prefix}b4", DiscriminatorEpilogue(channels if skip else 0, last, outputs or last, clamp))


def run_blocks(
    module: nn.Module, prefix: str, resolutions: tuple[int, ...], image: Tensor, condition: Tensor | None = None
) -> Float[Tensor, "B S"]:
    x, left = None, image
    for r in resolutions:
        x, left = getattr(module, f"{prefix}b{r}")(x, left)
    return getattr(module, f"{prefix}b4")(x, left, condition)
