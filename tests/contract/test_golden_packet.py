# SPDX-License-Identifier: GPL-3.0-or-later
"""The packet's format, held by one file that both sides of the socket read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import safetensors

from backend import packet
from blender_addon import messages
from blender_addon import packet as addon_packet
from tests.contract import golden, packet_lies

PEOPLE = pytest.mark.parametrize(("path", "made"), [(golden.PATH, golden.asset()),
                                                    (golden.POSED_PATH, golden.posed_asset())])  # fmt: skip


def assert_same_fields(ours: object, theirs: object, fields: Iterable[str]) -> None:
    for name in fields:
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None)
        assert a is None or (a == b if isinstance(a, bytes) else (a.dtype == b.dtype and np.array_equal(a, b)))


@PEOPLE
def test_backend_writes_exactly_the_golden_bytes(path: Path, made: packet.HumanAsset) -> None:
    assert packet.dumps(made) == path.read_bytes()


@PEOPLE
def test_backend_reads_back_every_array_and_fact(path: Path, made: packet.HumanAsset) -> None:
    read = packet.read(path)
    assert read.meta == made.meta
    for ours, theirs in zip(read.parts, made.parts, strict=True):
        assert_same_fields(ours, theirs, packet.Part.__dataclass_fields__)
    assert_same_fields(read.rig, made.rig, packet.RigArrays.__dataclass_fields__)
    assert read.maps == made.maps
    assert packet.dumps(read) == path.read_bytes()


@PEOPLE
def test_addon_reads_back_every_array_and_fact(path: Path, made: packet.HumanAsset) -> None:
    read = addon_packet.read(path.read_bytes())
    assert [part.name for part in read.parts] == [p["name"] for p in made.meta["parts"]]
    assert [part.lod for part in read.parts] == [made.lod(i) for i in range(len(made.parts))]
    for ours, theirs in zip(read.parts, made.parts, strict=True):
        assert_same_fields(ours, theirs, packet.Part.__dataclass_fields__.keys() - {"shape_keys"})
        assert list(ours.shape_keys) == made.shape_keys == ["height_m_min", "height_m_max"]
        assert theirs.shape_keys is not None
        assert np.array_equal(list(ours.shape_keys.values()), theirs.shape_keys)
    assert read.rig is not None
    assert list(read.rig.names) == made.meta["bones"]
    by_key = ("key_heads", "key_translation")
    assert_same_fields(read.rig, made.rig, packet.RigArrays.__dataclass_fields__.keys() - by_key)
    for name in by_key:
        theirs = getattr(made.rig, name)
        found = getattr(read.rig, name)
        assert list(found) == ([] if theirs is None else made.shape_keys)
        assert theirs is None or np.array_equal(list(found.values()), theirs)
    assert read.latents.keys() == made.latents.keys()
    assert all(np.array_equal(read.latents[name], codes) for name, codes in made.latents.items())
    assert read.maps == made.maps
    assert read.recipe.get("latent_maps", {}) == {name: messages.inline(png) for name, png in made.maps.items()}
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
