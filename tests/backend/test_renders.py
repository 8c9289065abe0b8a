# SPDX-License-Identifier: GPL-3.0-or-later
"""Folders of renders: what is written is read, and whatever is wrong is said in a sentence with the file's name."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backend.__main__ import main
from backend.protocol import PopulaceError
from backend.training import renders
from backend.training.renders_blender import RADIUS, cameras, lens, looking_at
from backend.training.renders_kit import codes
from tests.backend import render_folders

KIT = Path(os.environ.get("MAKEHUMAN_DATA", Path(__file__).parents[3] / "shared" / "data" / "makehuman"))
PICTURE = "ball_002/00.png"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    render_folders.write(tmp_path / "set", "get3d", count=3, views=2)
    return tmp_path / "set"


def change(folder: Path, edit: Callable[[dict], object]) -> None:
    index = json.loads((folder / "cameras.json").read_text())
    edit(index)
    (folder / "cameras.json").write_text(json.dumps(index))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    known = render_folders.write(tmp_path / "set", "get3dhuman", count=3, size=48)
    found = renders.read(tmp_path / "set", maps=True)
    assert found.size == 48
    assert [item.name for item in found.items] == sorted(known)
    assert len(found.views) == 12
    view = found.views[4]
    assert view.c2w == pytest.approx(looking_at(np.array([0, 0.95, 0]), 0.0, 0.0, 2.0), abs=1e-6)
    centre, half = known[view.item.name]
    mask, depth, normal = render_folders.ellipsoid(view.c2w, found.lens, 48, centre, half)
    assert np.array_equal(found.rgba(view)[..., 3] == 255, mask)
    assert np.abs(found.depth(view) - np.where(mask, depth, 0)).max() <= found.depth_unit
    assert np.abs(found.normal(view)[mask] - normal[mask]).max() < 0.01
    assert view.item.code == pytest.approx(np.random.default_rng([0, 1]).standard_normal(4), abs=1e-3)


def test_held_out_items_are_so_by_their_names_alone(tmp_path: Path) -> None:
    render_folders.write(tmp_path / "set", "get3d", count=40, views=1, size=16)
    found = renders.read(tmp_path / "set")
    train, test = found.part(False), found.part(True)
    assert 1 <= len(test.items) <= 12
    assert sorted(i.name for i in (*train.items, *test.items)) == [i.name for i in found.items]


def test_smaller_pictures_are_means_of_what_is_covered(folder: Path) -> None:
    found = renders.read(folder)
    small = found.smaller(16)
    view = found.views[0]
    large = found.rgba(view).astype(float)
    alpha = large[..., 3].reshape(16, 2, 16, 2).mean((1, 3))
    assert np.abs(small.rgba(view)[..., 3] - alpha).max() <= 0.5
    covered = small.rgba(view)[small.rgba(view)[..., 3] > 0]
    assert np.ptp(covered[:, :3], axis=0).max() <= 1  # one colour, also where half is covered
    for size in (24, 8, 64):
        with pytest.raises(PopulaceError, match="do not shrink to"):
            found.smaller(size)


def blank(folder: Path, mode: str = "RGBA", size: tuple[int, int] = (32, 32), color: tuple[int, ...] = ()) -> None:
    Image.new(mode, size, color or 0).save(folder / PICTURE)


def cut(folder: Path, end: int) -> None:
    data = (folder / PICTURE).read_bytes()
    (folder / PICTURE).write_bytes(data[:end])


def camera(folder: Path, value: object) -> None:
    change(folder, lambda index: index["items"]["ball_001"]["views"].update({"00": value}))


SKEWED = [[2.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1.2], [0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "cameras.json").unlink(), "pictures without cameras"),
        (lambda f: (f / "cameras.json").write_text("{"), "cannot be read"),
        (lambda f: change(f, lambda i: i.update(layout="other")), "layout 'other'"),
        (lambda f: change(f, lambda i: i.pop("fov_y_rad")), "either fov_y_rad or half_height"),
        (lambda f: change(f, lambda i: i.update(resolution="big")), "resolution is 'big'"),
        (lambda f: change(f, lambda i: i.update(items={})), "names no items"),
        (lambda f: change(f, lambda i: i["items"].update({"../x": {"views": {}}})), "no item's name"),
        (lambda f: change(f, lambda i: i["items"]["ball_001"]["views"].pop("01")), r"ball_001/01.png has no camera"),
        (lambda f: camera(f, [[1, 2], [3, 4]]), "camera of ball_001/00 is no rigid motion"),
        (lambda f: camera(f, SKEWED), "camera of ball_001/00 is no rigid motion"),
        (lambda f: camera(f, "none"), "camera of ball_001/00 is no rigid motion"),
        (lambda f: change(f, lambda i: i["items"]["ball_001"].update(code=[1.0])), "codes of different length"),
        (lambda f: (f / PICTURE).unlink(), "a camera for ball_002/00.png, but there is no such file"),
        (lambda f: blank(f, "RGB"), "ball_002/00.png is of mode RGB.*no mask"),
        (lambda f: blank(f, color=(9, 9, 9, 255)), "ball_002/00.png is opaque everywhere"),
        (lambda f: blank(f), "ball_002/00.png is empty"),
        (lambda f: blank(f, size=(16, 32)), "ball_002/00.png has 16 x 32 pixels, but .* 32 x 32"),
        (lambda f: (f / PICTURE).write_bytes(b"rubbish"), "ball_002/00.png cannot be read"),
        (lambda f: cut(f, -40), "ball_002/00.png cannot be read"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(folder: Path, spoil: Callable[[Path], object], says: str) -> None:
    spoil(folder)
    with pytest.raises(PopulaceError, match=says) as found:
        renders.read(folder)
    assert found.value.code == "invalid_request"
    assert found.value.hint


def test_depth_has_to_be_there_where_it_is_needed(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PopulaceError, match="no depth and normals"):
        renders.read(folder, maps=True)
    render_folders.write(tmp_path / "maps", "get3dhuman", count=1)
    (tmp_path / "maps" / "ball_000" / "01_depth.png").unlink()
    with pytest.raises(PopulaceError, match=r"ball_000/01_depth.png is missing"):
        renders.read(tmp_path / "maps", maps=True)
    with pytest.raises(PopulaceError, match="There is no folder"):
        renders.read(tmp_path / "nowhere")


def test_a_folder_with_something_in_it_is_not_written_to(folder: Path) -> None:
    with pytest.raises(PopulaceError, match="is not empty"):
        render_folders.write(folder, "get3d", count=1)


def test_cameras_are_get3ds() -> None:
    for c2w in cameras("get3d", 50, [1]).values():
        eye = c2w[:3, 3]
        assert np.linalg.norm(eye) == pytest.approx(RADIUS)
        assert c2w[:3, 2] == pytest.approx(eye / RADIUS)  # it looks at the origin
        assert 0 <= np.degrees(np.arcsin(eye[1] / RADIUS)) <= 20
    assert lens("get3d", 64)["fov_y_rad"] == pytest.approx(np.radians(49.134), abs=1e-4)


def test_codes_are_alike_for_those_who_are_alike() -> None:
    facts = [{"height_m": 1.5 + 0.01 * i, "top": "shirt" if i % 2 else "none", "top_item": "x",
              **({"top_color": [i / 99, 0.5, 0.5]} if i % 2 else {})} for i in range(99)]  # fmt: skip
    made = np.array(codes(facts))
    assert made.shape == (99, 5)
    assert np.corrcoef(made[:, 0], range(99))[0, 1] > 0.95
    assert made[:, 0].std() == pytest.approx(1, abs=0.05)
    assert len(set(made[1::2, 1])) == len(set(made[::2, 1])) == 1
    assert made[0, 1] != made[1, 1]
    assert np.all(made[::2, 2:] == 0)  # who wears none has no colour


@pytest.mark.skipif(not KIT.is_dir(), reason="needs MAKEHUMAN_DATA")
@pytest.mark.parametrize("purpose", ["get3d", "get3dhuman"])
def test_the_sampler_writes_people(tmp_path: Path, purpose: str) -> None:
    words = ["renders", "--kit", str(KIT), "--out", str(tmp_path / "set"), "--for", purpose, "--count", "2",
             "--views", "3", "--size", "32", "--workers", "1"]  # fmt: skip
    assert main(words) == 0
    found = renders.read(tmp_path / "set", maps=purpose == "get3dhuman")
    assert len(found.views) == (6 if purpose == "get3d" else 8)
    for view in found.views:
        rows, columns = np.nonzero(found.rgba(view)[..., 3] > 127)
        assert 20 < np.ptp(rows) + 1 < 31
        assert rows.min() > 0
        assert columns.max() < 31
        if purpose == "get3dhuman":
            depth = found.depth(view)[rows, columns]
            assert 1 < depth.min() < depth.max() < 3
            assert np.linalg.norm(found.normal(view)[rows, columns], axis=1) == pytest.approx(1, abs=0.02)
    assert len(found.items[0].code) > 10
    assert main(words) == 2  # not over another one


CUBE = """mtllib cube.mtl
v -0.25 0 -0.25\nv 0.25 0 -0.25\nv 0.25 0 0.25\nv -0.25 0 0.25
v -0.25 1.5 -0.25\nv 0.25 1.5 -0.25\nv 0.25 1.5 0.25\nv -0.25 1.5 0.25
usemtl red\nf 4 3 7 8
usemtl blue\nf 1 5 6 2\nf 1 4 8 5\nf 2 6 7 3\nf 5 8 7 6\nf 1 2 3 4
"""


@pytest.mark.skipif(importlib.util.find_spec("bpy") is None, reason="bpy is not installed")
def test_blender_renders_meshes_into_the_same_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meshes = tmp_path / "meshes"
    meshes.mkdir()
    (meshes / "a cube.obj").write_text(CUBE)  # its front, +Z, is red
    (meshes / "cube.mtl").write_text("newmtl red\nKd 1 0 0\nnewmtl blue\nKd 0 0 1\n")
    out = tmp_path / "set"
    words = ["renders", "--meshes", str(meshes), "--size", "32", "--views", "2", "--out"]
    assert main([*words, str(out), "--for", "get3dhuman"]) == 0
    found = renders.read(out, maps=True)
    front, back = found.views[0], found.views[2]
    assert front.item.name == "a_cube"
    assert found.rgba(front)[18, 16].tolist() == [255, 0, 0, 255]
    assert found.rgba(back)[18, 16].tolist() == [0, 0, 255, 255]
    rows, columns = np.nonzero(found.depth(front))
    pixel = 2 * found.lens.half_height / 32
    assert np.ptp(rows) + 1 == pytest.approx(1.5 / pixel, abs=1)
    assert np.ptp(columns) + 1 == pytest.approx(0.5 / pixel, abs=1)
    assert found.depth(front)[18, 16] == pytest.approx(2 - 0.25, abs=1e-3)
    assert found.normal(front)[18, 16] == pytest.approx([0, 0, 1], abs=0.01)
    covered = found.rgba(front)[..., 3] > 127
    assert (covered != (found.depth(front) > 0)).mean() < 0.02
    assert main([*words, str(tmp_path / "g3")]) == 0
    perspective = renders.read(tmp_path / "g3")
    assert perspective.items[0].unit_m == pytest.approx(1.5 / 0.9, abs=1e-4)
    (meshes / "broken.glb").write_bytes(b"glTF")
    assert main([*words, str(tmp_path / "again")]) == 2
    assert "broken.glb" in capsys.readouterr().err
