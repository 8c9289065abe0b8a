# SPDX-License-Identifier: GPL-3.0-or-later
"""One human as a file: named arrays <-> a safetensors packet, GLB, OBJ. numpy only, so the server can convert too.

The packet is a safetensors file (8 bytes header length, JSON header, raw little-endian sections):

    part/<i>/vertices       f32 [V,3]  metres, Y up, facing +Z, feet at y = 0
    part/<i>/faces          i32 [F,3]  counter-clockwise from outside
    part/<i>/normals        f32 [V,3]
    part/<i>/uvs            f32 [U,2]  origin bottom-left
    part/<i>/face_uvs_idx   i32 [F,3]
    part/<i>/base_color.png u8  [n]    sRGB, a PNG file's bytes
    part/<i>/normal.png     u8  [n]    tangent space, OpenGL convention (+Y up); may be absent
    part/<i>/orm.png        u8  [n]    occlusion (255: none), roughness, metallic, as glTF has them; may be absent
    part/<i>/shape_keys     f32 [K,V,3] what each shape key adds to `vertices`; in every part or in none
    part/<i>/skin_indices   i32 [V,4]  with a rig only; so are skin_weights f32 [V,4]
    rig/heads, rig/tails    f32 [J,3];  rig/parents i32 [J], parents first, the root's is -1
    rig/rotations           f32 [J,4]  only of a posed person: unit quaternions wxyz, see `poses`; with them
    rig/translation         f32 [1,3]  of the roots. The mesh itself is in rest pose all the same.
    rig/key_heads           f32 [K,J,3] what each shape key adds to `heads`; with shape keys only, may be absent
    rig/key_translation     f32 [K,3]  what each adds to `translation`, so that the posed person stands on y = 0
    latents/<name>          f32 [L,C]
    maps/<part>/photo.png   u8  [n]    what photos showed of a part, RGBA, in the family's own layout; belongs to the
                                       part's latents
    thumbnail.png           u8  [n]    the person in a small picture; older packets have none

`__metadata__` holds "schema" and "asset": JSON with "parts" (one object per part, with its "name" and, of a coarser
level of detail, "lod": 1, 2, ...; the whole person is there once per level), "bones" (names in
the order of the rig), "shape_keys" (their K names, if there are any), "attributes", "recipe" and "stats". Nothing in a
packet depends on time or machine, so the same request gives the same bytes. The add-on has its own reader;
tests/contract holds the file that both must read alike.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from backend.exports import corners, to_glb, to_obj
from backend.poses import REST, Bones, place, skin
from backend.protocol import PopulaceError
from backend.tensors import dump_tensors, load_tensors, write_file

SCHEMA = "populace.human/1"
MAX_FILE_BYTES = 4 << 30
MAX_PARTS = 64
MAX_KEYS = 64
MAX_ELEMENTS = 6_000_000  # rows of any one mesh array
MAX_TEXTURE = 8192

Array = np.ndarray[Any, Any]

__all__ = ["HumanAsset", "PacketError", "Part", "RigArrays", "corners", "dump_tensors", "dumps", "load_tensors",
           "loads", "read", "to_glb", "to_obj", "write", "write_file"]  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One object to insert. Arrays as in the packet; the maps are PNG bytes."""

    vertices: Array
    faces: Array
    normals: Array
    uvs: Array
    face_uvs_idx: Array
    base_color_png: bytes
    normal_png: bytes | None = None
    orm_png: bytes | None = None
    skin_indices: Array | None = None
    skin_weights: Array | None = None
    shape_keys: Array | None = None


@dataclass(frozen=True)
class RigArrays:
    heads: Array
    tails: Array
    parents: Array
    rotations: Array | None = None  # both or none
    translation: Array | None = None
    key_heads: Array | None = None
    key_translation: Array | None = None  # with the rotations and key_heads

    def at_key(self, k: int) -> RigArrays:
        """The rig of the person at one shape key."""
        if self.key_heads is None:
            return self
        moved = replace(self, heads=self.heads + self.key_heads[k], tails=self.tails + self.key_heads[k])
        if self.translation is None or self.key_translation is None:
            return moved
        return replace(moved, translation=self.translation + self.key_translation[k])


@dataclass(frozen=True)
class HumanAsset:
    """A whole person. `meta` is the packet's "asset" JSON: names of parts and bones are there."""

    parts: tuple[Part, ...]
    latents: Mapping[str, Array]
    rig: RigArrays | None
    meta: Mapping[str, Any]
    thumbnail_png: bytes | None = None
    maps: Mapping[str, bytes] = field(default_factory=dict)  # "PART/photo": PNG bytes

    def part_name(self, i: int) -> str:
        return str(self.meta["parts"][i]["name"])

    @property
    def shape_keys(self) -> list[str]:
        """Names in the order of the parts' arrays."""
        return list(self.meta.get("shape_keys", ()))

    def lod(self, i: int) -> int:
        """Level of detail of part `i`; 0 is the full one."""
        return int(self.meta["parts"][i].get("lod", 0))

    def at_lod(self, lod: int) -> list[int]:
        """The parts that make up the person at one level of detail. Raises `invalid_request` if there are none."""
        found = [i for i in range(len(self.parts)) if self.lod(i) == lod]
        if not found:
            levels = max(map(self.lod, range(len(self.parts)))) + 1
            raise PopulaceError("invalid_request",
                                f"This person has {levels} levels of detail, but none numbered {lod}.",
                                f"Ask for one of 0 to {levels - 1}, or generate with more LODs.")  # fmt: skip
        return found

    @property
    def skeleton(self) -> Bones | None:
        """The rig with the names of its bones."""
        if self.rig is None:
            return None
        return Bones(tuple(self.meta["bones"]), self.rig.parents, self.rig.heads, self.rig.tails)

    def in_pose(self, name: str, own: Mapping[str, Sequence[float]] | None = None) -> HumanAsset:
        """The same person in a pose of `poses.pose_names()`, standing on y = 0; rotations of one's `own` (wxyz by bone)
        go over it. Raises `invalid_request`."""
        if self.rig is None or self.skeleton is None:
            if name == REST and not own:
                return self
            raise PopulaceError("invalid_request", "This person has no skeleton and cannot be posed.",
                                'Ask for the pose "rest".')  # fmt: skip
        rotations, translation = place(name, self.skeleton, [self.parts[i] for i in self.at_lod(0)], own)
        if name == REST and not own:
            return replace(self, rig=replace(self.rig, rotations=None, translation=None, key_translation=None))
        posed = replace(self.rig, rotations=rotations, translation=translation)
        return replace(self, rig=replace(posed, key_translation=self._lifts(posed)))

    def _lifts(self, rig: RigArrays) -> Array | None:
        """How far each shape key lifts a person in this pose so that the soles stay on the floor, f32 [K, 3]."""
        if rig.key_heads is None:
            return None
        lifts = np.zeros((len(rig.key_heads), 3), np.float32)
        skinned = [p for p in (self.parts[i] for i in self.at_lod(0)) if p.skin_indices is not None]
        for k in range(len(lifts)):
            pose = (rig.at_key(k), rig.rotations, rig.translation)
            moved = [(p.vertices + p.shape_keys[k], p) for p in skinned if p.shape_keys is not None]
            lows = [skin(points, p.skin_indices, p.skin_weights, *pose)[:, 1].min() for points, p in moved]
            lifts[k, 1] = -min(lows, default=0.0)
        return lifts


class PacketError(PopulaceError):
    """Bytes that are not a packet of ours, or one that lies about itself."""

    def __init__(self, what: str) -> None:
        super().__init__("internal_error", f"The result packet is damaged: {what}.", "Generate the person again.")


# ------------------------------------------------------------------------------------------------------- the packet


def dumps(asset: HumanAsset) -> bytes:
    """The packet's bytes. Equal assets give equal bytes."""
    tensors: dict[str, Array] = {}
    for i, part in enumerate(asset.parts):
        arrays = {"vertices": part.vertices, "faces": part.faces, "normals": part.normals, "uvs": part.uvs,
                  "face_uvs_idx": part.face_uvs_idx, "skin_indices": part.skin_indices,
                  "skin_weights": part.skin_weights, "shape_keys": part.shape_keys}  # fmt: skip
        pngs = {"base_color.png": part.base_color_png, "normal.png": part.normal_png, "orm.png": part.orm_png}
        arrays |= {name: np.frombuffer(png, np.uint8) for name, png in pngs.items() if png is not None}
        tensors |= {f"part/{i}/{name}": array for name, array in arrays.items() if array is not None}
    if asset.rig is not None:
        tensors |= {"rig/heads": asset.rig.heads, "rig/tails": asset.rig.tails, "rig/parents": asset.rig.parents}
        pose = {"rig/rotations": asset.rig.rotations, "rig/translation": asset.rig.translation,
                "rig/key_heads": asset.rig.key_heads, "rig/key_translation": asset.rig.key_translation}  # fmt: skip
        tensors |= {name: array for name, array in pose.items() if array is not None}
    tensors |= {f"latents/{name}": codes for name, codes in asset.latents.items()}
    tensors |= {f"maps/{name}.png": np.frombuffer(png, np.uint8) for name, png in asset.maps.items()}
    if asset.thumbnail_png is not None:
        tensors["thumbnail.png"] = np.frombuffer(asset.thumbnail_png, np.uint8)
    meta = json.dumps(asset.meta, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return b"".join(dump_tensors(tensors, {"schema": SCHEMA, "asset": meta}))


def loads(data: bytes | memoryview) -> HumanAsset:
    """Raises `PacketError` unless every array is there, of the right type and shape, and every index is in range."""
    try:
        tensors, metadata = load_tensors(data)
        return _asset(tensors, metadata)
    except PacketError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PacketError(f"{error.args[0] if error.args else error} ({type(error).__name__})") from None


def write(path: Path, asset: HumanAsset) -> int:
    """Write the packet so that it exists whole or not at all. Returns its size in bytes."""
    data = dumps(asset)
    write_file(path, data)
    return len(data)


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
    lods = [p.get("lod", 0) for p in meta["parts"]]
    if not all(type(lod) is int and 0 <= lod < MAX_PARTS for lod in lods) or 0 not in lods:
        raise PacketError("its levels of detail are not numbers from 0 on")
    left = dict(tensors)
    rig = None
    if "rig/heads" in left:
        heads = _take(left, "rig/heads", "<f4", 3)
        rig = RigArrays(heads, _take(left, "rig/tails", "<f4", 3, len(heads)),
                        _take(left, "rig/parents", "<i4", None, len(heads)))  # fmt: skip
        if len(meta["bones"]) != len(heads) or (rig.parents >= np.arange(len(heads))).any() or rig.parents.min() < -1:
            raise PacketError("bones are not listed parents first")
        if "rig/rotations" in left:
            rotations = _take(left, "rig/rotations", "<f4", 4, len(heads))
            if (np.abs(np.linalg.norm(rotations, axis=1) - 1) > 1e-3).any():
                raise PacketError("rig/rotations are not rotations")
            rig = replace(rig, rotations=rotations, translation=_take(left, "rig/translation", "<f4", 3, 1))
    if not 0 < len(meta["parts"]) <= MAX_PARTS:
        raise PacketError(f"{len(meta['parts'])} parts")
    keys = meta.get("shape_keys", [])
    if rig is not None and "rig/key_heads" in left:
        rig = replace(rig, key_heads=_take(left, "rig/key_heads", "<f4", (len(rig.heads), 3), len(keys)))
        if rig.rotations is not None and "rig/key_translation" in left:
            rig = replace(rig, key_translation=_take(left, "rig/key_translation", "<f4", 3, len(keys)))
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(keys) > MAX_KEYS:
        raise PacketError("its shape keys have no names")
    if len(set(keys)) < len(keys):
        raise PacketError("two shape keys have one name")
    parts = tuple(_part(left, f"part/{i}/", rig, len(keys)) for i in range(len(meta["parts"])))
    latents = {name.removeprefix("latents/"): left.pop(name) for name in list(left) if name.startswith("latents/")}
    if any(codes.ndim != 2 or codes.dtype != "<f4" or not np.isfinite(codes).all() for codes in latents.values()):
        raise PacketError("latents are not finite rows of numbers")
    thumbnail = _png(left, "thumbnail.png") if "thumbnail.png" in left else None
    shown = {f"maps/{part}/photo.png": f"{part}/photo" for part in {name.partition("/")[0] for name in latents}}
    maps = {shown[name]: _png(left, name) for name in sorted(shown.keys() & left.keys())}
    if left:
        raise PacketError(f"unknown array {min(left)}")
    return HumanAsset(parts, latents, rig, meta, thumbnail, maps)


def _part(left: dict[str, Array], at: str, rig: RigArrays | None, keys: int) -> Part:
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
    maps = {name: _png(left, f"{at}{name}.png") for name in ("base_color", "normal", "orm")
            if name == "base_color" or f"{at}{name}.png" in left}  # fmt: skip
    offsets = None
    if keys:
        offsets = _take(left, at + "shape_keys", "<f4", (len(vertices), 3), keys)
    return Part(vertices, faces, _take(left, at + "normals", "<f4", 3, len(vertices)), uvs, face_uvs_idx,
                maps["base_color"], maps.get("normal"), maps.get("orm"), skin_indices, skin_weights,
                offsets)  # fmt: skip


def _take(
    left: dict[str, Array], name: str, dtype: str, columns: int | tuple[int, ...] | None, rows: int | None = None
) -> Array:
    """Take an array of `rows` (any number but 0, if None) out of `left`; each row has the shape `columns`."""
    array = left.pop(name)
    row = () if columns is None else columns if isinstance(columns, tuple) else (columns,)
    if array.dtype != dtype or array.ndim == 0 or array.shape[1:] != row:
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
