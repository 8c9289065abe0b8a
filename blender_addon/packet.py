# SPDX-License-Identifier: GPL-3.0-or-later
"""Bytes -> arrays: the add-on's own reader of result packets. numpy only, trusts nothing.

A packet is a safetensors file: 8 bytes header length (little-endian), a JSON header that names dtype, shape and span of
every array, then the raw arrays. `backend/packet.py` writes it and documents the names; the two files share no code.
"""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from .messages import BackendError, inline

SCHEMA: Final = "populace.human/1"
MAX_PACKET_BYTES: Final = 1 << 30
MAX_HEADER_BYTES: Final = 16 << 20
MAX_PARTS: Final = 64
MAX_ROWS: Final = 6_000_000  # of any mesh array
MAX_BONES: Final = 2000
MAX_KEYS: Final = 64
MAX_TEXTURE_PX: Final = 8192
_DTYPES: Final = {"F32": np.dtype("<f4"), "I32": np.dtype("<i4"), "U8": np.dtype("u1")}

Array = np.ndarray[Any, Any]


class PacketError(BackendError):
    """Bytes that are not a packet, or one that lies about itself."""

    def __init__(self, what: str) -> None:
        super().__init__("bad_packet", f"The result is damaged: {what}.", "Generate the person again.")


@dataclass(frozen=True)
class Part:
    """One object of a person. Metres, Y up, facing +Z, feet at y = 0; UV origin bottom-left."""

    name: str
    vertices: Array  # f32 [V, 3]
    faces: Array  # i32 [F, 3], counter-clockwise from outside, every index < V
    normals: Array  # f32 [V, 3]
    uvs: Array  # f32 [U, 2]
    face_uvs_idx: Array  # i32 [F, 3], every index < U
    base_color_png: bytes
    normal_png: bytes | None = None
    orm_png: bytes | None = None  # occlusion, roughness, metallic
    skin_indices: Array | None = None  # i32 [V, 4]
    skin_weights: Array | None = None  # f32 [V, 4], not negative
    lod: int = 0  # level of detail; the whole person is there once per level, 0 is the full one
    shape_keys: Mapping[str, Array] = field(default_factory=dict)  # f32 [V, 3] by name: what is added to `vertices`


@dataclass(frozen=True)
class Rig:
    """Bones in rest pose, parents before children, the roots' parent is -1."""

    names: tuple[str, ...]
    parents: Array  # i32 [J]
    heads: Array  # f32 [J, 3]
    tails: Array  # f32 [J, 3]
    rotations: Array | None = None  # f32 [J, 4] of a posed person: wxyz, parent-relative, in world-aligned axes
    translation: Array | None = None  # f32 [1, 3] of the roots, with the rotations
    key_heads: Mapping[str, Array] = field(default_factory=dict)  # f32 [J, 3] by shape key: what it adds to `heads`
    key_translation: Mapping[str, Array] = field(default_factory=dict)  # f32 [3]: what it adds to `translation`

    def at_key(self, name: str) -> Rig:
        """The rig of the person at one shape key, as far as the packet says; for skinning, so tails stay behind."""
        moved = replace(self, heads=self.heads + self.key_heads[name]) if name in self.key_heads else self
        if self.translation is None or name not in self.key_translation:
            return moved
        return replace(moved, translation=self.translation + self.key_translation[name])


@dataclass(frozen=True)
class Human:
    """A whole packet, checked: every array has its type, its shape, finite numbers and indices in range."""

    parts: tuple[Part, ...]
    rig: Rig | None
    latents: Mapping[str, Array]  # name -> f32 [L, C]
    asset: Mapping[str, Any]  # the backend's description: "recipe", "attributes", "stats", ...
    thumbnail_png: bytes | None = None  # a small square picture; older generators send none
    maps: Mapping[str, bytes] = field(default_factory=dict)  # "PART/photo": what photos showed of parts, RGBA PNGs

    @property
    def recipe(self) -> dict[str, Any]:
        """All that is needed to make this person again, ready for JSON: the backend's recipe and the exact latents."""
        codes = {name: {"shape": list(a.shape), "f32": base64.b64encode(a.astype("<f4").tobytes()).decode()}
                 for name, a in self.latents.items()}  # fmt: skip
        recipe = self.asset.get("recipe")
        maps = {"latent_maps": {name: inline(png) for name, png in self.maps.items()}} if self.maps else {}
        return {**(recipe if isinstance(recipe, dict) else {}), "latents": codes, **maps}

    @property
    def height_m(self) -> float:
        """Measured from the soles to the top of the head or hair, in rest pose."""
        full = [part.vertices[:, 1] for part in self.parts if part.lod == 0]
        return float(max(y.max() for y in full) - min(y.min() for y in full))


def recipe_latents(recipe: Mapping[str, Any]) -> dict[str, list[list[float]]]:
    """Latents of a stored recipe as a request wants them. Raises ValueError or KeyError on a recipe that was edited."""
    found = {}
    for name, code in recipe.get("latents", {}).items():
        rows, columns = code["shape"]
        found[name] = np.frombuffer(base64.b64decode(code["f32"]), "<f4").reshape(rows, columns).tolist()
    return found


def read(data: bytes | bytearray | memoryview) -> Human:
    """Raises `PacketError`, whatever the bytes are. The arrays are read-only views into `data` where aligned."""
    try:
        arrays, metadata = read_arrays(data)
        return _human(arrays, metadata)
    except PacketError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise PacketError(f"{type(error).__name__} {error.args[0] if error.args else ''}".strip()[:200]) from None


def read_arrays(data: bytes | bytearray | memoryview) -> tuple[dict[str, Array], dict[str, str]]:
    """The named arrays and the metadata of a safetensors file. Raises `PacketError`."""
    view = memoryview(data).cast("B") if len(data) else memoryview(b"")
    if not 8 <= len(view) <= MAX_PACKET_BYTES:
        raise PacketError(f"it is {len(view)} bytes long")
    (header_bytes,) = struct.unpack_from("<Q", view)
    if header_bytes > min(MAX_HEADER_BYTES, len(view) - 8):
        raise PacketError(f"it claims a header of {header_bytes} bytes")
    header = json.loads(bytes(view[8 : 8 + header_bytes]), object_pairs_hook=_no_duplicates,
                        parse_constant=_refuse_constant)  # fmt: skip
    if not isinstance(header, dict):
        raise PacketError("its header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise PacketError("its metadata are not strings")
    body = view[8 + header_bytes :]
    spans, arrays = [], {}
    for name, entry in header.items():
        dtype, shape = _DTYPES.get(entry["dtype"]), entry["shape"]
        begin, end = entry["data_offsets"]
        if dtype is None or not isinstance(shape, list) or len(shape) > 4:
            raise PacketError(f"{name[:60]} has an unknown type or shape")
        if not all(type(n) is int and 0 <= n <= len(body) for n in (*shape, begin, end)) or begin > end:
            raise PacketError(f"{name[:60]} lies outside the file")
        if math.prod(shape) * dtype.itemsize != end - begin:
            raise PacketError(f"{name[:60]} does not fill its span")
        spans.append((begin, end))
        array = np.frombuffer(body[begin:end], dtype).reshape(shape)
        arrays[name] = array if array.flags.aligned else array.copy()
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise PacketError("its arrays overlap or leave holes")
        position = end
    if position != len(body):
        raise PacketError("bytes are left over")
    return arrays, metadata


def _human(arrays: dict[str, Array], metadata: dict[str, str]) -> Human:
    if metadata.get("schema") != SCHEMA:
        raise PacketError(f"its schema is {str(metadata.get('schema'))[:60]!r}, this add-on reads {SCHEMA!r}")
    asset = json.loads(metadata["asset"], parse_constant=_refuse_constant)
    names = [part["name"] for part in asset["parts"]]
    if not 1 <= len(names) <= MAX_PARTS:
        raise PacketError(f"it has {len(names)} parts")
    rig = _rig(arrays, asset) if "rig/heads" in arrays else None
    lods = [part.get("lod", 0) for part in asset["parts"]]
    if not all(type(lod) is int and 0 <= lod < MAX_PARTS for lod in lods) or 0 not in lods:
        raise PacketError("its levels of detail are not numbers from 0 on")
    keys = asset.get("shape_keys", [])
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(keys) > MAX_KEYS:
        raise PacketError("its shape keys have no names")
    if len(set(keys)) != len(keys) or not all(0 < len(key.encode()) <= 63 for key in keys):
        raise PacketError("its shape keys have no proper names")
    rig = _key_joints(arrays, rig, keys) if rig is not None and "rig/key_heads" in arrays else rig
    parts = tuple(_part(arrays, i, name, lod, rig, keys) for i, (name, lod) in enumerate(zip(names, lods)))
    latents = {name.removeprefix("latents/"): _checked(arrays, name, "<f4", (None, None))
               for name in list(arrays) if name.startswith("latents/")}  # fmt: skip
    thumbnail = _png(arrays, "thumbnail.png") if "thumbnail.png" in arrays else None
    maps = {name: _png(arrays, f"maps/{name}.png") for name in _map_names(arrays, latents)}
    if arrays:
        raise PacketError(f"it holds an unknown array {min(arrays)[:60]!r}")
    return Human(parts, rig, latents, asset, thumbnail, maps)


def _map_names(arrays: dict[str, Array], latents: Mapping[str, Array]) -> list[str]:
    """Of what photos showed: PART/photo, of parts that the person has."""
    names = [name[5:-4] for name in arrays if name.startswith("maps/") and name.endswith(".png")]
    parts = {name.partition("/")[0] for name in latents}
    for name in names:
        part, _, kind = name.partition("/")
        if kind != "photo" or part not in parts:
            raise PacketError(f"it holds a map {name[:60]!r} of no part")
    return names


def _part(arrays: dict[str, Array], i: int, name: str, lod: int, rig: Rig | None, keys: list[str]) -> Part:
    at = f"part/{i}/"
    vertices = _checked(arrays, at + "vertices", "<f4", (None, 3))
    faces = _checked(arrays, at + "faces", "<i4", (None, 3), below=len(vertices))
    uvs = _checked(arrays, at + "uvs", "<f4", (None, 2))
    skin_indices = skin_weights = None
    if at + "skin_indices" in arrays:
        if rig is None:
            raise PacketError(f"{at} has skin weights but there is no rig")
        skin_indices = _checked(arrays, at + "skin_indices", "<i4", (len(vertices), 4), below=len(rig.names))
        skin_weights = _checked(arrays, at + "skin_weights", "<f4", (len(vertices), 4))
        if skin_weights.min() < 0:
            raise PacketError(f"{at} has negative skin weights")
    normal, orm = (_png(arrays, at + png) if at + png in arrays else None for png in ("normal.png", "orm.png"))
    moves = _checked(arrays, at + "shape_keys", "<f4", (len(keys), len(vertices), 3)) if keys else ()
    return Part(
        str(name)[:60], vertices, faces, _checked(arrays, at + "normals", "<f4", (len(vertices), 3)), uvs,
        _checked(arrays, at + "face_uvs_idx", "<i4", (len(faces), 3), below=len(uvs)),
        _png(arrays, at + "base_color.png"), normal, orm, skin_indices, skin_weights, lod, dict(zip(keys, moves)),
    )  # fmt: skip


def _rig(arrays: dict[str, Array], asset: Mapping[str, Any]) -> Rig:
    names = tuple(str(name) for name in asset["bones"])
    if not 1 <= len(names) <= MAX_BONES or len(set(names)) != len(names):
        raise PacketError("its bones have no proper names")
    if not all(0 < len(name.encode()) <= 63 for name in names):  # Blender's limit for names
        raise PacketError("a bone's name is empty or longer than 63 bytes")
    rig = Rig(names, _checked(arrays, "rig/parents", "<i4", (len(names),)),
              _checked(arrays, "rig/heads", "<f4", (len(names), 3)),
              _checked(arrays, "rig/tails", "<f4", (len(names), 3)))  # fmt: skip
    if (rig.parents >= np.arange(len(names))).any() or rig.parents.min() < -1:
        raise PacketError("its bones are not in order")
    if "rig/rotations" not in arrays:
        return rig
    rotations = _checked(arrays, "rig/rotations", "<f4", (len(names), 4))
    if (np.abs(np.linalg.norm(rotations, axis=1) - 1) > 1e-3).any():
        raise PacketError("its bones' rotations are none")
    return replace(rig, rotations=rotations, translation=_checked(arrays, "rig/translation", "<f4", (1, 3)))


def _key_joints(arrays: dict[str, Array], rig: Rig, keys: list[str]) -> Rig:
    heads = _checked(arrays, "rig/key_heads", "<f4", (len(keys), len(rig.names), 3))
    moved = replace(rig, key_heads=dict(zip(keys, heads)))
    if rig.rotations is None or "rig/key_translation" not in arrays:
        return moved
    lifts = _checked(arrays, "rig/key_translation", "<f4", (len(keys), 3))
    return replace(moved, key_translation=dict(zip(keys, lifts)))


def _checked(arrays: dict[str, Array], name: str, dtype: str, shape: tuple[int | None, ...],
             below: int | None = None) -> Array:  # fmt: skip
    """Take an array out of `arrays`: of this dtype and shape, finite, its indices in 0..below-1."""
    array = arrays.pop(name)
    fits = array.ndim == len(shape) and all(n is None or n == m for n, m in zip(shape, array.shape))
    if array.dtype != np.dtype(dtype) or not fits or not 1 <= len(array) <= MAX_ROWS or array.size == 0:
        raise PacketError(f"{name} is {array.dtype} {list(array.shape)}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise PacketError(f"{name} holds numbers that are not finite")
    if below is not None and (array.min() < 0 or array.max() >= below):
        raise PacketError(f"{name} points outside 0..{below - 1}")
    return array


def _png(arrays: dict[str, Array], name: str) -> bytes:
    """PNG bytes whose header is sound; decoding is left to Blender, after the size is known to be harmless."""
    array = arrays.pop(name)
    data = array.tobytes()
    if array.dtype != np.dtype("u1") or not data.startswith(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR") or len(data) < 57:
        raise PacketError(f"{name} is not a PNG image")
    width, height = struct.unpack_from(">II", data, 16)
    if not (1 <= width <= MAX_TEXTURE_PX and 1 <= height <= MAX_TEXTURE_PX):
        raise PacketError(f"{name} is {width} x {height} pixels")
    return data


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise PacketError("a name appears twice")
    return found


def _refuse_constant(name: str) -> float:
    raise PacketError(f"it holds the number {name}")
