# SPDX-License-Identifier: GPL-3.0-or-later
"""The body that the networks are told of: a linear shape space on a skeleton, and where it comes from.

`people_body` is the default model's own naked body: free, embedded, always here. `smplx_body` reads the licensed model
file of a user who has it; weights published by the authors were trained with that one. A body stands in its own metres,
Y up, facing +Z; `Placed` says where in the network's cube the posed body is.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from backend.families.base import Rig
from backend.geometry.body import BodyMesh
from backend.photo.posing import forward_kinematics
from backend.protocol import PopulaceError

BONES_PER_VERTEX = 4
SHAPES = 16  # directions of the shape space that photos may use; the rest is not seen in one photo
LATTICE, BODY_FACES = 96, 9000  # cells along the height from which the default body is made, and its faces

NETWORK = (1.0, -1.0, 1.0)  # network frame = viewer frame * this: y points down there


@dataclass(frozen=True)
class SkinnedBody:
    """rest = template + shape . shapes (and what a pose adds); joints likewise; linear blend skinning."""

    name: str
    template: Float[Tensor, "V 3"]
    shapes: Float[Tensor, "S V 3"]
    faces: Int[Tensor, "F 3"]
    codes: Float[Tensor, "V 3"]  # 0..1: which place of the body a vertex is
    bones: tuple[str, ...]
    parents: tuple[int, ...]
    joints: Float[Tensor, "J 3"]
    joint_shapes: Float[Tensor, "S J 3"]
    tails: Float[Tensor, "J 3"]
    tail_shapes: Float[Tensor, "S J 3"]
    skin_indices: Int[Tensor, "V 4"]
    skin_weights: Float[Tensor, "V 4"]
    pose_shapes: Float[Tensor, "P V 3"] | None = None  # added for R - 1 of every bone but the root
    licence: str = ""

    @property
    def dimensions(self) -> int:
        return len(self.shapes)

    def rest(self, shape: Float[Tensor, " S"]) -> Float[Tensor, "V 3"]:
        return self.template + torch.einsum("s,svc->vc", shape, self.shapes)

    def rig(self, shape: Float[Tensor, " S"]) -> Rig:
        """The skeleton of this shape in rest."""
        heads = self.joints + torch.einsum("s,sjc->jc", shape, self.joint_shapes)
        tails = self.tails + torch.einsum("s,sjc->jc", shape, self.tail_shapes)
        return Rig(self.bones, self.parents, heads, tails)

    def matrices(self, shape: Float[Tensor, " S"], rotations: Float[Tensor, "J 3 3"]) -> Float[Tensor, "J 3 4"]:
        """From rest to pose, per bone, as `poses.bone_matrices`; the root's head stays where it is."""
        heads = self.joints + torch.einsum("s,sjc->jc", shape, self.joint_shapes)
        turns, places = (x[0] for x in forward_kinematics(rotations[None], heads[None], self.parents))
        return torch.cat([turns, places[:, :, None] - turns @ heads[:, :, None]], 2)

    def vertex_matrices(self, shape: Float[Tensor, " S"], rotations: Float[Tensor, "J 3 3"]) -> Float[Tensor, "V 3 4"]:
        """Each vertex's blend of bone matrices."""
        return (self.skin_weights[:, :, None, None] * self.matrices(shape, rotations)[self.skin_indices]).sum(1)

    def posed(self, shape: Float[Tensor, " S"], rotations: Float[Tensor, "J 3 3"]) -> Float[Tensor, "V 3"]:
        """Vertices in metres; differentiable."""
        rest = self.rest(shape)
        if self.pose_shapes is not None:
            unit = torch.eye(3).to(rotations)
            rest = rest + torch.einsum("p,pvc->vc", (rotations[1:] - unit).flatten(), self.pose_shapes)
        blended = self.vertex_matrices(shape, rotations)
        return (blended[:, :, :3] @ rest[:, :, None])[:, :, 0] + blended[:, :, 3]

    def to(self, device: torch.device) -> SkinnedBody:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return SkinnedBody(**{**vars(self), **moved})


@dataclass(frozen=True)
class Placed:
    """A posed body in the network's cube: network = (scale * metres + shift) * (1, -1, 1)."""

    shape: Float[Tensor, " S"]
    rotations: Float[Tensor, "J 3 3"]
    scale: Float[Tensor, ""]  # network units per metre
    shift: Float[Tensor, " 3"]  # of the viewer's frame

    def to_network(self, metres: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        return (self.scale * metres + self.shift) * metres.new_tensor(NETWORK)

    def to_metres(self, network: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        return (network * network.new_tensor(NETWORK) - self.shift) / self.scale

    def vertices(self, body: SkinnedBody) -> Float[Tensor, "V 3"]:
        """In the network's frame."""
        return self.to_network(body.posed(self.shape, self.rotations))

    def mesh(self, body: SkinnedBody) -> BodyMesh:
        return BodyMesh(self.vertices(body).detach(), body.faces, body.codes)


def rest_placed(body: SkinnedBody, fill: float = 1 / 1.11) -> Placed:
    """The mean body in rest, its box in the middle of the cube, its longer side of `fill` of the cube's."""
    shape, turns = (
        body.template.new_zeros(body.dimensions),
        torch.eye(3).to(body.template).repeat(len(body.bones), 1, 1),
    )
    return framed(body, shape, turns, fill)


def framed(
    body: SkinnedBody, shape: Float[Tensor, " S"], rotations: Float[Tensor, "J 3 3"], fill: float = 1 / 1.11
) -> Placed:
    """A pose in the middle of the cube."""
    metres = body.posed(shape, rotations)
    low, high = metres.amin(0), metres.amax(0)
    scale = 2 * fill / (high - low)[:2].max()
    return Placed(shape, rotations, scale, -scale * (low + high) / 2)


# --------------------------------------------------------------------------------------------------- the default body


class _Naked:
    """The canonical naked body of the people family as a field to be meshed."""

    name = "body"
    rig = None
    region_density = None

    def __init__(self, model) -> None:
        self.networks, self.bounds, self.focus = model.networks, model.bounds, model.focus

    def sdf(self, points: Tensor) -> Tensor:
        return self.networks.body_field(points)

    def offset(self, points: Tensor) -> Tensor:
        return torch.zeros_like(points)


_people: OrderedDict[str, SkinnedBody] = OrderedDict()


@torch.no_grad()
def people_body(model) -> SkinnedBody:
    """The naked body of a loaded `PeopleModel` as one closed mesh. Kept per weights: it takes two seconds to make."""
    key = str(model.weights_sha256)
    if key not in _people:
        while len(_people) >= 2:
            _people.popitem(last=False)
        _people[key] = _make_people_body(model)
    return _people[key]


def _make_people_body(model) -> SkinnedBody:
    from backend.families.people.config import BODY_DIM
    from backend.families.people.model import PeopleField, Person
    from backend.geometry.clean import clean
    from backend.geometry.simplify import simplify
    from backend.geometry.tetgrid import extract_surface

    cpu = model.device.type == "cpu"
    assert cpu, "the body is made on the CPU, from a model that is there"
    mesh = simplify(clean(extract_surface(_Naked(model), LATTICE)), BODY_FACES)  # pyright: ignore[reportArgumentType]
    points, faces = mesh.points, mesh.faces
    person = model.sample(0, 0.0)
    naked = PeopleField(Person(model, {k: v for k, v in person.codes.items() if k.startswith("body/")}))
    index, weight = naked._neighbours(points)
    decoder, count = model.networks.body_shape, len(model.bones)

    def at(w: Tensor) -> tuple[Tensor, Tensor]:
        displacement, ends = decoder(w[None])
        return torch.einsum("nk,nkc->nc", weight, displacement[index]), ends

    zero = torch.zeros(BODY_DIM)
    still, ends = at(zero)
    each = [at(row) for row in torch.eye(BODY_DIM)[:SHAPES]]  # w is ordered by how much of the bodies it explains
    shapes = torch.stack([moved - still for moved, _ in each])
    end_shapes = torch.stack([moved - ends for _, moved in each])
    indices, weights = naked.skin(points)
    low, high = points.amin(0), points.amax(0)
    return SkinnedBody(
        "people", points + still, shapes, faces, (points - low) / (high - low), model.bones, tuple(model.parents),
        ends[:count], end_shapes[:, :count], ends[count:], end_shapes[:, count:], indices, weights, licence="CC0-1.0",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- a user's own SMPL-X

SMPLX_URL = "https://smpl-x.is.tue.mpg.de"
SMPLX_KEYS = ("v_template", "shapedirs", "J_regressor", "weights", "kintree_table", "f")
SMPLX_BETAS = 10
SMPLX_BONES = (
    "pelvis", "left_hip", "right_hip", "spine1", "left_knee", "right_knee", "spine2", "left_ankle", "right_ankle",
    "spine3", "left_foot", "right_foot", "neck", "left_collar", "right_collar", "head", "left_shoulder",
    "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist",
)  # fmt: skip


@functools.lru_cache(maxsize=2)
def smplx_body(path: Path, codes: Path | None = None) -> SkinnedBody:
    """SMPL-X from its model file (.npz), which its owner downloads after registration; not for commercial use.

    `codes` is a table of vertex codes (.npy [V, 3], 0..1): released weights want the published one; without it codes
    are places in the rest pose. Open parts of the mesh (eyeballs, mouth) are left out or capped. Raises
    `weights_missing` and `weights_corrupt`, and says what the file lacks.
    """
    if not path.is_file():
        raise PopulaceError("weights_missing", f"There is no SMPL-X model at {path}.",
                            f"Download it after registration at {SMPLX_URL} and name its .npz file.")  # fmt: skip
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {key: file[key] for key in (*SMPLX_KEYS, "posedirs") if key in file.files}
    except (OSError, ValueError) as error:
        raise _not_smplx(path, f"it cannot be read without running what is in it ({error})") from None
    missing = [key for key in SMPLX_KEYS if key not in found]
    if missing:
        raise _not_smplx(path, f"it has no {', '.join(missing)}")
    template = np.asarray(found["v_template"], np.float64)
    count = len(template)
    joints = len(np.atleast_2d(found["kintree_table"])[0])
    wanted = {"v_template": (count, 3), "J_regressor": (joints, count), "weights": (count, joints)}
    for key, shape in wanted.items():
        if found[key].shape != shape or not np.isfinite(found[key].astype(np.float64)).all():
            raise _not_smplx(path, f"{key} is {list(found[key].shape)} instead of {list(shape)}, or not finite")
    directions = found["shapedirs"]
    if directions.ndim != 3 or directions.shape[:2] != (count, 3):
        raise _not_smplx(path, f"shapedirs is {list(directions.shape)} instead of [{count}, 3, any]")
    faces = found["f"].astype(np.int64)
    if faces.ndim != 2 or faces.shape[1] != 3 or faces.min() < 0 or faces.max() >= count:
        raise _not_smplx(path, "f holds no triangles of its vertices")
    parents = [int(p) for p in np.asarray(found["kintree_table"], np.int64)[0]]
    parents = [-1 if p < 0 or p >= joints else p for p in parents]
    parents[0] = -1
    if any(p >= j for j, p in enumerate(parents)):
        raise _not_smplx(path, "its joints are not listed parents first")
    bases = np.moveaxis(directions[:, :, :SMPLX_BETAS], 2, 0).astype(np.float64)  # [S, V, 3]
    regressor = found["J_regressor"].astype(np.float64)
    heads, head_shapes = regressor @ template, np.einsum("jv,svc->sjc", regressor, bases)
    children = [[c for c, p in enumerate(parents) if p == j] for j in range(joints)]
    reach = np.stack([np.mean([heads[c] for c in cs], 0) if cs else 1.5 * heads[j] - 0.5 * heads[max(parents[j], 0)]
                      for j, cs in enumerate(children)])  # fmt: skip
    weights = found["weights"].astype(np.float64)
    indices = np.argsort(-weights, 1, kind="stable")[:, :BONES_PER_VERTEX]
    top = np.take_along_axis(weights, indices, 1)
    pose = None
    if "posedirs" in found:
        dirs = np.asarray(found["posedirs"])
        if dirs.size != count * 3 * 9 * (joints - 1):
            raise _not_smplx(path, f"posedirs is {list(dirs.shape)}, which does not fit {joints} joints")
        pose = np.moveaxis(dirs.reshape(count, 3, -1), 2, 0)
    low, high = template.min(0), template.max(0)
    table = (template - low) / (high - low) if codes is None else _code_table(codes, count)
    names = tuple(SMPLX_BONES[j] if j < len(SMPLX_BONES) else f"joint_{j}" for j in range(joints))

    def t(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.float32))

    return SkinnedBody(
        "smplx", t(template), t(bases), torch.from_numpy(closed(faces)), t(table), names, tuple(parents), t(heads),
        t(head_shapes), t(reach), t(head_shapes), torch.from_numpy(np.ascontiguousarray(indices)),
        t(top / top.sum(1, keepdims=True)), None if pose is None else t(pose),
        licence="SMPL-X model licence (non-commercial)",
    )  # fmt: skip


def _code_table(path: Path, count: int) -> np.ndarray:
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise _not_smplx(path, f"it is no table of numbers ({error})") from None
    if table.shape != (count, 3) or not np.isfinite(table).all():
        raise _not_smplx(path, f"it is {list(table.shape)} instead of [{count}, 3], or not finite")
    return table


def _not_smplx(path: Path, why: str) -> PopulaceError:
    return PopulaceError("weights_corrupt", f"{path.name} is not taken as SMPL-X: {why}.",
                         f"Use the .npz file of the model from {SMPLX_URL}.")  # fmt: skip


def closed(faces: Int[np.ndarray, "F 3"]) -> Int[np.ndarray, "G 3"]:
    """The largest connected part of a mesh with its holes closed by fans: eyeballs go, a mouth is shut."""
    from scipy.sparse import coo_array, csgraph

    size = int(faces.max()) + 1
    ends = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    graph = coo_array((np.ones(len(ends), bool), (ends[:, 0], ends[:, 1])), shape=(size, size))
    label = csgraph.connected_components(graph, False)[1]
    faces = faces[label[faces[:, 0]] == np.bincount(label[faces[:, 0]]).argmax()]
    ends = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    keys = set(map(tuple, ends.tolist()))
    follows = {b: a for a, b in keys if (b, a) not in keys}  # along the hole, the other way round than the faces
    fans = []
    while follows:
        loop = [next(iter(follows))]
        while (after := follows.pop(loop[-1], None)) is not None and after != loop[0]:
            loop.append(after)
        fans += _fan(loop)
    return np.concatenate([faces, np.array(fans, np.int64).reshape(-1, 3)])


def _fan(loop: Sequence[int]) -> list[tuple[int, int, int]]:
    """Triangles that close a loop: a strip from both ends, whose triangles are rounder than those of a fan."""
    low, high, found = 0, len(loop) - 1, []
    while high - low >= 2:
        found.append((loop[low], loop[low + 1], loop[high]))
        low += 1
        if high - low >= 2:
            found.append((loop[low], loop[high - 1], loop[high]))
            high -= 1
    return found
