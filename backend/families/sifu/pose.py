# SPDX-License-Identifier: GPL-3.0-or-later
"""The body that a photo's fit begins with: as the default model's photo encoder sees it, or the pose of the library
whose outline is most like the photo's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from backend import poses
from backend.families.base import PersonPhoto, Rig, Step, no_step
from backend.families.sifu.prior import Placed, SkinnedBody
from backend.families.sifu.views import clip_of
from backend.protocol import PopulaceError
from backend.render.rasterize import rasterize

TURNS = (0, 20, -20, 45, -45, 80, -80, 180, 150, -150)  # degrees about the vertical, the likeliest first
TURNS_ABOUT = (0, 15, -15, 30, -30)  # the same, about a facing that is known
UNLIKELY = 0.0004  # of overlap that a degree of turn has to earn: front and back have one outline
SMALL = 64  # pixels per side of outlines


def first_guess(
    body: SkinnedBody,
    photo: PersonPhoto,
    place: tuple[tuple[float, float], float],
    mask: Float[Tensor, "S S"],
    regressor: Any | None,
    step: Step = no_step,
) -> Placed:
    """`regressor`: a family model with `encode`, whose bones this body has; `place` is the crop's corner and side."""
    seen = _regressed(body, photo, place, regressor) if regressor is not None and body.name == "people" else None
    return by_outline(body, mask, step, seen)


class _AtFirstGlance:
    """`protocol.Inversion` for an encoder alone."""

    steps, seconds, texture, delight, symmetric, refine = 0, None, False, False, False, "none"


def _regressed(
    body: SkinnedBody, photo: PersonPhoto, place: tuple[tuple[float, float], float], regressor: Any
) -> Placed | None:
    """None where these weights have no photo encoder."""
    try:
        encoded = regressor.encode([photo], _AtFirstGlance())
    except (AttributeError, PopulaceError):
        return None
    shape = encoded.latents.codes["body/shape"][0, : body.dimensions].detach().cpu().float()
    turns = np.tile(np.eye(3), (len(body.bones), 1, 1))
    for name, quaternion in encoded.rotations.items():
        if name in body.bones:
            turns[body.bones.index(name)] = poses.to_matrices(np.array([quaternion]))[0]
    c2w = np.asarray(encoded.camera["c2w"], np.float64)
    height = float(encoded.camera["height"])
    width = float(encoded.camera["width"])
    # Seen in parallel: the head turns with the camera, and the middle of the body keeps its place and size.
    turn = c2w[:3, :3].T
    metres = body.posed(shape, torch.from_numpy(turns).float()).double().numpy()
    seen = (metres - c2w[:3, 3]) @ c2w[:3, :3]
    middle = (seen.min(0) + seen.max(0)) / 2
    focal = height / 2 / math.tan(float(encoded.camera["fov_y_rad"]) / 2)
    per_metre = focal / -middle[2]
    (x, y), side = place
    at = np.array([width / 2 + per_metre * middle[0] - x, height / 2 - per_metre * middle[1] - y]) * 2 / side - 1
    turns[0] = turn @ turns[0]
    rotations = torch.from_numpy(turns).float()
    scale = torch.tensor(2 * per_metre / side).float()
    posed = body.posed(shape, rotations)
    centre = (posed.amin(0) + posed.amax(0)) / 2
    wanted = torch.tensor([at[0], -at[1], 0.0]).float()
    return Placed(shape, rotations, scale, wanted - scale * centre)


@torch.no_grad()
def by_outline(
    body: SkinnedBody, mask: Float[Tensor, "S S"], step: Step = no_step, seen: Placed | None = None
) -> Placed:
    """The best of the library's poses, turned about the vertical, framed as the mask is. What a regressor has `seen`
    is one more pose, and its facing the likeliest: outlines tell limbs well, but not front from back."""
    target = torch.nn.functional.interpolate(mask[None, None], (SMALL, SMALL), mode="area")[0, 0] > 0.5
    rows, columns = target.any(1).nonzero()[:, 0], target.any(0).nonzero()[:, 0]
    top, bottom, left, right = int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])
    centre = torch.tensor([(left + right + 1) / SMALL - 1, 1 - (top + bottom + 1) / SMALL, 0.0])
    extent = max(bottom - top + 1, right - left + 1) * 2 / SMALL
    shape = body.template.new_zeros(body.dimensions) if seen is None else seen.shape
    rig = renamed(body.rig(shape))
    names = [name for name in poses.pose_names() if not name.startswith("lying")]
    facing = 0.0 if seen is None else _facing(seen)
    best, found = -1.0, None

    def weigh(rotations: Float[Tensor, "J 3 3"], malus: float) -> None:
        nonlocal best, found
        posed = body.posed(shape, rotations)
        low, high = posed.amin(0), posed.amax(0)
        scale = extent / (high - low)[:2].max()
        shift = centre - scale * (low + high) / 2
        view = rasterize(clip_of(scale * posed + shift, "F", SMALL)[None], body.faces, (SMALL, SMALL)).mask[0]
        overlap = float((view & target).sum() / (view | target).sum()) - malus
        if overlap > best:
            best, found = overlap, Placed(shape, rotations, scale, shift)

    if seen is not None:
        weigh(seen.rotations, 0.0)
    for i, name in enumerate(names):
        step("encode", i / len(names))
        turns = poses.to_matrices(poses.pose(name, rig)[0])
        for degrees in TURNS if seen is None else TURNS_ABOUT:
            half = math.radians(degrees + facing) / 2
            yaw = poses.to_matrices(np.array([[math.cos(half), 0, math.sin(half), 0]]))[0]
            weigh(torch.from_numpy(np.concatenate([(yaw @ turns[0])[None], turns[1:]])).float(),
                  UNLIKELY * abs(degrees))  # fmt: skip
    assert found is not None
    return found


def _facing(placed: Placed) -> float:
    """Degrees about the vertical that the body looks away from the viewer."""
    ahead = placed.rotations[0] @ torch.tensor([0.0, 0.0, 1.0])
    return math.degrees(math.atan2(float(ahead[0]), float(ahead[2])))


SMPLX_TO_POSES = {
    "pelvis": "pelvis", "left_hip": "thigh_l", "right_hip": "thigh_r", "left_knee": "calf_l", "right_knee": "calf_r",
    "left_ankle": "foot_l", "right_ankle": "foot_r", "left_foot": "ball_l", "right_foot": "ball_r",
    "spine1": "spine_01", "spine2": "spine_02", "spine3": "spine_03", "neck": "neck_01", "head": "head",
    "left_collar": "clavicle_l", "right_collar": "clavicle_r", "left_shoulder": "upperarm_l",
    "right_shoulder": "upperarm_r", "left_elbow": "lowerarm_l", "right_elbow": "lowerarm_r", "left_wrist": "hand_l",
    "right_wrist": "hand_r",
}  # fmt: skip


def renamed(rig: Rig) -> Rig:
    """With the names that the pose library knows. A SMPL-X person rests with arms held out, a sampled one with arms
    down by 45 degrees: outlines tell them apart, and the fit does the rest."""
    return Rig(tuple(SMPLX_TO_POSES.get(name, name) for name in rig.names), rig.parents, rig.heads, rig.tails)
