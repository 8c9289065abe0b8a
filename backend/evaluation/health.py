# SPDX-License-Identifier: GPL-3.0-or-later
"""Is a mesh a solid that can be printed, simulated and simplified: closed, of how many pieces, with how many holes
through it, and does it run through itself?"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import coo_array, csgraph

Array = np.ndarray[Any, Any]
STEPS = 1 << 20  # of the extent: 3 x 3 determinants of such integers are below 2^62, so int64 is exact


def topology(faces: Int[Array, "F 3"]) -> dict[str, int | bool | None]:
    """`closed`: every directed edge occurs once and so does its reverse; `components`; `genus`: the number of handles,
    all components together, None for a mesh that is not closed. V - E + F = 2 (components - genus)."""
    count = int(faces.max()) + 1 if len(faces) else 0
    edges = np.stack([faces, np.roll(faces, -1, 1)], 2).reshape(-1, 2).astype(np.int64)
    forward = np.sort(edges[:, 0] * count + edges[:, 1])
    backward = np.sort(edges[:, 1] * count + edges[:, 0])
    closed = bool(len(faces) and (forward == backward).all() and (np.diff(forward) > 0).all())
    used = np.unique(faces)
    graph = coo_array((np.ones(len(edges), bool), (edges[:, 0], edges[:, 1])), shape=(count, count))
    pieces = len(np.unique(csgraph.connected_components(graph, False)[1][used])) if len(used) else 0
    euler = len(used) - len(edges) // 2 + len(faces)
    return {"closed": closed, "components": pieces, "genus": pieces - euler // 2 if closed else None}


def self_intersections(vertices: Float[Array, "V 3"], faces: Int[Array, "F 3"]) -> int:
    """Pairs of faces that run through each other."""
    return len(intersecting_pairs(vertices, faces))


def intersecting_pairs(vertices: Float[Array, "V 3"], faces: Int[Array, "F 3"]) -> Int[Array, "P 2"]:
    """Pairs of faces (lower index first) of which an edge of one goes from one side of the other to the other side,
    within it or through its border.

    Vertices are snapped to a lattice of 2^-20 of the extent (2 um for people); from there on every test is exact, in
    integers. Faces that touch without crossing, lie in one plane, or share an edge are not counted; faces that share a
    corner are when they meet elsewhere too.
    """
    vertices, faces = np.asarray(vertices, np.float64), np.asarray(faces, np.int64)
    if not len(faces):
        return np.zeros((0, 2), np.int64)
    used = vertices[faces]
    low = used.min((0, 1))
    unit = max(float((used.max((0, 1)) - low).max()), 1e-30) / STEPS
    points = np.rint((vertices - low) / unit).astype(np.int64)
    corners = points[faces]
    first, last = corners.min(1), corners.max(1)
    cell = max(int(np.mean((last - first).max(1))) * 2, 1)  # a few faces per cell, a few cells per face
    first_cell, last_cell = first // cell, last // cell
    span = (last_cell - first_cell + 1).prod(1)
    face = np.repeat(np.arange(len(faces)), span)
    within = np.arange(len(face)) - np.repeat(np.cumsum(span) - span, span)
    size = (last_cell - first_cell + 1)[face]
    shift = np.stack([within // (size[:, 1] * size[:, 2]), within // size[:, 2] % size[:, 1], within % size[:, 2]], 1)
    place = first_cell[face] + shift
    key = (place[:, 0] << 42) | (place[:, 1] << 21) | place[:, 2]
    order = np.argsort(key, kind="stable")
    key, face = key[order], face[order]
    starts = np.append(np.flatnonzero(np.diff(key, prepend=-1)), len(key))
    buffer = np.empty((1 << 10, 2), np.int64)
    while True:
        count = _search(points, faces, first, last, cell, face, key, starts, buffer)
        if count <= len(buffer):
            return buffer[np.lexsort(buffer[:count].T[::-1])]
        buffer = np.empty((count, 2), np.int64)


@numba.njit(nogil=True, cache=True)
def _search(points, faces, first, last, cell, face, key, starts, out):  # pragma: no cover (compiled)
    """Fills `out` with pairs and returns how many there are, also beyond its end."""
    count = 0
    for s in range(len(starts) - 1):
        for i in range(starts[s], starts[s + 1]):
            a = face[i]
            for j in range(i + 1, starts[s + 1]):
                b = face[j]
                apart = False
                home = np.int64(0)
                for k in range(3):
                    low = max(first[a, k], first[b, k])
                    if low > min(last[a, k], last[b, k]):
                        apart = True
                        break
                    home = (home << 21) | (low // cell)
                # both faces meet in several cells: the one with the lowest corner of the common box answers
                if not apart and home == key[i] and _cross(points, faces[a], faces[b]):
                    if count < len(out):
                        out[count, 0], out[count, 1] = min(a, b), max(a, b)
                    count += 1
    return count


@numba.njit(nogil=True, cache=True)
def _cross(points, a, b):  # pragma: no cover (compiled)
    shared, at_a, at_b = 0, 0, 0
    for i in range(3):
        for j in range(3):
            if a[i] == b[j]:
                shared += 1
                at_a, at_b = i, j
    if shared > 1:
        return False
    if shared == 1:  # only the edges that do not leave the common corner can meet the other face elsewhere
        return _pierces(points, a[(at_a + 1) % 3], a[(at_a + 2) % 3], b) or _pierces(
            points, b[(at_b + 1) % 3], b[(at_b + 2) % 3], a
        )
    hit = False
    for i in range(3):
        hit = hit or _pierces(points, a[i], a[(i + 1) % 3], b) or _pierces(points, b[i], b[(i + 1) % 3], a)
    return hit


@numba.njit(nogil=True, cache=True)
def _pierces(points, p, q, face):  # pragma: no cover (compiled)
    """Do the ends lie strictly on different sides of the face, and does the segment meet it or its border?"""
    sp = _side(points[face[0]], points[face[1]], points[face[2]], points[p])
    if sp == 0:
        return False
    sq = _side(points[face[0]], points[face[1]], points[face[2]], points[q])
    if sp * sq >= 0:
        return False
    low, high = 0, 0
    for k in range(3):
        turn = _side(points[p], points[q], points[face[k]], points[face[(k + 1) % 3]])
        low, high = min(low, turn), max(high, turn)
    return low * high == 0


@numba.njit(nogil=True, cache=True)
def _side(a, b, c, d):  # pragma: no cover (compiled)
    """Sign of the determinant of (a - d, b - d, c - d). Sums may wrap around on the way; the result fits."""
    ax, ay, az = a[0] - d[0], a[1] - d[1], a[2] - d[2]
    bx, by, bz = b[0] - d[0], b[1] - d[1], b[2] - d[2]
    cx, cy, cz = c[0] - d[0], c[1] - d[1], c[2] - d[2]
    value = ax * (by * cz - bz * cy) - ay * (bx * cz - bz * cx) + az * (bx * cy - by * cx)
    return 1 if value > 0 else (-1 if value < 0 else 0)
