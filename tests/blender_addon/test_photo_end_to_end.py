# SPDX-License-Identifier: GPL-3.0-or-later
"""A photo becomes a person in Blender, from end to end over the real socket with the real backend."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.backend.test_photos import file, person_of, picture
from tests.blender_addon.conftest import PACKAGE
from tests.blender_addon.test_blender import draw, people, pump_until
from tests.blender_addon.test_editing import (
    CAPSULE,
    PATIENCE_S,
    at_work,  # noqa: F401  a fixture
    backend_home,  # noqa: F401  a fixture
)

OUTPUT = {name: value for name, value in CAPSULE.items() if name not in ("seed", "count")}


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "me ö 中.png"
    path.write_bytes(file(picture(person_of(5), lean=12.0)))
    return path


def ask(addon: SimpleNamespace, path: Path, steps: int) -> Any:
    """What the button does in a window: nothing waits, a tick inserts. Returns the job."""
    operators = importlib.import_module(f"{PACKAGE}.photo.operators")
    request = addon.messages.Request(photos=[path], inversion={"steps": steps}, **OUTPUT | {"texture_size": 512})
    return addon.tasks.send(request, operators.FromPhoto(addon.scene.Batch("me", 1, (0.0, 0.0, 0.0)), "me", str(path)))


def maps_of(root: Any) -> dict[str, bytes]:
    rows = {row.sha256: bytes(row.image.packed_file.data) for row in root.populace.maps}
    named = json.loads(root.populace.recipe).get("latent_maps", {})
    return {name: rows[sha] for name, sha in named.items()}


def turns(root: Any) -> Any:
    return np.array([bone.rotation_quaternion[:] for bone in root.pose.bones])


def test_a_photo_from_end_to_end(at_work: SimpleNamespace, photo: Path, tmp_path: Path) -> None:  # noqa: F811
    bpy = at_work.bpy
    assert bpy.ops.populace.from_photo(filepath=str(photo), steps=10, reference=True, **OUTPUT) == {"FINISHED"}
    root = people(bpy)[0]
    facts = json.loads(root.populace.photo)
    assert root.type == "ARMATURE"
    assert root.populace.family == "capsule"
    assert any(abs(bone.rotation_quaternion.w) < 0.9999 for bone in root.pose.bones), "leans as in the photo"
    assert set(facts["camera"]) >= {"c2w", "fov_y_rad", "width", "height"}
    assert bpy.context.scene.camera.parent == root
    kept = maps_of(root)
    assert kept

    # Saved, opened and changed: what the photo showed stays, byte for byte.
    path = str(tmp_path / "saved.blend")
    bpy.ops.wm.save_as_mainfile(filepath=path)
    bpy.ops.wm.open_mainfile(filepath=path)
    root = people(bpy)[0]
    assert maps_of(root) == kept
    bpy.context.view_layer.objects.active = root
    turned = turns(root)
    assert bpy.ops.populace.set_attributes(values='{"height_m": 1.9}') == {"FINISHED"}
    pump_until(at_work, lambda: people(bpy)[0].populace.height_m > 1.85, PATIENCE_S)
    root = people(bpy)[0]
    assert maps_of(root) == kept
    assert np.allclose(turns(root), turned, atol=1e-5)

    # Rest, and back.
    assert bpy.ops.populace.set_pose(pose="rest") == {"FINISHED"}
    pump_until(at_work, lambda: all(bone.rotation_quaternion.w > 0.9999 for bone in root.pose.bones), PATIENCE_S)
    assert bpy.ops.populace.set_pose(pose="photo") == {"FINISHED"}
    pump_until(at_work, lambda: any(bone.rotation_quaternion.w < 0.9999 for bone in root.pose.bones), PATIENCE_S)
    assert np.allclose(turns(root), turned, atol=1e-5)


def test_the_stages_are_told_and_a_tick_inserts(at_work: SimpleNamespace, photo: Path) -> None:  # noqa: F811
    bpy, job, stages = at_work.bpy, ask(at_work, photo, 200), list[str]()

    def arrived() -> bool:
        if job.status.stage not in stages:
            stages.append(job.status.stage)
        return len(people(bpy)) == 1

    pump_until(at_work, arrived, PATIENCE_S)
    assert "fit" in stages, stages
    assert json.loads(people(bpy)[0].populace.photo)["people"] == 1
    assert bpy.context.scene.camera.data.background_images[0].image.packed_file.data == photo.read_bytes()


def test_what_is_no_photo_says_so(at_work: SimpleNamespace, tmp_path: Path) -> None:  # noqa: F811
    bpy, path = at_work.bpy, tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"no picture" * 9)
    job = ask(at_work, path, 5)
    pump_until(at_work, lambda: job.status.ended, PATIENCE_S)
    assert job.status.error.code == "image_unreadable", job.status.error
    assert job.status.error.message in " ".join(draw(at_work, "POPULACE_PT_jobs").texts)
    Image.new("RGB", (200, 300), (120, 120, 120)).save(tmp_path / "nobody.png")
    with pytest.raises(RuntimeError, match="nobody in the photo"):
        bpy.ops.populace.from_photo(filepath=str(tmp_path / "nobody.png"), **OUTPUT)
    assert not people(bpy)


def test_a_photo_is_cancelled(at_work: SimpleNamespace, photo: Path) -> None:  # noqa: F811
    bpy, job = at_work.bpy, ask(at_work, photo, 1000)
    pump_until(at_work, lambda: job.status.stage == "fit", PATIENCE_S)
    assert bpy.ops.populace.cancel_job(job_id=job.id) == {"FINISHED"}
    pump_until(at_work, lambda: job.status.state == "cancelled", 20)
    assert not people(bpy)
