# SPDX-License-Identifier: GPL-3.0-or-later
"""Whole people from a MakeHuman folder: a seed -> a casting -> textured, dressed, rigged layers.

`Sampler.person` makes one person as it is seen; `Sampler.bodies` makes many rest bodies at once on any device; people
of one seed are the same either way. `visible_surface`, `signed_distance_samples` and `render_person` look at them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from scipy.spatial import cKDTree
from torch import Tensor

from backend import poses
from backend.protocol import PopulaceError
from backend.training import clothes
from backend.training.casting import CUT, SKIRT, Casting, Garment, cast
from backend.training.clothes import DM, HIDE, Wearable
from backend.training.makehuman import BODY, Kit, read_material
from backend.training.naming import attributes
from backend.training.person import PARTS, Layer, Paint, SampledPerson, Tint, grounded, posed
from backend.training.portrait import Portrait, render_person
from backend.training.splits import seeds, split_of
from backend.training.surface import Surface, signed_distance_samples, visible_surface

__all__ = ["Layer", "Portrait", "SampledPerson", "Sampler", "Surface", "render_person", "signed_distance_samples",
           "template", "visible_surface"]  # fmt: skip

FILLER = 0.012  # metres that hidden skin is moved inwards: sleeves and hems do not look into a hollow
GAP = {"top": 0.005, "bottom": 0.003, "hair": 0.003}  # metres in front of what is worn below
HAIR_OUT = 0.002  # metres: head shapes would push the scalp through the hair
CHUNK = 128  # bodies at a time


def template(kit: Kit, count: int = 1500) -> Float[np.ndarray, "V 3"]:
    """The mean person f64 [19158, 3] of the training split's first `count` seeds: metres, soles at y = 0."""
    total = np.zeros(kit.base.vertices.shape)
    sampler = Sampler(kit, total)
    people = seeds("train", count)
    for i in range(0, count, CHUNK):
        total += sampler.bodies(people[i : i + CHUNK]).sum(0, dtype=torch.float64).numpy()
    total /= count
    total[:, 1] -= total[BODY, 1].min()
    return total


class Sampler:
    """People of one kit. Textures and meshes are read when first worn and kept."""

    def __init__(self, kit: Kit, mean: np.ndarray | None = None) -> None:
        """`mean` [19158, 3] is `template(kit)`, which takes some seconds if it is not given."""
        self.kit = kit.check()
        self._mean = mean
        self._wearables: dict[str, Wearable] = {}
        self._cloth: dict[str, clothes.Cloth] = {}
        self._paints: dict[Path, np.ndarray] = {}
        self._targets: dict[torch.device, Tensor] = {}

    # --- bodies -------------------------------------------------------------------------------------------------------

    @cached_property
    def mean(self) -> np.ndarray:
        """The canonical body f64 [19158, 3]."""
        return template(self.kit) if self._mean is None else np.asarray(self._mean, np.float64)

    @cached_property
    def target_names(self) -> list[str]:
        """Every target that a casting can call for."""
        middle = np.array([0.25, 0.75])  # one value on either side of each slider's middle calls for all of its levels
        grid = np.stack(np.meshgrid(*[middle] * 6, indexing="ij"), -1).reshape(-1, 6).T
        sliders = dict(zip(("muscle", "weight", "height", "proportions", "cup", "firmness"), grid, strict=True))
        same = {"gender": np.full(64, 0.5), "age": np.full(64, 0.75)} | dict.fromkeys(
            ("african", "asian", "caucasian"), np.ones(64))  # fmt: skip
        return sorted(self.kit.weights(sliders | same, np.zeros((64, len(self.kit.details)))))

    def targets(self, device: torch.device | str = "cpu") -> Float[Tensor, "T V3"]:
        """Displacements in metres, one row per target name, dense: one matmul makes a batch of bodies."""
        device = torch.device(device)
        if device not in self._targets:
            table = np.zeros((len(self.target_names), self.kit.base.vertices.size), np.float32)
            for row, name in zip(table, self.target_names, strict=True):
                index, delta = self.kit.target(name)
                np.add.at(row.reshape(-1, 3), index, (delta * DM).astype(np.float32))
            self._targets[device] = torch.from_numpy(table).to(device)
        return self._targets[device]

    def weights(self, castings: Sequence[Casting]) -> Float[np.ndarray, "B T"]:
        """Target weights f32 of castings."""
        sliders = {k: np.array([c.sliders[k] for c in castings]) for k in castings[0].sliders}
        found = self.kit.weights(sliders, np.stack([c.details for c in castings]))
        column = {name: i for i, name in enumerate(self.target_names)}
        out = np.zeros((len(castings), len(column)), np.float32)
        for name, weight in found.items():
            out[:, column[name]] = weight
        return out

    def bodies(self, people: Sequence[int | Casting], device: torch.device | str = "cpu") -> Float[Tensor, "B V 3"]:
        """Naked rest bodies f32 [B, 19158, 3] of seeds or castings, helpers included: metres, soles at y = 0."""
        castings = [c if isinstance(c, Casting) else cast(self.kit, int(c)) for c in people]
        base = torch.from_numpy((self.kit.base.vertices * DM).astype(np.float32).ravel()).to(device)
        weights = torch.from_numpy(self.weights(castings)).to(device)
        bodies = torch.addmm(base[None], weights, self.targets(device)).view(len(castings), -1, 3)
        bodies[..., 1] -= bodies[:, BODY, 1].amin(1)[:, None]
        return bodies

    # --- skeleton -----------------------------------------------------------------------------------------------------

    @cached_property
    def rig_weights(self) -> np.ndarray:
        """Skin weights f32 [19158, J]; vertices that only bones of the larger rig move follow their neighbours."""
        weights = self.kit.rig_weights()[2].copy()
        empty = weights.sum(1) == 0
        body = np.flatnonzero(~empty)
        if empty.any() and len(body):
            at = self.kit.base.vertices
            weights[empty] = weights[body[cKDTree(at[body]).query(at[empty])[1]]]
        return weights

    @cached_property
    def joint_matrix(self) -> np.ndarray:
        """f32 [2 J, 19158]: heads, then tails, as means of base vertices."""
        bones, joints = self.kit.rig
        names = self.kit.rig_weights()[0]
        out = np.zeros((2 * len(names), len(self.kit.base.vertices)), np.float32)
        for i, end in enumerate(("head", "tail")):
            for j, name in enumerate(names):
                vertices = joints[bones[name][end]]
                out[i * len(names) + j, vertices] += 1 / len(vertices)
        return out

    @cached_property
    def _bones(self) -> tuple[tuple[str, ...], np.ndarray]:
        names, parents, _ = self.kit.rig_weights()
        return tuple(names), np.array(parents, np.int32)

    def bones(self, body: np.ndarray) -> poses.Bones:
        """The game_engine rig on a body [19158, 3]."""
        names, parents = self._bones
        heads, tails = (self.joint_matrix @ body.astype(np.float32)).reshape(2, len(names), 3)
        return poses.Bones(names, parents, heads, tails)

    @cached_property
    def head(self) -> np.ndarray:
        """bool [19158]: moves mainly with the head."""
        return self.rig_weights[:, self._bones[0].index("head")] > 0.5

    # --- what is worn -------------------------------------------------------------------------------------------------

    def wearable(self, item: str, part: str) -> Wearable:
        """An item of the kit by the name that castings use; eyes and brows by "eyes" and their folder."""
        if item not in self._wearables:
            quads = hides = None
            if part in ("hair", "brows", "eyes"):
                folder = self.kit.root / {"hair": "hair", "brows": "eyebrows", "eyes": "eyes"}[part]
                path = next(
                    iter(sorted(folder.glob("low-poly/*.mhclo" if part == "eyes" else f"{item}/*.mhclo"))), None
                )
                path = path or next(iter(sorted(folder.rglob("*.mhclo"))))  # another eye will do
                hides = np.zeros(0, np.int64)
            else:
                asset, _, label = item.partition("/")
                entry = self.kit.garments()[asset]
                wanted = (label, "top") if label == "outer" else (label,)
                pieces = [p for p in entry["parts"] if p["label"] in wanted]
                quads = _runs([r for p in pieces for r in p["faces"]])
                if all("hides" in p for p in pieces):
                    hides = _runs([r for p in pieces for r in p["hides"]])
                path = self.kit.root / entry["file"]
            self._wearables[item] = clothes.load(
                self.kit, path, part, self.mean, self.rig_weights, item, quads, hides
            )  # fmt: skip
        return self._wearables[item]

    @cached_property
    def _materials(self) -> dict[str, dict[str, Path]]:
        """Textures of skins and irises by the stem of their material."""
        found = {}
        for kind, folder in (("skin", "skins"), ("iris", "eyes/materials")):
            paths = sorted((self.kit.root / folder).rglob("*.mhmat"))
            found[kind] = {p.stem: Path(read_material(p).get("diffuseTexture", "")) for p in paths}
        return found

    def _texels(self, kind: str, name: str) -> np.ndarray:
        path = self._materials[kind][name]
        if not path.is_file():
            raise PopulaceError("not_found", f"The {kind} {name} has no texture.", "Install its images, or remove it.")
        if path not in self._paints:
            self._paints[path] = clothes.read_image(path)
        return self._paints[path]

    def _cloth_of(self, part: str, skirt: bool) -> clothes.Cloth:
        key = "skirt" if skirt else part
        if key not in self._cloth:
            self._cloth[key] = (
                clothes.skirt_cloth(self.kit, self.mean) if skirt
                else clothes.body_cloth(self.kit, self.mean, part, self.head)
            )  # fmt: skip
        return self._cloth[key]

    @cached_property
    def _normal_faces(self) -> np.ndarray:
        """Faces of body and skirt helper: what cut garments are pushed away from."""
        groups = self.kit.base.groups
        return np.concatenate([self.kit.base.triangles(groups[g])[0] for g in ("body", "helper-skirt")])

    # --- people -------------------------------------------------------------------------------------------------------

    def person(self, seed: int | Casting, pose: str | np.ndarray | None = None) -> SampledPerson:
        """The person of a seed (or a casting), in the rest pose, a pose by name, or with bone rotations [J, 4]."""
        casting = seed if isinstance(seed, Casting) else cast(self.kit, int(seed))
        body = self.bodies([casting])[0].numpy()
        normals = clothes.body_normals(self._normal_faces, body)
        hidden = np.zeros(len(body), bool)
        layers: dict[str, Layer] = {}
        for part, garment in casting.parts.items():
            layer, hides = self._garment(part, garment, body, normals)
            if len(layer.faces):
                layers[part] = layer
                hidden |= hides
        _arrange(layers, body, normals)
        skin, filler = self._skin(casting, body, normals, hidden)
        eyes = self._worn(self.wearable("eyes", "eyes"), body, Paint(self._texels("iris", casting.iris)))
        brow = self.wearable(casting.brow, "brows")
        black = np.concatenate([0.75 * casting.hair_color] * 2).astype(np.float32)
        brows = self._worn(brow, body, Paint(brow.texels, tint=Tint(black, typical=1e-9, power=0)))
        layers |= {"body": skin, "eyes": eyes, "brows": brows}
        bones = self.bones(body)
        person = grounded(SampledPerson(
            casting.seed, tuple(layers[p] for p in PARTS if p in layers), filler, bones,
            attributes(casting, body, skin, layers), split_of(casting.seed),
        ))  # fmt: skip
        if pose is None or (isinstance(pose, str) and pose == poses.REST):
            return person
        return posed(person, poses.pose(pose, person.bones)[0] if isinstance(pose, str) else pose)

    def _worn(self, item: Wearable, body: np.ndarray, paint: Paint) -> Layer:
        return Layer(item.part, item.fit(body), item.faces, item.uvs, item.face_uvs, paint, item.weights,
                     item.canonical, cutout=item.transparent, name=item.name)  # fmt: skip

    def _skin(
        self, casting: Casting, body: np.ndarray, normals: np.ndarray, hidden: np.ndarray
    ) -> tuple[Layer, Layer | None]:
        faces, face_uvs = self.kit.base.triangles(self.kit.base.groups["body"])
        paint = Paint(self._texels("skin", casting.skin), gain=casting.skin_gain)
        under = hidden[faces].all(1)
        uvs, weights = self.kit.base.uvs.astype(np.float32), self.rig_weights[BODY]
        mean = self.mean[BODY].astype(np.float32)

        def of(vertices: np.ndarray, which: np.ndarray) -> Layer:
            return Layer("body", vertices.astype(np.float32), faces[which], uvs, face_uvs[which], paint, weights, mean,
                         name=casting.skin)  # fmt: skip

        inner = np.zeros(len(body), bool)
        inner[faces[under]] = True
        inner[faces[~under]] = False  # the filler hangs on the rim of the visible skin
        sunk = body - FILLER * normals * inner[:, None]
        return of(body[BODY], ~under), of(sunk[BODY], under) if under.any() else None

    def _garment(self, part: str, garment: Garment, body: np.ndarray, normals: np.ndarray) -> tuple[Layer, np.ndarray]:
        """A layer and the base vertices bool [19158] that it hides."""
        if garment.item in (CUT, SKIRT):
            return self._cut(part, garment, body, normals)
        item = self.wearable(garment.item, part)
        tint = None
        if part == "hair":
            tint = Tint(garment.palette, item.typical[1], 0.8, soft=0.05)
        elif garment.pattern != "original":
            tint = Tint(garment.palette, item.typical[1], 1.0, garment.pattern, garment.scale)
        layer = self._worn(item, body, Paint(item.texels, tint=tint))
        hides = item.hides
        if part == "hair":
            centre = body[BODY][body[BODY, 1].argmax()] * [0, 1, 0] + [0, -0.10, 0.02]
            away = layer.vertices - centre
            away /= np.linalg.norm(away, axis=1, keepdims=True) + 1e-9
            layer = replace(layer, vertices=(layer.vertices + HAIR_OUT * away).astype(np.float32))
        elif garment.trims:
            border = clothes.border_of(part, garment.trims)
            if (border(item.canonical) >= 0).any():
                layer = _clipped(layer, border)
                hides = hides & (border(self.mean) < -HIDE)
        return layer, hides

    def _cut(self, part: str, garment: Garment, body: np.ndarray, normals: np.ndarray) -> tuple[Layer, np.ndarray]:
        skirt = garment.item == SKIRT
        cloth, border = self._cloth_of(part, skirt), clothes.border_of(part, garment.trims)
        off = clothes.stand_off(part, skirt, garment.thickness, garment.loose, self.mean)
        white = np.full((1, 1, 4), 255, np.uint8)
        tint = Tint(garment.palette, 1.0, 1.0, garment.pattern, garment.scale)
        pushed = (body + off[:, None] * normals).astype(np.float32)
        whole = Layer(part, pushed, cloth.faces, cloth.uvs, cloth.face_uvs, Paint(white, tint=tint), self.rig_weights,
                      self.mean.astype(np.float32), name=garment.item)  # fmt: skip
        hides = (border(self.mean) < -HIDE) & ~self.head & (self.mean[:, 1] < clothes.NECK_TOP)
        return _clipped(whole, border), hides


def _arrange(layers: dict[str, Layer], body: np.ndarray, normals: np.ndarray) -> None:
    """Outer layers in front of inner ones, in place."""
    for outer, inner in (("bottom", "shoes"), ("top", "bottom"), ("hair", "top")):
        if outer not in layers or inner not in layers:
            continue
        above, below = layers[outer], layers[inner]
        if inner == "bottom" and below.name.endswith("/onepiece"):  # overalls go over the shirt, which is tucked in
            moved = clothes.push_out(above.vertices, below.vertices, -below.normals, GAP["top"], reach=0.06)
            moved = clothes.push_out(moved, body[BODY], normals[BODY], 0.002).astype(
                np.float32
            )  # but not into the skin
        else:
            moved = clothes.push_out(above.vertices, below.vertices, below.normals, GAP[outer])
        layers[outer] = replace(above, vertices=moved)
    if "hair" in layers and "accessory" in layers:
        hat, hair = layers["accessory"], layers["hair"]
        centre = body[BODY, 1].max() * np.array([0.0, 1, 0]) + [0, -0.12, 0.02]
        moved = clothes.tuck(
            hair.vertices.astype(np.float64), centre, hat.vertices.astype(np.float64), hat.faces, 0.004
        )
        layers["hair"] = replace(hair, vertices=moved.astype(np.float32))


def _clipped(layer: Layer, border) -> Layer:
    """The part of a layer where the border of its canonical points is negative."""
    assert layer.canonical is not None
    assert layer.weights is not None
    cut = clothes.clip(layer.faces, layer.face_uvs, layer.canonical, border)
    return replace(
        layer, vertices=cut.vertices(layer.vertices), canonical=cut.vertices(layer.canonical),
        weights=cut.vertices(layer.weights), uvs=cut.uvs(layer.uvs), faces=cut.faces, face_uvs=cut.face_uvs,
    )  # fmt: skip


def _runs(runs: Sequence[Sequence[int]]) -> np.ndarray:
    """Inclusive runs [[3, 5], [9, 9]] -> [3, 4, 5, 9]."""
    return np.concatenate([np.arange(a, b + 1) for a, b in runs] or [np.zeros(0, np.int64)])
