# SPDX-License-Identifier: GPL-3.0-or-later
"""Where the people of a crowd stand, which way they look, who they are. numpy only, no bpy.

Everything follows from a seed: the same arguments give the same crowd. Each question has its own stream of random
numbers, so that another share of hats moves nobody. Z is up; a person of heading 0 faces -Y; lengths have one unit
throughout, whichever the caller takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

MAX_DARTS: Final = 512  # thrown at once
GIVE_UP_DARTS: Final = 20_000  # in a row without a hit: the surface is full
NEIGHBOURS: Final = 6  # who should not look like oneself

Array = np.ndarray[Any, Any]
Value = float | str | Sequence[float]


@dataclass(frozen=True)
class Spots:
    """Places to stand: f64 [M, 3] each. `along` is a level direction, zero where there is none."""

    points: Array
    along: Array

    def __len__(self) -> int:
        return len(self.points)


@dataclass(frozen=True)
class Share:
    """So many per cent have this: a number, [low, high] of numbers, a colour [r, g, b], a choice or words."""

    attribute: str
    value: Value
    percent: float


def stream(seed: int, name: str) -> np.random.Generator:
    """Random numbers for one question of one crowd."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *name.encode()])))


# -------------------------------------------------------------------------------------------------------------- places


def on_surface(
    triangles: Array, count: int, distance: float, seed: int, max_slope: float = math.pi, along: Array | None = None
) -> Spots:
    """Up to `count` points on triangles [T, 3, 3], uniform by area, no two nearer than `distance`.

    Triangles steeper than `max_slope` radians against the floor, or seen from below, are left out. The points look
    downhill, or as `along` [T, 3] says for each triangle. Fewer come back when there is no more room.
    """
    edge_a, edge_b = triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
    normals = np.cross(edge_a, edge_b)
    doubled = np.linalg.norm(normals, axis=1)
    flat = normals[:, 2] >= math.cos(min(max_slope, math.pi)) * doubled - 1e-12 * doubled.max(initial=1.0)
    total = np.cumsum(np.where(flat & (doubled > 0), doubled, 0.0))
    if not len(total) or total[-1] <= 0 or count < 1:
        return Spots(np.zeros((0, 3)), np.zeros((0, 3)))
    leads: Array = normals / np.maximum(doubled, 1e-30)[:, None] if along is None else along
    random = stream(seed, "surface")
    kept, owners, missed = np.empty((0, 3)), np.empty(0, np.int64), 0
    while len(kept) < count and missed < GIVE_UP_DARTS:
        darts = min(MAX_DARTS, max(count - len(kept), 64))
        pick, u, v = random.random((3, darts))
        owner = np.searchsorted(total, pick * total[-1], side="right")
        root = np.sqrt(u)[:, None]
        points = triangles[owner, 0] + root * (edge_a[owner] + v[:, None] * (edge_b[owner] - edge_a[owner]))
        hits = _apart(points, kept, distance)[: count - len(kept)]
        missed = 0 if len(hits) else missed + darts
        kept, owners = np.concatenate([kept, points[hits]]), np.concatenate([owners, owner[hits]])
    return Spots(kept, level(leads[owners]))


def along_curve(lines: Sequence[Array], count: int, distance: float, seed: int, width: float = 0.0,
                jitter: float = 0.0) -> Spots:  # fmt: skip
    """Evenly by length along polylines [P, 3] (a closed one repeats its first point), or in a band of that width.

    `jitter` 0..1 moves each along the line, as far as `distance` allows. Fewer come back when the line is too short.
    """
    lines = [line for line in lines if len(line) > 1 and np.ptp(line, axis=0).max() > 0]
    if not lines or count < 1:
        return Spots(np.zeros((0, 3)), np.zeros((0, 3)))
    if width > 0:
        bands = [_band(line, width) for line in lines]
        triangles, along = (np.concatenate(part) for part in zip(*bands))
        return on_surface(triangles, count, distance, seed, math.pi, along)
    starts = np.concatenate([line[:-1] for line in lines])
    steps = np.concatenate([np.diff(line, axis=0) for line in lines])
    ends = np.cumsum(np.linalg.norm(steps, axis=1))
    is_ring = len(lines) == 1 and np.allclose(lines[0][0], lines[0][-1])
    length = ends[-1]
    if distance > 0:
        count = min(count, int(length / distance + 1e-9) + (0 if is_ring else 1))
    count = max(count, 1)
    gap = length / (count if is_ring else max(count - 1, 1))
    at = np.arange(count) * gap if count > 1 else np.array([length / 2])
    at = at + stream(seed, "curve").uniform(-0.5, 0.5, count) * max(gap - distance, 0.0) * jitter
    at = at % length if is_ring else np.clip(at, 0.0, length)
    segment = np.minimum(np.searchsorted(ends, at, side="right"), len(ends) - 1)
    size = np.linalg.norm(steps, axis=1)
    part = (at - (ends - size)[segment]) / np.maximum(size[segment], 1e-30)
    points = starts[segment] + np.clip(part, 0, 1)[:, None] * steps[segment]
    kept = _apart(points, np.empty((0, 3)), distance * (1 - 1e-9))  # where the line comes back near itself
    return Spots(points[kept], level(steps[segment[kept]]))


def in_grid(count: int, distance: float, seed: int, gap: float = 0.0, columns: int = 0, jitter: float = 0.0) -> Spots:
    """Rows around the origin; `columns` 0 for a square. `gap` is the free space beyond `distance`; `jitter` uses it."""
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    index = np.arange(count)
    step = distance + gap
    points = np.zeros((count, 3))
    points[:, 0] = (index % columns - (min(columns, count) - 1) / 2) * step
    points[:, 1] = (index // columns - (rows - 1) / 2) * step
    random = stream(seed, "grid")
    angle, radius = random.uniform(0, 2 * np.pi, count), np.sqrt(random.random(count)) * gap / 2 * jitter
    points[:, 0] += np.cos(angle) * radius
    points[:, 1] += np.sin(angle) * radius
    return Spots(points, np.zeros((count, 3)))


def _apart(points: Array, others: Array, distance: float) -> Array:
    """Indices of the points that keep the distance from `others` and from the kept ones before them."""
    if distance <= 0:
        return np.arange(len(points))
    if len(others):
        free = np.ones(len(points), bool)
        for start in range(0, len(others), 1024):  # bounded memory
            between = points[:, None] - others[None, start : start + 1024]
            free &= (np.einsum("nmk,nmk->nm", between, between) >= distance**2).all(1)
        at = np.flatnonzero(free)
    else:
        at = np.arange(len(points))
    kept: list[int] = []
    for i in at.tolist():
        between = points[kept] - points[i]
        if not kept or (np.einsum("nk,nk->n", between, between) >= distance**2).all():
            kept.append(i)
    return np.array(kept, np.int64)


def _band(line: Array, width: float) -> tuple[Array, Array]:
    """A level ribbon along a line as triangles [T, 3, 3], and where each leads [T, 3]. Corners are mitred."""
    steps = level(np.diff(line, axis=0))
    is_ring = np.allclose(line[0], line[-1])
    before = np.concatenate([steps[-1:] if is_ring else steps[:1], steps])
    after = np.concatenate([steps, steps[:1] if is_ring else steps[-1:]])
    middle = level(before + after)
    middle[~middle.any(1)] = after[~middle.any(1)]
    stretch = 1 / np.maximum(np.abs((middle * after).sum(1)), 0.5)
    side = np.stack([middle[:, 1], -middle[:, 0], np.zeros(len(middle))], 1) * (stretch * width / 2)[:, None]
    left, right = line - side, line + side
    quads = [[right[:-1], right[1:], left[1:]], [right[:-1], left[1:], left[:-1]]]
    return np.concatenate([np.stack(corners, 1) for corners in quads]), np.concatenate([steps, steps])


def level(directions: Array) -> Array:
    """Unit vectors without their Z; zero for those that point up or down."""
    flat = np.array(directions, np.float64)
    flat[:, 2] = 0
    size = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.where(size > 1e-6, flat / np.maximum(size, 1e-30), 0.0)


# ------------------------------------------------------------------------------------------------------------- heading


def headings(spots: Spots, seed: int, fixed: float = 0.0, spread: float = 0.0, target: Array | None = None,
             follow: bool = False) -> Array:  # fmt: skip
    """Turns about Z in radians [M]: towards `target` [3], or along each spot's own direction where it has one if
    `follow`, else by `fixed`; then at random within `spread` radians around that."""
    turns = np.full(len(spots), fixed, np.float64)
    ahead = spots.along if target is None else level(np.asarray(target, np.float64) - spots.points)
    if follow or target is not None:
        has = ahead.any(1)
        turns[has] = np.arctan2(ahead[has, 0], -ahead[has, 1]) + fixed
    return turns + stream(seed, "heading").uniform(-0.5, 0.5, len(spots)) * spread


def levels(points: Array, camera: Array, first: float, count: int) -> Array:
    """Level of detail [M] by distance: 0 nearer than `first`, then one more at each doubling, `count` - 1 at most."""
    away = np.linalg.norm(points - np.asarray(camera, np.float64), axis=1)
    return np.searchsorted(first * 2.0 ** np.arange(count - 1), away, side="right")


# ---------------------------------------------------------------------------------------------------------------- who


def quotas(percents: Sequence[float], count: int) -> list[int]:
    """How many of `count` each share is, to the person: what rounding leaves goes to the largest remainders. Shares
    of more than 100 per cent together are scaled; of less, the rest of the people have none."""
    shares = np.maximum(np.asarray(percents, np.float64), 0.0)
    exact = shares / max(shares.sum(), 100.0) * count
    whole = np.floor(exact + 1e-9).astype(np.int64)
    left = round(float(exact.sum())) - int(whole.sum())
    whole[np.argsort(-(exact - whole), kind="stable")[:left]] += 1
    return whole.tolist()


def deal(shares: Sequence[Share], count: int, seed: int) -> list[dict[str, Value]]:
    """For each of `count` people the values of the attributes that they got. Values of a range lie evenly in it."""
    dealt: list[dict[str, Value]] = [{} for _ in range(count)]
    for name in dict.fromkeys(share.attribute for share in shares):
        own = [share for share in shares if share.attribute == name]
        random = stream(seed, f"share {name}")
        order = random.permutation(count).tolist()
        for share, number in zip(own, quotas([share.percent for share in own], count)):
            mine, order = order[:number], order[number:]
            for rank, person in enumerate(mine):
                dealt[person][name] = _drawn(share.value, (rank + random.random()) / max(number, 1))
    return dealt


def _drawn(value: Value, part: float) -> Value:
    """The value of one person; `part` 0..1 says where in a range."""
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        return round(float(value[0]) + part * (float(value[1]) - float(value[0])), 4)
    return value


def edits(dealt: Mapping[str, Value]) -> list[dict[str, Any]]:
    """What a request says for the values that one person got. A pose is no edit."""
    plain = {name: value for name, value in dealt.items() if name not in ("words", "pose")}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}
    found: list[dict[str, Any]] = [{"op": "words", "text": dealt["words"]}] if "words" in dealt else []
    return [*found, {"op": "set", "values": values}] if values else found


def assign(points: Array, people: int, seed: int) -> Array:
    """Which of the people stands on each spot [M]: each as often as any other, twins far from each other."""
    random = stream(seed, "who")
    count = len(points)
    deck = np.concatenate([random.permutation(people) for _ in range(-(-count // people))])[:count].tolist()
    who = np.full(count, -1, np.int64)
    for spot in random.permutation(count).tolist():
        away = ((points - points[spot]) ** 2).sum(1)
        away[who < 0] = np.inf
        near = np.argpartition(away, min(NEIGHBOURS, count - 1))[:NEIGHBOURS]
        taken = set(who[near[np.isfinite(away[near])]].tolist())
        card = next((i for i, person in enumerate(deck) if person not in taken), 0)
        who[spot] = deck.pop(card)
    return who
