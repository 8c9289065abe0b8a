# SPDX-License-Identifier: GPL-3.0-or-later
"""`populace bench` ends: slow steps are not repeated, and the stand-in of a large family is one figure."""

from __future__ import annotations

import time

import pytest
import torch

from backend.bench import steps_timed
from backend.families.get3dhuman.bench import FIGURE, stand_in
from backend.families.get3dhuman.config import Config

CPU = torch.device("cpu")


def test_slow_steps_are_not_repeated() -> None:
    calls: list[str] = []

    def work(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds * (3 if calls.count(name) == 1 else 1))  # the first run is cold

    steps = [("fast", lambda: work("fast", 0.01), 3), ("once", lambda: work("once", 0.01), 1),
             ("slow", lambda: work("slow", 0.04), 5)]  # fmt: skip
    fast, once, slow = steps_timed(steps, CPU, 0.1)
    assert [calls.count(name) for name in ("fast", "once", "slow")] == [4, 1, 1]
    assert [row["runs"] for row in (fast, once, slow)] == [3, 1, 1]
    assert 0.01 <= fast["seconds"] < 0.03
    assert once["seconds"] >= 0.03
    assert slow["seconds"] >= 0.12
    assert slow["rss_mib"] > 10


@pytest.mark.parametrize("seed", [0, 5])
def test_the_stand_in_is_a_figure_whatever_the_seed(seed: int) -> None:
    model = stand_in(CPU, Config.tiny())
    (field,) = model.decode(model.sample(seed, 1.0, {}))
    points = torch.tensor([[0.0, 1.2, 0.0], [0.0, 1.62, 0.0], [-0.1, 0.5, 0.0], [0.5, 1.15, 0.0],  # inside
                           [0.0, 1.2, 0.3], [0.4, 0.5, 0.0], [0.8, 1.2, 0.0], [0.0, 1.9, 0.0]])  # fmt: skip
    found = field.sdf(points)
    assert (found[:4] < 0.01).all()  # arms are thinner than a pixel of the smallest volume
    assert (found[:2] < -0.05).all()
    assert (found[4:] > 0.02).all()
    assert float(found[4]) == pytest.approx(0.3 - FIGURE[1][-1], abs=0.1)
