# SPDX-License-Identifier: GPL-3.0-or-later
"""A small picture of meshes, for previews of assets: exact, the same everywhere, no GPU, no window. numpy only.

Seen from a little to the side, without perspective; Z is up and people look down -Y.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

YAW: Final = math.radians(25)
MARGIN: Final = 0.05  # of the picture, on each side
OVERSAMPLING: Final = 2
LIGHT: Final = np.array([-0.45, -0.7, 0.55]) / np.linalg.norm([-0.45, -0.7, 0.55])

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Surface:
    """A mesh with one texture, in world coordinates."""

    vertices: Array  # [V, 3]
    faces: Array  # int [F, 3]
    uvs: Array  # [F, 3, 2]
    texture: Array  # [H, W, 3] sRGB 0..1, bottom row first


def portrait(surfaces: Sequence[Surface], size: int = 256) -> Array:
    """f32 [size, size, 4], sRGB and alpha, bottom row first as Blender has it. Empty where nobody is."""
    side = size * OVERSAMPLING
    turn = np.array([[math.cos(YAW), -math.sin(YAW), 0], [math.sin(YAW), math.cos(YAW), 0], [0, 0, 1]])
    turned = [surface.vertices.astype(np.float64) @ turn.T for surface in surfaces]
    points = np.concatenate(turned) if turned else np.zeros((0, 3))
    picture = np.zeros((side * side, 4), np.float32)
    if len(points):
        low, high = points[:, [0, 2]].min(0), points[:, [0, 2]].max(0)
        scale = side * (1 - 2 * MARGIN) / max((high - low).max(), 1e-9)
        move = side / 2 - (low + high) / 2 * scale
        depth = np.full(side * side, np.inf)
        for surface, own in zip(surfaces, turned):
            flat = np.concatenate([own[:, [0, 2]] * scale + move, own[:, 1:2]], 1)  # pixels right, pixels up, depth
            _draw(picture, depth, side, surface, own, flat[surface.faces])
    picture = picture.reshape(size, OVERSAMPLING, size, OVERSAMPLING, 4).mean((1, 3))
    alpha = picture[:, :, 3:]
    return np.concatenate([np.where(alpha > 0, picture[:, :, :3] / np.maximum(alpha, 1e-6), 0), alpha], 2)


def _draw(picture: Array, depth: Array, side: int, surface: Surface, points: Array, corners: Array) -> None:
    """Put the pixels of one surface that are nearer than what is there."""
    pixel, away, face, weights = _covered(corners, side)
    order = np.lexsort((away, pixel))
    first = order[np.concatenate([[True], np.diff(pixel[order]) > 0])] if len(order) else order
    first = first[away[first] < depth[pixel[first]]]
    pixel, face, weights = pixel[first], face[first], weights[first]
    depth[pixel] = away[first]
    uv = (surface.uvs[face] * weights[:, :, None]).sum(1)
    height, width = surface.texture.shape[:2]
    x = np.clip((uv[:, 0] * width).astype(np.int64), 0, width - 1)
    y = np.clip((uv[:, 1] * height).astype(np.int64), 0, height - 1)
    a, b, c = (points[surface.faces[face, i]] for i in range(3))
    normals = np.cross(b - a, c - a)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-30)
    shade = 0.62 + 0.38 * np.clip(normals @ LIGHT, 0, 1) + 0.1 * np.clip(normals[:, 2], 0, 1)
    picture[pixel, :3] = np.clip(surface.texture[y, x] * shade[:, None], 0, 1)
    picture[pixel, 3] = 1


def _covered(corners: Array, side: int) -> tuple[Array, Array, Array, Array]:
    """Pixels whose middle lies in a triangle [F, 3, 3] that faces us: pixel, depth, triangle, barycentric weights.

    Triangles of like size are tried together on a square of pixels each.
    """
    (ax, ay), (bx, by), (cx, cy) = (corners[:, i, :2].T for i in range(3))
    area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
    start = np.floor(corners[:, :, :2].min(1)).astype(np.int64)
    extent = np.ceil(corners[:, :, :2].max(1)).astype(np.int64) - start
    reach = np.maximum(extent.max(1), 1)
    found: list[tuple[Array, ...]] = []
    step = 1
    while True:
        at = np.flatnonzero((area > 1e-12) & (reach <= step) & (reach > step // 2))
        for some in np.array_split(at, max(1, len(at) * step * step // 2_000_000)):  # bounded memory
            offset = np.stack(np.meshgrid(np.arange(step), np.arange(step)), -1).reshape(-1, 2)
            spot = start[some, None] + offset[None]
            x, y = spot[:, :, 0] + 0.5, spot[:, :, 1] + 0.5
            p = corners[some][:, None]
            w = [((p[:, :, j, 0] - x) * (p[:, :, k, 1] - y) - (p[:, :, j, 1] - y) * (p[:, :, k, 0] - x))
                 / area[some, None] for j, k in ((1, 2), (2, 0), (0, 1))]  # fmt: skip
            weights = np.stack(w, -1)
            row, column = np.nonzero((weights >= 0).all(2) & (spot >= 0).all(2) & (spot < side).all(2))
            own = weights[row, column]
            inside = spot[row, column]
            found.append((inside[:, 1] * side + inside[:, 0], (corners[some[row], :, 2] * own).sum(1), some[row], own))
        if step >= reach.max(initial=1):
            break
        step *= 2
    pixel, away, face, own = (np.concatenate(part) for part in zip(*found))
    return pixel, away, face, own
