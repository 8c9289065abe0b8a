# SPDX-License-Identifier: GPL-3.0-or-later
"""The people that the files tests/contract/*.safetensors hold: one in rest pose, one posed with two levels of detail.
`python -m tests.contract.golden` writes the files anew, which is right only together with a change on both
sides and, when a version that reads the old ones was released, a new schema name."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from backend.packet import HumanAsset, Part, RigArrays, dumps

PATH = Path(__file__).with_name("golden.safetensors")
POSED_PATH = Path(__file__).with_name("posed.safetensors")


def png(width: int, height: int, rgb: tuple[int, int, int]) -> bytes:
    """A PNG of one colour whose bytes depend on no compressor."""
    rows = (b"\0" + bytes(rgb) * width) * height
    stored = b"\x78\x01\x01" + struct.pack("<HH", len(rows), len(rows) ^ 0xFFFF) + rows
    stored += struct.pack(">I", zlib.adler32(rows))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", stored) + chunk(b"IEND", b"")


def tetrahedron(at: tuple[float, float, float], rigged: bool) -> Part:
    """A closed tetrahedron with a corner at `at`; two of its corners share a UV seam."""
    vertices = np.array([(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)], np.float32) + np.float32(at)
    faces = np.array([(0, 2, 1), (0, 1, 3), (0, 3, 2), (1, 2, 3)], np.int32)
    normals = np.array([(-1, -1, -1), (1, 0, 0), (0, 1, 0), (0, 0, 1)], np.float32)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    uvs = np.array([(0.5, 0.25), (0.25, 0.5), (0.75, 0.5), (0.5, 0.75), (0.125, 0.125), (0.875, 0.875)], np.float32)
    bones = np.array([(0, 0, 0, 0), (0, 1, 0, 0), (1, 0, 0, 0), (1, 1, 0, 0)], np.int32)
    weights = np.array([(1, 0, 0, 0), (0.5, 0.5, 0, 0), (1, 0, 0, 0), (0.25, 0.5, 0.25, 0)], np.float32)
    return Part(
        vertices, faces, normals, uvs, np.array([(0, 2, 1), (0, 1, 3), (4, 3, 2), (1, 2, 5)], np.int32),
        png(4, 2, (200, 150, 120)), png(2, 2, (128, 128, 255)), png(2, 2, (255, 128, 0)),
        *((bones, weights) if rigged else ()), shape_keys=np.stack([-0.25 * vertices, 0.5 * vertices]),
    )  # fmt: skip


def asset() -> HumanAsset:
    facts = {"faces": 4, "vertices": 4, "closed": True, "components": 1}
    rig = RigArrays(np.float32([(0, 0, 0), (0, 0.5, 0)]), np.float32([(0, 0.5, 0), (0, 1, 0)]), np.int32([-1, 0]))
    meta = {
        "parts": [{"name": "human", **facts}, {"name": "hät", **facts}],
        "bones": ["root", "head"],
        "shape_keys": ["height_m_min", "height_m_max"],
        "attributes": {"height_m": 1.0},
        "recipe": {"family": "capsule", "seed": 7, "version": "0.1.0", "weights_sha256": None},
        "stats": {"faces": 8, "closed": True},
    }
    latents = {"body/shape": np.float32([[0.5, -1.25]]), "body/tex": np.float32([[1, 2, 3], [4, 5, 6]])}
    return HumanAsset((tetrahedron((0, 0, 0), True), tetrahedron((0, 1, 0), False)), latents, rig, meta)


def posed_asset() -> HumanAsset:
    """The head nods by 90 degrees (about +x) and looks to the left (then about +y), everything stands 0.25 m higher;
    shape keys move the joints; a second level of detail has one part with nothing but a colour map. A photo showed the
    body."""
    made = asset()
    assert made.rig is not None
    rig = replace(made.rig, rotations=np.float32([(1, 0, 0, 0), (0.5, 0.5, 0.5, -0.5)]),
                  translation=np.float32([(0, 0.25, 0)]), key_translation=np.float32([(0, -0.0625, 0), (0, 0.125, 0)]),
                  key_heads=np.float32([[(0, 0, 0), (0, -0.125, 0)], [(0, 0, 0), (0, 0.25, 0)]]))  # fmt: skip
    facts = {"faces": 4, "vertices": 4, "closed": True, "components": 1, "lod": 1}
    meta = {**made.meta, "parts": [*made.meta["parts"], {"name": "human_LOD1", **facts}]}
    coarse = replace(tetrahedron((0, 0, 0), True), normal_png=None, orm_png=None)
    return replace(made, parts=(*made.parts, coarse), rig=rig, meta=meta, maps={"body/photo": png(3, 3, (7, 8, 9))})


if __name__ == "__main__":
    PATH.write_bytes(dumps(asset()))
    POSED_PATH.write_bytes(dumps(posed_asset()))
