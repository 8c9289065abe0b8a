# SPDX-License-Identifier: GPL-3.0-or-later
"""What a photo showed of a part, kept in canonical space: it stays where it was on the person when body, pose or other
parts change (E3DGE's local, pixel-aligned detail, laid down once for all views instead of read through the camera).

A map is one RGBA picture, sRGB with its weight: the six sides of the whole body's box, and finer ones of the head's,
each lying on its longer edge, one below the other. A point takes the colour of the sides that it faces, as `PlaneBank`
has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from backend.networks.volumes import Side, Volume, plane_shape, project, six_sides

BODY_BOX = Volume("photo", (0.0, 0.88, 0.08), (0.64, 0.96, 0.34))
HEAD_BOX = Volume("photo_head", (0.0, 1.57, 0.03), (0.14, 0.19, 0.19))
BOXES = ((BODY_BOX, six_sides(0.003)), (HEAD_BOX, six_sides(0.0011)))
FULL = 0.35  # share of a point's sides that the photo must have shown for its colours to count wholly


@dataclass(frozen=True)
class Place:
    """Where a side lies in the picture."""

    volume: Volume
    side: Side
    row: int
    shape: tuple[int, int]  # of the plane, as `plane_shape` has it
    lying: bool  # rows and columns have changed places


def _places() -> tuple[list[Place], tuple[int, int]]:
    out, row, width = [], 0, 0
    for volume, sides in BOXES:
        for side in sides:
            rows, columns = plane_shape(volume, side)
            lying = rows > columns
            out.append(Place(volume, side, row, (rows, columns), lying))
            row += min(rows, columns)
            width = max(width, rows, columns)
    return out, (row, width)


PLACES, SHAPE = _places()


def planes_of(picture: UInt8[Tensor, "H W 4"]) -> list[Float[Tensor, "4 h w"]]:
    """The sides of a map, premultiplied, 0..1. Raises ValueError for a picture of another size."""
    if tuple(picture.shape) != (*SHAPE, 4):
        raise ValueError(f"a photo map is {SHAPE[0]} x {SHAPE[1]} pixels with alpha, not {list(picture.shape)}")
    out = []
    for place in PLACES:
        rows, columns = sorted(place.shape)
        plane = picture[place.row : place.row + rows, :columns].float().movedim(2, 0) / 255
        plane = plane.transpose(1, 2) if place.lying else plane
        out.append(torch.cat([plane[:3] * plane[3:], plane[3:]]))
    return out


def picture_of(planes: Sequence[Float[Tensor, "4 h w"]]) -> UInt8[Tensor, "H W 4"]:
    """The map of premultiplied sides: the inverse of `planes_of`, to rounding."""
    picture = torch.zeros(*SHAPE, 4, dtype=torch.uint8)
    for place, plane in zip(PLACES, planes, strict=True):
        straight = torch.cat([plane[:3] / plane[3:].clamp(min=1e-6), plane[3:]]).clamp(0, 1) * (plane[3:] > 0)
        straight = straight.transpose(1, 2) if place.lying else straight
        pixels = (straight * 255 + 0.5).to(torch.uint8).movedim(0, 2)
        picture[place.row : place.row + pixels.shape[0], : pixels.shape[1]] = pixels
    return picture


def _weights(side: Side, facing: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
    return (side.sign * facing[:, side.axis]).clamp(min=0) ** 3


def _hold(volume: Volume, points: Float[Tensor, "N 3"]) -> tuple[Tensor, Tensor]:
    """Box coordinates, and how much the box counts there."""
    local = volume.local(points)
    return local, (local.abs() < 1).all(1) * volume.window(local)


def read(
    planes: Sequence[Float[Tensor, "4 h w"]], points: Float[Tensor, "N 3"], facing: Float[Tensor, "N 3"]
) -> tuple[Float[Tensor, "N 3"], Float[Tensor, "N 1"]]:
    """Colours at canonical points whose surfaces face `facing`, and how far they count, 0..1; the head's own box over
    the body's."""
    color, weight = points.new_zeros(len(points), 3), points.new_zeros(len(points), 1)
    start = 0
    for volume, sides in BOXES:
        local, held = _hold(volume, points)
        at = (held > 0).nonzero().squeeze(1)
        total, whole = points.new_zeros(len(at), 4), points.new_full((len(at), 1), 1e-6)
        for i, side in enumerate(sides, start):
            share = _weights(side, facing[at])[:, None]
            grid = project(side, local[at])[None, None]
            total = total + share * F.grid_sample(planes[i][None], grid, align_corners=True)[0, :, 0].T
            whole = whole + share
        start += len(sides)
        alpha = (total[:, 3:] / whole / FULL).clamp(0, 1)
        alpha = alpha * alpha * (3 - 2 * alpha)
        found = total[:, :3] / total[:, 3:].clamp(min=1e-6)
        over = alpha * held[at, None]
        color = color.index_copy(0, at, color[at] + over * (found - color[at]))
        weight = weight.index_copy(0, at, weight[at] + over * (1 - weight[at]))
    return color, weight


class Canvas:
    """Photos' pixels gathered on the sides of one part."""

    def __init__(self) -> None:
        self.planes = [torch.zeros(4, *place.shape) for place in PLACES]

    def lay(
        self,
        points: Float[Tensor, "N 3"],
        facing: Float[Tensor, "N 3"],
        colors: Float[Tensor, "N 3"],
        weights: Float[Tensor, " N"],
        box: Volume,
    ) -> None:
        """Pixels on one box's sides, each spread over the four texels about it."""
        local, held = _hold(box, points)
        for place, plane in zip(PLACES, self.planes, strict=True):
            if place.volume is not box:
                continue
            share = _weights(place.side, facing) * weights * (held > 0)
            at = (share > 1e-3).nonzero().squeeze(1)
            if not at.numel():
                continue
            rows, columns = place.shape
            where = (project(place.side, local[at]) + 1) / 2 * local.new_tensor([columns - 1, rows - 1])
            low = where.floor().long()
            part = where - low
            flat = plane.view(4, -1)
            values = torch.cat([colors[at], torch.ones(len(at), 1)], 1) * share[at, None]
            for dx in (0, 1):
                for dy in (0, 1):
                    x, y = low[:, 0] + dx, low[:, 1] + dy
                    inside = (x >= 0) & (x < columns) & (y >= 0) & (y < rows)
                    w = (part[:, 0] if dx else 1 - part[:, 0]) * (part[:, 1] if dy else 1 - part[:, 1])
                    flat.index_add_(1, (y * columns + x)[inside], (values * w[:, None])[inside].T)

    def finish(self, symmetric: bool) -> UInt8[Tensor, "H W 4"] | None:
        """Means of what was laid, small gaps closed, and what only the mirrored side saw taken from there. None if
        nothing was laid."""
        out = [_closed(plane) for plane in self.planes]
        if not any(bool((plane[3] > 0).any()) for plane in out):
            return None
        if symmetric:
            other = _mirrored(out)
            out = [a + (1 - a[3:]) * b for a, b in zip(out, other, strict=True)]
        return picture_of(out)


def _closed(plane: Float[Tensor, "4 h w"], reach: int = 2) -> Float[Tensor, "4 h w"]:
    """From sums to premultiplied means; texels within `reach` of laid ones take their mean, so that splats join."""
    weight = plane[3:]
    laid: Bool[Tensor, "1 h w"] = weight > 1e-4
    color = torch.where(laid, plane[:3] / weight.clamp(min=1e-6), 0.0)
    for _ in range(reach):
        both = torch.cat([color * laid, laid.float()])[None]
        near = F.avg_pool2d(both, 3, 1, 1)[0]
        grown = ~laid & (near[3:] > 0)
        color = torch.where(grown, near[:3] / near[3:].clamp(min=1e-6), color)
        laid = laid | grown
    shrunk = laid.float()[None]
    for _ in range(reach):  # back to where pixels were: gaps are closed, the outline has not moved
        shrunk = -F.max_pool2d(-shrunk, 3, 1, 1)
    alpha = F.avg_pool2d(F.pad(shrunk, (2,) * 4, mode="replicate"), 5, 1)[0] * shrunk[0]
    return torch.cat([color * alpha, alpha])


def _mirrored(planes: Sequence[Float[Tensor, "4 h w"]]) -> list[Float[Tensor, "4 h w"]]:
    """The sides of the mirrored person (x -> -x)."""
    out = []
    for place in PLACES:
        sign = -place.side.sign if place.side.axis == 0 else place.side.sign
        for other, plane in zip(PLACES, planes, strict=True):
            if other.volume is place.volume and other.side.axis == place.side.axis and other.side.sign == sign:
                out.append(plane if place.side.axis == 0 else plane.flip(1))  # rows run along x
    return out
