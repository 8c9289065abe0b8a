# SPDX-License-Identifier: GPL-3.0-or-later
"""Occupancy on a lattice from coarse to fine, as the papers' evaluation does it, and finer.

`official`: every node of the coarsest grid is asked; each next grid is interpolated, and asked anew about the border
between inside and outside, widely on the second grid, less on the third; the last grid is interpolated only. So 257
nodes along a side have the detail of 129, and what is missed on the grid of 33 never comes back. `full`: the coarsest
grid has 65 nodes, and the last one is asked too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from backend.families.base import Step, no_step
from backend.geometry.mesh import TriMesh
from backend.geometry.tetgrid import extract_surface

Scheme = Literal["official", "full"]
Ask = Callable[[Float[Tensor, "N 3"]], Float[Tensor, " N"]]
COARSEST: dict[Scheme, int] = {"official": 32, "full": 64}  # cells of the first grid along the longest side, at least
BOXES: dict[Scheme, tuple[int, ...]] = {"official": (9, 7, 3), "full": (7, 3)}
"""Side of the box by which the border is widened on the second grid, the third, and all later ones."""
INSIDE = 0.5
PIECE = 1 << 15  # points between two looks at whether to stop


def levels_of(scheme: Scheme, cells: int) -> list[tuple[int, int]]:
    """Per grid every how manyth node of the finest one it has, and the side of the box by which the border is widened
    (0: interpolated only). With 256 cells: 8, 4, 2, 1 for `official` and 4, 2, 1 for `full`."""
    first = max(0, int(math.log2(max(cells / COARSEST[scheme], 1))))
    boxes = BOXES[scheme]
    found = [(1 << (first - i), 0 if i == 0 else boxes[min(i, len(boxes)) - 1]) for i in range(first + 1)]
    if scheme == "official" and first:
        found[-1] = (1, 0)
    return found


@torch.no_grad()
def coarse_to_fine(
    ask: Ask, axes: Sequence[Float[Tensor, " n"]], scheme: Scheme = "official", step: Step = no_step
) -> tuple[Float[Tensor, "X Y Z"], int]:
    """Occupancy at all nodes of three evenly spaced axes, and how many points were asked. Zero everywhere but on the
    coarsest grid's own nodes if no node of that one is inside."""
    levels = levels_of(scheme, max(len(axis) for axis in axes) - 1)
    stride = levels[0][0]
    longer = [_lengthened(axis, stride) for axis in axes]
    counts = [len(axis) for axis in longer]
    asked_in_all, values, asked = 0, torch.empty(0), torch.empty(0)
    for level, (stride, box) in enumerate(levels):
        own = [axis[::stride] for axis in longer]
        shape = tuple(len(axis) for axis in own)
        if level == 0:
            asked = torch.ones(shape, dtype=torch.bool)
            values = torch.zeros(shape)
            wanted = asked
        else:
            border = _doubled((values > INSIDE).float(), shape)
            values = _doubled(values, shape)
            known = torch.zeros(shape, dtype=torch.bool)
            known[::2, ::2, ::2] = asked
            wanted = torch.zeros_like(known)
            if box:
                mixed = ((border > 0) & (border < 1)).float()[None, None]
                wanted = (functional.max_pool3d(mixed, box, 1, box // 2)[0, 0] > 0) & ~known
            asked = known | wanted
        index = wanted.nonzero()
        asked_in_all += len(index)
        for begin in range(0, len(index), PIECE):
            at = index[begin : begin + PIECE]
            places = torch.stack([own[k][at[:, k]] for k in range(3)], 1)
            values[tuple(at.T)] = ask(places.to(axes[0])).float().cpu()
            step("surface", (level + begin / len(index)) / len(levels))
        if level == 0 and not (values > INSIDE).any():
            values = functional.interpolate(values[None, None], tuple(counts), mode="nearest-exact")[0, 0]
            break
    return values[tuple(slice(len(axis)) for axis in axes)], asked_in_all


def _lengthened(axis: Float[Tensor, " n"], stride: int) -> Float[Tensor, " m"]:
    """As many cells as `stride` divides, by going on beyond the end."""
    axis = axis.detach().cpu()
    missing = -(len(axis) - 1) % stride
    return torch.cat([axis, axis[-1] + (axis[-1] - axis[-2]) * torch.arange(1, missing + 1)])


def _doubled(values: Float[Tensor, "x y z"], shape: tuple[int, ...]) -> Float[Tensor, "X Y Z"]:
    """Trilinear, corners onto corners."""
    return functional.interpolate(values[None, None], shape, mode="trilinear", align_corners=True)[0, 0]


class CubeField:
    """Occupancy over the cube [-1, 1]^3 as a field to be meshed; see `families.base.LatticeField`."""

    name = "human"
    rig = None
    focus = None
    region_density = None

    def __init__(self, ask: Ask, scheme: Scheme = "official", step: Step = no_step) -> None:
        self.ask, self.step, self.asked = ask, step, 0
        self.scheme: Scheme = scheme
        self.bounds = torch.tensor([[-1.0] * 3, [1.0] * 3])

    def sdf_on_axes(self, axes: Sequence[Float[Tensor, " n"]]) -> np.ndarray:
        values, self.asked = coarse_to_fine(self.ask, axes, self.scheme, self.step)
        return (INSIDE - values).numpy()

    def sdf(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        return INSIDE - self.ask(points)

    def offset(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        return torch.zeros_like(points)


def cube_mesh(ask: Ask, cells: int = 256, scheme: Scheme = "official", step: Step = no_step) -> TriMesh:
    """The surface within the cube, nodes at (index - (R - 1) / 2) / ((R - 1) / 2) with R = cells + 1, in the frame in
    which `ask` takes points. Raises `empty_surface` if no node of the coarsest grid is inside."""
    return extract_surface(CubeField(ask, scheme, step), cells)  # pyright: ignore[reportArgumentType]
