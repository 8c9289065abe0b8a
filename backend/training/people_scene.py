# SPDX-License-Identifier: GPL-3.0-or-later
"""A person of the `people` family as a scene for `render.volume`: parts in person space, asked one by one.

Fields live in canonical space and know the way out of it (`offset`); rays need the way back in. It is found once per
person on a coarse lattice by fixed-point iteration, x <- p - offset(x), and read from there. No gradient goes through
it: where points go is the body's linear model, which the adversarial stage leaves alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from backend.families.people.model import PeopleField
from backend.render.volume import AWAY

SPACING = 0.04  # metres between the nodes of the lattice; offsets vary slowly
ROUNDS = 20
KNOWN = 0.02  # metres: farther off, distances of parts are cut off or guessed
NEAR = 0.06  # metres from the surface that the person's box has to hold


class Lattice:
    """Vectors on the nodes of a box, read trilinearly; constant beyond it."""

    def __init__(self, box: Float[Tensor, "2 3"], shape: Sequence[int]) -> None:
        self.box, self.shape = box, tuple(shape)
        self.values: Tensor | None = None  # [1, 3, X, Y, Z]

    @staticmethod
    def over(box: Float[Tensor, "2 3"], spacing: float) -> Lattice:
        counts = ((box[1] - box[0]) / spacing).ceil().long() + 1
        return Lattice(box, counts.tolist())

    def nodes(self) -> Float[Tensor, "N 3"]:
        axes = [torch.linspace(float(a), float(b), n, device=self.box.device)
                for a, b, n in zip(*self.box, self.shape, strict=True)]  # fmt: skip
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)

    def fill(self, vectors: Float[Tensor, "N 3"]) -> Lattice:
        self.values = vectors.detach().T.reshape(1, 3, *self.shape).contiguous()
        return self

    def __call__(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        assert self.values is not None
        local = (points - self.box[0]) / (self.box[1] - self.box[0]) * 2 - 1
        at = local.flip(1)[None, None, None].to(self.values.dtype)  # grid_sample wants the last axis first
        return F.grid_sample(self.values, at, align_corners=True, padding_mode="border")[0, :, 0, 0].T


_neighbours: weakref.WeakKeyDictionary[Any, tuple[Lattice, Tensor, Tensor]] = weakref.WeakKeyDictionary()
"""Per model: the canonical lattice with the control points that carry each node. People of a model share them."""


def _offsets(field: PeopleField) -> Lattice:
    if field.model not in _neighbours:
        lattice = Lattice.over(field.bounds, SPACING)
        _neighbours[field.model] = (lattice, *field._neighbours(lattice.nodes()))
    lattice, index, weight = _neighbours[field.model]
    own = Lattice(lattice.box, lattice.shape)
    return own.fill(torch.einsum("nk,nkc->nc", weight, field.displacement.detach()[index]))


class PeopleScene:
    """See `render.volume.Scene`. `bounds` and all points are in person space, feet on y = 0."""

    @torch.no_grad()
    def __init__(self, field: PeopleField) -> None:
        self.field = field
        self.parts = ("body", *field.worn)
        out = _offsets(field)
        nodes = out.nodes()
        near = nodes[field.sdf(nodes) < NEAR]
        moved = near + out(near)
        box = torch.stack([moved.amin(0) - SPACING / 2, moved.amax(0) + SPACING / 2])
        self.back = Lattice.over(box, SPACING)
        goal = self.back.nodes()
        x = goal
        for _ in range(ROUNDS):
            x = goal - out(x)
        self.back.fill(goal - x)
        self.bounds = box
        self.floor = 0.0
        self.floor = self._lowest()
        self.bounds = box - box.new_tensor([0, self.floor, 0])

    def canonical(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        """Person space to canonical space."""
        points = points + points.new_tensor([0, self.floor, 0])
        return points - self.back(points)

    def joint(self, name: str) -> Float[Tensor, "2 3"]:
        """Head and tail of a bone in person space."""
        rig = self.field.rig
        at = rig.names.index(name)
        return torch.stack([rig.heads[at], rig.tails[at]]).detach() - rig.heads.new_tensor([0, self.floor, 0])

    def distances(self, points: Float[Tensor, "N 3"], asked: Bool[Tensor, "N K"] | None = None) -> Float[Tensor, "N K"]:
        x = self.canonical(points)
        if asked is None:
            return beyond(self._layers(x, self.field.worn))
        bits = (asked[:, 1:].long() << torch.arange(len(self.parts) - 1, device=x.device)).sum(1)
        out = x.new_full((len(x), len(self.parts)), AWAY)
        for pattern in bits.unique().tolist():  # rays mostly see the same few parts
            at = (bits == pattern).nonzero().squeeze(1)
            worn = [p for i, p in enumerate(self.field.worn) if pattern >> i & 1]
            columns = [0] + [i + 1 for i in range(len(self.field.worn)) if pattern >> i & 1]
            values = x.new_full((len(at), len(self.parts)), AWAY)
            index = torch.tensor(columns, device=x.device)
            values = values.index_copy(1, index, beyond(self._layers(x[at], worn)))
            out = out.index_copy(0, at, values)
        return out

    def color(self, part: int, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        return part_color(self.field, self.parts[part], self.canonical(points))

    def _layers(self, x: Tensor, worn: Sequence[str]) -> Float[Tensor, "N K"]:
        return part_distances(self.field, x, worn)

    def _lowest(self) -> float:
        """Height of the lowest point of the surface: where columns of points under the feet first meet it."""
        low, high = self.bounds
        x = torch.linspace(float(low[0]), float(high[0]), 48, device=low.device)
        y = torch.linspace(float(low[1]) - 0.01, float(low[1]) + 0.2, 22, device=low.device)
        z = torch.linspace(-0.2, 0.3, 24, device=low.device)
        columns = torch.stack(torch.meshgrid(x, z, y, indexing="ij"), -1)[..., [0, 2, 1]].reshape(-1, 3)
        s = self.distances(columns).amin(1).reshape(-1, len(y))
        crossed = (s[:, :-1] > 0) & (s[:, 1:] <= 0)
        at = y[:-1] + y.diff() * s[:, :-1] / (s[:, :-1] - s[:, 1:]).clamp(min=1e-9)
        return float(torch.where(crossed, at, high[1]).amin())


def beyond(s: Tensor) -> Tensor:
    """Distances that go on growing, three times as steeply, where those of the parts stop: else the little density
    that a softened surface has 3 cm off would add up to haze."""
    return s + 2 * (s - KNOWN).clamp(min=0)


def part_distances(
    field: PeopleField, x: Float[Tensor, "N 3"], worn: Sequence[str] | None = None
) -> Float[Tensor, "N K"]:
    """Signed distances to the body and to what is `worn` (all there is, if None) at canonical points."""
    return torch.stack(field.person.distances(x, worn)[0], 1)


def part_color(field: PeopleField, part: str, x: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
    """Colour of one part at canonical points, whether or not it is the outermost there."""
    return field.person.color(part, x, field.model.networks.body_field.facing(x)).clamp(0, 1)
