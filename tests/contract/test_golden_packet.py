# SPDX-License-Identifier: GPL-3.0-or-later
"""The packet's format, held by one file that both sides of the socket read."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors

from backend import packet
from blender_addon import packet as addon_packet
from tests.contract import golden, packet_lies


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


def test_addon_reads_back_every_array_and_fact() -> None:
    read, made = addon_packet.read(golden.PATH.read_bytes()), golden.asset()
    assert [part.name for part in read.parts] == [p["name"] for p in made.meta["parts"]]
    for ours, theirs in zip(read.parts, made.parts, strict=True):
        for name in packet.Part.__dataclass_fields__:
            a, b = getattr(ours, name), getattr(theirs, name)
            assert (a is None) == (b is None)
            assert a is None or (a == b if isinstance(a, bytes) else (a.dtype == b.dtype and np.array_equal(a, b)))
    assert read.rig is not None
    assert made.rig is not None
    assert list(read.rig.names) == made.meta["bones"]
    for name in packet.RigArrays.__dataclass_fields__:
        assert np.array_equal(getattr(read.rig, name), getattr(made.rig, name))
    assert read.latents.keys() == made.latents.keys()
    assert all(np.array_equal(read.latents[name], codes) for name, codes in made.latents.items())
    assert read.asset == made.meta


@pytest.mark.parametrize("name", packet_lies.LIES)
def test_addon_refuses_the_same_lies(name: str) -> None:
    with pytest.raises(addon_packet.PacketError):
        addon_packet.read(packet_lies.LIES[name])


def test_reference_library_reads_the_same() -> None:
    """The safetensors library accepts the file: aligned sections, no holes."""
    ours, metadata = packet.load_tensors(golden.PATH.read_bytes())
    with safetensors.safe_open(golden.PATH, "numpy") as file:
        assert set(file.keys()) == set(ours)
        assert all(np.array_equal(file.get_tensor(name), array) for name, array in ours.items())
        assert file.metadata() == metadata
    assert json.loads(metadata["asset"])["bones"] == ["root", "head"]
