# SPDX-License-Identifier: GPL-3.0-or-later
"""People in a folder of orthographic renders (backend/training/README.md), as the prior network learns from them.

The picture is the front view. What is inside follows from the depth of all views: a point is outside if some view sees
through it or past it. So what no view sees counts as solid, as in scans that were closed. Occupancy goes from 0 to 1
over `config.DISTANCE` before and behind the surface: the tracer reads distances from it, and would leap over an arm if
it were a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.spatial import cKDTree
from torch import Tensor

from backend.families.get3dhuman.config import CENTRE, DISTANCE, SCALE
from backend.families.get3dhuman.losses import DISPLACED_CM
from backend.protocol import PopulaceError
from backend.training.renders import Item, Renders, View
from backend.training.renders_blender import CENTRE_M, HALF_M

CM = 100.0
FRONT = 0.999  # cosine between the front camera's back and +Z, at least
SLACK_M = 0.005  # a point so little before what a view sees is still surface
DEEPEST = 0.79  # of a body's depth picture: `losses.BACKGROUND` is no surface
FARTHEST = 3.0  # of a code's numbers: one rare hat shall not be all that is said of a person
COLOR_CM = 0.5  # standard deviation of the points whose colours are learned


@dataclass(frozen=True)
class Seen:
    """B people, each as one camera sees them."""

    picture: Float[Tensor, "B 3 R R"]  # -1..1, 0 where there is nobody
    mask: Bool[Tensor, "B 1 R R"]
    normal: Float[Tensor, "B 3 R R"]
    depth: Float[Tensor, "B 1 R R"]  # -1 nearest, 1 background: z_ndc = -depth

    def to(self, device: torch.device) -> Seen:
        return Seen(*(getattr(self, name).to(device) for name in ("picture", "mask", "normal", "depth")))


def angle(view: View) -> float | None:
    """From where a level view looks, radians about Y as the tracer turns; None if it looks up, down or askew."""
    return math.atan2(-view.c2w[0, 2], view.c2w[2, 2]) if view.c2w[1, 1] > FRONT else None


class People:
    """Raises PopulaceError("invalid_request") unless the folder is framed as the feature pictures are."""

    def __init__(self, renders: Renders) -> None:
        self.renders, self.size = renders, renders.size
        half = HALF_M * self.size / (self.size - 1)
        if renders.lens.fov_y is not None or abs(renders.lens.half_height / half - 1) > 0.005:
            found = "perspective" if renders.lens.fov_y is not None else f"half_height {renders.lens.half_height:g}"
            raise PopulaceError("invalid_request", f"The renders in {renders.folder} are not framed as Get3DHuman's "
                                f"pictures: {found} instead of half_height {half:.5f}.",
                                "Render them with: populace renders --for get3dhuman.")  # fmt: skip
        self.items = renders.items
        self._trees: dict[str, cKDTree] = {}
        self.front: dict[str, View] = {}
        for view in renders.views:
            middle = np.array([0.0, CENTRE_M, 0.0]) - view.c2w[:3, 3]
            if abs(view.c2w[:3, 0] @ middle) > 0.005 or abs(view.c2w[:3, 1] @ middle) > 0.005:
                raise PopulaceError("invalid_request", f"The camera of {view.file()} does not look at (0, {CENTRE_M}, "
                                    "0), the middle of Get3DHuman's pictures.", "Render it again.")  # fmt: skip
            if view.c2w[2, 2] > FRONT:
                self.front[view.item.name] = view
        for item in self.items:
            if item.name not in self.front or len(item.cameras) < 2:
                raise PopulaceError("invalid_request", f"{item.name} has no front view (a camera on +Z looking along "
                                    "-Z) or no other one.", "Get3DHuman learns from both sides at least.")  # fmt: skip

    def seen(self, items: Sequence[Item]) -> Seen:
        """From the front."""
        return self.seen_by([self.front[item.name] for item in items])

    def seen_by(self, views: Sequence[View]) -> Seen:
        rgba = torch.stack([torch.from_numpy(self.renders.rgba(v)) for v in views]).permute(0, 3, 1, 2)
        depth = torch.stack([torch.from_numpy(self.renders.depth(v)) for v in views])[:, None]
        normal = torch.stack([torch.from_numpy(self.renders.normal(v)) for v in views]).permute(0, 3, 1, 2)
        mask = (rgba[:, 3:] > 127) & (depth > 0)
        axis = np.array([0.0, CENTRE_M, 0.0])  # depth counts from here
        eye = torch.tensor([float((v.c2w[:3, 3] - axis) @ v.c2w[:3, 2]) for v in views])
        away = ((depth - eye[:, None, None, None]) * (CM * SCALE)).clamp(-1, DEEPEST)
        picture = torch.where(mask, rgba[:, :3].float() / 127.5 - 1, 0.0)
        return Seen(picture, mask, torch.where(mask, normal, 0.0), torch.where(mask, away, 1.0))

    def occupancy(
        self, item: Item, count: int, rng: np.random.Generator
    ) -> tuple[Float[Tensor, "N 3"], Float[Tensor, " N"]]:
        """Points (ndc), half of them about the surface, the others anywhere near the person; 0 inside, 1 outside, 0.5
        at the surface, as `tracer.estimate` reads it."""
        surface = self._surface(item, count - count // 2, rng)[0]
        about = surface + rng.normal(0, DISPLACED_CM / CM, surface.shape)
        near = DISTANCE / (CM * SCALE)
        points = np.concatenate([about, rng.uniform(surface.min(0) - near, surface.max(0) + near, (count // 2, 3))])
        away = self._met(item).query(points)[0] / near
        value = 0.5 + np.where(self.inside(item, points), -away, away) / 2
        ndc = to_picture(points).clamp(-0.999, 0.999)
        return ndc, torch.from_numpy(value.clip(0, 1).astype(np.float32))

    def colors(
        self, item: Item, count: int, rng: np.random.Generator
    ) -> tuple[Float[Tensor, "N 3"], Float[Tensor, "N 3"]]:
        """Points (ndc) by the surface, from all views alike, and their sRGB in 0..1."""
        surface, colors = self._surface(item, count, rng)
        moved = surface + rng.normal(0, COLOR_CM / CM, surface.shape)
        return to_picture(moved).clamp(-0.999, 0.999), torch.from_numpy(colors)

    def inside(self, item: Item, points: Float[np.ndarray, "N 3"]) -> Bool[np.ndarray, " N"]:
        """Whether no view sees through these points, metres."""
        out = np.ones(len(points), bool)
        for name in item.cameras:
            view = View(item, name)
            local = (points - view.c2w[:3, 3]) @ view.c2w[:3, :3]
            half = self.renders.lens.half_height
            column = np.floor((local[:, 0] / half + 1) / 2 * self.size).astype(int)
            row = np.floor((1 - local[:, 1] / half) / 2 * self.size).astype(int)
            shown = (column >= 0) & (column < self.size) & (row >= 0) & (row < self.size)
            depth = self.renders.depth(view)[row.clip(0, self.size - 1), column.clip(0, self.size - 1)]
            out &= shown & (depth > 0) & (-local[:, 2] >= depth - SLACK_M)
        return out

    def _met(self, item: Item) -> cKDTree:
        """What the pixels of all views met, metres."""
        if item.name not in self._trees:
            found = []
            for name in item.cameras:
                depth = self.renders.depth(View(item, name))
                row, column = np.nonzero(depth > 0)
                found.append(self._places(View(item, name), row + 0.5, column + 0.5, depth[row, column]))
            self._trees[item.name] = cKDTree(np.concatenate(found))
        return self._trees[item.name]

    def _places(
        self, view: View, row: Float[np.ndarray, " N"], column: Float[np.ndarray, " N"], depth: Float[np.ndarray, " N"]
    ) -> Float[np.ndarray, "N 3"]:
        """Metres, of places in a view's picture; pixel i reaches from i to i + 1."""
        right, up, back, eye = view.c2w[:3].T.astype(np.float64)
        across = (column / self.size * 2 - 1) * self.renders.lens.half_height
        above = (1 - row / self.size * 2) * self.renders.lens.half_height
        return eye + across[:, None] * right + above[:, None] * up - depth[:, None] * back

    def _surface(
        self, item: Item, count: int, rng: np.random.Generator
    ) -> tuple[Float[np.ndarray, "N 3"], Float[np.ndarray, "N 3"]]:
        """What random pixels of all views see, metres, and their colours."""
        points, colors, names = [], [], sorted(item.cameras)
        for i, name in enumerate(names):
            view, share = View(item, name), count * (i + 1) // len(names) - count * i // len(names)
            rgba, depth = self.renders.rgba(view), self.renders.depth(view)
            row, column = np.nonzero((depth > 0) & (rgba[..., 3] > 127))
            at = rng.integers(len(row), size=share)
            row, column = row[at], column[at]
            places = column + rng.random(share), row + rng.random(share)
            points.append(self._places(view, places[1], places[0], depth[row, column]))
            colors.append(rgba[row, column, :3].astype(np.float32) / 255)
        return np.concatenate(points), np.concatenate(colors)

    def z(self, item: Item, size: int, branch: str) -> Float[Tensor, " Z"]:
        """The code of a person: what the folder knows of it, filled up by numbers that its name and the branch draw.
        People who are alike so have codes that are alike."""
        key = [*branch.encode(), 0, *item.name.encode()]
        z = np.random.default_rng(key).standard_normal(size).astype(np.float32)
        mean, turn = self._whitening
        known = ((np.array(item.code) - mean) @ turn)[:size].clip(-FARTHEST, FARTHEST)
        z[: len(known)] = known
        return torch.from_numpy(z)

    @cached_property
    def _whitening(self) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, "C K"]]:
        """What makes the folder's codes standard normal together, largest differences first: people are later drawn by
        independent numbers, but red, green and blue of a colour go together, and few words are as likely as others."""
        codes = np.array([item.code for item in self.items if not item.held_out] or [self.items[0].code])
        mean, spread = codes.mean(0), codes.std(0)
        scale = np.where(spread > 1e-6, 1 / np.maximum(spread, 1e-6), 0.0)
        even = (codes - mean) * scale
        values, vectors = np.linalg.eigh(even.T @ even / len(codes))
        order = np.flatnonzero(values > 1e-3)[::-1]
        vectors = vectors[:, order]
        vectors = vectors * np.where(vectors.sum(0) < 0, -1, 1)  # eigenvectors have no sign
        return mean, scale[:, None] * vectors / np.sqrt(values[order])


def to_picture(points_m: Float[np.ndarray, "N 3"]) -> Float[Tensor, "N 3"]:
    """Metres to ndc, see `config.to_ndc`."""
    ndc = points_m * (CM * SCALE * np.array([1.0, -1.0, 1.0])) + np.array([0.0, CENTRE, 0.0])
    return torch.from_numpy(ndc.astype(np.float32))
