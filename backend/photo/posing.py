# SPDX-License-Identifier: GPL-3.0-or-later
"""The differentiable, batched twin of `poses.bone_matrices` and `poses.skin`: rotations are matrices, parent-relative
in world-aligned axes. A bone's head goes where its parent carries it; the root's stays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def forward_kinematics(
    rotations: Float[Tensor, "B J 3 3"], heads: Float[Tensor, "B J 3"], parents: Sequence[int]
) -> tuple[Float[Tensor, "B J 3 3"], Float[Tensor, "B J 3"]]:
    """World rotations of the bones and where their heads are. Bones are listed parents first."""
    turns: list[Tensor] = []
    places: list[Tensor] = []
    for j, parent in enumerate(parents):
        if parent < 0:
            turns.append(rotations[:, j])
            places.append(heads[:, j])
        else:
            turns.append(turns[parent] @ rotations[:, j])
            arm = (heads[:, j] - heads[:, parent])[:, :, None]
            places.append(places[parent] + (turns[parent] @ arm)[:, :, 0])
    return torch.stack(turns, 1), torch.stack(places, 1)


def skin(
    vertices: Float[Tensor, "V 3"],
    indices: Int[Tensor, "V 4"],
    weights: Float[Tensor, "V 4"],
    turns: Float[Tensor, "J 3 3"],
    places: Float[Tensor, "J 3"],
    heads: Float[Tensor, "J 3"],
) -> Float[Tensor, "V 3"]:
    """Posed vertices by linear blending: sum_j w_j (G_j (v - h_j) + p_j)."""
    shift = places - (turns @ heads[:, :, None])[:, :, 0]
    matrices = torch.cat([turns, shift[:, :, None]], 2)
    blended = (weights[:, :, None, None] * matrices[indices]).sum(1)
    return (blended[:, :, :3] @ vertices[:, :, None])[:, :, 0] + blended[:, :, 3]
