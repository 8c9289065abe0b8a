# SPDX-License-Identifier: GPL-3.0-or-later
"""Photos in Blender: what they showed is kept with the person, the reference camera, what the operators ask for."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.blender_addon import making
from tests.blender_addon.conftest import PACKAGE
from tests.blender_addon.test_blender import draw
from tests.blender_addon.test_scene import counts, insert

SIZE = 640, 480
FOV = 0.6


def look_at(eye: Any, target: Any) -> Any:
    """OpenGL's camera to world: down its own -Z, Y up."""
    back = np.subtract(eye, target)
    back = back / np.linalg.norm(back)
    right = np.cross([0, 1, 0], back)
    right /= np.linalg.norm(right)
    return np.vstack([np.stack([right, np.cross(back, right), back, eye], 1), [0, 0, 0, 1]])


C2W = look_at([1.5, 1.2, 3.0], [0.1, 0.9, 0.0])
FACTS = {"camera": {"c2w": C2W.tolist(), "fov_y_rad": FOV, "width": SIZE[0], "height": SIZE[1]},
         "rotations": {"spine": [0.8, 0.6, 0.0, 0.0]}, "box": [10, 20, 300, 400], "scores": {"iou": 0.9},
         "notes": []}  # fmt: skip


def shown(shade: int) -> bytes:
    return making.png(8, (shade, 0, 0))


def packet(*shades: int, **recipe: Any) -> bytes:
    """A posed person; each shade is what a photo showed of its body."""
    arrays = making.tensors([making.ball(6)], posed=True)
    for shade in shades[:1]:
        arrays["maps/body/photo.png"] = np.frombuffer(shown(shade), np.uint8)
    return making.pack(arrays, making.meta(**recipe) | {"photo": FACTS})


@pytest.fixture
def photo(addon: SimpleNamespace) -> SimpleNamespace:
    for name in ("keeping", "camera", "operators"):
        setattr(addon, f"photo_{name}", importlib.import_module(f"{PACKAGE}.photo.{name}"))
    return addon


def test_what_the_photo_showed_is_in_the_file_and_in_the_next_request(photo: SimpleNamespace, tmp_path: Path) -> None:
    insert(photo, packet(100))
    path = str(tmp_path / "saved ö 中.blend")
    photo.bpy.ops.wm.save_as_mainfile(filepath=path)
    photo.bpy.ops.wm.open_mainfile(filepath=path)
    root = photo.properties.active_human(photo.bpy.context)
    assert len(root.populace.recipe) < 1000, "the pictures are not in the text"
    assert json.loads(root.populace.recipe)["latent_maps"] == {"body/photo": hashlib.sha256(shown(100)).hexdigest()}
    request = photo.editing.request(root, [{"op": "set", "values": {"height_m": 1.8}}])
    assert request.latent_maps == {"body/photo": photo.messages.inline(shown(100))}
    assert b"".join(list(photo.messages.image_pieces(request.latent_maps["body/photo"]))[1:]) == shown(100)
    assert photo.editing.swap_edit(root.populace.uuid, "body")["other"]["latent_maps"] == request.latent_maps


def test_versions_share_the_maps_and_let_go_of_them(photo: SimpleNamespace) -> None:
    root = insert(photo, packet(100))
    about = root.populace
    before = counts(photo.bpy)
    for number, shade in enumerate((100, 120, 100), 1):
        human = photo.packet.read(packet(shade, seed=number))
        photo.replacing.replace(photo.bpy.context, root, human, True).populace.fill(about.uuid, human, f"{number}")
    assert len(about.versions) == 4
    assert {row.image.packed_file.data for row in about.maps} == {shown(100), shown(120)}
    after = counts(photo.bpy)
    assert after == before | {"images": before["images"] + 1}
    assert photo.photo_keeping.whole(about, about.versions[2].recipe)["latent_maps"] == {
        "body/photo": photo.messages.inline(shown(120))}  # fmt: skip
    about.versions.remove(2)
    photo.photo_keeping.prune(about)
    assert counts(photo.bpy) == before


def test_nothing_is_left_of_people_who_came_and_went(photo: SimpleNamespace) -> None:
    bpy = photo.bpy
    before = counts(bpy)
    for with_rig in (True, False):
        root = insert(photo, packet(100), with_rig=with_rig)
        human = photo.packet.read(packet(101, seed=2))
        top = photo.replacing.replace(bpy.context, root, human, not with_rig)
        top.populace.fill("0" * 32, human)
        assert [row.sha256 for row in top.populace.maps]
        kept = photo.photo_keeping.images_of([top])
        photo.replacing._remove({top, *top.children_recursive}, [], set())
        photo.photo_keeping.drop(kept)
        bpy.data.orphans_purge(do_recursive=True)
        bpy.data.batch_remove([c for c in bpy.data.collections if "populace_batch" in c])
        assert counts(bpy) == before


def test_a_failed_insertion_leaves_no_map(photo: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    before = counts(photo.bpy)
    monkeypatch.setattr(photo.photo_keeping, "prune", lambda about: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        insert(photo, packet(100))
    photo.bpy.data.orphans_purge()
    assert counts(photo.bpy) == before


def test_undo_and_redo_keep_them(photo: SimpleNamespace) -> None:
    bpy = photo.bpy
    insert(photo, packet(100))
    bpy.ops.ed.undo_push(message="insert")
    images = len(bpy.data.images)
    for _ in range(5):
        bpy.ops.ed.undo()
        assert not [o for o in bpy.data.objects if o.populace.uuid]
        bpy.ops.ed.redo()
    assert len(bpy.data.images) == images
    root = next(o for o in bpy.data.objects if o.populace.uuid)
    assert root.populace.whole_recipe["latent_maps"]["body/photo"] == photo.messages.inline(shown(100))


def test_a_map_that_somebody_deleted_is_left_out(photo: SimpleNamespace) -> None:
    root = insert(photo, packet(100))
    photo.bpy.data.images.remove(root.populace.maps[0].image)
    assert photo.editing.request(root).latent_maps == {}


@pytest.mark.parametrize("scale_length", [1.0, 0.01])
def test_the_camera_sees_what_the_photo_saw(photo: SimpleNamespace, tmp_path: Path, scale_length: float) -> None:
    """Points of the packet land on the pixels that the generator's own camera gives them."""
    bpy = photo.bpy
    bpy_extras = importlib.import_module("bpy_extras.object_utils")
    mathutils = importlib.import_module("mathutils")
    bpy.context.scene.unit_settings.scale_length = scale_length
    root = insert(photo, packet(100), location=(3.0 / scale_length, -2.0 / scale_length, 0.5 / scale_length))
    root.rotation_mode, root.rotation_euler.z = "XYZ", 0.7
    made = photo.photo_camera.add(bpy.context, root, FACTS, shown(90), "me.jpg")
    bpy.context.view_layer.update()
    scene = bpy.context.scene
    assert (scene.camera, scene.render.resolution_x, scene.render.resolution_y) == (made, *SIZE)
    units = 1 / scale_length
    for point in ([0.1, 0.9, 0.0], [0.4, 1.7, 0.2], [-0.3, 0.0, -0.2]):
        local = np.linalg.inv(C2W) @ [*point, 1.0]
        tan = math.tan(FOV / 2)
        wanted = (0.5 + local[0] / -local[2] / tan / 2 * SIZE[1] / SIZE[0], 0.5 + local[1] / -local[2] / tan / 2)
        world = root.matrix_world @ (mathutils.Vector((point[0], -point[2], point[1])) * units)
        seen = bpy_extras.world_to_camera_view(scene, made, world)
        assert tuple(seen.xy) == pytest.approx(wanted, abs=1e-5)
    background = made.data.background_images[0]
    assert bytes(background.image.packed_file.data) == shown(90)
    assert background.image.filepath == "//me.jpg"
    assert made.data.show_background_images


@pytest.mark.parametrize("camera", [
    None, {"c2w": [[1, 0], [0, 1]], "fov_y_rad": 1, "width": 5, "height": 5}, {**FACTS["camera"], "fov_y_rad": 9.0},
    {**FACTS["camera"], "width": 0},
])  # fmt: skip
def test_a_camera_that_is_none_leaves_nothing(photo: SimpleNamespace, camera: Any) -> None:
    root = insert(photo, packet(100))
    before = counts(photo.bpy), len(photo.bpy.data.cameras)
    with pytest.raises(photo.messages.BackendError, match="no camera"):
        photo.photo_camera.add(photo.bpy.context, root, {"camera": camera}, shown(90), "me")
    assert (counts(photo.bpy), len(photo.bpy.data.cameras)) == before


def jpeg(orientation: int, order: str = "<") -> bytes:
    tiff = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    tiff += struct.pack(order + "HHHIHH", 1, 0x0112, 3, 1, orientation, 0)
    exif = b"Exif\0\0" + tiff
    return b"\xff\xd8\xff\xe0\0\4ab\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + b"\xff\xda"


@pytest.mark.parametrize("order", ["<", ">"])
def test_how_a_photo_is_turned(photo: SimpleNamespace, order: str) -> None:
    assert [photo.photo_camera.orientation(jpeg(n, order)) for n in range(10)] == [1, 1, 2, 3, 4, 5, 6, 7, 8, 1]
    for data in (b"", b"\xff\xd8", shown(3), jpeg(6)[:30], b"\xff\xd8" + b"\xff" * 40):
        assert photo.photo_camera.orientation(data) == 1


@pytest.fixture
def asked(photo: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Requests that the operators make; whoever is asked for arrives at once."""
    found: list[Any] = []

    class Client:
        def __init__(self, *_: Any) -> None:
            pass

        def generate_all(self, requests: Any) -> Any:
            for request in requests:
                found.append(request)
                yield photo.packet.read(packet(100))

    monkeypatch.setattr(importlib.import_module(f"{PACKAGE}.actions"), "Client", Client)
    return found


def test_a_photo_becomes_a_request(photo: SimpleNamespace, asked: list[Any], tmp_path: Path) -> None:
    bpy, path = photo.bpy, tmp_path / "me ö 中.png"
    path.write_bytes(shown(90))
    assert bpy.ops.populace.from_photo(filepath=str(path), steps=20, delight=False, reference=True,
                                       texture_size="512") == {"FINISHED"}  # fmt: skip
    request = asked[0]
    assert request.photos == [{"image": str(path), "mask": None, "person": 0}]
    assert (request.pose, request.texture_size) == ("photo", 512)
    assert request.inversion["steps"] == 20
    assert request.inversion["delight"] is False
    root = photo.properties.active_human(bpy.context)
    assert json.loads(root.populace.photo) == FACTS
    assert bpy.context.scene.camera.parent == root
    assert "populace.set_pose" in draw(photo, "POPULACE_PT_human").buttons or photo.tasks.session() is None


def test_several_files_are_photos_of_one_person(photo: SimpleNamespace, asked: list[Any], tmp_path: Path) -> None:
    for name in ("a.jpg", "b.webp", "mask.png"):
        (tmp_path / name).write_bytes(shown(90))
    assert photo.bpy.ops.populace.from_photo(
        directory=str(tmp_path), files=[{"name": "a.jpg"}, {"name": "b.webp"}], as_posed=False, pose="walking",
        mask=str(tmp_path / "mask.png"), person=1) == {"FINISHED"}  # fmt: skip
    assert asked[0].photos == [{"image": str(tmp_path / "a.jpg"), "mask": str(tmp_path / "mask.png"), "person": 1},
                               {"image": str(tmp_path / "b.webp"), "mask": None, "person": 1}]  # fmt: skip
    assert asked[0].pose == "walking"


@pytest.mark.parametrize(("names", "why"), [
    ([], "No photo was chosen"), (["there is none.png"], "cannot be read"), (["notes.txt"], "is not a photo"),
    ([f"{i}.png" for i in range(9)], "9 photos are too many"),
])  # fmt: skip
def test_what_cannot_be_a_photo_is_told_at_once(
    photo: SimpleNamespace, asked: list[Any], tmp_path: Path, names: list[str], why: str
) -> None:
    (tmp_path / "notes.txt").write_text("no")
    with pytest.raises(RuntimeError, match=why):
        photo.bpy.ops.populace.from_photo(directory=str(tmp_path), files=[{"name": name} for name in names])
    assert not asked


def test_a_large_file_is_told_at_once(photo: SimpleNamespace, asked: list[Any], tmp_path: Path) -> None:
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(photo.messages.MAX_IMAGE_BYTES + 1)
    with pytest.raises(RuntimeError, match="larger than 64 MiB"):
        photo.bpy.ops.populace.from_photo(filepath=str(tmp_path / "large.png"))


def test_poses_of_the_photo_of_rest_and_of_the_library(photo: SimpleNamespace, asked: list[Any]) -> None:
    bpy = photo.bpy
    root = insert(photo, packet(100, pose="rest", joint_rotations=FACTS["rotations"]))
    assert photo.editing.request(root).joint_rotations == FACTS["rotations"], "an edit keeps the pose"
    for pose, turns in (("rest", None), ("walking", None), ("photo", FACTS["rotations"])):
        root.pose.bones["spine"].rotation_quaternion = (0.5, 0.5, 0.5, 0.5)  # by hand: it gives way
        assert bpy.ops.populace.set_pose(pose=pose) == {"FINISHED"}
        assert (asked[-1].pose, asked[-1].joint_rotations) == (pose.replace("photo", "rest"), turns)
        assert root.pose.bones["spine"].rotation_quaternion[:] != pytest.approx((0.5, 0.5, 0.5, 0.5))
    assert bpy.ops.populace.set_output(pose="walking") == {"FINISHED"}
    assert (asked[-1].pose, asked[-1].joint_rotations) == ("walking", None)
    assert bpy.ops.populace.set_output(pose="photo") == {"FINISHED"}
    assert (asked[-1].pose, asked[-1].joint_rotations) == ("rest", FACTS["rotations"])
    assert "photo" in photo.properties.pose_names(bpy.context.scene.populace, bpy.context, "")


def test_a_drop_is_for_photos_on_a_view(photo: SimpleNamespace) -> None:
    handler = photo.bpy.types.POPULACE_FH_photo
    assert handler.bl_import_operator == "populace.from_photo"
    assert set(handler.bl_file_extensions.split(";")) == {".png", ".jpg", ".jpeg", ".webp"}
    view = SimpleNamespace(area=SimpleNamespace(type="VIEW_3D"), mode="OBJECT")
    assert handler.poll_drop(view)
    assert not handler.poll_drop(SimpleNamespace(area=SimpleNamespace(type="IMAGE_EDITOR"), mode="OBJECT"))
    assert not handler.poll_drop(SimpleNamespace(area=view.area, mode="EDIT_MESH"))


def test_python_that_makes_the_person_again_has_all_of_it(photo: SimpleNamespace, asked: list[Any]) -> None:
    root = insert(photo, packet(100, joint_rotations=FACTS["rotations"], pose="rest"))
    request = photo.editing.request(root)
    eval(photo.snippets.person(request, True), {"bpy": photo.bpy})
    assert (asked[0].latents, asked[0].latent_maps) == (request.latents, request.latent_maps)
    assert asked[0].joint_rotations == FACTS["rotations"]


def test_a_favourite_takes_the_maps_along(photo: SimpleNamespace, asked: list[Any]) -> None:
    root = insert(photo, packet(100))
    kept = photo.history.keep(root, "me")
    try:
        assert photo.bpy.ops.populace.use_favourite(favourite=kept.id) == {"FINISHED"}
        assert asked[0].latent_maps == {"body/photo": photo.messages.inline(shown(100))}
    finally:
        photo.history.drop(kept.id)
