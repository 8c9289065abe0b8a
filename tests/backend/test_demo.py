# SPDX-License-Identifier: GPL-3.0-or-later
"""The main job, small: three people from seeds through the real backend into a real Blender scene."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.backend.khronos import find_validator, validate

PROGRAM = """
import sys
from pathlib import Path
from backend import demo
demo.PICTURE_SIZE = (160, 90)
demo.run(Path(sys.argv[1]), 1, "capsule")
"""
LOOK = """
import json, sys, bpy
bpy.ops.wm.open_mainfile(filepath=sys.argv[1])
meshes = [o for o in bpy.data.objects if o.type == "MESH" and o.vertex_groups]
json.dump({"people": len(meshes), "floor": [min((o.matrix_world @ v.co).z for v in o.data.vertices) for o in meshes],
           "x": [o.matrix_world.translation.x for o in meshes],
           "posed": [sum(b.rotation_quaternion.angle > 0.01 for b in o.parent.pose.bones) for o in meshes],
           "packed": all(i.packed_file for i in bpy.data.images if i.source == "FILE")}, sys.stderr)
"""

pytestmark = pytest.mark.skipif(importlib.util.find_spec("bpy") is None, reason="bpy is not installed")


def python(code: str, *arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"POPULACE_HOME": str(home)}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment, check=True, capture_output=True,
                          text=True, timeout=300)  # fmt: skip


def test_demo_makes_three_different_people_in_a_scene(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = python(PROGRAM, str(out), home=tmp_path / "home")
    percents = [int(line.split("%")[0]) for line in done.stderr.splitlines() if "%" in line]
    assert percents == sorted(percents)
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()) == [
        "people.blend", "people.png", "people/person_000001.glb", "people/person_000002.glb",
        "people/person_000003.glb", "report.json",
    ]  # fmt: skip

    report = json.loads((out / "report.json").read_text())
    assert [person["seed"] for person in report["people"]] == [1, 2, 3]
    assert len({person["height_m"] for person in report["people"]}) == 3
    assert all(part["closed"] and part["components"] == 1 for person in report["people"] for part in person["parts"])
    assert all(person["stats"]["seconds"]["surface"] > 0 for person in report["people"])

    picture = Image.open(out / "people.png").convert("RGB")
    assert picture.size == (160, 90)
    assert len(set(picture.get_flattened_data() if hasattr(picture, "get_flattened_data") else picture.getdata())) > 500

    scene = json.loads(python(LOOK, str(out / "people.blend"), home=tmp_path / "home").stderr.splitlines()[-1])
    assert scene["people"] == 3
    assert scene["packed"]
    assert scene["floor"] == pytest.approx([0, 0, 0], abs=1e-5)
    assert len(set(scene["x"])) == 3
    assert min(scene["posed"]) > 3
    assert len({person["pose"] for person in report["people"]}) == 3
    for glb in (out / "people").iterdir():
        assert b'"rotation"' not in glb.read_bytes(), "files are in rest pose"
        if find_validator():
            issues = validate(glb)["issues"]
            assert issues["numErrors"] == issues["numWarnings"] == 0, issues["messages"]
