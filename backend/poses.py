# SPDX-License-Identifier: GPL-3.0-or-later
"""Named poses for rigged people, and the linear blend skinning that all exports of a posed person agree on.

A pose is a rotation per bone, wxyz, **parent-relative in world-aligned axes**: in rest every bone's frame is the
world's, whatever way the bone points. With h the rest position of a bone's head, R its rotation and t the pose's
translation (0 for every bone but the roots):

    M = M_parent . T(h + t) . R . T(-h)           posed vertex = (sum_bones w . M) . rest vertex

These are glTF's node rotations as they are, and Blender's pose bones after a change of basis. Poses come from
`poses.json`, written by `python -m backend.training.poses` from the kit's CC0 files and from a table of joint angles.
numpy only: the server and the packet use it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Protocol

import numpy as np

from backend.protocol import PopulaceError

REST = "rest"
_BLENDER = {"chest": "spine_02", "neck": "neck_01", "upper_arm": "upperarm", "forearm": "lowerarm", "shin": "calf"}
FLESH = 0.125  # between hip joint and seat, in lengths of the leg: the middle of twelve clothed people

Array = np.ndarray[Any, Any]


class Skeleton(Protocol):
    """Bones in rest, parents first, a root's parent is -1. `families.base.Rig` is one, and so is the add-on's."""

    @property
    def names(self) -> Sequence[str]: ...
    @property
    def parents(self) -> Any: ...  # [J]
    @property
    def heads(self) -> Any: ...  # [J, 3] metres
    @property
    def tails(self) -> Any: ...  # [J, 3]


class Skinned(Protocol):
    """What hangs on a skeleton: a `packet.Part`."""

    @property
    def vertices(self) -> Any: ...  # [V, 3]
    @property
    def skin_indices(self) -> Any: ...  # [V, 4] or None
    @property
    def skin_weights(self) -> Any: ...  # [V, 4] or None


@dataclass(frozen=True)
class Bones:
    """A `Skeleton` of plain arrays."""

    names: tuple[str, ...]
    parents: Array  # i32 [J]
    heads: Array  # f32 [J, 3]
    tails: Array  # f32 [J, 3]


def pose_names() -> tuple[str, ...]:
    """All poses that there are; "rest" is the first."""
    return (REST, *_poses())


def pose(name: str, rig: Skeleton) -> tuple[Array, Array]:
    """Rotations f32 [J, 4] (wxyz, first number not negative) and the roots' translation f32 [1, 3] in metres.

    The translation brings the soles, as far as the bones tell where they are, to the height they have in rest; `place`
    knows the mesh and is exact. Bones have the names of the game_engine rig or Blender's ("upper_arm.L"); others keep
    their rest rotation. Raises `invalid_request` with the names that there are.
    """
    if name != REST and name not in _poses():
        raise PopulaceError("invalid_request", f"There is no pose called {name[:40]!r}.",
                            f"Choose one of: {', '.join(pose_names())}.")  # fmt: skip
    rotations = np.tile(np.array([1, 0, 0, 0], np.float64), (len(rig.names), 1))
    if name == REST:
        return rotations.astype(np.float32), np.zeros((1, 3), np.float32)
    entry, row = _poses()[name], {_usual(bone): j for j, bone in enumerate(rig.names)}
    for bone, rotation in entry["rotations"].items():
        if bone in row:
            rotations[row[bone]] = rotation
    if "seat_m" in entry and {"thigh_l", "thigh_r", "ball_l", "ball_r"} <= row.keys():
        rotations = _seated(rotations, rig, float(entry["seat_m"]))
    translation = np.zeros((1, 3))
    soles = _soles(rig)
    if soles is not None:
        points, bones = soles
        low = skin(points, bones, np.ones(bones.shape), rig, rotations, translation)[:, 1].min()
        translation[0, 1] = points[:, 1].min() - low
    return rotations.astype(np.float32), translation.astype(np.float32)


def own_rows(rig: Skeleton, rotations: Iterable[str]) -> dict[str, int]:
    """The bones in `rig` that these names mean: its own, or the poses'. Raises `invalid_request`."""
    own = {bone: j for j, bone in enumerate(rig.names)}
    usual = {_usual(bone): j for bone, j in own.items()}
    found = {bone: own.get(bone, usual.get(bone, -1)) for bone in rotations}
    if wrong := [bone for bone, j in found.items() if j < 0]:
        raise PopulaceError("invalid_request", f"This person has no bone {wrong[0]!r} to turn.",
                            f"There are: {', '.join(rig.names)}.")  # fmt: skip
    return found


def place(
    name: str, rig: Skeleton, parts: Iterable[Skinned], own: Mapping[str, Sequence[float]] | None = None
) -> tuple[Array, Array]:
    """As `pose`, with rotations of one's `own` in the place of the pose's, and with the translation that lets the
    lowest vertex of the posed `parts` stand exactly on y = 0.

    The rest pose is left alone: it stands where it was generated.
    """
    rotations, translation = pose(name, rig)
    for bone, j in own_rows(rig, own or ()).items():
        turn = np.asarray((own or {})[bone], np.float64)
        rotations[j] = turn / np.linalg.norm(turn) * (1 if turn[0] >= 0 else -1)
    skinned = [part for part in parts if part.skin_indices is not None]
    if (name != REST or own) and skinned:
        translation[0, 1] -= min(
            float(skin(p.vertices, p.skin_indices, p.skin_weights, rig, rotations, translation)[:, 1].min())
            for p in skinned
        )
    return rotations, translation


def skin(vertices: Any, skin_indices: Any, skin_weights: Any, rig: Any, quaternions: Any, translation: Any) -> Array:
    """Posed vertices f32 [V, 3] by linear blending; `rig` needs `parents` and `heads`. Weights are brought to sum 1."""
    vertices = np.asarray(vertices, np.float64)
    blended = blend(skin_indices, skin_weights, bone_matrices(rig, quaternions, translation))
    return (np.einsum("vij,vj->vi", blended[:, :, :3], vertices) + blended[:, :, 3]).astype(np.float32)


def skin_normals(normals: Any, skin_indices: Any, skin_weights: Any, rig: Any, quaternions: Any) -> Array:
    """Normals f32 [V, 3] turned with the surface: by the blended rotations, then of length 1, as renderers do."""
    blended = blend(skin_indices, skin_weights, bone_matrices(rig, quaternions, np.zeros((1, 3))))[:, :, :3]
    turned = np.einsum("vij,vj->vi", blended, np.asarray(normals, np.float64))
    length = np.linalg.norm(turned, axis=1, keepdims=True)
    return np.where(length > 0, turned / np.maximum(length, 1e-20), [[0, 1, 0]]).astype(np.float32)


def bone_matrices(rig: Any, quaternions: Any, translation: Any) -> Array:
    """From rest to pose, per bone: f64 [J, 3, 4], the last column a translation."""
    heads, turns = np.asarray(rig.heads, np.float64), to_matrices(quaternions)
    move = np.asarray(translation, np.float64).reshape(3)
    matrices = np.empty((len(heads), 3, 4))
    for j, parent in enumerate(np.asarray(rig.parents).tolist()):
        local = np.concatenate([turns[j], (heads[j] - turns[j] @ heads[j])[:, None]], 1)
        if parent < 0:
            local[:, 3] += move
            matrices[j] = local
        else:
            up = matrices[parent]
            matrices[j] = np.concatenate([up[:, :3] @ local[:, :3], up[:, :3] @ local[:, 3:] + up[:, 3:]], 1)
    return matrices


def blend(skin_indices: Any, skin_weights: Any, matrices: Array) -> Array:
    """Each vertex's weighted mean of bone matrices: [V, 4], [V, 4], [J, 3, 4] -> f64 [V, 3, 4]."""
    weights = np.maximum(np.asarray(skin_weights, np.float64), 0)
    weights = weights / np.maximum(weights.sum(1, keepdims=True), 1e-20)
    bones = np.asarray(skin_indices).astype(np.int64)
    out = np.zeros((len(bones), 3, 4))
    for k in range(bones.shape[1]):
        out += weights[:, k, None, None] * matrices[bones[:, k]]
    return out


def to_matrices(quaternions: Any) -> Array:
    """Quaternions [N, 4] wxyz of any length -> rotations f64 [N, 3, 3]."""
    q = np.asarray(quaternions, np.float64)
    w, x, y, z = (q / np.linalg.norm(q, axis=1, keepdims=True)).T
    return np.stack([
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ], 1).reshape(-1, 3, 3)  # fmt: skip


def to_quaternions(matrices: Any) -> Array:
    """Rotations [N, 3, 3] -> unit quaternions f64 [N, 4], w >= 0. Bar-Itzhack 2000: the largest eigenvector."""
    m = np.asarray(matrices, np.float64)
    k = np.empty((len(m), 4, 4))
    trace = np.trace(m, axis1=1, axis2=2)
    k[:, 0, 0] = trace
    k[:, 1:, 1:] = m + m.transpose(0, 2, 1) - trace[:, None, None] * np.eye(3)
    k[:, 0, 1:] = k[:, 1:, 0] = np.stack([m[:, 2, 1] - m[:, 1, 2], m[:, 0, 2] - m[:, 2, 0], m[:, 1, 0] - m[:, 0, 1]], 1)
    q = np.linalg.eigh(k)[1][:, :, -1]
    return np.where(q[:, :1] < 0, -q, q)


@functools.cache
def _poses() -> dict[str, dict[str, Any]]:
    return json.loads(resources.files("backend").joinpath("poses.json").read_text(encoding="utf-8"))["poses"]


def _usual(bone: str) -> str:
    """A bone's name as the poses have it: "upper_arm.L" is "upperarm_l"."""
    stem, dot, side = bone.rpartition(".")
    return _BLENDER.get(stem, stem) + f"_{side.lower()}" if dot else _BLENDER.get(bone, bone)


def _soles(rig: Skeleton) -> tuple[Array, Array] | None:
    """Points on the floor below heels and toes f64 [6, 3] with their bones i64 [6, 1]; None for a rig without feet."""
    row = {bone: j for j, bone in enumerate(rig.names)}
    if not {"foot_l", "foot_r", "ball_l", "ball_r"} <= row.keys():
        return None
    heads, tails = np.asarray(rig.heads, np.float64), np.asarray(rig.tails, np.float64)
    points, bones = [], []
    for side in "lr":
        foot, ball = row[f"foot_{side}"], row[f"ball_{side}"]
        points += [heads[foot], heads[ball], tails[ball]]
        bones += [foot, ball, ball]
    floor = np.array(points)
    floor[:, 1] = 0
    return floor, np.array(bones)[:, None]


def _seated(rotations: Array, rig: Skeleton, seat_m: float) -> Array:
    """The pose with thighs pitched so that a seat of this height carries them: hip joints `FLESH` of the leg's length
    above the seat, shins and feet as they were."""
    row = {bone: j for j, bone in enumerate(rig.names)}
    parents = np.asarray(rig.parents).tolist()
    matrices = bone_matrices(rig, rotations, np.zeros((1, 3)))
    heads, turns = np.asarray(rig.heads, np.float64), to_matrices(rotations)
    posed = np.einsum("jik,jk->ji", matrices[:, :, :3], heads) + matrices[:, :, 3]
    soles = _soles(rig)
    assert soles is not None
    floor = skin(*soles, np.ones((6, 1)), rig, rotations, np.zeros((1, 3)))[:, 1]
    for side, sole in (("l", floor[:3].min()), ("r", floor[3:].min())):
        thigh, calf, foot = (row[f"{bone}_{side}"] for bone in ("thigh", "calf", "foot"))
        leg = np.linalg.norm(heads[thigh] - heads[calf]) + np.linalg.norm(heads[calf] - heads[foot])
        _, y, z = posed[calf] - posed[thigh]
        rise = (posed[calf, 1] - sole) - (seat_m + FLESH * leg)  # of the knee over the hip, wanted
        radius = np.hypot(y, z)
        angle = np.arcsin(np.clip(rise / radius, -0.6, 0.6)) - np.arcsin(np.clip(y / radius, -1, 1))
        c, s = np.cos(-angle), np.sin(-angle)  # a thigh that points ahead is raised by a negative turn about x
        pitch = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
        up = matrices[parents[thigh], :, :3]
        turned = pitch @ matrices[thigh, :, :3]
        turns[thigh], turns[calf] = up.T @ turned, turned.T @ matrices[calf, :, :3]
    return to_quaternions(turns)
