# SPDX-License-Identifier: GPL-3.0-or-later
"""How folders of renders look at things, and people of a kit rendered into them.

get3d       perspective pictures from a sphere around the object, as published: 49.1 degrees, radius 1.2, azimuth
            all around, elevation 0 to 20 degrees for people; the longest side is 0.9
get3dhuman  orthographic pictures from the four sides, with depth and normals, in metres, framed as its feature
            pictures are
"""

from __future__ import annotations

import concurrent.futures
import functools
import math
import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.special import ndtri

from backend.progress import Progress
from backend.protocol import PopulaceError
from backend.training.renders import Item, Lens, Pixels, Writer
from backend.training.renders_blender import AWAY_M, LONGEST, cameras, lens

Purpose = Literal["get3d", "get3dhuman"]


@dataclass(frozen=True)
class Framing:
    """How a purpose looks at things."""

    purpose: Purpose
    size: int
    views: int

    @property
    def lens(self) -> Lens:
        found = lens(self.purpose, self.size)
        return Lens(found.get("fov_y_rad"), found.get("half_height", 0.0))

    def cameras(self, key: Sequence[int]) -> dict[str, Pixels]:
        """c2w by view, a function of the key; around the origin, or in metres around a standing person."""
        return cameras(self.purpose, self.views, key)


# --- people of a kit --------------------------------------------------------------------------------------------------


def sampled(
    kit: Path, folder: Path, framing: Framing, count: int, seed: int = 0, lit: bool = False, workers: int = 1,
    progress: Progress | None = None,
) -> None:  # fmt: skip
    """Write `count` training people of a kit. Raises PopulaceError("invalid_request")."""
    from backend.training.views import training_seeds

    if not kit.is_dir():
        raise PopulaceError("invalid_request", f"There is no folder {kit}.", "--kit wants a MakeHuman data folder.")
    writer = Writer(folder, framing.size, framing.lens, framing.purpose == "get3dhuman")
    shoot = functools.partial(_shoot, str(kit), framing, seed, lit)
    people = training_seeds(count, seed)
    items, facts = [], []
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) if workers > 1 \
            else _InTurn() as pool:  # fmt: skip
        for i, (item, attributes, pictures) in enumerate(pool.map(shoot, people, chunksize=4)):
            for name, (rgba, depth, normal) in pictures.items():
                writer.picture(item.name, name, rgba, depth, normal)
            items.append(item)
            facts.append(attributes)
            if progress is not None:
                progress.show(f"person {i + 1} of {count}", (i + 1) / count)
    for item, code in zip(items, codes(facts), strict=True):
        writer.item(Item(item.name, item.cameras, item.unit_m, tuple(code)))
    writer.close()


class _InTurn:
    """A pool of nobody else."""

    def __enter__(self):
        return self

    def __exit__(self, *problem: object) -> None: ...

    def map(self, work: Any, items: Sequence[Any], chunksize: int = 1):
        return map(work, items)


@functools.cache
def _sampler(kit: str):
    from backend.training.makehuman import Kit
    from backend.training.sampler import Sampler

    return Sampler(Kit(Path(kit)))


def _shoot(kit: str, framing: Framing, seed: int, lit: bool, person: int):
    """One person: the item, what can be said of it, and (rgba, depth, normal) by view."""
    import torch

    from backend.render.camera import Camera, orthographic, perspective
    from backend.render.shade import to_linear, to_srgb
    from backend.training.sampler import render_person

    one = _sampler(kit).person(person)
    placed = framing.cameras([seed, person, 12])
    unit, centre = 1.0, np.zeros(3)
    if framing.purpose == "get3d":
        low, high = one.bounds.astype(np.float64)
        unit, centre = float((high - low).max() / LONGEST), (low + high) / 2
    stacked = np.stack(list(placed.values()))
    stacked[:, :3, 3] = stacked[:, :3, 3] * unit + centre
    through, count = framing.lens, len(stacked)
    matrix = (
        orthographic(through.half_height, 1.0, 0.1, 2 * AWAY_M) if through.fov_y is None
        else perspective(through.fov_y, 1.0, 0.1 * unit, 10.0 * unit)
    )  # fmt: skip
    seen = render_person(one, Camera(torch.from_numpy(stacked).float(), matrix.expand(count, 4, 4)),
                         (framing.size, framing.size), 2, lit, (0.0, 0.0, 0.0))  # fmt: skip
    # on black, linear colours are the straight ones times the coverage
    straight = to_srgb(to_linear(seen.rgb) / seen.mask.clamp(min=1e-3)[..., None]).clamp(0, 1)
    rgba = (torch.cat([straight, seen.mask[..., None]], 3) * 255 + 0.5).to(torch.uint8).numpy()
    maps = framing.purpose == "get3dhuman"
    pictures = {name: (rgba[i], seen.depth[i].numpy() if maps else None, seen.normal[i].numpy() if maps else None)
                for i, name in enumerate(placed)}  # fmt: skip
    return Item(f"person_{person:07d}", placed, unit), dict(one.attributes), pictures


def codes(facts: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """What is known of people as numbers, each standard normal over them: numbers and colour channels by their rank,
    words by one number for each word. Get3DHuman's codes start with them, so that people who are alike have codes that
    are alike; names of items and colours are left out, which other entries say."""
    columns: list[np.ndarray] = []
    for key in sorted({k for f in facts for k in f}):
        if key.endswith(("_item", "_name")):
            continue
        values = [f.get(key) for f in facts]
        some = next(v for v in values if v is not None)
        if isinstance(some, str):
            columns.append(np.array([_word(key, str(v)) for v in values]))
        elif isinstance(some, Sequence):
            columns += [_ranked([v[k] if v is not None else math.nan for v in values]) for k in range(len(some))]
        else:
            columns.append(_ranked([v if v is not None else math.nan for v in values]))
    return np.stack(columns, 1).tolist() if columns else [[] for _ in facts]


def _ranked(values: Sequence[float]) -> np.ndarray:
    """Normal scores by rank; 0 for what is not known."""
    found = np.array(values, float)
    out, known = np.zeros(len(found)), np.flatnonzero(np.isfinite(found))
    order = np.argsort(np.argsort(found[known], kind="stable"), kind="stable")
    out[known] = ndtri((order + 0.5) / max(len(known), 1))
    return out


def _word(key: str, word: str) -> float:
    return float(np.random.default_rng([*key.encode(), 0, *word.encode()]).standard_normal())
