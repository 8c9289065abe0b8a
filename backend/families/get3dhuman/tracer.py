# SPDX-License-Identifier: GPL-3.0-or-later
"""Sphere tracing of a field of occupancy: depth, surface points and mask of a view around the vertical axis.

Picture coordinates as in `config.to_ndc`, but with y up: P = (x_ndc, -y_ndc, z_ndc). A ray starts at the front of the
cube [-1, 1]^3 of its view and goes straight in; the distance is estimated from the occupancy at its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from backend.families.get3dhuman.config import DISTANCE

STEPS = 55
REACH = 0.99  # the field is asked within +-REACH
LONGEST = 0.2  # ndc per step
TOUCHES = 0.0008  # an estimate below this is a hit
ARRIVED = 1e-5  # hastened rays end where the estimate is smaller
_RAYS = 1 << 14  # at a time: all their steps are kept
MISSED = 1e11  # depth where nothing is hit

Occupancy = Callable[[Float[Tensor, "N 3"]], Float[Tensor, " N"]]
"""ndc (y down) -> 0 inside, 1 outside."""


@dataclass(frozen=True)
class View:
    """What N x N rays of one view met. Rows from the top, as pictures have them."""

    angle: float  # radians about Y; 0 looks at the front
    depth: Float[Tensor, "N N"]  # from the front of the cube, ndc; `MISSED` where nothing was hit
    points: Float[Tensor, "N N 3"]  # P of the smallest estimate, not clamped

    @property
    def mask(self) -> Bool[Tensor, "N N"]:
        """Pixels that count as body."""
        return (self.depth > 0.4) & (self.depth < 2)

    @property
    def ndc(self) -> Float[Tensor, "N N 3"]:
        """Where the decoders are asked about the kept points."""
        return as_ndc(self.points)


def rotation(angle: float, like: Tensor) -> Float[Tensor, "3 3"]:
    """R of row vectors: P_world = P_view R."""
    c, s = math.cos(angle), math.sin(angle)
    return like.new_tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def rays(size: int, angle: float, like: Tensor) -> tuple[Float[Tensor, "N N 3"], Float[Tensor, " 3"]]:
    """Points at depth 0 and the direction of all rays; the outermost pixels' centres lie on the cube's edges."""
    middle = (size - 1) / 2
    line = (torch.arange(size, dtype=like.dtype, device=like.device) - middle) / middle
    v, u = torch.meshgrid(line, line, indexing="ij")
    turn = rotation(angle, like)
    return torch.stack([u, -v, torch.ones_like(u)], -1) @ turn, like.new_tensor([0, 0, -1]) @ turn


def as_ndc(points: Float[Tensor, "... 3"]) -> Float[Tensor, "... 3"]:
    return points.clamp(-REACH, REACH) * points.new_tensor([1, -1, 1])


def estimate(occupancy: Occupancy, points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
    """Distance to the surface in ndc, negative inside."""
    return (2 * occupancy(as_ndc(points)) - 1) * DISTANCE


@torch.no_grad()
def trace(occupancy: Occupancy, size: int, angle: float, like: Tensor) -> View:
    """As published: every ray takes `STEPS` steps and keeps the place of its smallest estimate, and the depth that
    this estimate led to. Device and dtype are those of `like`.

    Rays that only ever met the same estimate keep the step that `topk` picks among equals, as the published run does;
    they are misses, but pictures without a mask show their colour.
    """
    start, direction = rays(size, angle, like)
    kept, depths, values = [], [], []
    for begin in start.reshape(-1, 3).split(_RAYS):
        depth, places, q = [begin.new_zeros(len(begin))], [], []
        for _ in range(STEPS):
            places.append(begin + depth[-1][:, None] * direction)
            q.append(estimate(occupancy, places[-1]))
            depth.append(depth[-1] + q[-1].clamp(-LONGEST, LONGEST))
        best = torch.stack(q).abs().topk(1, 0, largest=False).indices
        values.append(torch.stack(q).gather(0, best)[0])
        depths.append(torch.stack(depth[1:]).gather(0, best)[0])
        kept.append(torch.stack(places).gather(0, best[..., None].expand(-1, -1, 3))[0])
    return _view(angle, size, torch.cat(values), torch.cat(depths), torch.cat(kept))


@torch.no_grad()
def trace_quickly(occupancy: Occupancy, size: int, angle: float, like: Tensor, coarse: int = 8) -> View:
    """The same view for a tenth of the work: only rays near those that hit in a picture `coarse` times smaller, each
    only until it has arrived or left the cube. Depths differ from those of `trace` by less than `TOUCHES`."""
    near = _hasten(occupancy, max(size // coarse, 16), angle, like, None).mask
    near = functional.max_pool2d(near[None, None].to(like.dtype), 3, 1, 1)
    return _hasten(occupancy, size, angle, like, functional.interpolate(near, (size, size))[0, 0] > 0)


def _hasten(occupancy: Occupancy, size: int, angle: float, like: Tensor, active: Bool[Tensor, "N N"] | None) -> View:
    start, direction = rays(size, angle, like)
    start = start.reshape(-1, 3)
    depth = torch.zeros(len(start), dtype=like.dtype, device=like.device)
    value, kept_depth, kept = torch.full_like(depth, torch.inf), depth.clone(), start.clone()
    going = torch.arange(len(start), device=like.device) if active is None else active.flatten().nonzero().squeeze(1)
    for _ in range(STEPS):
        if not len(going):
            break
        at = start[going] + depth[going, None] * direction
        q = estimate(occupancy, at)
        depth[going] += q.clamp(-LONGEST, LONGEST)
        nearer = q.abs() < value[going].abs()
        better = going[nearer]
        value[better], kept_depth[better], kept[better] = q[nearer], depth[better], at[nearer]
        going = going[(q.abs() > ARRIVED) & (depth[going] < 2)]
    return _view(angle, size, value, kept_depth, kept)


def _view(angle: float, size: int, value: Tensor, depth: Tensor, kept: Tensor) -> View:
    """A hit is inside or touches, and not at the far end of the cube."""
    within = ((kept @ rotation(angle, kept)) > -0.999).all(1)  # turned once more, as published; alike at 0 and 180
    depth = torch.where((value < TOUCHES) & within, depth, MISSED)
    return View(angle, depth.reshape(size, size), kept.reshape(size, size, 3))
