# SPDX-License-Identifier: GPL-3.0-or-later
"""Linear blend skinning, for people that are inserted posed but without an armature. numpy only, no bpy.

The same words as `backend/poses.py`: rotations are parent-relative, in world-aligned axes, about the bones' heads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .packet import Part, Rig

Array = np.ndarray[Any, Any]


def posed(part: Part, rig: Rig | None) -> Array:
    """Vertices f32 [V, 3] of a part as the person stands; the part's own if nothing moves it."""
    if rig is None or rig.rotations is None or part.skin_indices is None or part.skin_weights is None:
        return part.vertices
    matrices = bone_matrices(rig)
    weights = part.skin_weights.astype(np.float64)
    weights /= np.maximum(weights.sum(1, keepdims=True), 1e-20)
    blended = np.einsum("vk,vkij->vij", weights, matrices[part.skin_indices])
    return (np.einsum("vij,vj->vi", blended[:, :, :3], part.vertices) + blended[:, :, 3]).astype(np.float32)


def bone_matrices(rig: Rig) -> Array:
    """From rest to pose, per bone of a posed rig: f64 [J, 3, 4], the last column a translation."""
    assert rig.rotations is not None
    assert rig.translation is not None
    heads, turns = rig.heads.astype(np.float64), rotation_matrices(rig.rotations)
    out = np.empty((len(heads), 3, 4))
    for j, parent in enumerate(rig.parents.tolist()):
        turn, move = turns[j], heads[j] - turns[j] @ heads[j]
        if parent < 0:
            out[j, :, :3], out[j, :, 3] = turn, move + rig.translation[0]
        else:
            out[j, :, :3] = out[parent, :, :3] @ turn
            out[j, :, 3] = out[parent, :, :3] @ move + out[parent, :, 3]
    return out


def rotation_matrices(quaternions: Array) -> Array:
    """wxyz [N, 4] -> f64 [N, 3, 3]: v + 2 w (u x v) + 2 u x (u x v) for each axis v."""
    q = quaternions.astype(np.float64)
    q /= np.linalg.norm(q, axis=1, keepdims=True)
    axes = np.broadcast_to(np.eye(3), (len(q), 3, 3))
    once = np.cross(q[:, None, 1:], axes)
    turned = axes + 2 * q[:, :1, None] * once + 2 * np.cross(q[:, None, 1:], once)
    return turned.transpose(0, 2, 1)
