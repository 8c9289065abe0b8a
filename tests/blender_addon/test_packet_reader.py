# SPDX-License-Identifier: GPL-3.0-or-later
"""The add-on's reader takes every sound packet exactly and refuses everything else with a sentence."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blender_addon import packet
from tests.blender_addon import making
from tests.contract import golden


def test_golden_packet_is_read_as_the_backend_means_it() -> None:
    human, made = packet.read(golden.PATH.read_bytes()), golden.asset()
    assert [part.name for part in human.parts] == ["human", "hät"]
    for ours, theirs in zip(human.parts, made.parts, strict=True):
        for name in ("vertices", "faces", "normals", "uvs", "face_uvs_idx", "skin_indices", "skin_weights"):
            a, b = getattr(ours, name), getattr(theirs, name)
            assert (a is None and b is None) or (a.dtype == b.dtype and np.array_equal(a, b))
        assert (ours.base_color_png, ours.normal_png) == (theirs.base_color_png, theirs.normal_png)
    assert human.rig is not None
    assert human.rig.names == ("root", "head")
    assert human.rig.parents.tolist() == [-1, 0]
    assert human.height_m == 2.0
    assert human.recipe["seed"] == 7
    latents = packet.recipe_latents(json.loads(json.dumps(human.recipe)))
    assert {name: np.float32(a).tolist() for name, a in made.latents.items()} == latents


def test_latents_survive_the_recipe_to_the_bit() -> None:
    human = packet.read(making.packet())
    stored = json.loads(json.dumps(human.recipe))
    assert np.array_equal(np.float32(packet.recipe_latents(stored)["body/shape"]), human.latents["body/shape"])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_packets_are_refused_or_read_whole(data: st.DataObject) -> None:
    """Bits flipped, bytes cut or put in, anywhere: a PacketError or a person whose indices are all in range."""
    whole = bytearray(making.packet(rings=3))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1) | st.integers(0, 2500))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "set"])):
            case "flip":
                whole[min(at, len(whole) - 1)] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del whole[at : at + data.draw(st.integers(1, 64))]
            case "insert":
                whole[at:at] = data.draw(st.binary(min_size=1, max_size=16))
            case "set":
                whole[min(at, len(whole) - 1)] = data.draw(st.sampled_from(b"\x00\xff09{}[],\""))
        if not whole:
            break
    try:
        human = packet.read(whole)
    except packet.PacketError:
        return
    for part in human.parts:
        assert part.faces.min() >= 0
        assert part.faces.max() < len(part.vertices)
        assert part.face_uvs_idx.min() >= 0
        assert part.face_uvs_idx.max() < len(part.uvs)
        assert np.isfinite(part.vertices).all()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(packet.PacketError):
        packet.read(noise)


_text = st.text(max_size=8)
_json = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | _text,
                     lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_text, inner, max_size=4),
                     max_leaves=12)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(_json)
def test_any_header_is_refused(header: Any) -> None:
    head = json.dumps(header).encode()
    with pytest.raises(packet.PacketError):
        packet.read(struct.pack("<Q", len(head)) + head)


@settings(max_examples=150, deadline=None)
@given(_json, st.sampled_from(["parts", "bones", None]))
def test_any_description_is_refused_or_harmless(value: Any, key: str | None) -> None:
    asset = making.meta() | {key: value} if key else value
    arrays = making.tensors([making.ball(3)])
    try:
        human = packet.read(making.pack(arrays, asset))
    except packet.PacketError:
        return
    assert len(human.parts) == 1


def _with(**changed: Any) -> bytes:
    arrays = making.tensors()
    for name, change in changed.items():
        key = {"vertices": "part/0/vertices", "faces": "part/0/faces", "skin": "part/0/skin_indices",
               "weights": "part/0/skin_weights", "parents": "rig/parents", "png": "part/0/base_color.png",
               "latents": "latents/body/shape"}[name]  # fmt: skip
        arrays[key] = change(arrays[key].copy())
    return making.pack(arrays, making.meta())


def _put(at: tuple[int, ...], value: float) -> Any:
    def change(array: Any) -> Any:
        array[at] = value
        return array

    return change


@pytest.mark.parametrize(
    ("damaged", "complaint"),
    [
        (_with(vertices=_put((3, 1), np.nan)), "not finite"),
        (_with(vertices=_put((3, 1), np.inf)), "not finite"),
        (_with(latents=_put((0, 0), np.nan)), "not finite"),
        (_with(faces=_put((5, 2), 10**6)), "points outside"),
        (_with(faces=_put((5, 2), -1)), "points outside"),
        (_with(skin=_put((0, 0), 3)), "points outside"),
        (_with(weights=_put((0, 0), -0.5)), "negative"),
        (_with(parents=_put((0,), 2)), "not in order"),
        (_with(parents=_put((1,), -2)), "not in order"),
        (_with(faces=lambda a: a[:, :2].copy()), "is int32"),
        (_with(faces=lambda a: a.astype(np.float32)), "is float32"),
        (_with(vertices=lambda a: a[:0]), "is float32 [0, 3]"),
        (_with(png=lambda a: a[1:].copy()), "not a PNG"),
        (_with(png=_put((slice(16, 20),), 255)), "pixels"),
        (making.pack(making.tensors(), making.meta(), schema="populace.human/2"), "schema"),
        (making.pack(making.tensors(), making.meta() | {"bones": ["a", "a", "b"]}), "proper names"),
        (making.pack(making.tensors(), making.meta() | {"bones": ["a", "b" * 64, "c"]}), "longer than 63"),
        (making.pack(making.tensors() | {"part/9/vertices": np.zeros((1, 3), np.float32)}, making.meta()), "unknown"),
        (making.packet()[:-1], "outside the file"),
        (making.packet() + b"\0", "left over"),
        (struct.pack("<Q", 1 << 60) + b"{}", "claims a header"),
        (b"", "0 bytes"),
    ],
)  # fmt: skip
def test_each_lie_is_named(damaged: bytes, complaint: str) -> None:
    with pytest.raises(packet.PacketError, match=complaint.replace("[", r"\[")):
        packet.read(damaged)


def test_deeply_nested_header_is_refused() -> None:
    head = b"[" * 100_000
    with pytest.raises(packet.PacketError):
        packet.read(struct.pack("<Q", len(head)) + head)


def test_unaligned_arrays_come_out_aligned() -> None:
    arrays = making.tensors()
    arrays = {"part/0/base_color.png": np.append(arrays.pop("part/0/base_color.png"), np.uint8(0)), **arrays}
    part = packet.read(making.pack(arrays, making.meta())).parts[0]
    assert part.vertices.flags.aligned
    assert np.array_equal(part.vertices, arrays["part/0/vertices"])
