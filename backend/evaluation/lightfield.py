# SPDX-License-Identifier: GPL-3.0-or-later
"""Light-field distance of shapes (Chen et al. 2003, "On visual similarity based 3D model retrieval").

A shape is seen as a silhouette from the 20 vertices of a dodecahedron, orthographically. Opposite vertices see mirror
images, so 10 silhouettes remain; each is described by 35 magnitudes of Zernike moments (orders to 10, region) and 10
of the Fourier transform of its outline's distance from the centroid (outline). The distance of two shapes is the sum of
absolute differences over views and numbers, the smallest over the dodecahedron's 60 rotations.

Different from the original: one set of cameras instead of ten, magnitudes are not rounded to 8 bits, and where shapes
stand upright and face +Z, as people here do, views are compared one to one (`aligned`).
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numba
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import ndimage

from backend.render.camera import Camera, look_at, orthographic

Array = np.ndarray[Any, Any]
ORDER = 10  # of Zernike moments
FOURIER = 10
OUTLINE = 256  # samples of the outline
NUMBERS = 35 + FOURIER


@functools.cache
def directions() -> Float[Array, "10 3"]:
    """One unit vector for each pair of opposite vertices of the dodecahedron."""
    phi = (1 + math.sqrt(5)) / 2
    corners = [(1, s, t) for s in (1, -1) for t in (1, -1)]
    for s in (1, -1):
        corners += [(0, 1 / phi, s * phi), (1 / phi, s * phi, 0), (s * phi, 0, 1 / phi)]
    return np.array(corners) / math.sqrt(3)


@functools.cache
def rotations() -> Int[Array, "60 10"]:
    """Where the 60 rotations of the dodecahedron send the 10 pairs of vertices."""
    vertices = np.concatenate([directions(), -directions()])
    # A rotation is known from where it sends two neighbouring vertices: 20 x 3 = 60 of them.
    edge = np.sort(np.unique(np.round(vertices @ vertices.T, 6)))[-2]
    near = np.abs(vertices @ vertices.T - edge) < 1e-4
    first = np.array([vertices[0], vertices[near[0].argmax()]])
    basis = np.column_stack([*first, np.cross(*first)])
    found = []
    for i, j in itertools.product(range(20), repeat=2):
        if near[i, j]:
            turn = np.column_stack([vertices[i], vertices[j], np.cross(vertices[i], vertices[j])]) @ np.linalg.inv(
                basis
            )
            found.append(np.abs(directions() @ turn.T @ directions().T).argmax(1))
    return np.array(found)


def cameras(bounds: Float[Array, "2 3"]) -> Camera:
    """The 10 orthographic cameras around a box: its bounding sphere fills the image."""
    low, high = torch.as_tensor(np.asarray(bounds), dtype=torch.float64)
    centre, radius = (low + high) / 2, float((high - low).norm()) / 2
    eye = centre + 2 * radius * torch.from_numpy(directions())
    c2w = look_at(eye, centre).float()
    return Camera(c2w, orthographic(radius, 1.0, radius, 3 * radius).expand(len(eye), 4, 4))


def describe(masks: Bool[Array, "10 S S"]) -> Float[Array, "10 45"]:
    """The numbers of each silhouette; zeros for an empty one."""
    return np.stack([np.concatenate([zernike(m), fourier(m)]) if m.any() else np.zeros(NUMBERS) for m in masks])


def zernike(mask: Bool[Array, "S S"]) -> Float[Array, " 35"]:
    """Magnitudes of the Zernike moments of order 1 to 10, repetition >= 0, over the largest disc in the image, divided
    by that of order 0 (the area): the same for a rotated or mirrored silhouette."""
    basis = _zernike_basis(mask.shape[0])
    moments = np.abs(basis @ mask.reshape(-1).astype(np.float64))
    return moments[1:] / max(moments[0], 1e-12)


@functools.cache
def _zernike_basis(size: int) -> Array:
    """Complex [36, S * S]: (n + 1) / pi * conj(V_nm) dA at pixel centres."""
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(axis, -axis)
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    inside = (radius <= 1) * (2 / size) ** 2
    rows = []
    for n in range(ORDER + 1):
        for m in range(n % 2, n + 1, 2):
            radial = sum(
                (-1) ** s
                * math.factorial(n - s)
                / (math.factorial(s) * math.factorial((n + m) // 2 - s) * math.factorial((n - m) // 2 - s))
                * radius ** (n - 2 * s)
                for s in range((n - m) // 2 + 1)
            )
            rows.append((n + 1) / math.pi * radial * np.exp(-1j * m * angle) * inside)
    return np.stack(rows).reshape(len(rows), -1)


def fourier(mask: Bool[Array, "S S"]) -> Float[Array, " 10"]:
    """Magnitudes 1 to 10 of the Fourier transform of "distance from the centroid along the outline", divided by
    magnitude 0: the same for a moved, rotated, mirrored or scaled silhouette. The outline is that of the largest piece.
    """
    pieces, count = ndimage.label(mask, np.ones((3, 3)))
    if count > 1:
        mask = pieces == np.bincount(pieces.reshape(-1))[1:].argmax() + 1
    path = outline(mask)
    centre = np.argwhere(mask).mean(0)
    closed = np.concatenate([path, path[:1]])
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(closed, axis=0), axis=1))])
    if length[-1] == 0:  # a single pixel
        return np.zeros(FOURIER)
    distance = np.linalg.norm(closed - centre, axis=1)
    even = np.interp(np.arange(OUTLINE) * length[-1] / OUTLINE, length, distance)
    spectrum = np.abs(np.fft.rfft(even))
    return spectrum[1 : FOURIER + 1] / spectrum[0]


def outline(mask: Bool[Array, "H W"]) -> Int[Array, "P 2"]:
    """Rows and columns of the outer border pixels of one piece in order (Moore's neighbour tracing)."""
    padded = np.pad(np.asarray(mask, np.bool_), 1)
    start = np.unravel_index(padded.argmax(), padded.shape)
    return _trace(padded, start[0], start[1]) - 1


@numba.njit(cache=True)
def _trace(mask, row, column):  # pragma: no cover (compiled)
    dr = np.array([0, 1, 1, 1, 0, -1, -1, -1])  # clockwise from the right, rows go down
    dc = np.array([1, 1, 0, -1, -1, -1, 0, 1])
    path = np.empty((4 * mask.size, 2), np.int64)
    path[0, 0], path[0, 1] = row, column
    count, r, c = 1, row, column
    came = 4  # direction from here to the empty pixel that we came from: left of the topmost, leftmost one
    first = -1
    while count < len(path):
        turn = -1
        for k in range(1, 9):
            d = (came + k) % 8
            if mask[r + dr[d], c + dc[d]]:
                turn = d
                break
        if turn < 0:
            break
        if r == row and c == column:
            if first == turn:
                break
            if first < 0:
                first = turn
        r, c = r + dr[turn], c + dc[turn]
        # the last empty pixel looked at, seen from the new place
        came = (turn + 6) % 8 if turn % 2 == 0 else (turn + 5) % 8
        path[count, 0], path[count, 1] = r, c
        count += 1
    if count > 1:
        count -= 1  # the start again
    return path[:count].copy()


def light_field_distance(
    a: Float[Array, "A 10 45"], b: Float[Array, "B 10 45"], aligned: bool = False
) -> Float[Array, "A B"]:
    """Distances of all pairs of described shapes."""
    turns = np.arange(10)[None] if aligned else rotations()
    return _smallest(np.ascontiguousarray(a), np.ascontiguousarray(b), turns.astype(np.int64))


@numba.njit(nogil=True, cache=True)
def _smallest(a, b, turns):  # pragma: no cover (compiled)
    out = np.empty((len(a), len(b)))
    table = np.empty((10, 10))
    for i in range(len(a)):
        for j in range(len(b)):
            for v in range(10):
                for w in range(10):
                    if len(turns) > 1 or v == w:
                        table[v, w] = np.abs(a[i, v] - b[j, w]).sum()
            best = np.inf
            for turn in turns:
                total = 0.0
                for v in range(10):
                    total += table[v, turn[v]]
                best = min(best, total)
            out[i, j] = best
    return out
