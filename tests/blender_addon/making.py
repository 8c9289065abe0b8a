# SPDX-License-Identifier: GPL-3.0-or-later
"""Packets made by hand, without the backend: a ball that is a closed, seamed, textured, rigged "person"."""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_NAMES = {"float32": "F32", "int32": "I32", "uint8": "U8"}


def png(size: int, rgb: tuple[int, int, int]) -> bytes:
    rows = (b"\0" + bytes(rgb) * size) * size

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def normals(vertices: Array, faces: Array) -> Array:
    """Unit normals f32 [V, 3]: those of the faces, weighted by their angles at the vertex."""
    total = np.zeros(vertices.shape)
    corners = vertices[faces].astype(np.float64)
    flat = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    for i in range(3):
        a, b = (corners[:, (i + k) % 3] - corners[:, i] for k in (1, 2))
        cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
        np.add.at(total, faces[:, i], np.arccos(cosine)[:, None] * flat)
    return (total / np.linalg.norm(total, axis=1, keepdims=True)).astype(np.float32)


def ball(rings: int = 12, texture: int = 16) -> dict[str, Array]:
    """A closed ball, 1.8 m high, soles at y = 0; about 4 * rings^2 triangles. Its UVs have a seam."""
    n, m = rings, rings * 2
    theta = np.linspace(0, np.pi, n + 1)[1:-1]
    phi = np.arange(m) / m * 2 * np.pi
    ring = np.stack([np.outer(np.sin(theta), np.cos(phi)), np.outer(np.cos(theta), np.ones(m)),
                     -np.outer(np.sin(theta), np.sin(phi))], -1).reshape(-1, 3)  # fmt: skip
    unit = np.concatenate([ring, [[0, 1, 0], [0, -1, 0]]])
    top, bottom = len(unit) - 2, len(unit) - 1

    def at(i: int, j: int) -> int:
        return i * m + j % m

    faces, corners = [], []
    for j in range(m):
        faces.append((top, at(0, j), at(0, j + 1)))
        corners.append(((j + 0.5) / m, 1, j / m, 1 - 1 / n, (j + 1) / m, 1 - 1 / n))
        faces.append((bottom, at(n - 2, j + 1), at(n - 2, j)))
        corners.append(((j + 0.5) / m, 0, (j + 1) / m, 1 / n, j / m, 1 / n))
        for i in range(n - 2):
            v0, v1, u0, u1 = 1 - (i + 1) / n, 1 - (i + 2) / n, j / m, (j + 1) / m
            faces += [(at(i, j), at(i + 1, j), at(i + 1, j + 1)), (at(i, j), at(i + 1, j + 1), at(i, j + 1))]
            corners += [(u0, v0, u0, v1, u1, v1), (u0, v0, u1, v1, u1, v0)]
    uvs, index = np.unique(np.array(corners, np.float32).reshape(-1, 2), axis=0, return_inverse=True)
    vertices = ((unit + np.array([0, 1, 0])) * 0.9).astype(np.float32)
    vertices[:, 1] -= vertices[:, 1].min()
    height = vertices[:, 1:2] / vertices[:, 1].max()
    return {
        "vertices": vertices, "faces": np.array(faces, np.int32), "normals": normals(vertices, np.array(faces)),
        "uvs": uvs.astype(np.float32), "face_uvs_idx": index.reshape(-1, 3).astype(np.int32),
        "base_color.png": np.frombuffer(png(texture, (200, 120, 90)), np.uint8),
        "normal.png": np.frombuffer(png(texture, (128, 128, 255)), np.uint8),
        "orm.png": np.frombuffer(png(texture, (255, 153, 51)), np.uint8),
        "skin_indices": np.tile(np.array([0, 1, 2, 1], np.int32), (len(vertices), 1)),
        "skin_weights": np.concatenate([1 - height, height * 0.5, height * 0.5, height * 0], 1).astype(np.float32),
    }  # fmt: skip


TURNS = np.array([(0.9, 0, 0.3, 0.1), (0.8, -0.6, 0, 0), (0.5, 0.5, 0.5, -0.5)])
TURNS = (TURNS / np.linalg.norm(TURNS, axis=1, keepdims=True)).astype(np.float32)


def tensors(parts: list[dict[str, Array]] | None = None, rig: bool = True, posed: bool = False) -> dict[str, Array]:
    parts = parts or [ball()]
    found = {f"part/{i}/{name}": a for i, part in enumerate(parts) for name, a in part.items()
             if rig or not name.startswith("skin_")}  # fmt: skip
    if rig:
        found["rig/heads"] = np.array([[0, 0, 0], [0, 0.9, 0], [0, 1.5, 0]], np.float32)
        found["rig/tails"] = np.array([[0, 0.9, 0], [0, 1.5, 0], [0, 1.5, 0]], np.float32)  # the last without length
        found["rig/parents"] = np.array([-1, 0, 1], np.int32)
    if posed:
        found["rig/rotations"] = TURNS
        found["rig/translation"] = np.array([[0.25, 0.5, -0.125]], np.float32)
    found["latents/body/shape"] = np.array([[0.1, -0.25, 3.0e-7]], np.float32)
    return found


def meta(parts: int = 1, rig: bool = True, **recipe: Any) -> dict[str, Any]:
    described = [{"name": "human" if i == 0 else f"part_{i}", "closed": True} for i in range(parts)]
    recipe = {"family": "ball", "seed": 7, "version": "0.0.1", "weights_sha256": "ab" * 32, **recipe}
    return {"parts": described, "bones": ["root", "spine", "head"] if rig else [], "recipe": recipe,
            "attributes": {}, "stats": {}}  # fmt: skip


def pack(arrays: dict[str, Array], asset: dict[str, Any], schema: str = "populace.human/1") -> bytes:
    """A safetensors file, in the order given."""
    header: dict[str, Any] = {"__metadata__": {"schema": schema, "asset": json.dumps(asset)}}
    position = 0
    for name, a in arrays.items():
        header[name] = {"dtype": _NAMES[str(a.dtype)], "shape": list(a.shape),
                        "data_offsets": [position, position + a.nbytes]}  # fmt: skip
        position += a.nbytes
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + b"".join(a.tobytes() for a in arrays.values())


def packet(rings: int = 12, rig: bool = True, parts: int = 1, texture: int = 16, **recipe: Any) -> bytes:
    return pack(tensors([ball(rings, texture)] * parts, rig), meta(parts, rig, **recipe))
