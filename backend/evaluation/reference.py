# SPDX-License-Identifier: GPL-3.0-or-later
"""Sampled people as the evaluation sees them: the training distribution, on seeds that training never saw."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from backend.evaluation import lightfield
from backend.evaluation.portraits import (
    PARTS,
    POINTS,
    SILHOUETTE,
    SIZE,
    SUPERSAMPLE,
    Portrait,
    around,
    cameras,
    head_of,
)
from backend.evaluation.rebuild import Reality
from backend.evaluation.reconstruct import Target, through
from backend.families.base import Rig
from backend.protocol import PopulaceError
from backend.render.camera import Camera
from backend.training import splits
from backend.training.canonical import open_kit
from backend.training.person import LABELS, SampledPerson
from backend.training.portrait import render_person
from backend.training.sampler import Sampler
from backend.training.surface import visible_surface

SURFACE = 60_000  # points that a reconstruction is told of and measured by
EMPTY = 20_000  # candidates for points that some view sees through
assert LABELS == PARTS


class SampledPeople:
    """People of a MakeHuman folder; see `people.Reference`."""

    def __init__(self, kit: Path) -> None:
        """Raises PopulaceError("invalid_request") if there is no kit."""
        if not (kit / "3dobjs" / "base.obj").is_file():
            raise PopulaceError(
                "invalid_request", f"{kit} is not a MakeHuman data folder (it holds no 3dobjs/base.obj).",
                "Give the folder with --kit, or in the environment variable MAKEHUMAN_DATA."
            )  # fmt: skip
        self.kit = kit

    @cached_property
    def sampler(self) -> Sampler:
        return Sampler(open_kit(self.kit))

    def seeds(self, split: str, count: int) -> Sequence[int]:
        return splits.seeds(split, count)  # pyright: ignore[reportArgumentType]

    def portrait(self, seed: int) -> Portrait:
        person = self.sampler.person(seed)
        pictures, normals, parts = photograph(person, cameras(_head(person)), SIZE)
        around_it = lightfield.cameras(person.bounds)
        masks = render_person(person, around_it, (SILHOUETTE, SILHOUETTE), 1, lit=False).mask.numpy() > 0.5
        surface = visible_surface(person, POINTS, seed)
        points, colors, labels = (np.asarray(x) for x in (surface.points, surface.colors, surface.labels))
        return Portrait(
            points.astype(np.float32), (colors * 255 + 0.5).astype(np.uint8), labels.astype(np.uint8),
            pictures.numpy(), normals.numpy(), parts.numpy(), lightfield.describe(masks).astype(np.float32),
            {"height_m": float(person.bounds[1, 1])},
        )  # fmt: skip

    def reality(self, seed: int) -> Reality:
        person = self.sampler.person(seed)
        surface = visible_surface(person, SURFACE, seed)
        points, normals, colors = (torch.as_tensor(np.asarray(x)).float() for x in surface[:3])
        labels = torch.as_tensor(np.asarray(surface.labels)).long()
        target = Target(points, normals, colors, labels, self._empty(person, points, seed))
        return Reality(target, _head(person), float(person.bounds[1, 1]),
                       lambda camera, size: photograph(person, camera, size))  # fmt: skip

    def _empty(self, person: SampledPerson, points: Tensor, seed: int) -> Tensor:
        """Points in the air: half of them near the surface, half anywhere around the person."""
        rng = np.random.default_rng(seed)
        low, high = person.bounds
        anywhere = rng.uniform(low - 0.1, high + 0.1, (EMPTY // 2, 3))
        near = points.numpy()[rng.integers(len(points), size=EMPTY // 2)] + rng.normal(0, 0.03, (EMPTY // 2, 3))
        candidates = torch.from_numpy(np.concatenate([anywhere, near]).astype(np.float32))
        camera = around(16, float(high[1]))
        masks = render_person(person, camera, (2 * SIZE, 2 * SIZE), 1, lit=False).mask > 0.5
        return through(masks, camera.mvp, candidates)


def _head(person: SampledPerson) -> Tensor:
    bones = person.bones
    assert bones is not None
    rig = Rig(tuple(bones.names), tuple(int(p) for p in bones.parents), torch.as_tensor(bones.heads).float(),
              torch.as_tensor(bones.tails).float())  # fmt: skip
    return head_of(rig, float(person.bounds[1, 1]))


def photograph(person: SampledPerson, camera: Camera, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, normals and parts as `portraits.photograph` makes them of generated people."""
    seen = render_person(person, camera, (size, size), SUPERSAMPLE, lit=False)
    normal = functional.normalize(seen.normal, dim=3) * (seen.mask > 0)[..., None]
    coded = (seen.rgb * 255 + 0.5).to(torch.uint8), (normal * 127 + 128.5).clamp(0, 255).to(torch.uint8)
    return *coded, (seen.label + 1).to(torch.uint8)
