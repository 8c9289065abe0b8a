# SPDX-License-Identifier: GPL-3.0-or-later
"""Point clouds compared: Chamfer distance of one pair, and of all pairs of two sets.

Chamfer distance here is the mean of the two mean distances to the nearest point of the other cloud, in metres (not
squared, not summed), so that it reads as "how far apart are the surfaces".
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
from jaxtyping import Float
from scipy.spatial import cKDTree

Array = np.ndarray[Any, Any]
STEPS = 26000  # of the extent; three squares of differences fit into 31 bits


def chamfer(a: Float[Array, "N 3"], b: Float[Array, "M 3"]) -> float:
    """Metres; for large clouds of one pair."""
    to_b, to_a = nearest_distances(a, b), nearest_distances(b, a)
    return float(to_b.mean() + to_a.mean()) / 2


def resampling_distance(points: Float[Array, "N 3"]) -> float:
    """Chamfer distance to be expected of another N random points on the same surface: that between its two halves,
    which are sqrt 2 farther apart. About half the root of the area per point."""
    half = len(points) // 2
    return chamfer(points[:half], points[half : 2 * half]) / math.sqrt(2)


def nearest_distances(a: Float[Array, "N 3"], b: Float[Array, "M 3"]) -> Float[Array, " N"]:
    """From every point of `a` to the nearest of `b`, metres."""
    return cKDTree(b).query(a, workers=-1)[0]


def pairwise_chamfer(
    a: Float[Array, "A N 3"], b: Float[Array, "B M 3"] | None = None, threads: int = 2
) -> Float[Array, "A B"]:
    """Chamfer distance of every cloud of `a` to every cloud of `b`, or among `a` if there is no `b`.

    It looks at all pairs of points, which for a few thousand points is five times as fast as trees: coordinates are
    rounded to 1/26000 of the whole extent (0.1 mm for people), because compilers vectorise minima of integers.
    """
    low = np.min([x.min((0, 1)) for x in ((a,) if b is None else (a, b))], 0)
    extent = max(float((x - low).max()) for x in ((a,) if b is None else (a, b)))
    unit = max(extent, 1e-9) / STEPS

    def rounded(clouds: Array) -> Array:
        return np.ascontiguousarray(np.moveaxis(np.rint((clouds - low) / unit).astype(np.int32), 2, 1))

    first = rounded(a)
    second = first if b is None else rounded(b)
    out = np.zeros((len(first), len(second)))

    def row(i: int) -> None:
        start = i + 1 if b is None else 0
        out[i, start:] = _chamfer_row(first[i], second[start:])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(row, range(len(first))))
    out *= unit
    return out + out.T if b is None else out


@numba.njit(nogil=True, cache=True)
def _chamfer_row(a, many):  # pragma: no cover (compiled)
    """Chamfer distances of the cloud a [3, N] to each of many [B, 3, M]; int32."""
    count, size = a.shape[1], many.shape[2]
    out = np.empty(len(many), np.float64)
    back = np.empty(size, np.int32)
    far = np.int32(2**31 - 1)
    for m in range(len(many)):
        bx, by, bz = many[m, 0], many[m, 1], many[m, 2]
        back[:] = far
        there = 0.0
        for i in range(count):
            ax, ay, az = a[0, i], a[1, i], a[2, i]
            best = far
            for j in range(size):
                x, y, z = np.int32(bx[j] - ax), np.int32(by[j] - ay), np.int32(bz[j] - az)
                square = np.int32(np.int32(x * x) + np.int32(y * y) + np.int32(z * z))
                best = np.int32(min(best, square))
                back[j] = min(back[j], square)
            there += np.sqrt(best)
        here = 0.0
        for j in range(size):
            here += np.sqrt(back[j])
        out[m] = (there / count + here / size) / 2
    return out
