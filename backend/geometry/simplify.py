# SPDX-License-Identifier: GPL-3.0-or-later
"""Fewer faces by edge collapse under quadric errors (Garland & Heckbert 1997) that never changes the topology.

An edge collapses onto one of its two ends, so the vertices that remain are vertices of the fine mesh and keep their
exact place in the field. Collapses go in passes: all edges are sorted by cost once, then collapsed in that order as
long as both ends are untouched in this pass; that costs a tenth of a priority queue.
"""

from __future__ import annotations

import logging

import numba
import numpy as np
from jaxtyping import Float
from torch import Tensor

from backend.geometry.clean import _take
from backend.geometry.mesh import TriMesh

log = logging.getLogger(__name__)

# Share of a squared distance to the original vertices in the error: in flat places, where planes cost nothing, it
# makes evenly spaced, well-shaped triangles.
_SPREAD = 1e-3
# A pass also takes edges this much costlier than the last one that it would need, if all were free.
_SLACK = 1.5
# cos of the most that a face may turn in one collapse.
_TURN = 0.2


def simplify(mesh: TriMesh, faces: int, importance: Float[Tensor, " V"] | None = None) -> TriMesh:
    """`mesh`, a closed manifold as `clean` leaves it, with at most `faces` faces, one less at most; its uvs are lost.

    `importance` per vertex: where it is k, faces are about k times as dense as where it is 1. The result is again a
    closed manifold of the same genus, whose vertices and points are some of the mesh's. A mesh within the budget
    comes back as it is. Where the topology does not allow so few faces, there are more, and the log says so.
    """
    if len(mesh.faces) <= faces:
        return mesh
    positions = mesh.vertices.detach().cpu().numpy().astype(np.float64)
    positions = positions - positions.mean(0)
    now = np.ascontiguousarray(mesh.faces.cpu().numpy())
    weights = np.ones(len(positions)) if importance is None else importance.cpu().numpy().astype(np.float64)
    quadrics = _quadrics(now, positions, weights**3, _SPREAD)  # a face's error grows with the sixth power of its size
    strict = True
    while len(now) > faces:
        fewer = _pass(now, positions, quadrics, (len(now) - faces + 1) // 2, _SLACK, _TURN if strict else -1.0)
        if len(fewer) == len(now):
            if not strict:
                log.warning("simplify: %d faces are the fewest that keep the topology, asked for %d", len(now), faces)
                break
            strict = False
        now = fewer
    return _take(mesh, now, np.arange(len(positions)))


@numba.njit(cache=True, nogil=True)
def _quadrics(faces, positions, weights, spread):
    """Per vertex a symmetric form: xx, xy, xz, yy, yz, zz, x, y, z, 1; the squared distances to the planes of its
    faces, and by a small share to itself, times a third of their areas."""
    quadrics = np.zeros((len(positions), 10))
    for f in range(len(faces)):
        a, b, c = faces[f, 0], faces[f, 1], faces[f, 2]
        ux, uy, uz = positions[b] - positions[a]
        vx, vy, vz = positions[c] - positions[a]
        nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        twice = np.sqrt(nx * nx + ny * ny + nz * nz)
        if twice < 1e-20:
            continue
        nx, ny, nz = nx / twice, ny / twice, nz / twice
        d = -(nx * positions[a, 0] + ny * positions[a, 1] + nz * positions[a, 2])
        for i in range(3):
            vertex = faces[f, i]
            x, y, z = positions[vertex]
            w = weights[vertex] * twice / 6
            q = quadrics[vertex]
            q[0] += w * (nx * nx + spread)
            q[1] += w * nx * ny
            q[2] += w * nx * nz
            q[3] += w * (ny * ny + spread)
            q[4] += w * ny * nz
            q[5] += w * (nz * nz + spread)
            q[6] += w * (nx * d - spread * x)
            q[7] += w * (ny * d - spread * y)
            q[8] += w * (nz * d - spread * z)
            q[9] += w * (d * d + spread * (x * x + y * y + z * z))
    return quadrics


@numba.njit(cache=True, nogil=True)
def _error(q, r, p):
    """The sum of two forms at p; rounding may make it negative, which counts as none."""
    x, y, z = p[0], p[1], p[2]
    e = (q[0] + r[0]) * x * x + (q[3] + r[3]) * y * y + (q[5] + r[5]) * z * z + q[9] + r[9]
    e += 2 * ((q[1] + r[1]) * x * y + (q[2] + r[2]) * x * z + (q[4] + r[4]) * y * z)
    e += 2 * ((q[6] + r[6]) * x + (q[7] + r[7]) * y + (q[8] + r[8]) * z)
    return max(e, 0.0)


@numba.njit(cache=True, nogil=True)
def _pass(faces, positions, quadrics, goal, slack, turn):
    """Up to `goal` collapses, cheapest first, no vertex in two of them. Returns the faces left; adds up `quadrics`."""
    vertex_count, edge_count = len(positions), 3 * len(faces) // 2
    start = np.zeros(vertex_count + 1, np.int32)  # half-edges by the vertex they leave
    for f in range(len(faces)):
        for i in range(3):
            start[faces[f, i] + 1] += 1
    for v in range(vertex_count):
        start[v + 1] += start[v]
    fill = start[:-1].copy()
    leaving = np.empty(3 * len(faces), np.int32)
    goes, stays = np.empty(edge_count, np.int32), np.empty(edge_count, np.int32)
    costs = np.empty(edge_count, np.float32)
    n = 0
    for f in range(len(faces)):
        for i in range(3):
            a, b = faces[f, i], faces[f, (i + 1) % 3]
            leaving[fill[a]] = 3 * f + i
            fill[a] += 1
            if a < b:
                to_a = _error(quadrics[a], quadrics[b], positions[a])
                to_b = _error(quadrics[a], quadrics[b], positions[b])
                goes[n], stays[n], costs[n] = (a, b, to_b) if to_b < to_a else (b, a, to_a)
                n += 1
    keys = costs[:n].view(np.uint32) >> np.uint32(18)  # the order of positive floats is that of their bits
    bucket = np.zeros((1 << 14) + 1, np.int64)
    for e in range(n):
        bucket[keys[e] + 1] += 1
    for k in range(1 << 14):
        bucket[k + 1] += bucket[k]
    order = np.empty(n, np.int32)
    for e in range(n):
        order[bucket[keys[e]]] = e
        bucket[keys[e]] += 1
    most = costs[order[min(goal, n - 1)]] * slack

    target = np.arange(vertex_count).astype(np.int32)  # where a vertex went; whoever received one stays in this pass
    locked = np.zeros(vertex_count, np.bool_)
    seen = np.full(vertex_count, -1, np.int32)
    done = 0
    for k in range(n):
        e = order[k]
        if done >= goal or (costs[e] > most and done > goal // 8):
            break
        a, b = goes[e], stays[e]
        if locked[a] or locked[b] or not _may_collapse(a, b, e, faces, positions, start, leaving, target, seen, turn):
            continue
        target[a] = b
        locked[a] = locked[b] = True
        for i in range(10):
            quadrics[b, i] += quadrics[a, i]
        done += 1

    left = np.empty_like(faces)
    n = 0
    for f in range(len(faces)):
        a, b, c = target[faces[f, 0]], target[faces[f, 1]], target[faces[f, 2]]
        if a != b and b != c and c != a:
            left[n, 0], left[n, 1], left[n, 2] = a, b, c
            n += 1
    return left[:n].copy()


@numba.njit(cache=True, nogil=True)
def _may_collapse(a, b, stamp, faces, positions, start, leaving, target, seen, turn):
    """Whether a may move onto b: a and b have exactly two neighbours in common (the link condition, Dey et al. 1999),
    they are not part of a tetrahedron, and no face around a turns too far. A neighbour is read through `target`."""
    ring_a = 0
    for k in range(start[a], start[a + 1]):
        f, i = leaving[k] // 3, leaving[k] % 3
        p, q = target[faces[f, (i + 1) % 3]], target[faces[f, (i + 2) % 3]]
        if p == q:
            continue
        seen[p] = stamp
        ring_a += 1
        if p == b or q == b:
            continue
        ux, uy, uz = positions[p] - positions[a]
        vx, vy, vz = positions[q] - positions[a]
        nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        ux, uy, uz = positions[p] - positions[b]
        vx, vy, vz = positions[q] - positions[b]
        mx, my, mz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        both = (nx * nx + ny * ny + nz * nz) * (mx * mx + my * my + mz * mz)
        if turn > 0 and nx * mx + ny * my + nz * mz <= turn * np.sqrt(both):
            return False
    ring_b, common = 0, 0
    for k in range(start[b], start[b + 1]):
        f, i = leaving[k] // 3, leaving[k] % 3
        p, q = target[faces[f, (i + 1) % 3]], target[faces[f, (i + 2) % 3]]
        if p != q:
            ring_b += 1
            common += seen[p] == stamp
    return common == 2 and ring_a + ring_b > 6
