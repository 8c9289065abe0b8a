# SPDX-License-Identifier: GPL-3.0-or-later
"""One human as a file: named arrays <-> a safetensors packet, GLB, OBJ. numpy only, so the server can convert too.

The packet is a safetensors file (8 bytes header length, JSON header, raw little-endian sections):

    part/<i>/vertices       f32 [V,3]  metres, Y up, facing +Z, feet at y = 0
    part/<i>/faces          i32 [F,3]  counter-clockwise from outside
    part/<i>/normals        f32 [V,3]
    part/<i>/uvs            f32 [U,2]  origin bottom-left
    part/<i>/face_uvs_idx   i32 [F,3]
    part/<i>/base_color.png u8  [n]    sRGB, a PNG file's bytes
    part/<i>/normal.png     u8  [n]    tangent space, OpenGL convention (+Y up)
    part/<i>/skin_indices   i32 [V,4]  with a rig only; so are skin_weights f32 [V,4]
    rig/heads, rig/tails    f32 [J,3];  rig/parents i32 [J], parents first, the root's is -1
    latents/<name>          f32 [L,C]

`__metadata__` holds "schema" and "asset": JSON with "parts" (one object per part, with its "name"), "bones" (names in
the order of the rig), "attributes", "recipe" and "stats". Nothing in a packet depends on time or machine, so the same
request gives the same bytes. The add-on has its own reader; tests/contract holds the file that both must read alike.
"""

from __future__ import annotations

import errno
import json
import math
import os
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backend.protocol import PopulaceError

SCHEMA = "populace.human/1"
MAX_HEADER_BYTES = 16 << 20
MAX_FILE_BYTES = 4 << 30
MAX_PARTS = 64
MAX_ELEMENTS = 6_000_000  # rows of any one mesh array
MAX_TEXTURE = 8192
ROUGHNESS = 0.75  # of skin and cloth alike, until families say more

Array = np.ndarray[Any, Any]
_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "I64": np.dtype("<i8"), "I32": np.dtype("<i4"),
           "I8": np.dtype("i1"), "U8": np.dtype("u1")}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Part:
    """One object to insert. Arrays as in the packet; the maps are PNG bytes."""

    vertices: Array
    faces: Array
    normals: Array
    uvs: Array
    face_uvs_idx: Array
    base_color_png: bytes
    normal_png: bytes
    skin_indices: Array | None = None
    skin_weights: Array | None = None


@dataclass(frozen=True)
class RigArrays:
    heads: Array
    tails: Array
    parents: Array


@dataclass(frozen=True)
class HumanAsset:
    """A whole person. `meta` is the packet's "asset" JSON: names of parts and bones are there."""

    parts: tuple[Part, ...]
    latents: Mapping[str, Array]
    rig: RigArrays | None
    meta: Mapping[str, Any]

    def part_name(self, i: int) -> str:
        return str(self.meta["parts"][i]["name"])


class PacketError(PopulaceError):
    """Bytes that are not a packet of ours, or one that lies about itself."""

    def __init__(self, what: str) -> None:
        super().__init__("internal_error", f"The result packet is damaged: {what}.", "Generate the person again.")


# ---------------------------------------------------------------------------------------------- safetensors, by hand


def dump_tensors(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> list[bytes]:
    """A safetensors file as chunks. The library writes metadata in the order of a hash map; this order is fixed."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # keeps every section aligned
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    chunks, at = [], 0
    for name in order:
        array = np.ascontiguousarray(tensors[name])
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        header[name] = {"dtype": _DTYPE_NAMES[array.dtype], "shape": list(array.shape),
                        "data_offsets": [at, at + array.nbytes]}  # fmt: skip
        chunks.append(array.tobytes())
        at += array.nbytes
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
    head += b" " * (-len(head) % 8)
    return [struct.pack("<Q", len(head)), head, *chunks]


def load_tensors(data: bytes | memoryview) -> tuple[dict[str, Array], dict[str, str]]:
    """Arrays (read-only views into `data`) and metadata of a safetensors file. Raises ValueError with what is wrong.

    Checked: header length, JSON, known dtypes, shape x itemsize = span, spans inside the file, in order, without
    overlap or holes.
    """
    size = len(data)
    if size < 8:
        raise ValueError(f"{size} bytes are too few for a header")
    (head_bytes,) = struct.unpack_from("<Q", data)
    if head_bytes > min(MAX_HEADER_BYTES, size - 8):
        raise ValueError(f"a header of {head_bytes} bytes in a file of {size}")
    try:
        header = json.loads(bytes(data[8 : 8 + head_bytes]).decode("utf-8"), object_pairs_hook=_unique_keys)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"header is not JSON ({type(error).__name__})") from None
    if not isinstance(header, dict):
        raise ValueError("header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("metadata is not a map of strings")
    base, spans, arrays = 8 + head_bytes, [], {}
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(name, entry)
        spans.append((begin, end, name))
        if end > size - base:
            raise ValueError(f"{name} ends at {end}, behind the end of the file")
        count = math.prod(shape)
        if count * dtype.itemsize != end - begin:
            raise ValueError(f"{name} has shape {list(shape)} but {end - begin} bytes")
        arrays[name] = np.frombuffer(data, dtype, count, base + begin).reshape(shape)
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise ValueError(f"{name} begins at {begin} instead of {at}")
        at = end
    if at != size - base:
        raise ValueError(f"{size - base - at} bytes belong to no array")
    return arrays, metadata


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice in the header")
    return found


def _entry(name: str, entry: Any) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} is not described by dtype, shape and data_offsets")
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{name} has an unknown dtype")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers):
            raise ValueError(f"{name} has a bad shape or offset")
    if len(shape) > 8 or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name} has a bad shape or offset")
    return _DTYPES[dtype], tuple(shape), offsets[0], offsets[1]


# ------------------------------------------------------------------------------------------------------- the packet


def dumps(asset: HumanAsset) -> bytes:
    """The packet's bytes. Equal assets give equal bytes."""
    tensors: dict[str, Array] = {}
    for i, part in enumerate(asset.parts):
        arrays = {"vertices": part.vertices, "faces": part.faces, "normals": part.normals, "uvs": part.uvs,
                  "face_uvs_idx": part.face_uvs_idx, "skin_indices": part.skin_indices,
                  "skin_weights": part.skin_weights,
                  "base_color.png": np.frombuffer(part.base_color_png, np.uint8),
                  "normal.png": np.frombuffer(part.normal_png, np.uint8)}  # fmt: skip
        tensors |= {f"part/{i}/{name}": array for name, array in arrays.items() if array is not None}
    if asset.rig is not None:
        tensors |= {"rig/heads": asset.rig.heads, "rig/tails": asset.rig.tails, "rig/parents": asset.rig.parents}
    tensors |= {f"latents/{name}": codes for name, codes in asset.latents.items()}
    meta = json.dumps(asset.meta, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return b"".join(dump_tensors(tensors, {"schema": SCHEMA, "asset": meta}))


def loads(data: bytes | memoryview) -> HumanAsset:
    """Raises `PacketError` unless every array is there, of the right type and shape, and every index is in range."""
    try:
        tensors, metadata = load_tensors(data)
        return _asset(tensors, metadata)
    except PacketError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PacketError(f"{error.args[0] if error.args else error} ({type(error).__name__})") from None


def write(path: Path, asset: HumanAsset) -> int:
    """Write the packet so that it exists whole or not at all. Returns its size in bytes."""
    data = dumps(asset)
    write_file(path, data)
    return len(data)


def write_file(path: Path, data: bytes) -> None:
    """Write, fsync, rename. A full disk gives `out_of_disk` and leaves nothing behind."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            _rename(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PopulaceError(
                "out_of_disk", f"{path.name} needs {len(data) / 1e6:.0f} MB and the disk is full.",
                f"Free some space in {path.parent}."
            ) from error  # fmt: skip
        raise


def _rename(source: Path, target: Path, tries: int = 4) -> None:
    """`os.replace`; on Windows a virus scanner may hold a new file for a moment."""
    for left in reversed(range(tries)):
        try:
            return os.replace(source, target)
        except PermissionError:
            if not left:
                raise
            time.sleep(0.1)


def read(path: Path) -> HumanAsset:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise PacketError(f"{path.stat().st_size} bytes are too many")
    return loads(path.read_bytes())


def _asset(tensors: dict[str, Array], metadata: dict[str, str]) -> HumanAsset:
    if metadata.get("schema") != SCHEMA:
        raise PacketError(f"schema is {metadata.get('schema')!r} instead of {SCHEMA!r}")
    meta = json.loads(metadata["asset"])
    if not isinstance(meta, dict) or not all(isinstance(p["name"], str) for p in meta["parts"]):
        raise PacketError("the description of the parts is missing")
    left = dict(tensors)
    rig = None
    if "rig/heads" in left:
        heads = _take(left, "rig/heads", "<f4", 3)
        rig = RigArrays(heads, _take(left, "rig/tails", "<f4", 3, len(heads)),
                        _take(left, "rig/parents", "<i4", None, len(heads)))  # fmt: skip
        if len(meta["bones"]) != len(heads) or (rig.parents >= np.arange(len(heads))).any() or rig.parents.min() < -1:
            raise PacketError("bones are not listed parents first")
    if not 0 < len(meta["parts"]) <= MAX_PARTS:
        raise PacketError(f"{len(meta['parts'])} parts")
    parts = tuple(_part(left, f"part/{i}/", rig) for i in range(len(meta["parts"])))
    latents = {name.removeprefix("latents/"): left.pop(name) for name in list(left) if name.startswith("latents/")}
    if any(codes.ndim != 2 or codes.dtype != "<f4" or not np.isfinite(codes).all() for codes in latents.values()):
        raise PacketError("latents are not finite rows of numbers")
    if left:
        raise PacketError(f"unknown array {min(left)}")
    return HumanAsset(parts, latents, rig, meta)


def _part(left: dict[str, Array], at: str, rig: RigArrays | None) -> Part:
    vertices = _take(left, at + "vertices", "<f4", 3)
    faces = _take(left, at + "faces", "<i4", 3)
    uvs = _take(left, at + "uvs", "<f4", 2)
    face_uvs_idx = _take(left, at + "face_uvs_idx", "<i4", 3, len(faces))
    for indices, count in ((faces, len(vertices)), (face_uvs_idx, len(uvs))):
        _in_range(indices, count, at)
    skin_indices = skin_weights = None
    if at + "skin_indices" in left:
        skin_indices = _take(left, at + "skin_indices", "<i4", 4, len(vertices))
        skin_weights = _take(left, at + "skin_weights", "<f4", 4, len(vertices))
        _in_range(skin_indices, 0 if rig is None else len(rig.heads), at)
    return Part(vertices, faces, _take(left, at + "normals", "<f4", 3, len(vertices)), uvs, face_uvs_idx,
                _png(left, at + "base_color.png"), _png(left, at + "normal.png"),
                skin_indices, skin_weights)  # fmt: skip


def _take(left: dict[str, Array], name: str, dtype: str, columns: int | None, rows: int | None = None) -> Array:
    array = left.pop(name)
    if array.dtype != dtype or array.shape[1:] != (() if columns is None else (columns,)) or array.ndim == 0:
        raise PacketError(f"{name} is {array.dtype} {list(array.shape)}")
    if not 0 < len(array) <= MAX_ELEMENTS or (rows is not None and len(array) != rows):
        raise PacketError(f"{name} has {len(array)} rows")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise PacketError(f"{name} holds numbers that are not finite")
    return array


def _in_range(indices: Array, count: int, at: str) -> None:
    if indices.min() < 0 or indices.max() >= count:
        raise PacketError(f"{at} has an index outside 0..{count - 1}")


def _png(left: dict[str, Array], name: str) -> bytes:
    array = left.pop(name)
    data = array.tobytes()
    if array.dtype != "u1" or len(data) < 57 or not data.startswith(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"):
        raise PacketError(f"{name} is not a PNG file")
    width, height = struct.unpack(">II", data[16:24])
    if not (0 < width <= MAX_TEXTURE and 0 < height <= MAX_TEXTURE):
        raise PacketError(f"{name} is {width} x {height} pixels large")
    return data


# ------------------------------------------------------------------------------------------------------- GLB and OBJ


def corners(part: Part) -> tuple[Array, Array, Array]:
    """Vertices split at UV seams, as files with one index per corner need them.

    Returns `vertex` [S] and `uv` [S] (rows of `vertices` and `uvs` for each split vertex) and `faces` [F,3] into them.
    """
    key = part.faces.astype(np.int64) * len(part.uvs) + part.face_uvs_idx
    unique, inverse = np.unique(key.ravel(), return_inverse=True)
    return unique // len(part.uvs), unique % len(part.uvs), inverse.reshape(-1, 3)


def to_glb(asset: HumanAsset) -> bytes:
    """glTF 2.0 in one file: a mesh node per part, PBR material, embedded PNGs, a skin when there is a rig.

    Tangents are given, because the normal map depends on them and readers without MikkTSpace would guess.
    """
    glb = _Glb()
    roots: list[int] = []
    skin = None
    if asset.rig is not None:
        skin = {"name": "Skeleton", "joints": [], "inverseBindMatrices": 0}
        first = len(glb.nodes) + 1
        parents = asset.rig.parents.tolist()
        glb.nodes.append({"name": "Skeleton", "children": [first + j for j, p in enumerate(parents) if p < 0]})
        for j, p in enumerate(parents):
            move = asset.rig.heads[j] - (asset.rig.heads[p] if p >= 0 else 0)
            node = {"name": str(asset.meta["bones"][j]), "translation": [float(x) for x in move]}
            children = [first + k for k, q in enumerate(parents) if q == j]
            glb.nodes.append(node | ({"children": children} if children else {}))
            skin["joints"].append(first + j)
        bind = np.tile(np.eye(4, dtype=np.float32), (len(parents), 1, 1))
        bind[:, 3, :3] = -asset.rig.heads  # column-major: the translation is the last row here
        skin["inverseBindMatrices"] = glb.accessor(bind.reshape(-1, 16), "MAT4")
        roots.append(0)
    for i, part in enumerate(asset.parts):
        roots.append(len(glb.nodes))
        glb.add_part(part, asset.part_name(i), skinned=skin is not None and part.skin_indices is not None)
    extra = {"skins": [skin]} if skin else {}
    recipe = asset.meta.get("recipe", {})
    return glb.pack(extra | {"scene": 0, "scenes": [{"name": "Human", "nodes": roots, "extras": {"recipe": recipe}}]})


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

    def add_part(self, part: Part, name: str, skinned: bool) -> None:
        vertex, uv, faces = corners(part)
        vertex_data, indices = 34962, 34963  # GL_ARRAY_BUFFER, GL_ELEMENT_ARRAY_BUFFER
        uvs = part.uvs[uv] * np.array([1, -1], np.float32) + np.array([0, 1], np.float32)  # glTF counts from the top
        normals = _unit(part.normals)[vertex]
        attributes = {
            "POSITION": self.accessor(part.vertices[vertex], "VEC3", vertex_data, bounds=True),
            "NORMAL": self.accessor(normals, "VEC3", vertex_data),
            "TANGENT": self.accessor(
                _tangents(part.vertices[vertex], normals, part.uvs[uv], faces), "VEC4", vertex_data
            ),
            "TEXCOORD_0": self.accessor(uvs.astype(np.float32), "VEC2", vertex_data),
        }
        if skinned:
            joints, weights = _gltf_skin(part)
            attributes["JOINTS_0"] = self.accessor(joints[vertex], "VEC4", vertex_data)
            attributes["WEIGHTS_0"] = self.accessor(weights[vertex], "VEC4", vertex_data)
        material = self._add("materials", {
            "name": name,
            "pbrMetallicRoughness": {"baseColorTexture": self._texture(part.base_color_png, f"{name} base color"),
                                     "metallicFactor": 0.0, "roughnessFactor": ROUGHNESS},
            "normalTexture": self._texture(part.normal_png, f"{name} normal"),
        })  # fmt: skip
        primitive = {"attributes": attributes, "material": material, "mode": 4,
                     "indices": self.accessor(faces.astype("<u4").reshape(-1), "SCALAR", indices)}  # fmt: skip
        mesh = self._add("meshes", {"name": name, "primitives": [primitive]})
        self.nodes.append({"name": name, "mesh": mesh} | ({"skin": 0} if skinned else {}))

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


def to_obj(asset: HumanAsset, folder: Path) -> Path:
    """Write human.obj, human.mtl and the PNGs into `folder` (made if needed). Returns the path of the OBJ."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, materials = ["mtllib human.mtl"], []
    at = np.ones(3, np.int64)  # OBJ counts from 1, through all parts
    for i, part in enumerate(asset.parts):
        name = asset.part_name(i)
        stem = f"{i}_{''.join(c if c.isalnum() else '_' for c in name)}"
        write_file(folder / f"{stem}_base_color.png", part.base_color_png)
        write_file(folder / f"{stem}_normal.png", part.normal_png)
        materials.append(f"newmtl {stem}\nKs 0 0 0\nmap_Kd {stem}_base_color.png\nnorm {stem}_normal.png\n")
        lines += [f"o {stem}", f"usemtl {stem}", "s 1"]
        lines += ["v {:.6f} {:.6f} {:.6f}".format(*row) for row in part.vertices.tolist()]
        lines += ["vt {:.6f} {:.6f}".format(*row) for row in part.uvs.tolist()]
        lines += ["vn {:.4f} {:.4f} {:.4f}".format(*row) for row in part.normals.tolist()]
        corner = np.stack([part.faces, part.face_uvs_idx, part.faces], 2) + at
        lines += ["f {}/{}/{} {}/{}/{} {}/{}/{}".format(*row) for row in corner.reshape(-1, 9).tolist()]
        at += [len(part.vertices), len(part.uvs), len(part.vertices)]
    write_file(folder / "human.mtl", "\n".join(materials).encode())
    write_file(folder / "human.obj", ("\n".join(lines) + "\n").encode())
    return folder / "human.obj"
