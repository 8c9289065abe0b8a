# SPDX-License-Identifier: GPL-3.0-or-later
"""From a photo to codes and to a pose: the global encoder E0 (a pSp pyramid on an IR-SE50 body) and the pose estimator.

Parameters are named and shaped as in the published files.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from backend.families.e3dge.config import Config
from backend.networks.stylegan2 import SLOPE, EqualLinear

STYLE_CONVS = 7  # of a style block; those of the decoder's rows from 3 on have one more
FINE_ROWS = 3  # style blocks of the decoder that begin at the finest map


class SqueezeExcitation(nn.Module):
    """x times a number per channel in 0..1 that depends on the means of all channels (Hu et al. 2018)."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, max(channels // reduction, 1), 1, bias=False)
        self.fc2 = nn.Conv2d(max(channels // reduction, 1), channels, 1, bias=False)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return x * torch.sigmoid(self.fc2(functional.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class Bottleneck(nn.Module):
    """Residual unit of ArcFace's networks (Deng et al. 2019): norm, conv, PReLU, conv with the stride, norm."""

    def __init__(self, inputs: int, outputs: int, stride: int, excite: bool) -> None:
        super().__init__()
        if inputs == outputs:
            self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        else:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        layers: list[nn.Module] = [
            nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), nn.PReLU(outputs),
            nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs),
        ]  # fmt: skip
        self.res_layer = nn.Sequential(*layers, *([SqueezeExcitation(outputs)] if excite else []))

    def forward(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O h w"]:
        return self.shortcut_layer(x) + self.res_layer(x)


class StyleBlock(nn.Module):
    """A map -> one code: convolutions of stride 2 until one pixel is left, then an equalised linear layer."""

    def __init__(self, inputs: int, outputs: int, convs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(convs):
            layers += [nn.Conv2d(inputs if i == 0 else outputs, outputs, 3, 2, 1), nn.LeakyReLU(0.01)]
        self.convs = nn.Sequential(*layers)
        self.linear = EqualLinear(outputs, outputs)

    def forward(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O"]:
        return self.linear(self.convs(x).flatten(1))


class GlobalEncoder(nn.Module):
    """Photo in -1..1 -> offsets of the codes from their means."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width = config.encoder_width
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.PReLU(width)
        )
        units, before, self.taps = [], width, []
        for level, count in enumerate(config.encoder_units):
            for unit in range(count):
                units.append(Bottleneck(before, width << level, 2 if unit == 0 else 1, excite=True))
                before = width << level
            self.taps.append(len(units) - 1)
        self.body = nn.Sequential(*units)
        top, dim = 8 * width, config.decoder_dim
        self.styles_pigan = nn.ModuleList(StyleBlock(top, config.style_dim, STYLE_CONVS) for _ in range(config.rows))
        self.styles_stylegan = nn.ModuleList(  # of which only the first is used
            StyleBlock(top, dim, STYLE_CONVS + (i >= FINE_ROWS)) for i in range(config.decoder_rows)
        )
        self.latlayer64 = nn.Conv2d(width, top, 1)
        self.latlayer128 = nn.Conv2d(2 * width, top, 1)
        self.latlayer256 = nn.Conv2d(4 * width, top, 1)

    def forward(self, photo: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B L W"], Float[Tensor, "B R D"]]:
        """Of the renderer's rows, and of the decoder's, which are all alike."""
        x, seen = self.input_layer(photo), []
        for i, unit in enumerate(self.body):
            x = unit(x)
            if i in self.taps:
                seen.append(x)
        coarse = _onto(seen[3], self.latlayer256(seen[2]))
        fine = _onto(_onto(coarse, self.latlayer128(seen[1])), self.latlayer64(seen[0]))
        renderer = torch.stack([block(coarse) for block in self.styles_pigan], 1)
        decoder = self.styles_stylegan[0](fine)
        return renderer, decoder[:, None].expand(-1, self.config.decoder_rows, -1)


def _onto(x: Float[Tensor, "B C h w"], y: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    return functional.interpolate(x, y.shape[2:], mode="bilinear", align_corners=True) + y


class Activated(nn.Module):
    """Convolution that also sees where it is: two more channels, the row and the column in -1..1 (Liu et al. 2018).
    Then a bias and a leaky rectifier."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Module()
        self.conv.conv = nn.Conv2d(inputs + 2, outputs, 3, padding=1, bias=False)
        self.activation = Bias(outputs)

    def forward(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O H W"]:
        rows, columns = (torch.linspace(-1, 1, n, device=x.device).to(x) for n in x.shape[2:])
        places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
        y = self.conv.conv(torch.cat([x, places.expand(len(x), -1, -1, -1)], 1))
        return self.activation(y)


class Bias(nn.Module):
    """lrelu(x + b), without a gain."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return functional.leaky_relu(x + self.bias[:, None, None], SLOPE)


class Unactivated(nn.Module):
    """A convolution under the name `conv`."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Entry(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, outputs, 1, bias=False)
        self.activation = Bias(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.conv(x))


class Halving(nn.Module):
    """(two convolutions, averaged down + shortcut, averaged down) / sqrt(2)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = Activated(inputs, outputs)
        self.conv2 = Activated(outputs, outputs)
        if inputs != outputs:
            self.skip = Unactivated(inputs, outputs, 1)

    def forward(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O h w"]:
        y = functional.avg_pool2d(self.conv2(self.conv1(x)), 2)
        x = functional.avg_pool2d(x, 2)
        return (y + (self.skip(x) if hasattr(self, "skip") else x)) * 0.5**0.5


class PoseEstimator(nn.Module):
    """Thumbnail in -1..1 -> score, and azimuth and elevation in radians: the discriminator of StyleSDF's volume
    renderer."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.convs = nn.Sequential(Entry(widths[0]), *(Halving(a, b) for a, b in pairwise(widths)))
        self.final_conv = Unactivated(widths[-1], 3, 2)

    def forward(self, thumb: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B 1"], Float[Tensor, "B 2"]]:
        found = self.final_conv(self.convs(thumb))[:, :, 0, 0]
        return found[:, :1], found[:, 1:]
