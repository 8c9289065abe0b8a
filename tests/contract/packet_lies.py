# SPDX-License-Identifier: GPL-3.0-or-later
"""Damaged and lying packets that both readers must refuse."""

from __future__ import annotations

import json
import struct

import numpy as np

from backend import packet
from tests.contract import golden

GOLDEN = golden.PATH.read_bytes()
POSED = golden.POSED_PATH.read_bytes()


def rebuilt(source: bytes = GOLDEN, /, **changes: object) -> bytes:
    """The golden packet with some arrays replaced (None: dropped), honestly framed."""
    tensors, metadata = packet.load_tensors(source)
    for name, array in changes.items():
        name = name.replace("__", "/").replace("_png", ".png")
        if array is None:
            del tensors[name]
        else:
            tensors[name] = array
    return b"".join(packet.dump_tensors(tensors, metadata))


def with_header(edit) -> bytes:
    """The golden packet with its JSON header edited and everything else kept."""
    (size,) = struct.unpack_from("<Q", GOLDEN)
    header = json.loads(GOLDEN[8 : 8 + size])
    edit(header)
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + GOLDEN[8 + size :]


def with_asset(**changes: object) -> bytes:
    """The golden packet with another description."""
    asset = {**golden.asset().meta, **changes}
    return with_header(lambda header: header["__metadata__"].update(asset=json.dumps(asset)))


def with_lods(*lods: object) -> bytes:
    """The golden packet whose two parts claim these levels of detail."""
    return with_asset(parts=[{"name": f"p{i}", "lod": lod} for i, lod in enumerate(lods)])


def set_offsets(name: str, begin: int, end: int):
    return lambda header: header[name].update(data_offsets=[begin, end])


LIES = {
    "empty": b"",
    "seven bytes": GOLDEN[:7],
    "header of 2^60 bytes": struct.pack("<Q", 1 << 60) + GOLDEN[8:],
    "header longer than the file": struct.pack("<Q", len(GOLDEN)) + GOLDEN[8:],
    "deep header": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "not UTF-8": struct.pack("<Q", 4) + b"\xff\xfe\xff\xfe",
    "a list": struct.pack("<Q", 2) + b"[]",
    "name twice": struct.pack("<Q", 15) + b'{"a":{},"a":{}}',
    "truncated": GOLDEN[:-1],
    "one byte more": GOLDEN + b"\0",
    "overlap": with_header(set_offsets("part/1/faces", 0, 48)),
    "outside": with_header(set_offsets("part/1/faces", 1 << 40, (1 << 40) + 48)),
    "negative": with_header(set_offsets("part/1/faces", -48, 0)),
    "backwards": with_header(set_offsets("part/1/faces", 48, 0)),
    "shape and span differ": with_header(lambda h: h["part/0/faces"].update(shape=[5, 3])),
    "shape overflows": with_header(lambda h: h["part/0/faces"].update(shape=[1 << 40, 1 << 40])),
    "shape with true": with_header(lambda h: h["part/0/faces"].update(shape=[True, 12])),
    "unknown dtype": with_header(lambda h: h["part/0/faces"].update(dtype="I128")),
    "dtype is a list": with_header(lambda h: h["part/0/faces"].update(dtype=["F32"])),
    "other schema": with_header(lambda h: h["__metadata__"].update(schema="populace.human/9")),
    "no asset": with_header(lambda h: h["__metadata__"].pop("asset")),
    "asset is not JSON": with_header(lambda h: h["__metadata__"].update(asset="{")),
    "asset has no parts": with_header(lambda h: h["__metadata__"].update(asset='{"parts": [], "bones": ["a", "b"]}')),
    "joints of a key missing": rebuilt(POSED, rig__key_heads=np.zeros((1, 2, 3), np.float32)),
    "joints of another rig": rebuilt(POSED, rig__key_heads=np.zeros((2, 3, 3), np.float32)),
    "joints are not numbers": rebuilt(POSED, rig__key_heads=np.full((2, 2, 3), np.nan, np.float32)),
    "lifts without a pose": rebuilt(POSED, rig__rotations=None, rig__translation=None),
    "lifts without joints": rebuilt(POSED, rig__key_heads=None),
    "vertices missing": rebuilt(part__0__vertices=None),
    "texture missing": rebuilt(part__0__base_color_png=None),
    "ORM map is text": rebuilt(part__0__orm_png=np.frombuffer(b"hello" * 20, np.uint8)),
    "shape keys missing": rebuilt(part__1__shape_keys=None),
    "three shape keys": rebuilt(part__0__shape_keys=np.zeros((3, 4, 3), np.float32)),
    "shape keys of other vertices": rebuilt(part__0__shape_keys=np.zeros((2, 5, 3), np.float32)),
    "shape key NaN": rebuilt(part__0__shape_keys=np.full((2, 4, 3), np.nan, np.float32)),
    "shape keys without names": with_asset(shape_keys=None),
    "shape keys are numbers": with_asset(shape_keys=[1, 2]),
    "one shape key twice": with_asset(shape_keys=["a", "a"]),
    "too many shape keys": with_asset(shape_keys=[f"a{i}" for i in range(65)]),
    "a third part's array": rebuilt(part__2__uvs=np.zeros((3, 2), np.float32)),
    "no faces": rebuilt(part__0__faces=np.zeros((0, 3), np.int32)),
    "index too high": rebuilt(part__0__faces=np.full((4, 3), 4, np.int32)),
    "index negative": rebuilt(part__0__face_uvs_idx=np.full((4, 3), -1, np.int32)),
    "faces are floats": rebuilt(part__0__faces=np.zeros((4, 3), np.float32)),
    "four columns": rebuilt(part__0__vertices=np.zeros((4, 4), np.float32)),
    "NaN vertex": rebuilt(part__0__vertices=np.full((4, 3), np.nan, np.float32)),
    "rows differ": rebuilt(part__0__normals=np.zeros((5, 3), np.float32)),
    "bone out of range": rebuilt(part__0__skin_indices=np.full((4, 4), 2, np.int32)),
    "skin without a rig": rebuilt(rig__heads=None, rig__tails=None, rig__parents=None),
    "bones in a circle": rebuilt(rig__parents=np.array([1, 0], np.int32)),
    "rotations of length 2": rebuilt(POSED, rig__rotations=np.full((2, 4), 1, np.float32)),
    "rotations of length 0": rebuilt(POSED, rig__rotations=np.zeros((2, 4), np.float32)),
    "rotations NaN": rebuilt(POSED, rig__rotations=np.full((2, 4), np.nan, np.float32)),
    "rotation missing": rebuilt(POSED, rig__rotations=np.float32([(1, 0, 0, 0)])),
    "rotations without translation": rebuilt(POSED, rig__translation=None),
    "translation without rotations": rebuilt(POSED, rig__rotations=None),
    "two translations": rebuilt(POSED, rig__translation=np.zeros((2, 3), np.float32)),
    "pose without a rig": rebuilt(POSED, rig__heads=None, rig__tails=None, rig__parents=None),
    "no full level of detail": with_lods(1, 1),
    "negative level of detail": with_lods(0, -1),
    "level of detail is text": with_lods(0, "1"),
    "level of detail is true": with_lods(0, True),
    "map is text": rebuilt(POSED, maps__body__photo_png=np.frombuffer(b"hello" * 20, np.uint8)),
    "map of another part": rebuilt(POSED, maps__hat__photo_png=np.frombuffer(golden.png(4, 2, (1, 2, 3)), np.uint8)),
    "map of another kind": rebuilt(POSED, maps__body__depth_png=np.frombuffer(golden.png(4, 2, (1, 2, 3)), np.uint8)),
    "map without end": rebuilt(POSED, maps__body__photo=np.frombuffer(golden.png(4, 2, (1, 2, 3)), np.uint8)),
    "latents NaN": rebuilt(latents__body__shape=np.full((1, 2), np.nan, np.float32)),
    "PNG is text": rebuilt(part__0__base_color_png=np.frombuffer(b"hello" * 20, np.uint8)),
    "PNG bomb": rebuilt(
        part__0__base_color_png=np.frombuffer(
            GOLDEN_PNG[:16] + struct.pack(">II", 20_000, 20_000) + GOLDEN_PNG[24:], np.uint8
        )
    ) if (GOLDEN_PNG := golden.png(4, 2, (1, 2, 3))) else b"",
}  # fmt: skip
