# SPDX-License-Identifier: GPL-3.0-or-later
"""Crowds with the real backend over the real socket: at once as scripts make them, one by one as the window does."""

from __future__ import annotations

import importlib
import json
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.blender_addon.conftest import PACKAGE
from tests.blender_addon.test_blender import pump_until
from tests.blender_addon.test_end_to_end import real  # noqa: F401  a fixture
from tests.blender_addon.test_scene import counts

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals")

SMALL = {"family": "capsule", "grid_resolution": 48, "faces": 1000, "texture_size": "512", "lods": 2, "poses": "REST"}
MIX = [{"attribute": "pattern", "value": "plain", "percent": 50},
       {"attribute": "height_m", "value": [1.6, 1.7], "percent": 25}]  # fmt: skip


@pytest.fixture
def layout(real: SimpleNamespace) -> SimpleNamespace:  # noqa: F811
    for name in ("arrivals", "cast"):
        setattr(real, f"crowd_{name}", importlib.import_module(f"{PACKAGE}.crowd.{name}"))
    return real


def test_made_at_once_saved_and_changed(layout: SimpleNamespace, tmp_path: Path) -> None:
    bpy = layout.bpy
    assert bpy.ops.populace.make_crowd(people=4, placements=8, mix=json.dumps(MIX), **SMALL) == {"FINISHED"}
    crowd = layout.crowd_cast.active(bpy.context)
    bodies = [o for o in bpy.data.objects if o.populace.uuid]
    assert len(bodies) == 4
    said = [json.loads(o.populace.attributes) for o in bodies]
    plain = Counter(attributes["pattern"] for attributes in said)["plain"]
    assert plain >= 2, "the quota, and whoever is plain anyhow"
    assert sum(1.6 <= round(attributes["height_m"], 3) <= 1.7 for attributes in said) >= 1
    bpy.context.view_layer.update()
    graph = bpy.context.evaluated_depsgraph_get()
    soles = [min((i.matrix_world @ v.co).z for v in i.object.data.vertices)
             for i in graph.object_instances if i.is_instance]  # fmt: skip
    assert soles == pytest.approx([0] * 8, abs=0.02), "the coarsest level stands on the floor"
    path = str(tmp_path / "crowd.blend")
    bpy.ops.wm.save_as_mainfile(filepath=path)
    bpy.ops.wm.open_mainfile(filepath=path)
    crowd = layout.crowd_cast.active(bpy.context)
    places = layout.crowd_cast.placements(crowd)
    before = [o[layout.crowd_cast.PERSON] for o in places]
    places[3].select_set(True)
    assert bpy.ops.populace.reseed_placement(seed=9) == {"FINISHED"}
    after = [o[layout.crowd_cast.PERSON] for o in layout.crowd_cast.placements(crowd)]
    assert [a == b for a, b in zip(before, after)].count(False) == 1
    assert not layout.crowd_cast.missing(crowd)
    with pytest.raises(RuntimeError, match="nobody"):
        bpy.ops.populace.make_crowd(people=1, placements=1, **SMALL | {"family": "nobody"})


def test_people_arrive_one_by_one(layout: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    bpy = layout.bpy
    monkeypatch.setattr(layout.crowd_arrivals, "_must_wait", lambda wait: wait)
    before = counts(bpy)
    bpy.ops.populace.make_crowd("EXEC_DEFAULT", True, people=3, placements=6, **SMALL)
    crowd = layout.crowd_cast.active(bpy.context)
    assert len(layout.crowd_cast.missing(crowd)) == 3
    seen = set()
    pump_until(
        layout, lambda: seen.add(len(layout.crowd_cast.missing(crowd))) or not layout.crowd_cast.missing(crowd), 300
    )
    assert seen == {0, 1, 2, 3}
    assert not layout.crowd_arrivals.on_the_way(crowd)
    bpy.ops.ed.undo()
    assert counts(bpy) == before
