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

from backend.geometry.clean import take_faces
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
    now = mesh.faces.cpu().numpy().astype(np.int32)
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
    return take_faces(mesh, now, np.arange(len(positions)))


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
    start = np.zeros(vertex_count + 1, np.int32)  # the faces around each vertex, by their other two corners
    for f in range(len(faces)):
        for i in range(3):
            start[faces[f, i] + 1] += 1
    for v in range(vertex_count):
        start[v + 1] += start[v]
    fill = start[:-1].copy()
    ring = np.empty((3 * len(faces), 2), np.int32)
    for f in range(len(faces)):
        for i in range(3):
            slot = fill[faces[f, i]]
            fill[faces[f, i]] += 1
            ring[slot, 0], ring[slot, 1] = faces[f, (i + 1) % 3], faces[f, (i + 2) % 3]
    goes, stays = np.empty(edge_count, np.int32), np.empty(edge_count, np.int32)
    costs = np.empty(edge_count, np.float32)
    n = 0
    for a in range(vertex_count):
        for slot in range(start[a], start[a + 1]):
            b = ring[slot, 0]
            if a < b:
                to_a = _error(quadrics[a], quadrics[b], positions[a])
                to_b = _error(quadrics[a], quadrics[b], positions[b])
                goes[n], stays[n], costs[n] = (a, b, to_b) if to_b < to_a else (b, a, to_a)
                n += 1
    keys = costs[:n].view(np.uint32) >> np.uint32(18)  # the order of positive floats is that of their bits
    bucket = np.zeros((1 << 14) + 1, np.int32)
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
        if locked[a] or locked[b] or not _may_collapse(a, b, e, positions, start, ring, target, seen, turn):
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
def _may_collapse(a, b, stamp, positions, start, ring, target, seen, turn):
    """Whether a may move onto b: a and b have exactly two neighbours in common (the link condition, Dey et al. 1999),
    they are not part of a tetrahedron, and no face around a turns too far. A neighbour is read through `target`."""
    ring_a = 0
    for slot in range(start[a], start[a + 1]):
        p, q = target[ring[slot, 0]], target[ring[slot, 1]]
        if p != q:
            seen[p] = stamp
            ring_a += 1
    ring_b, common = 0, 0
    for slot in range(start[b], start[b + 1]):
        p, q = target[ring[slot, 0]], target[ring[slot, 1]]
        if p != q:
            ring_b += 1
            common += seen[p] == stamp
    if common != 2 or ring_a + ring_b == 6:
        return False
    ax, ay, az = positions[a, 0], positions[a, 1], positions[a, 2]
    bx, by, bz = positions[b, 0], positions[b, 1], positions[b, 2]
    for slot in range(start[a], start[a + 1]):
        p, q = target[ring[slot, 0]], target[ring[slot, 1]]
        if p == q or b in (p, q):
            continue
        px, py, pz = positions[p, 0], positions[p, 1], positions[p, 2]
        ex, ey, ez = positions[q, 0] - px, positions[q, 1] - py, positions[q, 2] - pz
        ux, uy, uz = px - ax, py - ay, pz - az
        nx, ny, nz = uy * ez - uz * ey, uz * ex - ux * ez, ux * ey - uy * ex
        ux, uy, uz = px - bx, py - by, pz - bz
        mx, my, mz = uy * ez - uz * ey, uz * ex - ux * ez, ux * ey - uy * ex
        both = (nx * nx + ny * ny + nz * nz) * (mx * mx + my * my + mz * mz)
        if turn > 0 and nx * mx + ny * my + nz * mz <= turn * np.sqrt(both):
            return False
    return True
