# SPDX-License-Identifier: GPL-3.0-or-later
"""People as assets: what the library is told, the picture, the files."""

from __future__ import annotations

import importlib
import json
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from blender_addon import library
from blender_addon.portrait import OVERSAMPLING, Surface, portrait
from tests.blender_addon import making
from tests.blender_addon.conftest import PACKAGE
from tests.blender_addon.test_scene import counts, insert

WOMAN = {"sex": 0.1, "age_years": 71.0, "height_m": 1.62, "weight": 0.2, "muscle": 0.8, "top": "suit jacket",
         "bottom": "none", "hair": "long", "top_color": [0.72, 0.08, 0.1], "hair_color": [0.5, 0.5, 0.5],
         "bottom_color": [0, 0, 1], "eye_color": "blue", "accessory": "hat"}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- catalogues


def test_a_catalogue_is_written_once_and_leaves_the_rest_alone(tmp_path: Path) -> None:
    file = tmp_path / library.CATALOG_FILE
    first = library.merge_catalog(tmp_path, "People/Crowd ö")
    text = file.read_text("utf-8")
    assert text.splitlines().count("VERSION 1") == 1
    assert f"{first}:People/Crowd ö:People-Crowd ö" in text.splitlines()
    assert library.merge_catalog(tmp_path, "People/Crowd ö") == first
    assert file.read_text("utf-8") == text
    theirs = str(uuid.uuid4())
    file.write_text(f"# mine\n\nVERSION 1\n{theirs}:Props/Chairs:Chairs", "utf-8")
    assert library.merge_catalog(tmp_path, "Props/Chairs") == theirs, "a path that is there keeps its id"
    second = library.merge_catalog(tmp_path, "Props")
    assert file.read_text("utf-8") == (
        f"# mine\n\nVERSION 1\n{theirs}:Props/Chairs:Chairs\n{second}:Props:Props\n")  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == [library.CATALOG_FILE]
    assert library.merge_catalog(tmp_path / "..", "x") == library.catalog_id("x")
    (tmp_path / ".." / library.CATALOG_FILE).unlink()


def test_paths_of_catalogues_are_made_clean() -> None:
    assert library.clean_path(" /People//Old: men\\x/ ") == "People/Old- men/x"
    assert library.clean_path("//") == ""


def test_tags_and_sentence_say_what_is_known() -> None:
    assert library.tags(WOMAN, "hero, , old") == [
        "female", "old", "slim", "muscular", "suit jacket", "long hair", "hat", "red suit jacket", "grey hair", "hero"]
    assert library.sentence(WOMAN) == "Old woman, 1.62 m, 71 years, in red suit jacket"
    assert library.tags({}) == []
    assert library.sentence({}) == "Person"
    assert library.tags({"sex": "x", "age_years": None, "top_color": [1, "a", 3]}) == ["x"]
    assert library.color_name([0.1, 0.2, 0.5]) == "blue"
    assert library.color_name([0.3, 0.3, 0.3]) in ("grey", "black")
    assert library.color_name("red") == ""


# ------------------------------------------------------------------------------------------------------------- picture


def quad(x: float, y: float, color: tuple[float, float, float], width: float = 1.0) -> Surface:
    """An upright square that looks down -Y."""
    corners = np.array([[x, y, 0], [x + width, y, 0], [x + width, y, 1], [x, y, 1]], float)
    texture = np.array(color, float).reshape(1, 1, 3)
    return Surface(corners, np.array([[0, 1, 2], [0, 2, 3]]), np.zeros((2, 3, 2)), texture)


def test_the_nearest_surface_is_seen_and_nothing_has_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blender_addon.portrait.YAW", 0.0)
    picture = portrait([quad(0, 0, (0, 1, 0)), quad(0, -1, (1, 0, 0), 0.5), quad(0, 1, (0, 0, 1))], 64)
    seen = picture[:, :, 3] > 0
    rows, columns = np.nonzero(seen)
    assert seen[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all(), "no holes"
    assert abs(np.ptp(rows) + 1 - 64 * 0.9) <= 1
    middle = picture[32]
    assert middle[20, :3].argmax() == 0
    assert middle[45, :3].argmax() == 1
    assert picture[:, :, 2].max() == 0, "what is behind is not seen"
    behind = Surface(**{**vars(quad(0, 0, (1, 1, 1))), "faces": np.array([[0, 2, 1], [0, 3, 2]])})
    assert portrait([behind], 16).max() == 0, "nor is what looks away"
    assert portrait([], 8).shape == (8, 8, 4)
    assert OVERSAMPLING == 2


def test_texture_and_shape_come_through() -> None:
    ball = making.ball(24)
    x, y, z = ball["vertices"].T
    rows = np.linspace(0, 1, 32)[:, None, None] * np.ones((1, 32, 3))
    surface = Surface(np.stack([x, -z, y], 1), ball["faces"], ball["uvs"][ball["face_uvs_idx"]], rows)
    picture = portrait([surface], 128)
    disc = picture[:, :, 3].sum() / 128**2
    assert disc == pytest.approx(np.pi / 4 * 0.9**2, rel=0.02)
    column = picture[10:118, 64, 0]
    assert column[-8:].mean() > column[:8].mean() + 0.4, "the texture's top is at the top"


# -------------------------------------------------------------------------------------------------------------- marking


@pytest.fixture
def people(addon: SimpleNamespace) -> SimpleNamespace:
    """Two people of one batch, one with a rig; both selected."""
    addon.assets = importlib.import_module(f"{PACKAGE}.assets")
    meta = making.meta()
    meta["attributes"] = WOMAN
    batch = {"name": "Humans", "count": 2, "location": (4.0, 0.0, 0.0), "id": "ab"}
    addon.roots = [insert(addon, making.pack(making.tensors(), meta), i, **batch) for i in range(2)]
    addon.bpy.context.view_layer.update()
    return addon


def pixels(collection: Any) -> Any:
    found = np.empty(collection.preview.image_size[0] * collection.preview.image_size[1] * 4, np.float32)
    collection.preview.image_pixels_float.foreach_get(found)
    return found.reshape(collection.preview.image_size[1], -1, 4)


def test_marked_in_this_file(people: SimpleNamespace, tmp_path: Path) -> None:
    bpy = people.bpy
    path = str(tmp_path / "mine.blend")
    bpy.ops.wm.save_as_mainfile(filepath=path)
    assert bpy.ops.populace.mark_asset(author="Ann", tags="hero") == {"FINISHED"}
    made = [c for c in bpy.data.collections if c.asset_data is not None]
    assert len(made) == 2
    for collection in made:
        data = collection.asset_data
        assert (data.author, data.license) == ("Ann", "CC0-1.0")
        assert {"female", "old", "hero", "red suit jacket"} <= {tag.name for tag in data.tags}
        assert data.description.startswith("Old woman")
        assert {o.type for o in collection.objects} == {"ARMATURE", "MESH"}
        picture = pixels(collection)
        assert picture.shape == (256, 256, 4)
        assert 0.2 < (picture[:, :, 3] > 0.5).mean() < 0.9
        skin = picture[picture[:, :, 3] > 0.99][:, :3].mean(0)
        assert skin[0] > skin[1] > skin[2] > 0.1, "the texture's colour"
        assert tuple(collection.instance_offset) == tuple(collection.objects[0].matrix_world.translation)
    lines = (tmp_path / library.CATALOG_FILE).read_text("utf-8").splitlines()
    assert f"{made[0].asset_data.catalog_id}:People/Populace:People-Populace" in lines
    before = counts(bpy)
    assert bpy.ops.populace.mark_asset() == {"FINISHED"}
    assert counts(bpy) == before, "a second time nothing more is made"
    bpy.ops.wm.save_mainfile()
    bpy.ops.wm.open_mainfile(filepath=path)
    kept = next(c for c in bpy.data.collections if c.asset_data is not None)
    assert (pixels(kept)[:, :, 3] > 0.5).mean() > 0.2, "the picture is in the file"


def test_saved_into_a_library_and_found_there(people: SimpleNamespace, tmp_path: Path) -> None:
    bpy, folder = people.bpy, tmp_path / "lib ö"
    libraries = bpy.context.preferences.filepaths.asset_libraries
    for known in list(libraries):
        libraries.remove(known)
    with pytest.raises(RuntimeError, match="Choose the folder"):
        bpy.ops.populace.save_assets()
    assert bpy.ops.populace.save_assets(folder=str(folder), catalog="Crowd/Extras") == {"FINISHED"}
    files = sorted(folder.glob("*.blend"))
    assert len(files) == 2
    assert not [c for c in bpy.data.collections if c.asset_data is not None], "this file stays as it was"
    bpy.ops.populace.save_assets(folder=str(folder), catalog="Crowd/Extras")
    assert sorted(folder.glob("*.blend")) == files, "saved again it is the same file"
    bpy.ops.wm.read_homefile(use_empty=True, use_factory_startup=True)
    with bpy.data.libraries.load(str(files[0]), assets_only=True) as (there, here):
        here.collections = there.collections
    assert len(here.collections) == 1
    collection = here.collections[0]
    assert collection.asset_data.catalog_id == library.catalog_id("Crowd/Extras")
    root = next(o for o in collection.objects if o.populace.uuid)
    assert json.loads(root.populace.recipe)["seed"] == 7
    mesh = next(o for o in collection.objects if o.type == "MESH")
    image = mesh.data.materials[0].node_tree.nodes["Base Color"].image
    assert bytes(image.packed_file.data) == making.ball()["base_color.png"].tobytes()


def test_a_picture_of_ones_own(people: SimpleNamespace, tmp_path: Path) -> None:
    bpy = people.bpy
    file = tmp_path / "face.png"
    file.write_bytes(making.png(64, (10, 200, 30)))
    images = len(bpy.data.images)
    assert bpy.ops.populace.mark_asset(thumbnail=str(file)) == {"FINISHED"}
    assert len(bpy.data.images) == images
    made = next(c for c in bpy.data.collections if c.asset_data is not None)
    assert pixels(made)[128, 128].tolist() == pytest.approx([10 / 255, 200 / 255, 30 / 255, 1], abs=0.01)
    with pytest.raises(RuntimeError, match="could not be marked"):
        bpy.ops.populace.mark_asset(thumbnail=str(tmp_path / "none.png"))


def test_without_people_the_button_says_what_it_wants(addon: SimpleNamespace) -> None:
    assert not addon.bpy.ops.populace.mark_asset.poll()
    assert not addon.bpy.ops.populace.save_assets.poll()
