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
from PIL import Image

from backend import exports, packet, poses
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


def glb_floats(data: bytes, accessor: int) -> np.ndarray:
    document = glb_json(data)
    entry = document["accessors"][accessor]
    start = data.index(b"BIN\0") + 4 + document["bufferViews"][entry["bufferView"]]["byteOffset"]
    return np.frombuffer(data, "<f4", entry["count"] * 3, start).reshape(-1, 3)


def test_glb_has_shape_keys_as_named_morph_targets() -> None:
    asset = golden.asset()
    data = packet.to_glb(asset)
    for part, mesh in zip(asset.parts, glb_json(data)["meshes"], strict=True):
        assert mesh["extras"]["targetNames"] == ["height_m_min", "height_m_max"]
        assert mesh["weights"] == [0, 0]
        (primitive,) = mesh["primitives"]
        vertex = packet.corners(part)[0]
        assert np.array_equal(glb_floats(data, primitive["attributes"]["POSITION"]), part.vertices[vertex])
        for target, moves in zip(primitive["targets"], part.shape_keys, strict=True):
            assert np.array_equal(glb_floats(data, target["POSITION"]), moves[vertex])
    bare = replace(asset, parts=tuple(replace(part, shape_keys=None) for part in asset.parts), meta={
        key: value for key, value in asset.meta.items() if key != "shape_keys"})  # fmt: skip
    for mesh in glb_json(packet.to_glb(bare))["meshes"]:
        assert mesh.keys() == {"name", "primitives"}
        assert "targets" not in mesh["primitives"][0]


def test_glb_materials_name_the_maps_that_there_are() -> None:
    asset = golden.posed_asset()
    data = packet.to_glb(asset)
    document = glb_json(data)
    pbr = document["materials"][0]["pbrMetallicRoughness"]
    assert (pbr["metallicFactor"], pbr["roughnessFactor"]) == (1, 1)
    image = document["images"][document["textures"][pbr["metallicRoughnessTexture"]["index"]]["source"]]
    view = document["bufferViews"][image["bufferView"]]
    start = data.index(b"BIN\0") + 4 + view["byteOffset"]
    assert data[start : start + view["byteLength"]] == asset.parts[0].orm_png
    coarse = glb_json(packet.to_glb(asset, lod=1))  # has a colour map alone
    (material,), (mesh,) = coarse["materials"], coarse["meshes"]
    assert material.keys() == {"name", "pbrMetallicRoughness"}
    assert material["pbrMetallicRoughness"]["metallicFactor"] == 0
    assert len(coarse["images"]) == 1
    assert "TANGENT" not in mesh["primitives"][0]["attributes"]


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


def gltf_skinned(data: bytes, mesh: str) -> np.ndarray:
    """A mesh's vertices as a glTF viewer shows them: node transforms down the tree, inverse bind matrices, weights."""
    document, start = glb_json(data), data.index(b"BIN\0") + 4

    def array(accessor: int, dtype: str) -> np.ndarray:
        entry = document["accessors"][accessor]
        view = document["bufferViews"][entry["bufferView"]]
        width = {"VEC3": 3, "VEC4": 4, "MAT4": 16}[entry["type"]]
        return np.frombuffer(data, dtype, entry["count"] * width, start + view["byteOffset"]).reshape(-1, width)

    nodes, world = document["nodes"], {}

    def walk(index: int, above: np.ndarray) -> None:
        x, y, z, w = nodes[index].get("rotation", (0, 0, 0, 1))
        local = np.eye(4)
        local[:3, :3] = poses.to_matrices(np.array([(w, x, y, z)]))[0]
        local[:3, 3] = nodes[index].get("translation", (0, 0, 0))
        world[index] = above @ local
        for child in nodes[index].get("children", ()):
            walk(child, world[index])

    for root in document["scenes"][0]["nodes"]:
        walk(root, np.eye(4))
    skin = document["skins"][0]
    bind = array(skin["inverseBindMatrices"], "<f4").reshape(-1, 4, 4).transpose(0, 2, 1)
    matrices = np.stack([world[j] for j in skin["joints"]]) @ bind
    attributes = next(m for m in document["meshes"] if m["name"] == mesh)["primitives"][0]["attributes"]
    points, weights = array(attributes["POSITION"], "<f4"), array(attributes["WEIGHTS_0"], "<f4")
    blended = np.einsum("vk,vkij->vij", weights, matrices[array(attributes["JOINTS_0"], "u1").astype(int)])
    return np.einsum("vij,vj->vi", blended[:, :3, :3], points) + blended[:, :3, 3]


def test_glb_skinning_gives_the_posed_mesh() -> None:
    """The node rotations do what `poses.skin` does; the head's tip (0, 1, 0), half of its weight on it, by hand."""
    asset = golden.posed_asset()
    data, part, rig = packet.to_glb(asset), asset.parts[0], asset.rig
    assert rig is not None
    vertex, _, _ = packet.corners(part)
    wanted = poses.skin(part.vertices, part.skin_indices, part.skin_weights, rig, rig.rotations, rig.translation)
    assert gltf_skinned(data, "human") == pytest.approx(wanted[vertex], abs=1e-6)
    assert wanted[0] == pytest.approx([0, 0.25, 0], abs=1e-6)
    assert wanted[1] == pytest.approx([0.25, 0.5, -0.5], abs=1e-6)  # the middle of (1, .25, 0) and (-.5, .75, -1)
    assert wanted[2] == pytest.approx([0.5, 0.75, 0], abs=1e-6)
    rest = replace(asset, rig=replace(rig, rotations=None, translation=None))
    assert gltf_skinned(packet.to_glb(rest), "human") == pytest.approx(part.vertices[vertex], abs=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_glb_skinning_of_a_long_chain(seed: int) -> None:
    """Twelve bones in a random tree with random turns, two roots."""
    rng, count = np.random.default_rng(seed), 12
    parents = np.int32([-1, -1, *(rng.integers(0, j) for j in range(2, count))])
    turns = rng.normal(size=(count, 4))
    heads = rng.normal(size=(count, 3)).astype(np.float32)
    rig = packet.RigArrays(heads, heads + 1, parents,
                           (turns / np.linalg.norm(turns, axis=1, keepdims=True)).astype(np.float32),
                           rng.normal(size=(1, 3)).astype(np.float32))  # fmt: skip
    part = replace(golden.tetrahedron((0, 0, 0), True), skin_indices=rng.integers(0, count, (4, 4)).astype(np.int32),
                   skin_weights=rng.dirichlet(np.ones(4), 4).astype(np.float32))  # fmt: skip
    meta = {**golden.asset().meta, "parts": [{"name": "human"}], "bones": list("abcdefghijkl")}
    asset = replace(golden.asset(), parts=(part,), rig=rig, meta=meta)
    wanted = poses.skin(part.vertices, part.skin_indices, part.skin_weights, rig, rig.rotations, rig.translation)
    assert gltf_skinned(packet.to_glb(asset), "human") == pytest.approx(wanted[packet.corners(part)[0]], abs=1e-5)


def test_each_level_of_detail_is_a_file_of_its_own(tmp_path: Path) -> None:
    asset = golden.posed_asset()
    assert [m["name"] for m in glb_json(packet.to_glb(asset))["meshes"]] == ["human", "hät"]
    assert [m["name"] for m in glb_json(packet.to_glb(asset, lod=1))["meshes"]] == ["human_LOD1"]
    assert packet.to_obj(asset, tmp_path, lod=1).read_text().count("\no ") == 1
    for wrong in (lambda: packet.to_glb(asset, 2), lambda: packet.to_obj(asset, tmp_path, 2)):
        with pytest.raises(PopulaceError, match=r"has 2 levels of detail, but none numbered 2\. Ask for one of 0 to 1"):
            wrong()


VARIANTS = {
    "rest": golden.asset(),
    "no rig": replace(golden.asset(), rig=None, parts=golden.asset().parts[1:],
                      meta={**golden.asset().meta, "parts": golden.asset().meta["parts"][1:]}),
    "posed": golden.posed_asset(),
}  # fmt: skip


@pytest.mark.skipif(find_validator() is None, reason="npm package gltf-validator is not installed")
@pytest.mark.parametrize(("name", "lod"), [("rest", 0), ("no rig", 0), ("posed", 0), ("posed", 1)])
def test_khronos_validator_finds_nothing(tmp_path: Path, name: str, lod: int) -> None:
    (tmp_path / "a.glb").write_bytes(packet.to_glb(VARIANTS[name], lod))
    issues = validate(tmp_path / "a.glb")["issues"]
    assert issues["numErrors"] == issues["numWarnings"] == 0, issues["messages"]


def test_obj_is_posed(tmp_path: Path) -> None:
    """The first part follows its bones, with its normals; the second has no skin and stays."""
    asset = golden.posed_asset()
    lines = packet.to_obj(asset, tmp_path).read_text().splitlines()
    vertices = np.array([line.split()[1:] for line in lines if line.startswith("v ")], float)
    normals = np.array([line.split()[1:] for line in lines if line.startswith("vn ")], float)
    assert asset.rig is not None
    part, rig = asset.parts[0], asset.rig
    wanted = poses.skin(part.vertices, part.skin_indices, part.skin_weights, rig, rig.rotations, rig.translation)
    assert vertices[:4] == pytest.approx(wanted, abs=1e-6)
    assert vertices[4:] == pytest.approx(asset.parts[1].vertices, abs=1e-6)
    assert np.linalg.norm(normals, axis=1) == pytest.approx(np.ones(8), abs=1e-3)
    assert normals[2] == pytest.approx([1, 0, 0], abs=1e-4)  # on the head alone, which turns y to x


def test_obj_keeps_shape_and_names_its_textures(tmp_path: Path) -> None:
    path = packet.to_obj(golden.asset(), tmp_path / "out")
    text = path.read_text()
    assert text.count("\nf ") == 8
    assert "f 5/7/5 7/9/7 6/8/6" in text  # the second part counts on from the first
    pixels = {}
    for line in (tmp_path / "out/human.mtl").read_text().splitlines():
        if line.startswith(("map_", "norm")):
            with Image.open(tmp_path / "out" / line.split()[1]) as image:
                pixels[line.split()[0]] = image.getpixel((0, 0))
    assert pixels == {"map_Kd": (200, 150, 120), "norm": (128, 128, 255), "map_Pr": 128, "map_Pm": 0}
    mesh = trimesh.load(path, force="mesh", process=True)
    assert len(mesh.faces) == 8
