# SPDX-License-Identifier: GPL-3.0-or-later
"""Slow twins: what the fast paths are compared with, for equality by the tests and for speed by `populace bench`."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from backend.families.base import HumanField
from backend.geometry import marching, tetgrid
from backend.geometry.mesh import TriMesh


@torch.no_grad()
def extract_dense(field: HumanField, grid_resolution: int) -> TriMesh:
    """The surface as GET3D makes it: the field at every node of the lattice, then plain tensor operations that find
    the unique crossing edges anew each time. The same mesh as `tetgrid.extract_surface`, in another order.

    Grows with the volume: about 1.5 GB at 256 cells along a human's height.
    """
    nodes, tets = tetgrid.Lattice.of(field.bounds, grid_resolution, field.focus).dense(field.bounds.device)
    sdf = field.sdf(nodes)
    deformed = torch.cat([nodes, nodes + field.offset(nodes)], 1)
    both, faces = march_by_unique(deformed, sdf, tets)
    return TriMesh(both[:, 3:].contiguous(), faces, both[:, :3].contiguous())


def march_by_unique(
    values: Float[Tensor, "V C"], sdf: Float[Tensor, " V"], tets: Int[Tensor, "T 4"]
) -> tuple[Float[Tensor, "M C"], Int[Tensor, "F 3"]]:
    """Marching tetrahedra the way DMTet's users write it; all tetrahedra positively oriented."""
    inside = sdf < 0
    number_inside = inside[tets.reshape(-1)].reshape(-1, 4).sum(1)
    cut = tets[(number_inside > 0) & (number_inside < 4)]
    pairs = cut[:, torch.as_tensor(marching.TET_EDGES, device=tets.device)].reshape(-1, 2).sort(dim=1).values
    unique, inverse = torch.unique(pairs, dim=0, return_inverse=True)
    crossing = inside[unique.reshape(-1)].reshape(-1, 2).sum(1) == 1
    number = torch.where(crossing, crossing.cumsum(0) - 1, -1)[inverse].reshape(-1, 6)
    case = (inside[cut] * torch.tensor([1, 2, 4, 8], device=tets.device)).sum(1)
    table = torch.as_tensor(marching.TRIANGLES, device=tets.device)[case]
    count = torch.as_tensor(marching.TRIANGLE_COUNT, device=tets.device)[case, None]
    faces = torch.gather(number, 1, table.reshape(-1, 6)).reshape(-1, 2, 3)
    return marching.interpolate(values, sdf, unique[crossing]), faces[torch.arange(2, device=tets.device) < count]


def unwrap_by_xatlas(mesh: TriMesh) -> int:
    """xatlas with its default options, to be timed. Returns the number of charts. Raises ImportError without xatlas."""
    import xatlas

    atlas = xatlas.Atlas()
    atlas.add_mesh(mesh.vertices.cpu().numpy(), mesh.faces.cpu().numpy().astype(np.uint32))
    atlas.generate()
    return atlas.chart_count
