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

Purpose = Literal["get3d", "get3dhuman"]
FOV = 2 * math.atan(16 / 35)  # a 35 mm lens before a 32 mm sensor
RADIUS = 1.2
LONGEST = 0.9  # side of an object's box, in units
ELEVATION = (0.0, math.radians(20.0))
SIDES = 4  # views of Get3DHuman's people
HALF_M, CENTRE_M = 1.07789, 0.95  # of the feature pictures' frame: see `families.get3dhuman.config`
AWAY_M = 2.0  # distance of orthographic cameras


@dataclass(frozen=True)
class Framing:
    """How a purpose looks at things."""

    purpose: Purpose
    size: int
    views: int

    @property
    def lens(self) -> Lens:
        if self.purpose == "get3d":
            return Lens(fov_y=FOV)
        # the outermost pixels' centres lie on the frame, as the networks read their pictures
        return Lens(half_height=HALF_M * self.size / (self.size - 1))

    def cameras(self, key: Sequence[int]) -> dict[str, Pixels]:
        """c2w by view, a function of the key; around the origin, or in metres around a standing person."""
        rng = np.random.default_rng(key)
        if self.purpose == "get3d":
            angles = zip(rng.uniform(0, 2 * math.pi, self.views), rng.uniform(*ELEVATION, self.views))
            return {f"{i:02d}": looking_at(np.zeros(3), a, e, RADIUS) for i, (a, e) in enumerate(angles)}
        centre = np.array([0.0, CENTRE_M, 0.0])
        return {f"{i:02d}": looking_at(centre, 2 * math.pi * i / SIDES, 0.0, AWAY_M) for i in range(SIDES)}


def looking_at(target: Pixels, azimuth: float, elevation: float, distance: float) -> Pixels:
    """c2w f64 [4, 4]; azimuth 0 is in front (+Z), pi/2 at +X; radians."""
    back = np.array([math.sin(azimuth) * math.cos(elevation), math.sin(elevation),
                     math.cos(azimuth) * math.cos(elevation)])  # fmt: skip
    right = np.cross([0.0, 1.0, 0.0], back)
    right /= np.linalg.norm(right)
    c2w = np.eye(4)
    c2w[:3] = np.stack([right, np.cross(back, right), back, target + distance * back], 1)
    return c2w


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
    cameras = framing.cameras([seed, person, 12])
    unit, centre = 1.0, np.zeros(3)
    if framing.purpose == "get3d":
        low, high = one.bounds.astype(np.float64)
        unit, centre = float((high - low).max() / LONGEST), (low + high) / 2
    stacked = np.stack(list(cameras.values())).copy()
    stacked[:, :3, 3] = stacked[:, :3, 3] * unit + centre
    lens, count = framing.lens, len(stacked)
    matrix = (
        orthographic(lens.half_height, 1.0, 0.1, 2 * AWAY_M) if lens.fov_y is None
        else perspective(lens.fov_y, 1.0, 0.1 * unit, 10.0 * unit)
    )  # fmt: skip
    seen = render_person(one, Camera(torch.from_numpy(stacked).float(), matrix.expand(count, 4, 4)),
                         (framing.size, framing.size), 2, lit, (0.0, 0.0, 0.0))  # fmt: skip
    # on black, linear colours are the straight ones times the coverage
    straight = to_srgb(to_linear(seen.rgb) / seen.mask.clamp(min=1e-3)[..., None]).clamp(0, 1)
    rgba = (torch.cat([straight, seen.mask[..., None]], 3) * 255 + 0.5).to(torch.uint8).numpy()
    maps = framing.purpose == "get3dhuman"
    pictures = {name: (rgba[i], seen.depth[i].numpy() if maps else None, seen.normal[i].numpy() if maps else None)
                for i, name in enumerate(cameras)}  # fmt: skip
    return Item(f"person_{person:07d}", cameras, unit), dict(one.attributes), pictures


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
