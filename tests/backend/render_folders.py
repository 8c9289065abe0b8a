# SPDX-License-Identifier: GPL-3.0-or-later
"""Folders of renders of ellipsoids, whose every pixel is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from backend.training.renders import Item, Lens, Pixels, Writer
from backend.training.renders_blender import cameras, lens


def ellipsoid(c2w: Pixels, through: Lens, size: int, centre: Pixels, half: Pixels) -> tuple[Pixels, Pixels, Pixels]:
    """Mask [S, S], depth along the axis and normal in camera space."""
    line = (np.arange(size) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(line, -line)
    back, eye = c2w[:3, 2], c2w[:3, 3]
    if through.fov_y is None:
        origin = eye + (x[..., None] * c2w[:3, 0] + y[..., None] * c2w[:3, 1]) * through.half_height
        way = np.broadcast_to(-back, origin.shape)
    else:
        k = np.tan(through.fov_y / 2)
        origin = np.broadcast_to(eye, (size, size, 3))
        way = k * x[..., None] * c2w[:3, 0] + k * y[..., None] * c2w[:3, 1] - back
    o, d = (origin - centre) / half, way / half
    a, b, c = (d * d).sum(2), (o * d).sum(2), (o * o).sum(2) - 1
    root = b * b - a * c
    mask = root > 0
    distance = np.where(mask, (-b - np.sqrt(np.maximum(root, 0))) / a, 0.0)  # way goes 1 along the axis
    place = origin + distance[..., None] * way
    normal = (place - centre) / half**2
    normal = normal / np.linalg.norm(normal, axis=2, keepdims=True) @ c2w[:3, :3]
    return mask, distance, np.where(mask[..., None], normal, 0.0)


def write(
    folder: Path, purpose: str, count: int = 24, size: int = 32, views: int = 3, seed: int = 0
) -> dict[str, tuple[Pixels, Pixels]]:
    """`count` upright ellipsoids of many widths and colours; returns centre and half axes of each."""
    found = lens(purpose, size)
    through = Lens(found.get("fov_y_rad"), found.get("half_height", 0.0))
    writer = Writer(folder, size, through, purpose == "get3dhuman")
    known = {}
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        code = rng.standard_normal(4).astype(float)
        if purpose == "get3d":
            centre, half = np.zeros(3), np.array([0.15 + 0.05 * np.tanh(code[0]), 0.42, 0.15])
        else:
            centre, half = np.array([0.0, 0.9, 0.0]), np.array([0.3 + 0.1 * np.tanh(code[0]), 0.85, 0.2])
        color = np.uint8(127 + 120 * np.tanh(code[1:4]))
        placed = cameras(purpose, views, [seed, i])
        for name, c2w in placed.items():
            mask, depth, normal = ellipsoid(c2w, through, size, centre, half)
            rgba = np.zeros((size, size, 4), np.uint8)
            rgba[mask] = [*color, 255]
            maps = (depth, normal) if purpose == "get3dhuman" else (None, None)
            writer.picture(f"ball_{i:03d}", name, rgba, *maps)
        writer.item(Item(f"ball_{i:03d}", placed, 1.0, tuple(code)))
        known[f"ball_{i:03d}"] = centre, half
    writer.close()
    return known
