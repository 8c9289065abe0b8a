# SPDX-License-Identifier: GPL-3.0-or-later
"""Places, headings and quotas of a crowd: exact where the promise is exact. No Blender."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from blender_addon.crowd import placement
from blender_addon.crowd.placement import Share

SQUARE = np.array([[[0, 0, 0], [4, 0, 0], [4, 4, 0]], [[0, 0, 0], [4, 4, 0], [0, 4, 0]]], float)


def nearest(points: Any) -> float:
    between = np.linalg.norm(points[:, None] - points[None], axis=2)
    return float((between + np.eye(len(points)) * 1e9).min())


# ------------------------------------------------------------------------------------------------------------ surface


def test_a_surface_keeps_people_apart_and_on_it() -> None:
    rng = np.random.default_rng(1)
    hills = rng.uniform(-3, 3, (40, 1, 3)) + rng.uniform(-1, 1, (40, 3, 3)) * [1, 1, 0.2]
    hills = np.where((np.cross(hills[:, 1] - hills[:, 0], hills[:, 2] - hills[:, 0])[:, 2] < 0)[:, None, None],
                     hills[:, ::-1], hills)  # fmt: skip
    spots = placement.on_surface(hills, 150, 0.2, seed=3)
    assert len(spots) == 150
    assert nearest(spots.points) >= 0.2
    for point in spots.points:  # inside one of the triangles, by barycentric coordinates
        a = hills[:, 0]
        sides = np.stack([hills[:, 1] - a, hills[:, 2] - a, np.cross(hills[:, 1] - a, hills[:, 2] - a)], 2)
        u, v, off = np.linalg.solve(sides, (point - a)[:, :, None])[:, :, 0].T
        assert ((u >= -1e-9) & (v >= -1e-9) & (u + v <= 1 + 1e-9) & (np.abs(off) < 1e-9)).any()


def test_a_surface_is_filled_evenly_whatever_its_triangles() -> None:
    """A square cut into one huge and many small triangles: as many people left as right of the middle."""
    coarse = SQUARE * [0.5, 1, 1]
    fine = [SQUARE / 8 + [2 + x, y, 0] for x in np.arange(0, 2, 0.5) for y in np.arange(0, 4, 0.5)]
    spots = placement.on_surface(np.concatenate([coarse, *fine]), 4000, 0.0, seed=5)
    cells = Counter(map(tuple, np.floor(spots.points[:, :2]).astype(int).tolist()))
    assert len(cells) == 16
    chi2 = sum((n - 250) ** 2 / 250 for n in cells.values())
    assert chi2 < 37.7, "15 degrees of freedom: one in a thousand"


def test_a_full_surface_gives_as_many_as_fit() -> None:
    spots = placement.on_surface(SQUARE, 1000, 1.0, seed=2)
    assert nearest(spots.points) >= 1.0
    left = np.stack(np.meshgrid(*[np.linspace(0, 4, 200)] * 2), -1).reshape(-1, 2)
    away = np.linalg.norm(left[:, None] - spots.points[None, :, :2], axis=2).min(1)
    assert (away >= 1.0).mean() < 0.001, "no room is left"


def test_slopes_and_ceilings_stay_empty() -> None:
    ramp = np.array([[[5, 0, 0], [9, 0, 4], [9, 4, 4]]], float)  # 45 degrees
    ceiling = SQUARE[:, ::-1] + [0, 0, 3]
    both = np.concatenate([SQUARE, ramp, ceiling])
    flat = placement.on_surface(both, 300, 0.0, seed=1, max_slope=math.radians(44))
    assert np.ptp(flat.points[:, 2]) == 0
    assert (flat.along == 0).all()
    some = placement.on_surface(both, 300, 0.0, seed=1, max_slope=math.radians(46))
    assert (some.points[:, 2] < 4.0 + 1e-9).all()
    on_ramp = some.points[:, 0] > 5
    assert 0.2 < on_ramp.mean() < 0.55, "11.3 of 27.3 square metres"
    assert np.allclose(some.along[on_ramp], [-1, 0, 0]), "downhill"
    assert len(placement.on_surface(ceiling, 10, 0.0, seed=1, max_slope=math.radians(60))) == 0


def test_same_seed_same_places() -> None:
    a, b, c = (placement.on_surface(SQUARE, 20, 0.3, seed=s).points for s in (7, 7, 8))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


# -------------------------------------------------------------------------------------------------------------- curve


def test_along_a_line_the_steps_are_equal() -> None:
    line = np.array([[0, 0, 0], [3, 0, 0], [3, 4, 0]], float)
    spots = placement.along_curve([line], 8, 0.5, seed=0)
    assert np.allclose(spots.points, [(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0), (3, 1, 0), (3, 2, 0), (3, 3, 0),
                                      (3, 4, 0)])  # fmt: skip
    assert np.allclose(spots.along[0], (1, 0, 0))
    assert np.allclose(spots.along[-1], (0, 1, 0))
    assert len(placement.along_curve([line], 100, 0.5, seed=0)) == 15, "no more than fit"
    ring = np.array([[0, 0, 0], [2, 0, 0], [2, 2, 0], [0, 2, 0], [0, 0, 0]], float)
    round_ = placement.along_curve([ring], 8, 0.5, seed=0).points
    assert len({tuple(p) for p in np.round(round_, 6).tolist()}) == 8, "the ends of a ring are one place"


@pytest.mark.parametrize("seed", range(5))
def test_jitter_and_bands_keep_the_distance(seed: int) -> None:
    angle = np.linspace(0, 2 * np.pi, 61)
    ring = np.stack([np.cos(angle) * 6, np.sin(angle) * 6, angle * 0], 1)
    loose = placement.along_curve([ring], 30, 0.6, seed, jitter=1.0).points
    assert len(loose) == 30
    assert nearest(loose) >= 0.6 * (1 - 1e-9)
    band = placement.along_curve([ring], 60, 0.6, seed, width=2.0)
    assert len(band) == 60
    assert nearest(band.points) >= 0.6
    radius = np.hypot(*band.points[:, :2].T)
    assert 4.95 < radius.min() < radius.max() < 7.05
    assert 0.35 < (radius > 6).mean() < 0.75
    around = np.stack([-band.points[:, 1], band.points[:, 0]], 1) / radius[:, None]
    assert ((band.along[:, :2] * around).sum(1) > 0.99).all(), "they look along the line"
    assert len(placement.along_curve([np.zeros((2, 3))], 5, 1.0, seed)) == 0


def test_a_grid_is_centred_and_its_jitter_keeps_the_distance() -> None:
    spots = placement.in_grid(12, 1.0, seed=0, columns=4)
    assert np.allclose(spots.points.mean(0), 0)
    assert nearest(spots.points) == pytest.approx(1)
    assert sorted(set(spots.points[:, 0])) == [-1.5, -0.5, 0.5, 1.5]
    loose = placement.in_grid(100, 0.7, seed=0, gap=0.8, jitter=1.0)
    assert nearest(loose.points) >= 0.7
    assert np.ptp(loose.points[:, 0] - np.round(loose.points[:, 0] / 1.5) * 1.5) > 0.4


# ------------------------------------------------------------------------------------------------------------ heading


def ahead(turns: Any) -> Any:
    """Where a person looks who looks down -Y at 0."""
    return np.stack([np.sin(turns), -np.cos(turns)], -1)


def test_headings() -> None:
    spots = placement.Spots(np.array([[3.0, 0, 0], [0, 3, 1], [0, 0, 0]]),
                            np.array([[1.0, 0, 0], [0, -1, 0], [0, 0, 0]]))  # fmt: skip
    assert placement.headings(spots, 1, fixed=0.5).tolist() == [0.5, 0.5, 0.5]
    follow = placement.headings(spots, 1, follow=True)
    assert np.allclose(ahead(follow), [[1, 0], [0, -1], [0, -1]])
    to = placement.headings(spots, 1, target=np.array([0, 0, 5]))
    assert np.allclose(ahead(to[:2]), [[-1, 0], [0, -1]])
    many = placement.Spots(np.zeros((2000, 3)), np.zeros((2000, 3)))
    turns = placement.headings(many, 4, fixed=1.0, spread=math.radians(60)) - 1.0
    assert math.radians(29) < turns.max() <= math.radians(30)
    assert math.radians(-30) <= turns.min() < math.radians(-29)
    assert abs(turns.mean()) < 0.03


def test_levels_double_with_distance() -> None:
    away = np.array([[0, 0, 0], [7.9, 0, 0], [8, 0, 0], [15.9, 0, 0], [16, 0, 0], [900, 0, 0]], float)
    assert placement.levels(away, np.zeros(3), 8.0, 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert placement.levels(away, np.zeros(3), 8.0, 1).tolist() == [0] * 6


# ---------------------------------------------------------------------------------------------------------------- who


def test_quotas_are_exact_to_the_person() -> None:
    assert placement.quotas([50, 50], 20) == [10, 10]
    assert placement.quotas([33, 33, 34], 10) == [3, 3, 4]
    assert placement.quotas([30], 20) == [6]
    assert placement.quotas([100, 100], 5) == [3, 2], "more than all is scaled"
    assert placement.quotas([0.1], 3) == [0]
    assert placement.quotas([], 3) == []
    rng = np.random.default_rng(0)
    for _ in range(300):
        percents, count = rng.uniform(0, 60, rng.integers(1, 7)), int(rng.integers(0, 60))
        found = placement.quotas(percents.tolist(), count)
        exact = percents / max(percents.sum(), 100) * count
        assert sum(found) == round(exact.sum())
        assert (np.abs(np.array(found) - exact) < 1).all()


MIX = [Share("sex", (0.0, 0.2), 50), Share("sex", (0.8, 1.0), 50), Share("top", "jacket", 30),
       Share("top_color", (0.1, 0.2, 0.3), 25), Share("pose", "walking", 40), Share("words", "old", 10)]  # fmt: skip


def test_shares_become_people() -> None:
    dealt = placement.deal(MIX, 20, seed=4)
    sexes = sorted(person["sex"] for person in dealt)
    assert [s < 0.5 for s in sexes] == [True] * 10 + [False] * 10
    assert all(0.02 * i <= s <= 0.02 * (i + 1) for i, s in enumerate(sexes[:10])), "evenly over the range"
    assert Counter(person.get("top") for person in dealt) == {"jacket": 6, None: 14}
    assert Counter(person.get("pose") for person in dealt) == {"walking": 8, None: 12}
    assert sum("words" in person for person in dealt) == 2
    assert dealt == placement.deal(MIX, 20, seed=4)
    assert dealt != placement.deal(MIX, 20, seed=5)
    without = placement.deal([share for share in MIX if share.attribute != "top"], 20, seed=4)
    assert [p["sex"] for p in without] == [p["sex"] for p in dealt], "a share of jackets changes nobody's sex"


def test_dealt_values_become_edits() -> None:
    assert placement.edits({}) == []
    assert placement.edits({"pose": "walking"}) == []
    assert placement.edits({"words": "old", "top_color": (0.1, 0.2, 0.3), "top": "jacket", "pose": "x"}) == [
        {"op": "words", "text": "old"}, {"op": "set", "values": {"top_color": [0.1, 0.2, 0.3], "top": "jacket"}}]


def test_everybody_stands_equally_often_and_twins_apart() -> None:
    points = placement.in_grid(400, 1.0, seed=0).points
    who = placement.assign(points, 20, seed=1)
    assert set(Counter(who.tolist()).values()) == {20}
    between = np.linalg.norm(points[:, None] - points[None], axis=2)
    twins = (who[:, None] == who[None]) & (between < 1.1) & (between > 0)
    assert twins.sum() <= 8, "at random it would be 76"
    assert placement.assign(points[:1], 20, seed=1).shape == (1,)
    assert Counter(placement.assign(points[:7], 2, seed=1).tolist()).most_common()[0][1] == 4
