# SPDX-License-Identifier: GPL-3.0-or-later
"""Marching tetrahedra (Doi & Koide 1991), differentiable as in DMTet (Shen et al. 2021): the tables, and the function
for any tetrahedral grid. `tetgrid` marches whole cubes by the same tables.

A cube is cut into five tetrahedra: one between its four corners of even parity (i + j + k even, counted over the whole
lattice) and one at each odd corner. All diagonals join even nodes, so neighbouring cubes agree on their shared face,
and the lattice has all the symmetries of the cube: a mirrored body gives a mirrored mesh. Corner c of a cube sits at
((c >> 2) & 1, (c >> 1) & 1, c & 1).
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

# A vertex keeps this share of its edge away from either end, so that no triangle degenerates where the field is zero
# at a lattice node.
_KEEP_OFF = 1e-3

CORNERS = np.array([[c >> 2 & 1, c >> 1 & 1, c & 1] for c in range(8)], np.int32)
TET_EDGES = np.array([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])


def _triangle_table() -> tuple[Int[np.ndarray, "16 2 3"], Int[np.ndarray, " 16"]]:
    """For every set of inside corners (bit i: corner i) of a positively oriented tetrahedron, the edges that bear the
    corners of its triangles, counter-clockwise seen from outside, and how many triangles there are."""
    edge = {frozenset(pair): i for i, pair in enumerate(TET_EDGES.tolist())}
    table, count = np.zeros((16, 2, 3), np.int64), np.zeros(16, np.int64)
    for i, j, k, m in itertools.permutations(range(4)):
        if np.linalg.det(np.eye(4)[[i, j, k, m]]) < 0:  # even permutations keep the orientation
            continue
        e = [[edge.get(frozenset((a, b)), -1) for b in range(4)] for a in range(4)]
        table[1 << i, 0] = e[i][j], e[i][k], e[i][m]
        table[15 - (1 << i), 0] = e[i][j], e[i][m], e[i][k]
        count[[1 << i, 15 - (1 << i)]] = 1
        if i < j:  # the quad i|k, i|m, j|m, j|k: i and j inside, k and m outside
            table[1 << i | 1 << j] = (e[i][k], e[i][m], e[j][m]), (e[i][k], e[j][m], e[j][k])
            count[1 << i | 1 << j] = 2
    return table, count


TRIANGLES, TRIANGLE_COUNT = _triangle_table()


def _cube_tets() -> Int[np.ndarray, "2 5 4"]:
    """Corners of the five positively oriented tetrahedra of a cube whose corner 0 is even, and odd."""
    tets = np.zeros((2, 5, 4), np.int64)
    for parity in range(2):
        odd = [c for c in range(8) if (c.bit_count() + parity) % 2]
        tets[parity, 0] = [c for c in range(8) if c not in odd]
        tets[parity, 1:] = [[c, c ^ 1, c ^ 2, c ^ 4] for c in odd]
        for tet in tets[parity]:
            if np.linalg.det((CORNERS[tet[1:]] - CORNERS[tet[0]]).astype(float)) < 0:
                tet[2:] = tet[:1:-1]
    return tets


CUBE_TETS = _cube_tets()


def _cube_table() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The triangles of a whole cube for every set of inside corners.

    Returns edges [24, 2] (corners, lower first), where they are kept [24, 2] (corner, slot), triangles
    [2 parities, 256 codes, 12, 3] (edges) and their number [2, 256]. An edge along an axis is kept at its lower corner
    in slot 0..2, a face's diagonal (each face has one) at the face's lowest corner in slot 3..5.
    """
    edges = [(a, b) for a in range(8) for b in range(a + 1, 8) if (a ^ b).bit_count() < 3]
    kept = np.zeros((len(edges), 2), np.int32)
    for i, (a, b) in enumerate(edges):
        along = a ^ b
        kept[i] = a & b, {4: 0, 2: 1, 1: 2, 3: 3, 5: 4, 6: 5}[along]
    triangles, count = np.zeros((2, 256, 12, 3), np.int32), np.zeros((2, 256), np.int32)
    for parity, code in itertools.product(range(2), range(256)):
        for tet in CUBE_TETS[parity]:
            case = sum((code >> int(tet[i]) & 1) << i for i in range(4))
            for triangle in TRIANGLES[case, : TRIANGLE_COUNT[case]]:
                pairs = [tuple(sorted(tet[TET_EDGES[e]].tolist())) for e in triangle]
                triangles[parity, code, count[parity, code]] = [edges.index(pair) for pair in pairs]
                count[parity, code] += 1
    return np.array(edges, np.int32), kept, triangles, count


EDGES, KEPT, CUBE_TRIANGLES, CUBE_COUNT = _cube_table()


def interpolate(
    values: Float[Tensor, "V C"], sdf: Float[Tensor, " V"], edges: Int[Tensor, "M 2"]
) -> Float[Tensor, "M C"]:
    """`values` where the field, linear along each edge, is zero (DMTet, eq. 3). Swapping the ends changes no bit."""
    a, b = edges.unbind(1)
    difference = sdf[a] - sdf[b]
    to_a = (-sdf[b] / difference).clamp(_KEEP_OFF, 1 - _KEEP_OFF)
    to_b = (sdf[a] / difference).clamp(_KEEP_OFF, 1 - _KEEP_OFF)
    return values[a] * to_a[:, None] + values[b] * to_b[:, None]


def unique_edges(tets: Int[Tensor, "T 4"]) -> tuple[Int[Tensor, "E 2"], Int[Tensor, "T 6"]]:
    """The edges of a tetrahedral grid, lower index first, and which six belong to each tetrahedron. Build it once per
    grid: it costs far more than one extraction."""
    pairs = tets[:, torch.as_tensor(TET_EDGES, device=tets.device)].sort(dim=2).values
    scale = int(tets.max()) + 1
    keys, inverse = torch.unique(pairs[..., 0] * scale + pairs[..., 1], return_inverse=True)
    return torch.stack([keys // scale, keys % scale], 1), inverse.reshape(-1, 6)


def marching_tetrahedra(
    vertices: Float[Tensor, "*B V 3"],
    sdf: Float[Tensor, "*B V"],
    tets: Int[Tensor, "T 4"],
    edges: tuple[Int[Tensor, "E 2"], Int[Tensor, "T 6"]] | None = None,
) -> tuple[Float[Tensor, "M 3"], Int[Tensor, "F 3"]] | list[tuple[Float[Tensor, "M 3"], Int[Tensor, "F 3"]]]:
    """The zero surface of a field given at the vertices of a tetrahedral grid; a list of surfaces for a batch.

    Differentiable with respect to `vertices` and `sdf`. Negative is inside; zero counts as outside. Faces are
    counter-clockwise from outside whatever the orientation of a tetrahedron. Vertices come in the order of the grid's
    edges, faces in that of the tetrahedra; the surface is closed where it does not leave the grid. `edges`: what
    `unique_edges(tets)` returns, if at hand.
    """
    if sdf.ndim == 1:
        return marching_tetrahedra(vertices[None], sdf[None], tets, edges)[0]
    negative = sdf.detach() < 0
    if edges is None:
        corners = negative[:, tets]
        tets = tets[(corners.any(2) & ~corners.all(2)).any(0)]
        if len(tets) == 0:
            return [(v[:0], tets.new_zeros(0, 3)) for v in vertices.expand(len(sdf), -1, -1)]
        edges = unique_edges(tets)
    pairs, tet_edges = edges
    triangles = torch.as_tensor(TRIANGLES, device=tets.device)
    bits = torch.tensor([1, 2, 4, 8], device=tets.device)
    surfaces = []
    for points, field, inside in zip(vertices.expand(len(sdf), -1, -1), sdf, negative):
        crossing = inside[pairs[:, 0]] != inside[pairs[:, 1]]
        number = crossing.cumsum(0) - 1
        case = (inside[tets] * bits).sum(1)
        cut = ((case > 0) & (case < 15)).nonzero()[:, 0]
        case, corners = case[cut], points.detach()[tets[cut]]
        flipped = torch.linalg.det(corners[:, 1:] - corners[:, :1]) < 0
        faces = number[tet_edges[cut]].gather(1, triangles[case].flatten(1)).unflatten(1, (2, 3))
        faces = torch.where(flipped[:, None, None], faces.flip(2), faces)
        used = torch.arange(2, device=tets.device) < torch.as_tensor(TRIANGLE_COUNT, device=tets.device)[case, None]
        surfaces.append((interpolate(points, field, pairs[crossing]), faces[used]))
    return surfaces
