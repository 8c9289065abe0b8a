# SPDX-License-Identifier: GPL-3.0-or-later
"""Packets: what is written comes back, what lies is refused (F17-F19 of the reader), GLB and OBJ are valid."""

from __future__ import annotations

import errno
import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trimesh
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backend import exports, packet
from backend.protocol import PopulaceError
from tests.backend.khronos import find_validator, validate
from tests.contract import golden
from tests.contract.packet_lies import GOLDEN, LIES


@pytest.mark.parametrize("name", LIES)
def test_reader_refuses_lies_with_one_sentence(name: str) -> None:
    with pytest.raises(packet.PacketError, match="packet is damaged"):
        packet.loads(LIES[name])


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(at=st.integers(0, len(GOLDEN) - 1), value=st.integers(0, 255), cut=st.integers(0, len(GOLDEN)))
def test_any_flipped_byte_or_cut_reads_whole_or_not_at_all(at: int, value: int, cut: int) -> None:
    for data in (GOLDEN[:at] + bytes([value]) + GOLDEN[at + 1 :], GOLDEN[:cut]):
        try:
            asset = packet.loads(data)
        except packet.PacketError:
            continue
        for part in asset.parts:
            assert part.faces.max() < len(part.vertices)
            assert np.isfinite(part.vertices).all()


def test_written_file_is_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    size = packet.write(tmp_path / "result.safetensors", golden.asset())
    assert [p.name for p in tmp_path.iterdir()] == ["result.safetensors"]
    assert (tmp_path / "result.safetensors").stat().st_size == size == len(GOLDEN)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "result.safetensors"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(PopulaceError, match="disk is full") as caught:
        packet.write(path, golden.asset())
    assert caught.value.code == "out_of_disk"
    assert [p.name for p in tmp_path.iterdir()] == ["result.safetensors"]
    assert path.read_bytes() == b"old"


def test_corners_give_each_corner_its_own_position_and_uv() -> None:
    part = golden.asset().parts[0]
    vertex, uv, faces = packet.corners(part)
    assert np.array_equal(vertex[faces], part.faces)
    assert np.array_equal(uv[faces], part.face_uvs_idx)
    assert len(vertex) == len(set(zip(vertex.tolist(), uv.tolist()))) == 6


def test_glb_keeps_shape_uvs_and_images(tmp_path: Path) -> None:
    """An independent reader (trimesh) finds the closed tetrahedra, the flipped v, and the texture's pixels."""
    (tmp_path / "a.glb").write_bytes(packet.to_glb(golden.asset()))
    scene = trimesh.load(tmp_path / "a.glb")
    assert set(scene.geometry) == {"human", "hät"}
    mesh = scene.geometry["hät"]
    assert mesh.bounds[:, 1].tolist() == [1, 2]
    image = mesh.visual.material.baseColorTexture
    assert image.size == (4, 2)
    assert image.getpixel((0, 0)) == (200, 150, 120)
    uvs = {tuple(uv) for uv in mesh.visual.uv.tolist()}  # trimesh turns v back up
    assert uvs == {tuple(uv) for uv in golden.asset().parts[0].uvs.tolist()}
    mesh.merge_vertices(merge_tex=True, merge_norm=True)
    assert mesh.is_watertight
    assert mesh.volume == pytest.approx(1 / 6)


def test_tangents_follow_u_and_name_the_side_of_v() -> None:
    """A square in the plane z = 0 whose u runs along +y and whose v runs along +x or -x."""
    vertices = np.float32([(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0)])
    normals, faces = np.tile(np.float32([0, 0, 1]), (4, 1)), np.array([(0, 1, 2), (0, 2, 3)])
    for v, side in ((vertices[:, 0], -1), (-vertices[:, 0], 1)):
        tangents = exports._tangents(vertices, normals, np.stack([vertices[:, 1], v], 1), faces)
        assert np.allclose(tangents, [0, 1, 0, side], atol=1e-6)


def glb_json(data: bytes) -> dict:
    (size,) = struct.unpack_from("<I", data, 12)
    return json.loads(data[20 : 20 + size])


def test_glb_skin_binds_at_the_joints() -> None:
    data = packet.to_glb(golden.asset())
    document = glb_json(data)
    joints = [document["nodes"][j] for j in document["skins"][0]["joints"]]
    assert [j["name"] for j in joints] == ["root", "head"]
    assert [j["translation"] for j in joints] == [[0, 0, 0], [0, 0.5, 0]]
    view = document["bufferViews"][document["accessors"][document["skins"][0]["inverseBindMatrices"]]["bufferView"]]
    start = data.index(b"BIN\0") + 4 + view["byteOffset"]
    bind = np.frombuffer(data[start : start + view["byteLength"]], "<f4").reshape(2, 4, 4)
    assert bind[1].T[:3, 3].tolist() == [0, -0.5, 0]


def test_glb_weights_name_each_joint_once() -> None:
    part = golden.asset().parts[0]
    joints, weights = exports._gltf_skin(part)
    assert weights.sum(1).tolist() == [1, 1, 1, 1]
    assert weights[3].tolist() == [0.75, 0, 0.25, 0]
    assert joints[3].tolist() == [1, 0, 0, 0]
    assert joints.dtype == np.uint8


@pytest.mark.skipif(find_validator() is None, reason="npm package gltf-validator is not installed")
@pytest.mark.parametrize("rigged", [True, False])
def test_khronos_validator_finds_nothing(tmp_path: Path, rigged: bool) -> None:
    asset = golden.asset()
    if not rigged:
        asset = replace(asset, rig=None, parts=asset.parts[1:], meta={**asset.meta, "parts": asset.meta["parts"][1:]})
    (tmp_path / "a.glb").write_bytes(packet.to_glb(asset))
    issues = validate(tmp_path / "a.glb")["issues"]
    assert issues["numErrors"] == issues["numWarnings"] == 0, issues["messages"]


def test_obj_keeps_shape_and_names_its_textures(tmp_path: Path) -> None:
    path = packet.to_obj(golden.asset(), tmp_path / "out")
    text = path.read_text()
    assert text.count("\nf ") == 8
    assert "f 5/7/5 7/9/7 6/8/6" in text  # the second part counts on from the first
    for line in (tmp_path / "out/human.mtl").read_text().splitlines():
        if line.startswith(("map_Kd", "norm")):
            assert (tmp_path / "out" / line.split()[1]).read_bytes().startswith(b"\x89PNG")
    mesh = trimesh.load(path, force="mesh", process=True)
    assert len(mesh.faces) == 8
