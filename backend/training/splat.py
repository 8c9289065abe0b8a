# SPDX-License-Identifier: GPL-3.0-or-later
"""Coloured points onto the planes of a box: the inverse of `PlaneBank.read`, in closed form."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage

from backend.networks.volumes import PlaneBank, Side, Volume, plane_shape, project


def splat(
    volume: Volume, sides: Sequence[Side], points: np.ndarray, facing: np.ndarray, values: np.ndarray
) -> list[np.ndarray]:
    """Planes f32 [C, H, W] per side from values [N, C] at points [N, 3] that face `facing` [N, 3].

    Each texel is the mean of the points whose bilinear footprint it lies in, weighted by how much the side counts for
    them (squared: what is seen edge-on should not blur what is seen in full); the rest continue the nearest texel.
    """
    bank = PlaneBank(volume, sides, 1, 1)
    p = torch.from_numpy(points.astype(np.float32))
    local = volume.local(p)
    inside = (local.abs() <= 1).all(1)
    local, values = local[inside], values[inside.numpy()].astype(np.float64)
    turned = volume.turned(p[inside], torch.from_numpy(facing.astype(np.float32))[inside])
    weights = (bank.weights(turned) * bank.coverage(turned)[:, None]).numpy() ** 2
    out = []
    for i, side in enumerate(sides):
        rows, columns = plane_shape(volume, side)
        at = (project(side, local).numpy().astype(np.float64) + 1) / 2 * [columns - 1, rows - 1]
        low = np.floor(at).astype(np.int64).clip(0, [columns - 2, rows - 2])
        part = at - low
        total, sums = np.zeros(rows * columns), np.zeros((values.shape[1], rows * columns))
        for dx in (0, 1):
            for dy in (0, 1):
                share = weights[:, i] * np.abs(1 - dx - part[:, 0]) * np.abs(1 - dy - part[:, 1])
                index = (low[:, 1] + dy) * columns + low[:, 0] + dx
                total += np.bincount(index, share, rows * columns)
                for c in range(values.shape[1]):
                    sums[c] += np.bincount(index, share * values[:, c], rows * columns)
        known = total > 1e-4
        plane = np.where(known, sums / np.maximum(total, 1e-12), 0).reshape(-1, rows, columns)
        if known.any():
            nearest = ndimage.distance_transform_edt(
                ~known.reshape(rows, columns), return_distances=False, return_indices=True
            )
            plane = plane[:, nearest[0], nearest[1]]
        out.append(plane.astype(np.float32))
    return out
