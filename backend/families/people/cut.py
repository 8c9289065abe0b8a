# SPDX-License-Identifier: GPL-3.0-or-later
"""Borders and patterns of garments as functions of canonical points: sleeves, hems, necklines, waists; stripes, checks.

A border is a signed distance in metres, positive where the garment ends; borders of one garment are joined by max.
Every function takes numpy arrays or torch tensors alike, so that training data and model have one home for them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from backend.families.people.wardrobe import OPEN, PATTERNS, TRIMS

__all__ = ["OPEN", "PATTERNS", "TRIMS", "arm_distance", "borders", "pattern_mask", "slack"]

# the canonical left arm's joints, metres
SHOULDER, ELBOW, WRIST = (0.176, 1.33, 0.023), (0.338, 1.153, 0.03), (0.458, 1.033, 0.192)


def _of(p: Any) -> Any:
    return torch if isinstance(p, torch.Tensor) else np


def arm_distance(p: Any) -> Any:
    """Metres along the arm from the shoulder to the point of the arm nearest to each of p [N, 3]; both arms alike.
    Negative inwards of the shoulder and on the torso, which is further than an arm's radius from the arm's axis: a
    sleeve's end is no cut across the flanks."""
    xp = _of(p)
    x, y, z = xp.abs(p[:, 0]), p[:, 1], p[:, 2]
    best = along = None
    start = 0.0
    hand = np.array(WRIST) + 1.2 * (np.array(WRIST) - ELBOW)
    for a, b in ((np.array(SHOULDER), np.array(ELBOW)), (np.array(ELBOW), hand)):
        length = float(np.linalg.norm(b - a))
        u = [float(c) for c in (b - a) / length]
        dx, dy, dz = x - float(a[0]), y - float(a[1]), z - float(a[2])
        t = xp.clip(dx * u[0] + dy * u[1] + dz * u[2], -0.2 if best is None else 0.0, length)
        d = (dx - t * u[0]) ** 2 + (dy - t * u[1]) ** 2 + (dz - t * u[2]) ** 2
        along = start + t if best is None else xp.where(d < best, start + t, along)
        best = d if best is None else xp.minimum(d, best)
        start += length
    return along - 4 * xp.clip(best**0.5 - 0.09, 0, None)


def borders(part: str, trims: Any, p: Any) -> Any:
    """Border distance [N] of canonical points p [N, 3] under `trims` (as in TRIMS[part]); negative where cloth may be.

    top: sleeve -1..1 is 3 to 49 cm of the arm, hem -1..1 is 0.80 to 0.97 m of height, neck -1..1 the half width of a
    neckline from 3 to 11.5 cm, tilt -1..1 from round to deep. bottom: hem -1..1 from 0.08 to 0.70 m of height, waist
    -1 at 0.95 m, 1 at 1.61 m (a bib).
    """
    xp = _of(p)
    x, y = xp.abs(p[:, 0]), p[:, 1]
    if part == "top":
        sleeve, hem, neck, tilt = trims[0], trims[1], trims[2], trims[3]
        opening = xp.minimum(
            y - 1.43 + (0.625 + 0.375 * tilt) * (p[:, 2] + 0.03), 0.03 + 0.0425 * (neck + 1) - x
        )  # a slanted plane, as wide as the neckline
        ends = xp.maximum(arm_distance(p) - (0.26 + 0.23 * sleeve), 0.885 + 0.085 * hem - y)
        return xp.maximum(xp.maximum(ends, opening), y - 1.49)  # no cloth on the head
    hem, waist = trims[0], trims[1]
    # wrists hang low in the rest pose: trousers end where the arms begin
    return xp.maximum(xp.maximum(0.39 + 0.31 * hem - y, y - (1.28 + 0.33 * waist)), x - 0.29)


def slack(part: str, p: Any) -> Any:
    """How loosely a cut garment hangs [N], 0..1, growing towards its lower end; times `Garment.loose` in metres."""
    xp = _of(p)
    return xp.clip((1.15 - p[:, 1]) / 0.35, 0, 1) if part == "top" else xp.clip((0.7 - p[:, 1]) / 0.6, 0, 1)


def pattern_mask(name: str, p: Any, scale: Any = 0.0) -> Any:
    """How much of the secondary colour [N], 0..1, at canonical points p [N, 3]; `scale` doubles the period per unit."""
    xp = _of(p)
    factor = 2.0**scale
    around = xp.abs(p[:, 0]) + 0.5 * xp.abs(p[:, 2])

    def wave(x: Any, period: float) -> Any:
        return xp.clip(0.5 + 4 * xp.sin(2 * np.pi * x / (period * factor)), 0, 1)

    match name:
        case "wide stripes":
            return wave(p[:, 1], 0.10)
        case "narrow stripes":
            return wave(p[:, 1], 0.04)
        case "vertical stripes":
            return wave(around, 0.06)
        case "checks":
            return 0.5 * wave(p[:, 1], 0.08) + 0.5 * wave(around, 0.08)
        case "block":
            return xp.clip((1.17 - p[:, 1]) / 0.01, 0, 1)
    raise ValueError(name)
