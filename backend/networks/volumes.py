# SPDX-License-Identifier: GPL-3.0-or-later
"""Linear bases of local volumes and colour planes in oriented, optionally mirrored boxes.

A basis is a set of dense grids (or planes) that a person's coefficients mix into one; only that one is read. The read
is trilinear (bilinear), so sharp data stay sharp, a mix of two garments lies between them, and a point costs the same
however many garments the basis knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
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

    def turned(self, points: Float[Tensor, "... 3"], directions: Float[Tensor, "... 3"]) -> Float[Tensor, "... 3"]:
        """Directions at points along the box's own axes."""
        if self.mirror:
            sign = torch.where(points[..., :1] < 0, -1.0, 1.0)
            directions = torch.cat([directions[..., :1] * sign, directions[..., 1:]], -1)
        return directions @ directions.new_tensor(self.axes).T

    def window(self, local: Float[Tensor, "... 3"]) -> Float[Tensor, " ..."]:
        """1 inside, falling to 0 over the outer tenth of the box, so that volumes blend where they overlap."""
        edge = ((1 - local.abs()) / 0.1).clamp(0, 1)
        return (edge * edge * (3 - 2 * edge)).prod(-1)

    def nodes(self, step: float) -> Float[Tensor, "X Y Z 3"]:
        """Canonical positions of a grid of about this step over the box (the positive side of a mirrored one)."""
        ends = [torch.linspace(-1, 1, n) for n in self.shape(step)]
        local = torch.stack(torch.meshgrid(*ends, indexing="ij"), -1) * torch.tensor(self.half_size)
        return local @ torch.tensor(self.axes) + torch.tensor(self.centre)

    def shape(self, step: float) -> tuple[int, int, int]:
        x, y, z = (round(2 * h / step) + 1 for h in self.half_size)
        return x, y, z


def read_grid(grid: Float[Tensor, "C X Y Z"], local: Float[Tensor, "N 3"]) -> Float[Tensor, "N C"]:
    """Trilinear values at box coordinates; those beyond the box take the border's."""
    at = local.flip(-1)[None, None, None]  # grid_sample wants the last axis first
    return F.grid_sample(grid[None], at, align_corners=True, padding_mode="border")[0, :, 0, 0].T


class GridBank(nn.Module):
    """Scalar volumes as a linear basis: values(a) = sum_j a_j G_j."""

    def __init__(self, volume: Volume, rank: int, step: float) -> None:
        super().__init__()
        self.volume = volume
        self.basis = nn.Parameter(torch.zeros(rank, *volume.shape(step)))

    def forward(self, a: Float[Tensor, " J"]) -> Float[Tensor, "1 X Y Z"]:
        return _mix(a, self.basis)[None]


@dataclass(frozen=True)
class Side:
    """One face of a box that colours are projected on: +axis or -axis, with its texel size in metres."""

    axis: int
    sign: int
    texel: float


def six_sides(texel: float) -> tuple[Side, ...]:
    """All faces of a box alike."""
    return tuple(Side(axis, sign, texel) for axis in range(3) for sign in (1, -1))


class PlaneBank(nn.Module):
    """Colours on the sides of a box as a linear basis.

    A point takes the colour of the sides that it faces (tri-planar mapping, told apart by sign), weighted by the cube
    of the cosine. The direction that a point faces is given by a smooth guide, not by the garment, so that folds and
    noses do not jump between planes.
    """

    def __init__(self, volume: Volume, sides: Sequence[Side], rank: int, channels: int) -> None:
        super().__init__()
        self.volume, self.sides = volume, tuple(sides)
        self.planes = nn.ParameterList(torch.zeros(rank, channels, *plane_shape(volume, side)) for side in self.sides)

    def forward(self, a: Float[Tensor, " J"]) -> list[Float[Tensor, "C H W"]]:
        return [_mix(a, basis) for basis in self.planes]

    def weights(self, directions: Float[Tensor, "N 3"]) -> Float[Tensor, "N S"]:
        """How much each side counts for points that face `directions` (in box axes); rows sum to 1."""
        w = torch.stack([(side.sign * directions[:, side.axis]).clamp(min=0) for side in self.sides], 1) ** 3 + 1e-6
        return w / w.sum(1, keepdim=True)

    def coverage(self, directions: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        """How well the sides see points that face `directions` (in box axes): 0 edge-on, 1 from 60 degrees off."""
        best = torch.stack([side.sign * directions[:, side.axis] for side in self.sides], 1).amax(1)
        t = ((best - 0.25) / 0.25).clamp(0, 1)
        return t * t * (3 - 2 * t)

    def read(
        self, planes: Sequence[Tensor], local: Float[Tensor, "N 3"], directions: Float[Tensor, "N 3"]
    ) -> Float[Tensor, "N C"]:
        """Blended values at box coordinates that face `directions` (in box axes)."""
        w = self.weights(directions)
        total = local.new_zeros(len(local), planes[0].shape[0])
        for i, (side, plane) in enumerate(zip(self.sides, planes, strict=True)):
            at = (w[:, i] > 1e-3).nonzero().squeeze(1)
            if at.numel():
                values = F.grid_sample(
                    plane[None], project(side, local[at])[None, None], align_corners=True, padding_mode="border"
                )[0, :, 0].T
                total = total.index_add(0, at, values * w[at, i : i + 1])
        return total


def plane_shape(volume: Volume, side: Side) -> tuple[int, int]:
    """Rows and columns of a side: the two other axes in order."""
    rows, columns = (round(2 * volume.half_size[k] / side.texel) + 1 for k in range(3) if k != side.axis)
    return rows, columns


def project(side: Side, local: Float[Tensor, "N 3"]) -> Float[Tensor, "N 2"]:
    """Box coordinates -> plane coordinates (column, row) in [-1, 1], as grid_sample has them."""
    row, column = (k for k in range(3) if k != side.axis)
    return torch.stack([local[:, column], local[:, row]], 1)


def _mix(a: Float[Tensor, " J"], basis: Float[Tensor, "J ..."]) -> Float[Tensor, ...]:
    if not (a.requires_grad or basis.requires_grad):  # most coefficients are zero: a person wears one shirt
        used = a.abs() > 1e-6
        a, basis = a[used], basis[used]
    return torch.tensordot(a, basis, 1)
