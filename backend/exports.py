# SPDX-License-Identifier: GPL-3.0-or-later
"""One human as GLB or OBJ: the formats of other programs. numpy only, so the server can convert too.

A GLB keeps the mesh in rest pose and poses its joint nodes; an OBJ has no joints, so its mesh is posed. Shape keys are
morph targets of a GLB; their bones and normals stay those of the person without them.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from backend import poses
from backend.tensors import write_file

if TYPE_CHECKING:
    from backend.packet import HumanAsset, Part, RigArrays

ROUGHNESS = 0.75  # of people made without a map of it

Array = np.ndarray[Any, Any]


def corners(part: Part) -> tuple[Array, Array, Array]:
    """Vertices split at UV seams, as files with one index per corner need them.

    Returns `vertex` [S] and `uv` [S] (rows of `vertices` and `uvs` for each split vertex) and `faces` [F,3] into them.
    """
    key = part.faces.astype(np.int64) * len(part.uvs) + part.face_uvs_idx
    unique, inverse = np.unique(key.ravel(), return_inverse=True)
    return unique // len(part.uvs), unique % len(part.uvs), inverse.reshape(-1, 3)


def to_glb(asset: HumanAsset, lod: int = 0) -> bytes:
    """glTF 2.0 in one file: a mesh node per part of one level of detail, PBR material, embedded PNGs, a skin when there
    is a rig. Raises `invalid_request` when the person has no such level.

    A pose is the joint nodes' rotation; the inverse bind matrices are those of the rest pose. Tangents are given,
    because the normal map depends on them and readers without MikkTSpace would guess.
    """
    glb = _Glb()
    roots: list[int] = []
    skin = None
    if asset.rig is not None:
        skin = {"name": "Skeleton", "joints": [], "inverseBindMatrices": 0}
        first = len(glb.nodes) + 1
        parents = asset.rig.parents.tolist()
        rotations, translation = _pose(asset.rig)
        glb.nodes.append({"name": "Skeleton", "children": [first + j for j, p in enumerate(parents) if p < 0]})
        for j, p in enumerate(parents):
            move = asset.rig.heads[j] - (asset.rig.heads[p] if p >= 0 else -translation)
            node: dict[str, Any] = {"name": str(asset.meta["bones"][j]), "translation": [float(x) for x in move]}
            if (rotations[j] != (1, 0, 0, 0)).any():
                node["rotation"] = [float(x) for x in rotations[j, [1, 2, 3, 0]]]  # glTF has w last
            children = [first + k for k, q in enumerate(parents) if q == j]
            glb.nodes.append(node | ({"children": children} if children else {}))
            skin["joints"].append(first + j)
        bind = np.tile(np.eye(4, dtype=np.float32), (len(parents), 1, 1))
        bind[:, 3, :3] = -asset.rig.heads  # column-major: the translation is the last row here
        skin["inverseBindMatrices"] = glb.accessor(bind.reshape(-1, 16), "MAT4")
        roots.append(0)
    for i in asset.at_lod(lod):
        roots.append(len(glb.nodes))
        part = asset.parts[i]
        glb.add_part(part, asset.part_name(i), skin is not None and part.skin_indices is not None, asset.shape_keys)
    extra = {"skins": [skin]} if skin else {}
    recipe = asset.meta.get("recipe", {})
    return glb.pack(extra | {"scene": 0, "scenes": [{"name": "Human", "nodes": roots, "extras": {"recipe": recipe}}]})


def _pose(rig: RigArrays) -> tuple[Array, Array]:
    """Unit quaternions f64 [J, 4] wxyz and the roots' translation f32 [3]; those of rest if the rig has none."""
    if rig.rotations is None or rig.translation is None:
        return np.tile(np.array([1.0, 0, 0, 0]), (len(rig.heads), 1)), np.zeros(3, np.float32)
    rotations = rig.rotations.astype(np.float64)
    return rotations / np.linalg.norm(rotations, axis=1, keepdims=True), rig.translation[0]


class _Glb:
    """Grows the JSON lists and the binary chunk of one glTF file together."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.json: dict[str, list[dict[str, Any]]] = {
            name: [] for name in ("meshes", "materials", "textures", "images", "accessors", "bufferViews")
        }
        self.chunks: list[bytes] = []
        self.size = 0

    def _add(self, kind: str, entry: dict[str, Any]) -> int:
        self.json[kind].append(entry)
        return len(self.json[kind]) - 1

    def _view(self, data: bytes, target: int | None = None) -> int:
        entry = {"buffer": 0, "byteOffset": self.size, "byteLength": len(data)}
        padded = data + b"\0" * (-len(data) % 4)
        self.chunks.append(padded)
        self.size += len(padded)
        return self._add("bufferViews", entry | ({"target": target} if target else {}))

    def accessor(self, array: Array, kind: str, target: int | None = None, bounds: bool = False) -> int:
        component = {"f4": 5126, "u4": 5125, "u2": 5123, "u1": 5121}[array.dtype.str[1:]]
        entry: dict[str, Any] = {"bufferView": self._view(np.ascontiguousarray(array).tobytes(), target),
                                 "componentType": component, "count": len(array), "type": kind}  # fmt: skip
        if bounds:
            entry |= {"min": array.min(0).tolist(), "max": array.max(0).tolist()}
        return self._add("accessors", entry)

    def _texture(self, png: bytes, name: str) -> dict[str, int]:
        image = self._add("images", {"name": name, "mimeType": "image/png", "bufferView": self._view(png)})
        return {"index": self._add("textures", {"source": image, "sampler": 0})}

    def _material(self, part: Part, name: str) -> int:
        pbr: dict[str, Any] = {"baseColorTexture": self._texture(part.base_color_png, f"{name} base color")}
        if part.orm_png is None:
            pbr |= {"metallicFactor": 0.0, "roughnessFactor": ROUGHNESS}
        else:
            pbr["metallicRoughnessTexture"] = self._texture(part.orm_png, f"{name} roughness and metallic")
            pbr |= {"metallicFactor": 1.0, "roughnessFactor": 1.0}
        material: dict[str, Any] = {"name": name, "pbrMetallicRoughness": pbr}
        if part.normal_png is not None:
            material["normalTexture"] = self._texture(part.normal_png, f"{name} normal")
        return self._add("materials", material)

    def add_part(self, part: Part, name: str, skinned: bool, shape_keys: Sequence[str]) -> None:
        vertex, uv, faces = corners(part)
        vertex_data, indices = 34962, 34963  # GL_ARRAY_BUFFER, GL_ELEMENT_ARRAY_BUFFER
        uvs = part.uvs[uv] * np.array([1, -1], np.float32) + np.array([0, 1], np.float32)  # glTF counts from the top
        normals = _unit(part.normals)[vertex]
        attributes = {
            "POSITION": self.accessor(part.vertices[vertex], "VEC3", vertex_data, bounds=True),
            "NORMAL": self.accessor(normals, "VEC3", vertex_data),
            "TEXCOORD_0": self.accessor(uvs.astype(np.float32), "VEC2", vertex_data),
        }
        if part.normal_png is not None:
            tangents = _tangents(part.vertices[vertex], normals, part.uvs[uv], faces)
            attributes["TANGENT"] = self.accessor(tangents, "VEC4", vertex_data)
        if skinned:
            joints, weights = _gltf_skin(part)
            attributes["JOINTS_0"] = self.accessor(joints[vertex], "VEC4", vertex_data)
            attributes["WEIGHTS_0"] = self.accessor(weights[vertex], "VEC4", vertex_data)
        primitive = {"attributes": attributes, "material": self._material(part, name), "mode": 4,
                     "indices": self.accessor(faces.astype("<u4").reshape(-1), "SCALAR", indices)}  # fmt: skip
        mesh: dict[str, Any] = {"name": name, "primitives": [primitive]}
        if part.shape_keys is not None:
            primitive["targets"] = [{"POSITION": self.accessor(offsets[vertex], "VEC3", vertex_data, bounds=True)}
                                    for offsets in part.shape_keys]  # fmt: skip
            mesh |= {"weights": [0.0] * len(shape_keys), "extras": {"targetNames": list(shape_keys)}}
        self.nodes.append({"name": name, "mesh": self._add("meshes", mesh)} | ({"skin": 0} if skinned else {}))

    def pack(self, extra: Mapping[str, Any]) -> bytes:
        document = {"asset": {"version": "2.0", "generator": "Populace"}, "nodes": self.nodes, **self.json, **extra,
                    "samplers": [{"magFilter": 9729, "minFilter": 9987, "wrapS": 33071, "wrapT": 33071}],
                    "buffers": [{"byteLength": self.size}]}  # fmt: skip
        head = json.dumps(document, separators=(",", ":"), sort_keys=True, allow_nan=False).encode()
        head += b" " * (-len(head) % 4)
        total = 12 + 8 + len(head) + 8 + self.size
        return b"".join([struct.pack("<4sII", b"glTF", 2, total), struct.pack("<I4s", len(head), b"JSON"), head,
                         struct.pack("<I4s", self.size, b"BIN\0"), *self.chunks])  # fmt: skip


def _unit(vectors: Array) -> Array:
    """Rows of length 1; a zero row (a vertex without area) points up."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.where(length > 0, vectors / np.maximum(length, 1e-20), [[0, 1, 0]]).astype(np.float32)


def _tangents(vertices: Array, normals: Array, uvs: Array, faces: Array) -> Array:
    """Per split vertex the direction of growing u, [S,4]; the fourth number is the side on which v grows.

    As MikkTSpace (Mikkelsen 2008): per-face directions, weighted by the angle at the corner, then made perpendicular
    to the normal.
    """
    edge, uv_edge = vertices[faces[:, [1, 2]]] - vertices[faces[:, :1]], uvs[faces[:, [1, 2]]] - uvs[faces[:, :1]]
    sign = np.where(uv_edge[:, 0, 0] * uv_edge[:, 1, 1] - uv_edge[:, 0, 1] * uv_edge[:, 1, 0] < 0, -1.0, 1.0)
    along = _unit((edge[:, 0] * uv_edge[:, 1, 1:] - edge[:, 1] * uv_edge[:, 0, 1:]) * sign[:, None])
    side = np.zeros(len(vertices))
    total = np.zeros((len(vertices), 3))
    for corner in range(3):
        a, b, c = (vertices[faces[:, (corner + k) % 3]] for k in range(3))
        angle = np.arccos(np.clip((_unit(b - a) * _unit(c - a)).sum(1), -1, 1))
        at = faces[:, corner]
        side += np.bincount(at, angle * sign, len(vertices))
        for axis in range(3):
            total[:, axis] += np.bincount(at, angle * along[:, axis], len(vertices))
    total -= normals * (normals * total).sum(1, keepdims=True)
    flat = np.linalg.norm(total, axis=1) < 1e-6  # no direction of its own: any one perpendicular to the normal
    total[flat] = np.cross(normals[flat], np.where(np.abs(normals[flat, :1]) < 0.9, [[1, 0, 0]], [[0, 1, 0]]))
    return np.concatenate([_unit(total), np.where(side < 0, -1, 1)[:, None]], 1).astype(np.float32)


def _gltf_skin(part: Part) -> tuple[Array, Array]:
    """JOINTS_0 and WEIGHTS_0 as glTF wants them: no joint twice in a row, unused slots 0, weights that sum to 1."""
    assert part.skin_indices is not None
    assert part.skin_weights is not None
    joints, weights = part.skin_indices.copy(), np.maximum(part.skin_weights, 0)
    for a in range(4):
        for b in range(a + 1, 4):
            same = joints[:, a] == joints[:, b]
            weights[same, a] += weights[same, b]
            weights[same, b] = 0
    weights /= np.maximum(weights.sum(1, keepdims=True), 1e-20)
    joints[weights == 0] = 0
    return joints.astype("u1" if joints.max() < 256 else "<u2"), weights.astype(np.float32)


def posed(asset: HumanAsset, part: Part) -> tuple[Array, Array]:
    """Vertices and normals f32 [V, 3] of a part as the person stands; the part's own if nothing moves it."""
    rig = asset.rig
    if rig is None or rig.rotations is None or part.skin_indices is None:
        return part.vertices, part.normals
    skinning = (part.skin_indices, part.skin_weights, rig, rig.rotations)
    return poses.skin(part.vertices, *skinning, rig.translation), poses.skin_normals(part.normals, *skinning)


def to_obj(asset: HumanAsset, folder: Path, lod: int = 0) -> Path:
    """Write human.obj, human.mtl and the PNGs into `folder` (made if needed): the posed mesh of one level of detail.
    Returns the path of the OBJ. Raises `invalid_request` when the person has no such level."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, materials = ["mtllib human.mtl"], []
    at = np.ones(3, np.int64)  # OBJ counts from 1, through all parts
    for i in asset.at_lod(lod):
        part, name = asset.parts[i], asset.part_name(i)
        vertices, normals = posed(asset, part)
        stem = f"{i}_{''.join(c if c.isalnum() else '_' for c in name)}"
        write_file(folder / f"{stem}_base_color.png", part.base_color_png)
        material = [f"newmtl {stem}", "Ks 0 0 0", f"map_Kd {stem}_base_color.png"]
        if part.normal_png is not None:
            write_file(folder / f"{stem}_normal.png", part.normal_png)
            material.append(f"norm {stem}_normal.png")
        for key, channel, png in () if part.orm_png is None else _channels(part.orm_png):
            write_file(folder / f"{stem}_{channel}.png", png)
            material.append(f"{key} {stem}_{channel}.png")
        materials.append("\n".join(material) + "\n")
        lines += [f"o {stem}", f"usemtl {stem}", "s 1"]
        lines += ["v {:.6f} {:.6f} {:.6f}".format(*row) for row in vertices.tolist()]
        lines += ["vt {:.6f} {:.6f}".format(*row) for row in part.uvs.tolist()]
        lines += ["vn {:.4f} {:.4f} {:.4f}".format(*row) for row in normals.tolist()]
        corner = np.stack([part.faces, part.face_uvs_idx, part.faces], 2) + at
        lines += ["f {}/{}/{} {}/{}/{} {}/{}/{}".format(*row) for row in corner.reshape(-1, 9).tolist()]
        at += [len(part.vertices), len(part.uvs), len(part.vertices)]
    write_file(folder / "human.mtl", "\n".join(materials).encode())
    write_file(folder / "human.obj", ("\n".join(lines) + "\n").encode())
    return folder / "human.obj"


def _channels(orm: bytes) -> list[tuple[str, str, bytes]]:
    """Statement of an MTL file, name and grey PNG of roughness and metallic: readers of MTL take no single channels."""
    from PIL import Image

    found = []
    with Image.open(io.BytesIO(orm)) as image:
        for key, name, band in (("map_Pr", "roughness", "G"), ("map_Pm", "metallic", "B")):
            out = io.BytesIO()
            image.convert("RGB").getchannel(band).save(out, "PNG", compress_level=1)
            found.append((key, name, out.getvalue()))
    return found
