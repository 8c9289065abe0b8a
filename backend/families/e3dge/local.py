# SPDX-License-Identifier: GPL-3.0-or-later
"""Local detail: what the photo shows and the codes do not, as features at points (Lan et al. 2023, sec. 3.3 and 3.4).

    residual = photo - picture of the codes
    3D: the residual's features, read where a point projects into the photo
    2D: the residual, warped into the wanted view by the aligner; its features, read in that view
    fused, they modulate the field's way to its colours; the distance never sees them.

Parameters are named and shaped as in the published files.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from backend.families.e3dge.config import Config
from backend.families.e3dge.encoder import Bottleneck
from backend.networks.hourglass import StackedHourglass
from backend.networks.stylegan2 import SLOPE

OCTAVES = 7  # of the positional code: sin and cos of p, 2 p, ... 64 p
POSITION = 3 + 6 * OCTAVES


class ResidualFC(nn.Module):
    """Two linear layers with ReLU before each, and a linear shortcut without bias."""

    def __init__(self, inputs: int, outputs: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or min(inputs, outputs)
        self.fc_0 = nn.Linear(inputs, hidden)
        self.fc_1 = nn.Linear(hidden, outputs)
        self.shortcut = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        return self.shortcut(x) + self.fc_1(functional.relu(self.fc_0(functional.relu(x))))


def _reflecting(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="reflect", bias=False)


class Preactivated(nn.Module):
    """x + two convolutions, each after a norm and ReLU."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            own = nn.InstanceNorm2d(channels, affine=True) if norm == "instance" else nn.BatchNorm2d(channels)
            layers += [own, nn.ReLU(), _reflecting(channels, channels)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def _stem(inputs: int, config: Config) -> nn.Sequential:
    width = config.local_stem
    return nn.Sequential(_reflecting(inputs, width), Preactivated(width, config.local_norm),
                         nn.Conv2d(width, width, 1, bias=False))  # fmt: skip


class Unused(nn.Module):
    """A layer that is in the published file and that nothing calls."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * config.width, config.hourglass_stem, 3)
        self.bn = nn.GroupNorm(config.groups, config.hourglass_stem)


class LocalNet(nn.Module):
    """Residual and depth of a view -> feature map; fused features of points -> modulation."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.image_filter = StackedHourglass(
            2 * config.local_stem, config.width, config.hourglass_stacks, config.width, config.hourglass_stem,
            groups=config.groups,
        )  # fmt: skip
        self.local_feat_to_tex_modulations_linear = ResidualFC(config.width + POSITION, 2 * config.width)
        self.downsample_channel_conv = Unused(config)
        self.depth_conv = _stem(1, config)
        self.residual_conv = _stem(3, config)

    def start_at_zero(self) -> None:
        """The first step of a training equals the plain generator."""
        last = self.local_feat_to_tex_modulations_linear
        for parameter in (last.fc_1.weight, last.fc_1.bias, last.shortcut.weight):
            nn.init.zeros_(parameter)

    def feature_map(
        self, residual: Float[Tensor, "B 3 H W"], depth: Float[Tensor, "B 1 h w"]
    ) -> Float[Tensor, "B C h w"]:
        """Of a view's residual and of its depth, which is enlarged to the residual's size."""
        depth = functional.interpolate(depth, residual.shape[2:], mode="nearest")
        both = torch.cat([self.residual_conv(residual), self.depth_conv(depth)], 1)
        return self.image_filter(both)

    def modulation(self, fused: Float[Tensor, "B N C"], points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N 2C"]:
        """alpha and beta of `generator.Field.texture` from features and the places of points."""
        return self.local_feat_to_tex_modulations_linear(torch.cat([fused, positional_code(points)], -1))


def positional_code(points: Float[Tensor, "... 3"]) -> Float[Tensor, "... 45"]:
    """p, sin p, cos p, sin 2 p, cos 2 p, ... of the world's coordinates."""
    parts = [points]
    for octave in range(OCTAVES):
        parts += [torch.sin(points * 2**octave), torch.cos(points * 2**octave)]
    return torch.cat(parts, -1)


def read_map(
    features: Float[Tensor, "B C H W"], xy: Float[Tensor, "B N 2"]
) -> tuple[Float[Tensor, "B N C"], Bool[Tensor, "B N"]]:
    """Bilinear over pixel areas (align_corners off), zero beyond the picture; and whether a place is inside it."""
    found = functional.grid_sample(features, xy[:, :, None], align_corners=False)
    return found[..., 0].transpose(1, 2), (xy.abs() <= 1).all(-1)


class Aligner(nn.Module):
    """Residual of the photo and picture of the wanted view -> that residual in the wanted view."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        a, b, c, d = config.aligner_widths
        self.conv_layer1 = nn.Sequential(nn.Conv2d(6, a, 3, 1, 1, bias=False), nn.BatchNorm2d(a), nn.PReLU(a))
        self.conv_layer2 = _units([a, b, b, b], 2)
        self.conv_layer3 = _units([b, c, c, c], 2)
        self.conv_layer4 = _units([c, d, d, d], 2)
        self.dconv_layer1 = _units([c + d, d, b, b], 1)
        self.dconv_layer2 = _units([2 * b, b, a, a], 1)
        self.dconv_layer3 = _units([2 * a, a, 3, 3], 1)

    def forward(self, residual: Float[Tensor, "B 3 H W"], wanted: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        # of channels-last memory torch's backward pass through these layers writes beyond its arrays (2.13, CPU)
        first = self.conv_layer1(torch.cat([residual, wanted], 1).contiguous())
        second = self.conv_layer2(first)
        third = self.conv_layer3(second)
        x = self.conv_layer4(third)
        for skip, layer in ((third, self.dconv_layer1), (second, self.dconv_layer2), (first, self.dconv_layer3)):
            x = functional.interpolate(x, skip.shape[2:], mode="bilinear", align_corners=False)
            x = layer(torch.cat([x, skip], 1))
        return x


def _units(widths: list[int], stride: int) -> nn.Sequential:
    units = [Bottleneck(a, b, 1 if i else stride, excite=False) for i, (a, b) in enumerate(pairwise(widths))]
    return nn.Sequential(*units)


class Fusion(nn.Module):
    """Both features of a point become one: the photo's, scaled and shifted by what the two say together."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.width
        self.encode_enc = ResidualFC(2 * width + 1, width, width)
        self.scale = _two_layers(width)
        self.shift = _two_layers(width)

    def forward(
        self, aligned: Float[Tensor, "B N C"], seen: Float[Tensor, "B N 1"], own: Float[Tensor, "B N C"]
    ) -> Float[Tensor, "B N C"]:
        """`seen`: 1 where the surface at this pixel of the wanted view lies within the photo's picture."""
        e = self.encode_enc(torch.cat([aligned, seen, own], -1))
        return own + own * self.scale(e) + self.shift(e)


def _two_layers(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.LeakyReLU(SLOPE), nn.Linear(width, width))
