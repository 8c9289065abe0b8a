# SPDX-License-Identifier: GPL-3.0-or-later
"""Stacked hourglasses (Newell et al. 2016) as PIFu's image filter builds them (Saito et al. 2019).

Get3DHuman, E3DGE and SIFU differ in the first convolution, in the number of stacks and in which tensors their files
name; the parameters here say so. Parameters are named and shaped as in the published files.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Three 3x3 convolutions, each after group normalisation and ReLU; their outputs stand side by side, and the input
    is added.

    With `fourth_norm` there is a `bn4`: the normalisation of the shortcut under a second name, or of no use to anyone
    where there is no shortcut. Files that have it load strictly only so.
    """

    def __init__(self, inputs: int, outputs: int, groups: int = 32, fourth_norm: bool = False) -> None:
        super().__init__()
        half, quarter = outputs // 2, outputs // 4
        self.conv1 = nn.Conv2d(inputs, half, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(half, quarter, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(quarter, quarter, 3, padding=1, bias=False)
        self.bn1 = nn.GroupNorm(groups, inputs)
        self.bn2 = nn.GroupNorm(groups, half)
        self.bn3 = nn.GroupNorm(groups, quarter)
        norm = nn.GroupNorm(groups, inputs)
        if fourth_norm:
            self.bn4 = norm
        self.downsample = None
        if inputs != outputs:
            self.downsample = nn.Sequential(norm, nn.ReLU(), nn.Conv2d(inputs, outputs, 1, bias=False))

    def forward(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O H W"]:
        a = self.conv1(functional.relu(self.bn1(x)))
        b = self.conv2(functional.relu(self.bn2(a)))
        c = self.conv3(functional.relu(self.bn3(b)))
        return torch.cat([a, b, c], 1) + (x if self.downsample is None else self.downsample(x))


class Hourglass(nn.Module):
    """Down and up again, with a branch at every level; `b2_plus_1` is the bottom."""

    def __init__(self, channels: int, depth: int, groups: int = 32, fourth_norm: bool = False) -> None:
        super().__init__()
        self.depth = depth
        for level in range(1, depth + 1):
            for branch in ("b1", "b2", "b3"):
                self.add_module(f"{branch}_{level}", Block(channels, channels, groups, fourth_norm))
        self.b2_plus_1 = Block(channels, channels, groups, fourth_norm)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return self._level(self.depth, x)

    def _level(self, n: int, x: Tensor) -> Tensor:
        up = self.get_submodule(f"b1_{n}")(x)
        low = self.get_submodule(f"b2_{n}")(functional.avg_pool2d(x, 2))
        low = self._level(n - 1, low) if n > 1 else self.b2_plus_1(low)
        low = self.get_submodule(f"b3_{n}")(low)
        return up + functional.interpolate(low, scale_factor=2, mode="bicubic", align_corners=True)


class StackedHourglass(nn.Module):
    """Picture [B, inputs, H, W] -> features [B, outputs, H/4, W/4], one map per stack.

    The picture is halved by the first convolution (`kernel`, stride 2, padding 3) and by `down`: an average pool, or a
    convolution of stride 2. Between stacks the features and the output are added to what the next one sees. `beside`:
    channels of a second map that takes the place of so many of the convolution's.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int = 256,
        stacks: int = 1,
        channels: int = 256,
        stem: int = 64,
        depth: int = 2,
        kernel: int = 7,
        groups: int = 32,
        down: Literal["pool", "conv"] = "pool",
        fourth_norm: bool = True,
        beside: int = 0,
    ) -> None:
        super().__init__()
        self.stacks = stacks
        self.conv1 = nn.Conv2d(inputs, stem, kernel, stride=2, padding=3)
        self.bn1 = nn.GroupNorm(groups, stem)
        self.conv2 = Block(stem, 2 * stem, groups, fourth_norm)
        self.down_conv2 = nn.Conv2d(2 * stem, 2 * stem - beside, 3, stride=2, padding=1) if down == "conv" else None
        self.conv3 = Block(2 * stem, 2 * stem, groups, fourth_norm)
        self.conv4 = Block(2 * stem, channels, groups, fourth_norm)
        for i in range(stacks):
            self.add_module(f"m{i}", Hourglass(channels, depth, groups, fourth_norm))
            self.add_module(f"top_m_{i}", Block(channels, channels, groups, fourth_norm))
            self.add_module(f"conv_last{i}", nn.Conv2d(channels, channels, 1))
            self.add_module(f"bn_end{i}", nn.GroupNorm(groups, channels))
            self.add_module(f"l{i}", nn.Conv2d(channels, outputs, 1))
            if i < stacks - 1:
                self.add_module(f"bl{i}", nn.Conv2d(channels, channels, 1))
                self.add_module(f"al{i}", nn.Conv2d(outputs, channels, 1))

    def forward(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O h w"]:
        """The last stack's map."""
        return self.maps(x)[-1]

    def maps(
        self, x: Float[Tensor, "B I H W"], beside: Float[Tensor, "B P h w"] | None = None
    ) -> list[Float[Tensor, "B O h w"]]:
        """Every stack's map: training supervises all of them."""
        part, found = self.get_submodule, []
        x = x.contiguous()  # group normalisation of channels-last memory is five times less exact
        x = self.conv2(functional.relu(self.bn1(self.conv1(x))))
        x = functional.avg_pool2d(x, 2) if self.down_conv2 is None else self.down_conv2(x)
        x = x if beside is None else torch.cat([x, beside], 1)
        x = self.conv4(self.conv3(x))
        for i in range(self.stacks):
            y = part(f"top_m_{i}")(part(f"m{i}")(x))
            y = functional.relu(part(f"bn_end{i}")(part(f"conv_last{i}")(y)))
            found.append(part(f"l{i}")(y))
            if i < self.stacks - 1:
                x = x + part(f"bl{i}")(y) + part(f"al{i}")(found[-1])
        return found
