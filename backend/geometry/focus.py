# SPDX-License-Identifier: GPL-3.0-or-later
"""A lattice that is finer where people look: the cubic lattice of the surface, drawn together above a height.

Faces need smaller triangles than legs. Lattice places q are carried to field places p by a smooth map that is the
identity below, shrinks towards an upright axis above, and keeps neighbours neighbours, so that everything that is known
of cubic lattices stays true.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Focus:
    """Cells are `factor` times smaller above `high`, as large as elsewhere below `low`; heights in lattice space, y."""

    low: float
    high: float
    factor: float
    axis: tuple[float, float]  # x and z that cells are drawn towards
    reach: Float[Tensor, "2 3"]  # field-space box that the fine part has to hold

    def to_field(self, places: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        """Lattice places to field places."""
        less, span = 1 - 1 / self.factor, self.high - self.low
        y = places[:, 1]
        u = ((y - self.low) / span).clamp(0, 1)
        shrink = 1 - less * (3 - 2 * u) * u * u
        above = (y - self.high).clamp(min=0)
        height = y - less * (span * (1 - u / 2) * u**3 + above)
        x, z = self.axis
        return torch.stack([x + (places[:, 0] - x) * shrink, height, z + (places[:, 2] - z) * shrink], 1)

    def lattice_box(self, bounds: Float[Tensor, "2 3"]) -> Float[Tensor, "2 3"]:
        """The box in lattice space that holds the field's `bounds` below and `reach` above."""
        less, span = 1 - 1 / self.factor, self.high - self.low
        middle = bounds.new_tensor([self.axis[0], 0.0, self.axis[1]])
        wide = middle + (self.reach.to(bounds) - middle) * self.factor
        top = self.factor * (bounds[1, 1] + less * (span / 2 - self.high))
        low, high = torch.minimum(bounds[0], wide[0]), torch.maximum(bounds[1], wide[1])
        low[1], high[1] = bounds[0, 1], top
        return torch.stack([low, high])
