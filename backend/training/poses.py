# SPDX-License-Identifier: GPL-3.0-or-later
"""`python -m backend.training.poses --kit DIR --out FILE`: write the poses that the package carries (`poses.json`).

Two sources: BVH files of the kit, whose 163 bones are mapped onto the 53 of the game_engine rig, and the table of joint
angles in `pose_table`. Both become rotations per bone, parent-relative in world-aligned axes (`backend.poses`).

**BVH.** Global rotations are accumulated on the default rig. A bone of the small rig stands for a chain of the large
one (upperarm_l: upperarm01.L, upperarm02.L): it takes the chain's mean rotation, so that twist is shared, and is then
turned the short way until it points at the chain's posed tail, so that joints arrive where the file puts them. Root
takes nothing and the pelvis the large rig's root, so that Root stays free for the animator.

**Angles** count from the anatomical standing position: upright, arms and legs hang straight down, palms to the thighs.
That position is found from the joints of the kit's mean body; left bones are computed and mirrored to the right.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from backend import poses
from backend.training.makehuman import Kit
from backend.training.pose_table import BVH, HAND, SPREAD, TABLE

_AXIS = {"X": 0, "Y": 1, "Z": 2}
_TO_Y_UP = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])  # (x, y, z) -> (x, z, -y)
MEAN = dict.fromkeys(("gender", "age", "muscle", "weight", "height", "proportions", "cup", "firmness"), 0.5)
MEAN |= dict.fromkeys(("african", "asian", "caucasian"), 1.0)
FINGERS = ("index", "middle", "ring", "pinky")


@dataclass(frozen=True)
class RigOnBody:
    """A skeleton with its joints on one body; also a `backend.poses.Skeleton`."""

    names: tuple[str, ...]
    parents: tuple[int, ...]
    heads: np.ndarray  # f64 [J, 3]
    tails: np.ndarray  # f64 [J, 3]
    sources: Mapping[str, Sequence[str]]  # game_engine only: the default bones that each stands for

    def row(self, name: str) -> int:
        return self.names.index(name)


def read_rig(kit: Path, name: str, body: np.ndarray) -> RigOnBody:
    """`rigs/NAME.mhskel` with its joints on the base mesh `body` [19158, 3], bones parents first."""
    data = json.loads((kit / "rigs" / f"{name}.mhskel").read_text(encoding="utf-8"))
    bones, joints = data["bones"], data["joints"]
    names: list[str] = []
    while len(names) < len(bones):
        names += [b for b in sorted(bones) if b not in names and bones[b]["parent"] in (None, *names)]
    ends = [[body[joints[bones[b][end]]].mean(0) for b in names] for end in ("head", "tail")]
    parents = tuple(-1 if bones[b]["parent"] is None else names.index(bones[b]["parent"]) for b in names)
    sources = {b: bones[b].get("reference") or bones[b].get("weights_reference") or () for b in names}
    return RigOnBody(tuple(names), parents, np.array(ends[0]), np.array(ends[1]), sources)


def about(axis: Sequence[float] | np.ndarray, degrees: float) -> np.ndarray:
    """Rotation [3, 3] about an axis through the origin, right-handed (Rodrigues)."""
    x, y, z = np.asarray(axis, np.float64) / np.linalg.norm(axis)
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.radians(degrees)
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k


def shortest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The rotation [3, 3] by the smallest angle that turns direction `a` into direction `b`."""
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    axis = np.cross(a, b)
    if np.linalg.norm(axis) < 1e-12:
        return np.eye(3)
    return about(axis, np.degrees(np.arctan2(np.linalg.norm(axis), a @ b)))


# ------------------------------------------------------------------------------------------------------------- BVH


def read_bvh(path: Path) -> dict[str, np.ndarray]:
    """Joint -> rotation [3, 3] relative to its parent, y up, of the first frame."""
    names, channels, offsets = [], [], {}
    words = iter(path.read_text(encoding="utf-8").split())
    joint = ""
    for word in words:
        if word in ("ROOT", "JOINT"):
            joint = next(words)
            names.append(joint)
        elif word == "OFFSET":
            offsets.setdefault(joint, [float(next(words)) for _ in range(3)])  # an End Site comes after its joint's own
        elif word == "CHANNELS":
            channels.append([next(words) for _ in range(int(next(words)))])
        elif word == "Time:":
            next(words)
            break
    turn = _TO_Y_UP if abs(offsets["lowerleg02.L"][2]) > abs(offsets["lowerleg02.L"][1]) else np.eye(3)
    out = {}
    for name, listed in zip(names, channels, strict=True):
        rotation = np.eye(3)
        for channel in listed:
            value = float(next(words))
            if channel.endswith("rotation"):
                rotation = rotation @ about(np.eye(3)[_AXIS[channel[0]]], value)
        out[name] = turn @ rotation @ turn.T
    return out


def globals_of(rig: RigOnBody, local: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parent-relative rotations [J, 3, 3] -> rotations from rest to pose [J, 3, 3] and posed heads [J, 3]."""
    matrices = poses.bone_matrices(rig, poses.to_quaternions(local), np.zeros(3))
    return matrices[:, :, :3], np.einsum("jik,jk->ji", matrices[:, :, :3], rig.heads) + matrices[:, :, 3]


def locals_of(rig: RigOnBody, turned: np.ndarray) -> np.ndarray:
    """The inverse of `globals_of`: rotations from rest to pose -> parent-relative ones."""
    return np.stack([turned[j] if p < 0 else turned[p].T @ turned[j] for j, p in enumerate(rig.parents)])


def on_default(large: RigOnBody, bvh: Mapping[str, np.ndarray]) -> np.ndarray:
    """A file's rotations in the rig's order [J, 3, 3]; its joints without a bone are left out."""
    return np.stack([bvh.get(name, np.eye(3)) for name in large.names])


def retarget(large: RigOnBody, small: RigOnBody, bvh: Mapping[str, np.ndarray]) -> np.ndarray:
    """A file's pose as parent-relative rotations of the game_engine rig, [J, 3, 3]; see the module's text."""
    turned, posed = globals_of(large, on_default(large, bvh))
    tails = posed + np.einsum("jik,jk->ji", turned, large.tails - large.heads)
    quaternions = poses.to_quaternions(turned)
    out = np.tile(np.eye(3), (len(small.names), 1, 1))
    heads = small.heads.copy()  # posed, as far as the loop has come
    for j, (name, parent) in enumerate(zip(small.names, small.parents)):
        if parent >= 0:
            heads[j] = heads[parent] + out[parent] @ (small.heads[j] - small.heads[parent])
        chain = sorted(large.row(b) for b in _chain(name, small.sources[name]))
        if not chain:
            continue
        q = quaternions[chain]
        q = q * np.sign(q @ q[0])[:, None]
        mean = poses.to_matrices(q.sum(0, keepdims=True))[0]
        if len(chain) > 1 and not name.startswith("ball"):
            last = chain[-1]
            mean = shortest(mean @ (large.tails[last] - small.heads[j]), tails[last] - heads[j]) @ mean
        out[j] = mean
    return locals_of(small, out)


def spread(small: RigOnBody, local: np.ndarray, degrees: float) -> np.ndarray:
    """The pose with each leg turned outward about the hip joint, in the plane of the body; feet keep their bearing."""
    turned, _ = globals_of(small, local)
    for side, sign in (("l", 1), ("r", -1)):
        for bone in ("thigh", "calf"):
            j = small.row(f"{bone}_{side}")
            turned[j] = about((0, 0, 1), sign * degrees) @ turned[j]
    return locals_of(small, turned)


def _chain(name: str, sources: Sequence[str]) -> list[str]:
    """The bones of the default rig that a bone follows; the weights' list where it is also the chain."""
    side = f".{name[-1].upper()}"
    special = {"Root": [], "pelvis": ["root"], "thigh": ["upperleg01", "upperleg02"], "hand": ["wrist"],
               "ball": [f"toe{i}-1" for i in range(1, 6)]}  # fmt: skip
    stem = name[:-2] if name.endswith(("_l", "_r")) else name
    if stem not in special:
        return list(sources)
    return special[stem] if stem in ("Root", "pelvis") else [b + side for b in special[stem]]


# ---------------------------------------------------------------------------------------------------------- angles


class Anatomy:
    """The anatomical standing position of a rig, and poses counted from it. Only left bones are looked at."""

    def __init__(self, rig: RigOnBody) -> None:
        self.rig = rig
        head = {name: rig.heads[j] for j, name in enumerate(rig.names)}
        down = np.array([0, -1.0, 0])
        stand: dict[str, np.ndarray] = {}
        for chain in (("thigh_l", "calf_l", "foot_l"), ("upperarm_l", "lowerarm_l", "hand_l", "middle_01_l")):
            turn = np.eye(3)
            for bone, end in pairwise(chain):
                turn = shortest(turn @ (head[end] - head[bone]), down) @ turn
                if bone == "upperarm_l":  # the forearm's rest bend says which way the elbow folds: let that be ahead
                    fold = turn @ (head["hand_l"] - head["lowerarm_l"])
                    turn = shortest(fold * (1, 0, 1), np.array([0, 0, 1.0])) @ turn
                stand[bone] = turn
        across, along = head["index_01_l"] - head["pinky_01_l"], head["middle_01_l"] - head["hand_l"]
        self.palm = np.cross(along, across)  # towards what the hand would grasp
        inward = shortest(stand["hand_l"] @ self.palm * (1, 0, 1), np.array([-1.0, 0, 0]))
        q = poses.to_quaternions(inward[None])[0] + (1, 0, 0, 0)
        stand["lowerarm_l"] = poses.to_matrices(q[None])[0] @ stand["lowerarm_l"]  # half of pronation in each
        stand["hand_l"] = inward @ stand["hand_l"]
        self.stand = stand
        self.curl = {}
        for finger in FINGERS:
            for i, end in (("01", "02"), ("02", "03"), ("03", None)):
                name = f"{finger}_{i}_l"
                tip = head[f"{finger}_{end}_l"] if end else rig.tails[rig.row(name)]
                self.curl[name] = np.cross(tip - head[name], self.palm)
        for i in ("01", "02", "03"):
            name = f"thumb_{i}_l"
            thumb = rig.tails[rig.row(name)] - head[name]
            self.curl[name] = np.cross(thumb, head["pinky_01_l"] - head["thumb_02_l"])

    def pose(self, table: Mapping[str, Mapping[str, float] | float]) -> np.ndarray:
        """Parent-relative rotations [J, 3, 3] of an entry of `pose_table.TABLE`."""
        names = self.rig.names
        turned = np.zeros((len(names), 3, 3))
        posed = np.zeros((len(names), 3, 3))  # from the anatomical position to the pose
        for j, name in enumerate(names):
            parent = self.rig.parents[j]
            posed[j] = np.eye(3) if parent < 0 else posed[parent]
            side = name[-2:] if name.endswith(("_l", "_r")) else ""
            stem = name.removesuffix(side)
            left = f"{stem}_l" if side else name
            finger = stem.split("_")[0]
            keys = (name, finger + side, stem, finger)
            entry = next((found[key] for found in (table, HAND) for key in keys if key in found), {})
            stand = self.stand.get(left)
            if stand is None and left in self.curl:
                stand = self.stand["hand_l"]
            stand = np.eye(3) if stand is None else stand
            local = self._local(left, stem, stand, entry)
            if side == "_r":
                mirror = np.diag([-1.0, 1, 1])
                stand, local = mirror @ stand @ mirror, mirror @ local @ mirror
            if entry.get("level"):
                posed[j] = _level(posed[j])
            posed[j] = posed[j] @ local
            turned[j] = posed[j] @ stand
        return locals_of(self.rig, turned)

    def _local(self, left: str, stem: str, stand: np.ndarray, entry: Mapping[str, float]) -> np.ndarray:
        """One joint's rotation in the anatomical position's axes: twist first, then flexion, then the side."""
        flex, side, twist = (entry.get(key, 0.0) for key in ("flex", "abduct", "twist"))
        if left in self.curl:
            spread = about(stand @ self.palm, -side) if side else np.eye(3)
            return spread @ about(stand @ self.curl[left], flex)
        x, y, z = np.eye(3)
        if stem in ("thigh", "upperarm", "lowerarm"):  # ahead
            return about(z, side) @ about(x, -flex) @ about(y, -twist)
        if stem == "hand":  # flexion is to the palm's side: inward
            return about(x, -side) @ about(z, -flex) @ about(y, -twist)
        if stem == "foot" or stem == "ball":  # flexion raises the toes
            return about(y, twist) @ about(x, -flex) @ about(z, side)
        if stem == "clavicle":  # abduction raises the shoulder, flexion brings it ahead
            return about(z, side) @ about(y, -flex)
        if stem == "calf":
            return about(x, flex) @ about(y, twist)
        return about(y, twist) @ about(z, -side) @ about(x, flex)  # trunk and head: bow, lean and turn to the left


def _level(turned: np.ndarray) -> np.ndarray:
    """The part of a rotation that turns about the vertical: what a foot flat on the floor keeps."""
    ahead = turned[:, 2]
    return about([0, 1, 0], np.degrees(np.arctan2(ahead[0], ahead[2])))


# ------------------------------------------------------------------------------------------------------------ file


def build(kit_root: Path) -> dict[str, dict]:
    """All poses in the form of `poses.json`."""
    kit = Kit(kit_root)
    body = kit.people({k: np.array([v]) for k, v in MEAN.items()})[0].astype(np.float64)
    large, small = read_rig(kit_root, "default", body), read_rig(kit_root, "game_engine", body)
    found: dict[str, dict] = {}
    for name, file in BVH.items():
        local = retarget(large, small, read_bvh(kit_root / "poses" / file))
        found[name] = {"rotations": spread(small, local, SPREAD.get(name, 0.0))}
    anatomy = Anatomy(small)
    for name, table in TABLE.items():
        seat = {"seat_m": table["seat_m"]} if "seat_m" in table else {}
        found[name] = {"rotations": anatomy.pose({k: v for k, v in table.items() if k != "seat_m"}), **seat}
    for entry in found.values():
        quaternions = poses.to_quaternions(entry["rotations"])
        entry["rotations"] = {
            name: [round(float(x), 5) for x in q] for name, q in zip(small.names, quaternions) if q[0] < 1 - 1e-8
        }
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; raises FileNotFoundError when the folder is no kit."""
    parser = argparse.ArgumentParser(prog="python -m backend.training.poses", description=__doc__.splitlines()[0])
    parser.add_argument("--kit", type=Path, required=True, help="a MakeHuman data folder with poses/*.bvh")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args(argv)
    found = build(options.kit)
    rows = [f'"{name}":{json.dumps(entry, separators=(",", ":"))}' for name, entry in found.items()]
    about_it = json.dumps("Written by python -m backend.training.poses. Rotations wxyz, see backend/poses.py. CC0-1.0.")
    options.out.write_text('{"about":' + about_it + ',\n"poses":{\n' + ",\n".join(rows) + "\n}}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
