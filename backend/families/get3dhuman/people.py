# SPDX-License-Identifier: GPL-3.0-or-later
"""People in a folder of orthographic renders (backend/training/README.md), as the prior network learns from them.

The picture is the front view. What is inside follows from the depth of all views: a point is outside if some view sees
through it or past it. So what no view sees counts as solid, as in scans that were closed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from backend.families.get3dhuman.config import CENTRE, SCALE
from backend.families.get3dhuman.losses import DISPLACED_CM
from backend.protocol import PopulaceError
from backend.training.renders import Item, Renders, View
from backend.training.renders_blender import CENTRE_M, HALF_M

CM = 100.0
FRONT = 0.999  # cosine between the front camera's back and +Z, at least
SLACK_M = 0.005  # a point so little before what a view sees is still surface
DEEPEST = 0.79  # of a body's depth picture: `losses.BACKGROUND` is no surface
COLOR_CM = 0.5  # standard deviation of the points whose colours are learned


@dataclass(frozen=True)
class Seen:
    """B people as their front camera sees them."""

    picture: Float[Tensor, "B 3 R R"]  # -1..1, 0 where there is nobody
    mask: Bool[Tensor, "B 1 R R"]
    normal: Float[Tensor, "B 3 R R"]
    depth: Float[Tensor, "B 1 R R"]  # -1 nearest, 1 background: z_ndc = -depth

    def to(self, device: torch.device) -> Seen:
        return Seen(*(getattr(self, name).to(device) for name in ("picture", "mask", "normal", "depth")))


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
        views = [self.front[item.name] for item in items]
        rgba = torch.stack([torch.from_numpy(self.renders.rgba(v)) for v in views]).permute(0, 3, 1, 2)
        depth = torch.stack([torch.from_numpy(self.renders.depth(v)) for v in views])[:, None]
        normal = torch.stack([torch.from_numpy(self.renders.normal(v)) for v in views]).permute(0, 3, 1, 2)
        mask = (rgba[:, 3:] > 127) & (depth > 0)
        eye = torch.tensor([float(v.c2w[2, 3]) for v in views])[:, None, None, None]
        away = ((depth - eye) * (CM * SCALE)).clamp(-1, DEEPEST)
        picture = torch.where(mask, rgba[:, :3].float() / 127.5 - 1, 0.0)
        return Seen(picture, mask, torch.where(mask, normal, 0.0), torch.where(mask, away, 1.0))

    def occupancy(
        self, item: Item, count: int, rng: np.random.Generator
    ) -> tuple[Float[Tensor, "N 3"], Float[Tensor, " N"]]:
        """Points (ndc), half of them about the surface, the others anywhere near the person; 0 inside, 1 outside."""
        surface = self._surface(item, count - count // 2, rng)[0]
        about = surface + rng.normal(0, DISPLACED_CM / CM, surface.shape)
        low, high = surface.min(0) - 0.1, surface.max(0) + 0.1
        points = np.concatenate([about, rng.uniform(low, high, (count // 2, 3))])
        ndc = to_picture(points).clamp(-0.999, 0.999)
        return ndc, torch.from_numpy(1 - self.inside(item, points).astype(np.float32))

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
            right, up, back, eye = view.c2w[:3].T.astype(np.float64)
            across = ((column + rng.random(share)) / self.size * 2 - 1) * self.renders.lens.half_height
            above = (1 - (row + rng.random(share)) / self.size * 2) * self.renders.lens.half_height
            places = eye + across[:, None] * right + above[:, None] * up - depth[row, column][:, None] * back
            points.append(places)
            colors.append(rgba[row, column, :3].astype(np.float32) / 255)
        return np.concatenate(points), np.concatenate(colors)

    def z(self, item: Item, size: int, branch: str) -> Float[Tensor, " Z"]:
        """The code of a person: what the folder knows of it, filled up by numbers that its name and the branch draw.
        People who are alike so have codes that are alike."""
        key = [*branch.encode(), 0, *item.name.encode()]
        z = np.random.default_rng(key).standard_normal(size).astype(np.float32)
        known = np.array(item.code[:size], np.float32)
        z[: len(known)] = known
        return torch.from_numpy(z)


def to_picture(points_m: Float[np.ndarray, "N 3"]) -> Float[Tensor, "N 3"]:
    """Metres to ndc, see `config.to_ndc`."""
    ndc = points_m * (CM * SCALE * np.array([1.0, -1.0, 1.0])) + np.array([0.0, CENTRE, 0.0])
    return torch.from_numpy(ndc.astype(np.float32))
