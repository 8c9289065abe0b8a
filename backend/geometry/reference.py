# SPDX-License-Identifier: GPL-3.0-or-later
"""Slow twins: what the fast paths are compared with, for equality by the tests and for speed by `populace bench`."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from backend.families.base import HumanField
from backend.geometry import flexicubes, marching, tetgrid
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


@torch.no_grad()
def extract_dual_dense(field: HumanField, grid_resolution: int) -> TriMesh:
    """FlexiCubes with all weights one as its users write it: the field and its offsets at every node, edges told apart
    by sorting pairs of nodes. The same mesh as `flexicubes.extract_surface`, in another order."""
    lattice = tetgrid.Lattice.of(field.bounds, grid_resolution, field.focus)
    cells = torch.as_tensor(lattice.cells)
    index = np.stack(np.meshgrid(*(np.arange(n + 1) for n in lattice.cells), indexing="ij"), -1).reshape(-1, 3)
    nodes = lattice.points(index.astype(np.int32), field.bounds.device)
    values = field.sdf(nodes)
    placed = nodes + field.offset(nodes)
    strides = torch.stack([(cells[1] + 1) * (cells[2] + 1), cells[2] + 1, torch.ones_like(cells[0])])
    cubes = torch.from_numpy(index).to(cells)[(torch.from_numpy(index) < cells).all(1)]
    corners = (cubes @ strides)[:, None] + torch.as_tensor(flexicubes.CORNERS) @ strides
    inside = values[corners] < 0
    crossed = inside.any(1) & ~inside.all(1)
    cubes, corners, inside = cubes[crossed], corners[crossed], inside[crossed]
    case = flexicubes._untwisted(cubes, (inside * (1 << torch.arange(8))).sum(1), cells.tolist())
    pairs = corners[:, torch.as_tensor(flexicubes.EDGES)].reshape(-1, 2)
    unique, inverse = torch.unique(pairs, dim=0, return_inverse=True)
    sheet = torch.as_tensor(flexicubes.SHEET)[case]
    sheets = torch.as_tensor(flexicubes.SHEETS)[case]
    vertex = ((sheets.cumsum(0) - sheets)[:, None] + sheet).flatten()
    on, edge = (sheet.flatten() >= 0).nonzero()[:, 0], inverse.reshape(-1)
    a, b = unique.unbind(1)
    crossing = (placed[a] * values[b, None] - placed[b] * values[a, None]) / (values[b] - values[a])[:, None]
    total = placed.new_zeros(int(sheets.sum()), 4)
    total = total.index_add(0, vertex[on], torch.cat([crossing, torch.ones_like(crossing[:, :1])], 1)[edge[on]])
    vertices = total[:, :3] / total[:, 3:]
    order = on[torch.argsort(edge[on], stable=True)]
    _, number = torch.unique_consecutive(edge[order], return_counts=True)
    whole = torch.repeat_interleave(number == 4, number)
    quads = vertex[order[whole]].reshape(-1, 4)
    outside = values[unique[edge[order[whole]].reshape(-1, 4)[:, 0], 0]] >= 0
    quads = torch.where(outside[:, None], quads[:, [0, 1, 3, 2]], quads[:, [2, 3, 1, 0]])
    return TriMesh(vertices, quads[:, [0, 1, 3, 3, 1, 2]].reshape(-1, 3), vertices)


def unwrap_by_xatlas(mesh: TriMesh) -> int:
    """xatlas with its default options, to be timed. Returns the number of charts. Raises ImportError without xatlas."""
    import xatlas

    atlas = xatlas.Atlas()
    atlas.add_mesh(mesh.vertices.cpu().numpy(), mesh.faces.cpu().numpy().astype(np.uint32))
    atlas.generate()
    return atlas.chart_count
