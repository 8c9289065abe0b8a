# SPDX-License-Identifier: GPL-3.0-or-later
"""safetensors by hand, byte for byte the same everywhere, and files that exist whole or not at all. numpy only."""

from __future__ import annotations

import errno
import json
import math
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from backend.protocol import PopulaceError

MAX_HEADER_BYTES = 16 << 20

Array = np.ndarray[Any, Any]
_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "I64": np.dtype("<i8"), "I32": np.dtype("<i4"),
           "I8": np.dtype("i1"), "U8": np.dtype("u1")}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def dump_tensors(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> list[bytes]:
    """A safetensors file as chunks. The library writes metadata in the order of a hash map; this order is fixed."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # keeps every section aligned
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    chunks, at = [], 0
    for name in order:
        array = np.asarray(tensors[name], order="C")  # ascontiguousarray would give a lone number a dimension
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
