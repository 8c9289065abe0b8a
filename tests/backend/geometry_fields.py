# SPDX-License-Identifier: GPL-3.0-or-later
"""Fields made of functions, for the geometry tests."""

from __future__ import annotations

import torch

from backend.families.capsule.model import load

CAPSULE = load(torch.device("cpu"))


def capsule(seed: int = 1, **parameters):
    (one,) = CAPSULE.decode(CAPSULE.sample(seed, 1.0, parameters))
    return one


class Shape:
    """A `HumanField` from a distance function; counts the points that it is asked for."""

    name = "shape"
    rig = None
    focus = None
    region_density = None

    def __init__(self, sdf, half=(0.6, 0.6, 0.6), offset=None, color=None):
        self._sdf, self._offset, self._color = sdf, offset, color
        self.bounds = torch.tensor([[-x for x in half], list(half)])
        self.asked = []

    def sdf(self, points):
        self.asked.append(len(points))
        return self._sdf(points)

    def offset(self, points):
        return self._offset(points) if self._offset else torch.zeros_like(points)

    def color(self, points):
        return self._color(points)

    def material(self, points):
        return points.new_tensor([0.5, 0.0]).expand(len(points), 2)

    def region(self, points):
        return torch.zeros(len(points), dtype=torch.int64)


def ball(radius=0.4):
    return lambda p: p.norm(dim=1) - radius


def torus(major=0.35, minor=0.12):
    def sdf(p):
        ring = p[:, [0, 2]].norm(dim=1) - major
        return torch.stack([ring, p[:, 1]], 1).norm(dim=1) - minor

    return sdf


def block(half):
    """A box whose sides may lie exactly on lattice planes."""

    def sdf(p):
        q = p.abs() - torch.tensor(half)
        return q.clamp_min(0).norm(dim=1) + q.amax(1).clamp_max(0)

    return sdf


def bumpy(amplitude=0.01, waves=40.0):
    return lambda p: p.norm(dim=1) - 0.4 + amplitude * (torch.sin(waves * p).prod(1))
