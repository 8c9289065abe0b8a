# SPDX-License-Identifier: GPL-3.0-or-later
"""Sizes of the networks, and the fixed map between world and feature pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

SCALE = 0.00927734  # ndc per centimetre
CENTRE = 0.88134766  # y_ndc of the floor; the picture's y points down
INVERSE = 107.789  # centimetres per ndc, as the published back-projection rounds it
CENTRE_CM = 95.0  # height of the picture's centre in that back-projection
DEPTH_UNITS = 256 / 200  # z' = DEPTH_UNITS * z_ndc is what the decoders see
OUTSIDE = 0.9  # occupancy value of points whose projection leaves the picture
DISTANCE = 25 / 128  # (2 value - 1) * DISTANCE estimates the distance in ndc
GRID_LOW, GRID_SIDE = (-128.0, -28.0, -128.0), 256.0  # cm; the box of the published grid


@dataclass(frozen=True)
class Config:
    """Widths; the defaults are those of the published weights."""

    z_dim: int = 512
    w_dim: int = 512
    mapping_layers: int = 2
    resolution: int = 512  # of the feature pictures F
    channel_base: int = 32768  # a block at resolution r has min(channel_base // r, channel_max) channels
    channel_max: int = 512
    feature_channels: int = 16  # of F
    stem: int = 64  # first width of the hourglass filters; a multiple of 32, or of 4 where `groups` is less
    volume: int = 256  # channels of V
    groups: int = 32  # of group normalisation
    shape_widths: tuple[int, ...] = (512, 256, 128)  # hidden layers of mlp_shape
    texture_widths: tuple[int, ...] = (1024, 512, 256, 128)
    refine_width: int = 64  # of the refine net; four times doubled
    discriminator_max: int = 512

    @property
    def volume_size(self) -> int:
        """512 -> 257 -> 128: stride 2 with padding 3, then an average pool."""
        return (self.resolution // 2 + 1) // 2

    @classmethod
    def tiny(cls) -> Config:
        """Same construction, for tests on a CPU."""
        return replace(
            cls(), resolution=64, channel_base=512, channel_max=16, stem=8, volume=16, groups=4,
            shape_widths=(32, 16, 8), texture_widths=(32, 16, 16, 8), refine_width=4, discriminator_max=16,
        )  # fmt: skip


def from_metadata(metadata: Mapping[str, str]) -> Config:
    """Widths as a weights file has them; without a word those of the published weights."""
    facts = json.loads(metadata.get("get3dhuman", "{}"))
    return Config(**{name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()})


def to_metadata(config: Config) -> dict[str, str]:
    return {"get3dhuman": json.dumps(asdict(config))}


def to_ndc(points: Float[Tensor, "... 3"]) -> Float[Tensor, "... 3"]:
    """World centimetres (Y up, facing +Z) to picture coordinates: x right, y down, z towards the viewer in front."""
    return points * points.new_tensor([SCALE, -SCALE, SCALE]) + points.new_tensor([0.0, CENTRE, 0.0])


def to_world(ndc: Float[Tensor, "... 3"]) -> Float[Tensor, "... 3"]:
    """Inverse of `to_ndc`."""
    return (ndc - ndc.new_tensor([0.0, CENTRE, 0.0])) / ndc.new_tensor([SCALE, -SCALE, SCALE])


def grid_points(resolution: int, device: torch.device | str = "cpu") -> Float[Tensor, "R R R 3"]:
    """The published sampling grid, centimetres: axis samples at low + i * side / resolution."""
    axes = [low + torch.arange(resolution, dtype=torch.float64) * (GRID_SIDE / resolution) for low in GRID_LOW]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).float().to(device)
