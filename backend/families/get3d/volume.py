# SPDX-License-Identifier: GPL-3.0-or-later
"""The separate generator's geometry: a feature volume of 32^3 by modulated 3D convolutions, and the MLP that reads it.

Residual blocks at 4, 8, 16, 32: skip = 1x1x1 convolution of the enlarged input, body = conv0, conv1, each branch times
sqrt(1/2), summed. There is no noise, though the published files hold tensors for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from backend.families.get3d.fields import FieldMLP, run_layers
from backend.networks.stylegan2 import GAIN, EqualLinear, activate, filter_taps, modulated_conv

RESOLUTIONS = (4, 8, 16, 32)
HIDDEN = 256  # width of the MLP


def volume_widths(resolution: int) -> int:
    """Channels at a resolution."""
    return min(2048 // resolution, 256)


class VolumeLayer(nn.Module):
    """Modulated 3x3x3 convolution, bias, lrelu times gain, clamp times gain."""

    noise_const: Tensor

    def __init__(self, inputs: int, outputs: int, w_dim: int, resolution: int, clamp: float | None) -> None:
        super().__init__()
        self.clamp = clamp
        self.affine = EqualLinear(w_dim, inputs, bias=1.0)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3, 3))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.noise_strength = nn.Parameter(torch.zeros([]))  # of the file format, not used
        self.register_buffer("noise_const", torch.randn(resolution, resolution))

    def forward(
        self, x: Float[Tensor, "B I R R R"], w: Float[Tensor, "B W"], gain: float = 1.0
    ) -> Float[Tensor, "B O R R R"]:
        y = modulated_conv(x, self.weight, self.affine(w), GAIN * gain * self.bias, gain=GAIN * gain)
        return activate(y, None if self.clamp is None else self.clamp * gain)


class SkipConv(nn.Module):
    """Equalised 1x1x1 convolution without bias."""

    resample_filter: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 1, 1, 1))
        self.register_buffer("resample_filter", filter_taps())  # of the file format, not used

    def forward(self, x: Float[Tensor, "B I R R R"], gain: float) -> Float[Tensor, "B O R R R"]:
        return functional.conv3d(x, self.weight * (gain / math.sqrt(x.shape[1])))


class VolumeBlock(nn.Module):
    """One resolution; the first has a learned constant instead of an input."""

    def __init__(self, inputs: int, outputs: int, w_dim: int, resolution: int, clamp: float | None) -> None:
        super().__init__()
        if inputs:
            self.conv0 = VolumeLayer(inputs, outputs, w_dim, resolution, clamp)
            self.skip = SkipConv(inputs, outputs)
        else:
            self.const = nn.Parameter(torch.randn(outputs, resolution, resolution, resolution))
        self.conv1 = VolumeLayer(outputs, outputs, w_dim, resolution, clamp)

    def forward(self, x: Float[Tensor, "B I r r r"] | None, ws: Sequence[Float[Tensor, "B W"]]) -> Tensor:
        if x is None:
            return self.conv1(self.const.expand(len(ws[0]), -1, -1, -1, -1), ws[0])
        x = functional.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)
        skip = self.skip(x, math.sqrt(0.5))
        return skip + self.conv1(self.conv0(x, ws[0]), ws[1], math.sqrt(0.5))


class VolumeField(nn.Module):
    """w -> volume [B, 64, 32, 32, 32]; its features with sines and cosines of the place -> `outputs` numbers."""

    def __init__(self, outputs: int, layers: int, w_dim: int, clamp: float | None) -> None:
        super().__init__()
        before = 0
        for r in RESOLUTIONS:
            setattr(self, f"b{r}", VolumeBlock(before, volume_widths(r), w_dim, r, clamp))
            before = volume_widths(r)
        self.layers = FieldMLP(before + 6, HIDDEN, outputs, w_dim, layers - 1).layers

    @property
    def rows(self) -> int:
        """Rows of w that the convolutions take; the MLP takes the next ones."""
        return 2 * len(RESOLUTIONS) - 1

    def forward(self, ws: Sequence[Float[Tensor, "B W"]]) -> Float[Tensor, "B C 32 32 32"]:
        x = None
        for i, r in enumerate(RESOLUTIONS):
            x = getattr(self, f"b{r}")(x, ws[max(2 * i - 1, 0) : 2 * i + 1])
        assert x is not None
        return x

    def read(
        self, features: Float[Tensor, "B N C"], points: Float[Tensor, "B N 3"], ws: Sequence[Float[Tensor, "B W"]]
    ) -> Float[Tensor, "B N O"]:
        """The MLP at points with these features of the volume."""
        angle = math.pi * points
        x = torch.cat([angle.sin(), angle.cos(), features], 2)
        return run_layers(self.layers, x, ws[self.rows : self.rows + len(self.layers)])
