# SPDX-License-Identifier: GPL-3.0-or-later
"""Many sampled people at once in torch, on any device: bodies, skeletons, fitted items, poses.

Vertices are those of `Sampler.person` before layers are arranged (outer ones pushed out, hair tucked under hats), with
the barefoot floor at y = 0; cut garments come whole, with the border's value at each vertex: they are where it is
negative. Positions and connectivity only; colours are the sampler's paints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from backend.training import clothes
from backend.training.casting import CUT, SKIRT, Casting, cast
from backend.training.clothes import DM, Wearable
from backend.training.makehuman import BODY
from backend.training.sampler import HAIR_OUT, Sampler


@dataclass(frozen=True)
class Worn:
    """One item on all people of a crowd who wear it."""

    part: str
    item: str
    rows: Int[Tensor, " N"]  # the wearers' places in the crowd
    vertices: Float[Tensor, "N V 3"]
    faces: Int[Tensor, "F 3"]
    border: Float[Tensor, "N V"] | None  # of cut garments: metres, negative where there is cloth


@dataclass(frozen=True)
class Crowd:
    """People by place: person i is castings[i]."""

    castings: tuple[Casting, ...]
    bodies: Float[Tensor, "B V 3"]  # naked, helpers included
    heads: Float[Tensor, "B J 3"]
    tails: Float[Tensor, "B J 3"]
    worn: tuple[Worn, ...]


class CrowdMaker:
    """Makes crowds; what depends on the kit only is moved to the device once."""

    def __init__(self, sampler: Sampler, device: torch.device | str = "cpu") -> None:
        self.sampler, self.device = sampler, torch.device(device)
        self._fits: dict[str, tuple[Tensor, ...]] = {}
        self._skins: dict[str, Tensor] = {}
        self._joints = torch.from_numpy(sampler.joint_matrix).to(self.device).to_sparse()
        self._normal_faces = torch.from_numpy(sampler._normal_faces).to(self.device)
        self._skin = torch.from_numpy(sampler.rig_weights).to(self.device)
        self._parents = sampler._bones[1].tolist()

    def __call__(self, people: Sequence[int | Casting], rotations: Float[Tensor, "B J 4"] | None = None) -> Crowd:
        """The people of seeds or castings, in rest or with bone rotations (wxyz, see `poses`; not grounded again)."""
        castings = tuple(c if isinstance(c, Casting) else cast(self.sampler.kit, int(c)) for c in people)
        bodies = self.sampler.bodies(castings, self.device)
        count = len(self._parents)
        flat = bodies.permute(1, 0, 2).reshape(bodies.shape[1], -1)
        ends = torch.sparse.mm(self._joints, flat).view(2, count, len(castings), 3).permute(0, 2, 1, 3)
        matrices = None if rotations is None else bone_matrices(ends[0], self._parents, rotations.to(self.device))
        normals = None
        groups: dict[tuple[str, str], list[int]] = {}
        for i, casting in enumerate(castings):
            for part, garment in casting.parts.items():
                groups.setdefault((part, garment.item), []).append(i)
            groups.setdefault(("eyes", "eyes"), []).append(i)
            groups.setdefault(("brows", casting.brow), []).append(i)
        worn = []
        for (part, item), rows in groups.items():
            where = torch.tensor(rows, device=self.device)
            if item in (CUT, SKIRT):
                normals = smooth_normals(bodies, self._normal_faces) if normals is None else normals
                garments = [castings[i].parts[part] for i in rows]
                mean = self.sampler.mean
                off = np.stack([clothes.stand_off(part, item == SKIRT, g.thickness, g.loose, mean) for g in garments])
                border = np.stack([clothes.border_of(part, g.trims)(mean) for g in garments])
                vertices = bodies[where] + self._to(off)[..., None] * normals[where]
                faces, skin, edge = self.sampler._cloth_of(part, item == SKIRT).faces, self._skin, self._to(border)
            else:
                wearable = self.sampler.wearable(item, part)
                vertices, faces, edge = self.fit(wearable, bodies[where]), wearable.faces, None
                if part == "hair":
                    vertices = vertices + HAIR_OUT * functional.normalize(
                        vertices - self._skulls(bodies[where]), dim=-1
                    )
                skin = self._skins.setdefault(item, torch.from_numpy(wearable.weights).to(self.device))
            if matrices is not None:
                vertices = skinned(vertices, skin, matrices[where])
            worn.append(Worn(part, item, where, vertices, torch.from_numpy(faces).to(self.device), edge))
        if matrices is not None:
            bodies = skinned(bodies, self._skin, matrices)
            turn, move = matrices[..., :3], matrices[..., 3]
            ends = torch.stack([(turn @ end[..., None]).squeeze(-1) + move for end in ends])
        return Crowd(castings, bodies, ends[0], ends[1], tuple(worn))

    def fit(self, item: Wearable, bodies: Float[Tensor, "B V 3"]) -> Float[Tensor, "B W 3"]:
        """Vertices of an item on bodies, metres."""
        if item.name not in self._fits:
            p = item.proxy
            self._fits[item.name] = (
                torch.from_numpy(p.refs).to(self.device), self._to(p.weights), self._to(p.offsets * DM),
                torch.from_numpy(p.scales[:, :2].astype(np.int64)).to(self.device), self._to(p.scales[:, 2] * DM),
            )  # fmt: skip
        refs, weights, offsets, ends, reference = self._fits[item.name]
        axis = torch.arange(3, device=self.device)
        factor = (bodies[:, ends[:, 0], axis] - bodies[:, ends[:, 1], axis]).abs() / reference
        out = factor[:, None] * offsets
        for k in range(3):
            out = out + weights[:, k, None] * bodies[:, refs[:, k]]
        return out

    def _skulls(self, bodies: Tensor) -> Tensor:
        top = bodies[:, BODY, 1].amax(1)
        return torch.stack([torch.zeros_like(top), top - 0.10, torch.full_like(top, 0.02)], 1)[:, None]

    def _to(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(self.device)


def bone_matrices(
    heads: Float[Tensor, "B J 3"], parents: Sequence[int], rotations: Float[Tensor, "B J 4"]
) -> Float[Tensor, "B J 3 4"]:
    """From rest to pose, as `poses.bone_matrices` for a batch."""
    w, x, y, z = functional.normalize(rotations.to(heads.dtype), dim=-1).unbind(-1)
    turns = torch.stack([
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ], -1).view(*w.shape, 3, 3)  # fmt: skip
    moves = heads - (turns @ heads[..., None]).squeeze(-1)
    turn, move = [], []
    for j, parent in enumerate(parents):
        if parent < 0:
            turn.append(turns[:, j])
            move.append(moves[:, j])
        else:
            turn.append(turn[parent] @ turns[:, j])
            move.append((turn[parent] @ moves[:, j, :, None]).squeeze(-1) + move[parent])
    return torch.cat([torch.stack(turn, 1), torch.stack(move, 1)[..., None]], -1)


def skinned(
    vertices: Float[Tensor, "B V 3"], weights: Float[Tensor, "V J"], matrices: Float[Tensor, "B J 3 4"]
) -> Float[Tensor, "B V 3"]:
    """Linear blend skinning."""
    blended = (weights @ matrices.flatten(2)).view(*vertices.shape[:2], 3, 4)
    return (blended[..., :3] @ vertices[..., None]).squeeze(-1) + blended[..., 3]


def smooth_normals(vertices: Float[Tensor, "B V 3"], faces: Int[Tensor, "F 3"]) -> Float[Tensor, "B V 3"]:
    """Unit vertex normals, faces weighted by area."""
    a, b, c = (vertices[:, faces[:, k]] for k in range(3))
    cross = torch.linalg.cross(b - a, c - a, dim=-1)
    total = torch.zeros_like(vertices)
    for k in range(3):
        total.index_add_(1, faces[:, k], cross)
    return functional.normalize(total, dim=-1)
