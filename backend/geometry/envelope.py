# SPDX-License-Identifier: GPL-3.0-or-later
"""The surface for coarse levels of detail: without the pinholes and narrow gaps that only a fine mesh has faces for.

Simplification never changes the topology, and every handle costs it faces: a person of a hundred pinholes in her
clothes becomes a stick figure at 500 faces. So the surface is taken a little outside, where narrow gaps are closed
(a morphological closing: Serra 1982, ch. II), and its vertices are pulled back onto the true one.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from backend.families.base import HumanField, Step, no_step
from backend.geometry.clean import clean
from backend.geometry.mesh import TriMesh
from backend.geometry.tetgrid import extract_surface
from backend.protocol import PopulaceError

GAP_M = 0.012  # gaps up to here are closed
GRID_RESOLUTION = 96  # cells along the height at most: about 2 cm
_STEPS = 6  # of Newton's method


class _Grown:
    """A field whose surface lies `by` metres outside that of another; the rest is that field's."""

    def __init__(self, field: HumanField, by: float) -> None:
        self._field, self._by = field, by
        self.bounds = field.bounds + field.bounds.new_tensor([[-2 * by], [2 * by]])

    def __getattr__(self, name: str) -> object:
        return getattr(self._field, name)

    def sdf(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        # Beyond the box the field need not know anything: there it is what it is on the box, and the way there.
        inside = points.clamp(*self._field.bounds)
        return self._field.sdf(inside) + (points - inside).norm(dim=1) - self._by


def envelope(field: HumanField, grid_resolution: int, pieces: float = 1.0, step: Step = no_step) -> TriMesh | None:
    """A closed mesh close to the surface of `field` with few handles; None where the field does not allow one.

    `pieces` as in `clean`. Vertices where a gap was closed lie on one of its walls.
    """
    try:
        cells = min(grid_resolution, GRID_RESOLUTION)
        mesh = clean(extract_surface(_Grown(field, GAP_M / 2), cells, step), pieces)
    except PopulaceError as error:
        if error.code != "empty_surface":
            raise
        return None
    points = mesh.points
    for _ in range(_STEPS):
        with torch.enable_grad():
            at = points.detach().requires_grad_()
            sdf = field.sdf(at)
            gradient = torch.autograd.grad(sdf.sum(), at)[0]
        move = -sdf.detach()[:, None] * gradient / gradient.square().sum(1, keepdim=True).clamp_min(0.25)
        points = points + move * (GAP_M / 2 / move.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp(max=1)
    points = points.clamp(*field.bounds)
    return replace(mesh, points=points, vertices=points + field.offset(points))
