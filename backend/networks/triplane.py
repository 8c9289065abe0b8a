# SPDX-License-Identifier: GPL-3.0-or-later
"""Tri-planes in oriented, optionally mirrored boxes ("volumes").

After EG3D (Chan et al. 2022, sec. 3.2): a point's feature is read from three axis-aligned planes. Here each volume has
its own box in canonical space, so a head gets as many texels as a pair of legs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Volume:
    """A box: `axes` rows are its unit directions in canonical space; a mirrored one serves x and -x alike."""

    name: str
    centre: tuple[float, float, float]  # metres
    half_size: tuple[float, float, float]  # metres along the box's own axes
    axes: tuple[tuple[float, float, float], ...] = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    mirror: bool = False

    def local(self, points: Float[Tensor, "... 3"]) -> Float[Tensor, "... 3"]:
        """Box coordinates, inside where all are in [-1, 1]."""
        if self.mirror:
            points = torch.cat([points[..., :1].abs(), points[..., 1:]], -1)
        axes = points.new_tensor(self.axes)
        return (points - points.new_tensor(self.centre)) @ axes.T / points.new_tensor(self.half_size)

    def window(self, local: Float[Tensor, "... 3"]) -> Float[Tensor, " ..."]:
        """1 inside, falling to 0 over the outer tenth of the box, so that volumes blend where they overlap."""
        edge = ((1 - local.abs()) / 0.1).clamp(0, 1)
        return (edge * edge * (3 - 2 * edge)).prod(-1)


_PLANES = ((0, 1), (0, 2), (1, 2))


def sample_planes(planes: Float[Tensor, "B 3 C R R"], local: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N 3*C"]:
    """Bilinear features of each point from its three planes, concatenated."""
    b, _, c, r, _ = planes.shape
    at = torch.stack([local[..., list(p)] for p in _PLANES], 1)  # [B, 3, N, 2]
    out = F.grid_sample(
        planes.reshape(b * 3, c, r, r), at.reshape(b * 3, -1, 1, 2), align_corners=True, padding_mode="border"
    )
    return out.reshape(b, 3 * c, -1).transpose(1, 2)


class PlaneBank(nn.Module):
    """Tri-planes as a mean plus a learned linear basis: planes(a) = P_0 + sum_j a_j P_j.

    A linear decoder needs no convolutions at run time and learns from minutes of one CPU core; its capacity is the
    rank. (A modulated-convolution synthesis network has the same interface: coefficients in, planes out.)
    """

    def __init__(self, volume: Volume, rank: int, channels: int, resolution: int) -> None:
        super().__init__()
        self.volume = volume
        self.basis = nn.Parameter(torch.randn(rank + 1, 3, channels, resolution, resolution) * 0.1)

    @property
    def features(self) -> int:
        return 3 * self.basis.shape[2]

    def forward(self, coefficients: Float[Tensor, "B J"]) -> Float[Tensor, "B 3 C R R"]:
        flat = self.basis.flatten(1)
        return torch.addmm(flat[:1], coefficients, flat[1:]).view(-1, *self.basis.shape[1:])


def gather(
    banks: nn.ModuleList, planes: list[Tensor], points: Float[Tensor, "N 3"]
) -> tuple[Float[Tensor, "M F"], Bool[Tensor, " N"]]:
    """Features of one person's points from all volumes that hold them (window-weighted), and which points those are."""
    n = points.shape[0]
    total = points.new_zeros(n)
    feature = points.new_zeros(n, banks[0].features)
    for bank, plane in zip(banks, planes, strict=True):
        local = bank.volume.local(points)
        inside = (local.abs() < 1).all(-1).nonzero().squeeze(1)
        if inside.numel():
            local = local[inside]
            weight = bank.volume.window(local) + 1e-6
            values = torch.cat([sample_planes(plane, chunk[None])[0] for chunk in local.split(1 << 15)])
            feature = feature.index_add(0, inside, values * weight[:, None])
            total = total.index_add(0, inside, weight)
    held = total > 0
    return feature[held] / total[held, None], held
