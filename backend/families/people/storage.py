# SPDX-License-Identifier: GPL-3.0-or-later
"""How the weights lie in their file: small numbers, and volumes as narrow bands.

Bases of volumes and planes are int8 with one scale per vector of the basis; the rest is fp16. A distance that is
truncated in every vector of a basis is not stored, only its sign: level sets are kept as narrow bands (Adalsteinsson
and Sethian 1995).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

SCALE, BAND, SIGN, SHAPE = "#scale", "#band", "#sign", "#shape"


def pack(state: Mapping[str, Array], volumes: Mapping[str, float], planes: frozenset[str]) -> dict[str, Array]:
    """Arrays of the file from those of the networks; `volumes` names distances with what they are truncated to."""
    out: dict[str, Array] = {}
    for key, value in state.items():
        if not value.size:  # the basis of a part that the data have nothing of
            out[key] = value.astype(np.float16) if value.dtype == np.float32 else value
        elif key in volumes:
            limit = volumes[key]
            flat = value.reshape(len(value), -1)
            far = (np.abs(flat) >= limit * 0.999).all(0) & ((flat > 0).all(0) | (flat < 0).all(0))
            out[key + BAND] = np.packbits(~far)
            out[key + SIGN] = np.packbits(flat[0, far] > 0) if far.any() else np.zeros(1, np.uint8)
            out[key + SHAPE] = np.array(value.shape, np.int32)
            flat = flat[:, ~far] if (~far).any() else flat[:, :1]
            out[key + SCALE] = np.full((len(flat), 1), limit / 127, np.float32)
            out[key] = np.rint(flat / (limit / 127)).clip(-127, 127).astype(np.int8)
        elif key in planes:
            scale = np.abs(value).reshape(len(value), -1).max(1).clip(1e-8) / 127
            scale = scale.astype(np.float32).reshape(-1, *[1] * (value.ndim - 1))
            out[key + SCALE] = scale
            out[key] = np.rint(value / scale).astype(np.int8)
        elif value.dtype == np.float32:
            out[key] = value.astype(np.float16)
        else:
            out[key] = value
    return {k: np.ascontiguousarray(v) for k, v in out.items()}


def unpack(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The networks' arrays, floats in single precision."""
    out: dict[str, Array] = {}
    for key, value in arrays.items():
        if "#" in key:
            continue
        if key + SCALE in arrays:
            value = value.astype(np.float32) * arrays[key + SCALE]
        if key + BAND in arrays:
            shape = tuple(int(n) for n in arrays[key + SHAPE])
            count = int(np.prod(shape[1:]))
            held = np.unpackbits(arrays[key + BAND], count=count).astype(bool)
            limit = 127 * float(arrays[key + SCALE].flat[0])
            full = np.empty((shape[0], count), np.float32)
            full[:, ~held] = np.where(np.unpackbits(arrays[key + SIGN], count=int((~held).sum())), limit, -limit)
            full[:, held] = value if held.any() else 0
            value = full.reshape(shape)
        out[key] = value.astype(np.float32) if value.dtype == np.float16 else value.copy()
    return out
