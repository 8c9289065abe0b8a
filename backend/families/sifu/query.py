# SPDX-License-Identifier: GPL-3.0-or-later
"""What the point decoders are told of a point: spatial features, features carried by the body, normals, and the body.

    input = [ S, P, N, sdf 1, code 3, normal 3, visible 1 ]

S are the planes' first halves at the point; P their second halves, read at the body's vertices and carried to the
point by the triangle nearest to it; N is the normal map's features of the side that the viewer would see there.
Points are in the network's frame: x right, y down, z to the viewer, within [-1, 1]^3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from backend.families.sifu.config import Kind
from backend.families.sifu.networks import PointDecoders
from backend.geometry.body import BodyMesh

VISIBLE = 0.1  # of the corners' visibility, for a point to count as seen
CHUNK = 1 << 14


def read_plane(plane: Float[Tensor, "C H W"], at: Float[Tensor, "N 2"]) -> Float[Tensor, "N C"]:
    """Bilinear values at (column, row); the corner pixels' centres lie at +-1, beyond is zero."""
    return functional.grid_sample(plane[None], at[None, :, None], align_corners=True)[0, :, :, 0].T


def read_planes(
    planes: Mapping[str, Float[Tensor, "C H W"]], points: Float[Tensor, "N 3"], kind: Kind, half: int
) -> Float[Tensor, "N D"]:
    """The spatial (half 0) or prior (half 1) channels of all planes at points: the viewer's own plane, then the mean of
    the others."""

    def read(name: str, column: int, row: int) -> Tensor:
        plane = planes[name]
        return read_plane(plane.chunk(2)[half], points[:, [column, row]])

    if kind == "gta":
        return torch.cat([read("xy", 0, 1), (read("yz", 1, 2) + read("xz", 0, 2)) / 2], 1)
    sides = (read("B", 0, 1) + read("R", 2, 1) + read("L", 2, 1)) / 3
    return torch.cat([read("F", 0, 1), sides], 1)


class About(NamedTuple):
    """What the body alone says of points."""

    corners: Int[Tensor, "N 3"]  # of the nearest triangle
    weights: Float[Tensor, "N 3"]  # of the point's foot on its plane, unclamped
    values: Float[Tensor, "N 8"]  # sdf 1, code 3, normal 3, visible 1


class BodySpeaker:
    """A body mesh in the network's frame with what its vertices know."""

    def __init__(self, body: BodyMesh, legacy_visibility: bool = False) -> None:
        self.body = body
        outward = body.winding_normals * body.vertices.new_tensor([-1.0, 1.0, -1.0])
        self.seen = body.seen(legacy_visibility)
        self.on_vertices = torch.cat([body.codes, outward, self.seen[:, None].to(outward)], 1)

    def about(self, points: Float[Tensor, "N 3"]) -> About:
        """Differentiable with respect to points."""
        near = self.body.nearest(points)
        sdf = self.body.signed_distance(points, near) / math.sqrt(3)
        code, normal, seen = self.body.carry(self.on_vertices.to(points), near).split((3, 3, 1), 1)
        values = [sdf[:, None], code.clamp(0, 1), functional.normalize(normal, dim=1), (seen >= VISIBLE).to(points)]
        return About(self.body.faces.to(points.device)[near.face], near.weights, torch.cat(values, 1))


def carry(attributes: Float[Tensor, "V C"], about: About) -> Float[Tensor, "N C"]:
    """Attributes of the body's vertices at the points' feet."""
    return functional.embedding_bag(about.corners, attributes, per_sample_weights=about.weights, mode="sum")


def features(
    planes: Mapping[str, Float[Tensor, "C H W"]],
    carried: Float[Tensor, "V D"],
    points: Float[Tensor, "N 3"],
    about: About,
    kind: Kind,
) -> Float[Tensor, "N F"]:
    """The decoders' input. `carried` is `read_planes` of the body's vertices with half 1."""
    visible = about.values[:, -1:] > 0
    front, back = planes["N"].chunk(2)
    normals = torch.where(visible, read_plane(front, points[:, :2]), read_plane(back, points[:, :2]))
    return torch.cat([read_planes(planes, points, kind, 0), carry(carried, about), normals, about.values], 1)


class Query:
    """One person: planes, normal features and a body, ready to be asked. Differentiable with respect to points."""

    def __init__(self, planes: Mapping[str, Float[Tensor, "C H W"]], speaker: BodySpeaker, kind: Kind) -> None:
        """`planes` as `Reconstructor.planes` gives them, without their batch, "N" among them."""
        self.planes, self.speaker = planes, speaker
        self.kind: Kind = kind
        self.carried = read_planes(planes, speaker.body.vertices.to(planes["N"]), kind, 1)

    def features(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N F"]:
        return features(self.planes, self.carried, points, self.speaker.about(points), self.kind)


class Answers:
    """Occupancy and colour of one person at points of the network's frame; points in pieces, no batch."""

    def __init__(self, query: Query, decoders: PointDecoders, device: torch.device | str = "cpu") -> None:
        """Points come and answers go on the CPU; `device` is the networks'."""
        self.query, self.decoders, self.device = query, decoders, torch.device(device)

    def occupancy(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        """1 inside, 0 outside and beyond the cube."""
        parts = [self.decoders.occupancy(self._features(p))[0].to(points) for p in points.split(CHUNK)]
        within = (points.abs() < 1).all(1)
        return (torch.cat(parts) if parts else points[:, 0]) * within

    def color(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        """sRGB in 0..1."""
        parts = [self.decoders.color(self._features(p))[0].to(points) for p in points.split(CHUNK)]
        return torch.cat(parts) if parts else points

    def _features(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "1 F N"]:
        return self.query.features(points.to(self.device)).T[None]
