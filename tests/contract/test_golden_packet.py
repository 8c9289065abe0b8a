# SPDX-License-Identifier: GPL-3.0-or-later
"""The packet's format, held by one file that both sides of the socket read."""

from __future__ import annotations

import json

import numpy as np
import safetensors

from backend import packet
from tests.contract import golden


def test_backend_writes_exactly_the_golden_bytes() -> None:
    assert packet.dumps(golden.asset()) == golden.PATH.read_bytes()


def test_backend_reads_back_every_array_and_fact() -> None:
    read, made = packet.read(golden.PATH), golden.asset()
    assert read.meta == made.meta
    for ours, theirs in zip(read.parts, made.parts, strict=True):
        for name in packet.Part.__dataclass_fields__:
            a, b = getattr(ours, name), getattr(theirs, name)
            assert (a is None) == (b is None)
            assert a is None or (a == b if isinstance(a, bytes) else (a.dtype == b.dtype and np.array_equal(a, b)))
    assert read.rig is not None
    assert np.array_equal(read.rig.parents, [-1, 0])
    assert packet.dumps(read) == golden.PATH.read_bytes()


def test_reference_library_reads_the_same() -> None:
    """The safetensors library accepts the file: aligned sections, no holes."""
    ours, metadata = packet.load_tensors(golden.PATH.read_bytes())
    with safetensors.safe_open(golden.PATH, "numpy") as file:
        assert set(file.keys()) == set(ours)
        assert all(np.array_equal(file.get_tensor(name), array) for name, array in ours.items())
        assert file.metadata() == metadata
    assert json.loads(metadata["asset"])["bones"] == ["root", "head"]
