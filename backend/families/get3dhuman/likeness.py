# SPDX-License-Identifier: GPL-3.0-or-later
"""How much people look like people: the Frechet distance between pictures of traced fields and pictures of people that
training does not see, from the same sides (features: `evaluation.features`).

A shape, which has no colours yet, is seen by the normals that its depth has; real people's normals come from their
depth pictures in the same way.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from backend.evaluation.features import Target
from backend.families.get3dhuman import losses
from backend.families.get3dhuman.colors import Colors
from backend.families.get3dhuman.networks import Get3DHuman
from backend.families.get3dhuman.people import DEEPEST, People, Seen, angle
from backend.families.get3dhuman.reading import Reader
from backend.families.get3dhuman.teacher import Teacher
from backend.families.get3dhuman.tracer import Occupancy, trace_quickly
from backend.families.get3dhuman.training import Branch
from backend.training.renders import Item, View

Volumes = tuple[Float[Tensor, "C h w"], Float[Tensor, "C h w"] | None]
"""V_s and V_t of a person; a look at the shape needs no V_t."""


def of_people(seen: Seen, look: Branch) -> Float[Tensor, "B 3 R R"]:
    """In 0..1 on white."""
    shown = losses.normals_of_depth(seen.depth) if look == "shape" else seen.picture
    return torch.where(seen.mask, (shown + 1) / 2, 1.0)


@torch.no_grad()
def of_field(
    networks: Get3DHuman | Teacher, volumes: Volumes, look: Branch, size: int, angles: Sequence[float] = (0.0,)
) -> Float[Tensor, "A 3 R R"]:
    """The same of a person's field, traced."""
    shape, texture = volumes
    inside, color = Reader(networks.mlp_shape, shape), None
    if look == "texture":
        assert texture is not None, "colours are asked for"
        color = Reader(networks.mlp_texture, torch.cat([shape, texture]))
    seen = [seen_from(turned, lambda p: inside(p)[:, 0], color, size, shape) for turned in angles]
    return torch.cat([of_people(one, look) for one in seen])


@torch.no_grad()
def seen_from(turned: float, occupancy: Occupancy, color: Colors | None, size: int, like: Tensor) -> Seen:
    """A field as `People.seen_by` gives a person; grey without `color`."""
    view = trace_quickly(occupancy, size, turned, like)
    picture = torch.zeros_like(view.points)
    if color is not None:
        picture[view.mask] = color(view.ndc[view.mask]) * 2 - 1
    mask = view.mask[None, None]
    depth = torch.where(mask, (view.depth - 1).clamp(-1, DEEPEST), 1.0)
    return Seen(picture.movedim(2, 0)[None], mask, losses.normals_of_depth(depth), depth)


class Likeness:
    """Measures one look, on about `count` pictures."""

    def __init__(self, people: People, items: Sequence[Item], look: Branch, count: int) -> None:
        """`items` are real people to compare with; every person is seen by all level cameras of one of them."""
        self.people = people
        self.look: Branch = look
        sides = [_level(item) for item in items]
        total = list(itertools.accumulate(map(len, sides)))
        self.sides = [views for views, so_far in zip(sides, total) if so_far <= max(count, total[0])]
        self.target = Target(self._real(self.sides))

    def __len__(self) -> int:
        """People that `distance` wants."""
        return len(self.sides)

    def distance(self, networks: Get3DHuman | Teacher, volumes: Iterable[Volumes]) -> float:
        pictures = [
            of_field(networks, pair, self.look, self.people.size, [angle(view) or 0.0 for view in views]).cpu()
            for pair, views in zip(volumes, self.sides, strict=True)
        ]
        return self.target.distance(torch.cat(pictures))

    def of_real(self, items: Sequence[Item]) -> float:
        """What other real people get, as many at most: no generator can be expected to get less."""
        return self.target.distance(self._real(map(_level, items[: len(self)])))

    def _real(self, sides: Iterable[Sequence[View]]) -> Float[Tensor, "N 3 R R"]:
        return of_people(self.people.seen_by(list(itertools.chain.from_iterable(sides))), self.look)


def _level(item: Item) -> list[View]:
    views = [View(item, name) for name in sorted(item.cameras)]
    return [view for view in views if angle(view) is not None]
