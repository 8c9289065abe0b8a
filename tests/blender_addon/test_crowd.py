# SPDX-License-Identifier: GPL-3.0-or-later
"""Crowds in Blender's data: what stands where, what one change touches, that nothing is left behind."""

from __future__ import annotations

import importlib
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.blender_addon import making
from tests.blender_addon.conftest import PACKAGE
from tests.blender_addon.test_scene import counts

LEVELS = 3
MAPS = sum(name.endswith(".png") for name in making.ball())
SAME = {"seed": 3, "spread": 0.0, "lods": LEVELS}


@pytest.fixture
def layout(addon: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The add-on with a generator that makes balls at once; `asked` collects what it was asked for."""
    for name in ("arrivals", "cast", "form", "operators", "footing", "placement"):
        setattr(addon, f"crowd_{name}", importlib.import_module(f"{PACKAGE}.crowd.{name}"))
    addon.asked = []

    class Balls:
        def __init__(self, *_: Any) -> None: ...

        def generate_all(self, requests: Any) -> Any:
            for request in requests:
                addon.asked.append(request)
                yield addon.packet.read(person(request.seed))

    monkeypatch.setattr(addon.crowd_arrivals, "Client", Balls)
    return addon


def person(seed: int = 0) -> bytes:
    """Three levels of detail of a ball."""
    meta = making.meta(LEVELS, rig=False, seed=seed)
    for i, part in enumerate(meta["parts"]):
        part.update(lod=i, name=f"human_LOD{i}" if i else "human")
    return making.pack(making.tensors([making.ball(12 >> i) for i in range(LEVELS)], rig=False), meta)


def make(layout: SimpleNamespace, **settings: Any) -> Any:
    """A crowd, by the operator that scripts call."""
    settings = {"people": 4, "placements": 12} | SAME | settings
    assert layout.bpy.ops.populace.make_crowd(**settings) == {"FINISHED"}
    return layout.crowd_cast.crowds(layout.bpy.context.scene)[-1]


def plane(bpy: Any, size: float = 10.0, height: float = 0.0) -> Any:
    bpy.ops.mesh.primitive_plane_add(size=size, location=(0, 0, height))
    return bpy.context.object


def points(layout: SimpleNamespace, crowd: Any) -> Any:
    layout.bpy.context.view_layer.update()
    return np.array([o.matrix_world.translation for o in layout.crowd_cast.placements(crowd)])


# -------------------------------------------------------------------------------------------------------------- making


def test_a_crowd_is_few_people_in_many_places(layout: SimpleNamespace) -> None:
    bpy = layout.bpy
    crowd = make(layout, people=4, placements=100, distance=0.9, gap=0.5)
    places = layout.crowd_cast.placements(crowd)
    assert len(places) == 100
    shown = Counter(o.instance_collection.name for o in places)
    assert set(shown.values()) == {25}
    assert len(bpy.data.images) == 4 * LEVELS * MAPS, "textures of people, not of placements"
    assert len(bpy.data.meshes) == 4 * LEVELS + 1, "and one manikin"
    at = points(layout, crowd)
    between = np.linalg.norm(at[:, None] - at[None], axis=2) + np.eye(100) * 9
    assert between.min() >= 0.9 - 1e-5
    assert [r.seed for r in layout.asked] == [3, 4, 5, 6]
    assert {(r.lods, r.faces, r.maps) for r in layout.asked} == {(3, 8000, "color")}
    assert len({r.pose for r in layout.asked}) == 4, "nobody stands like another"
    assert all(o.type == "EMPTY" for o in crowd.objects)
    assert not any(o.populace.uuid for o in bpy.context.view_layer.objects if o.visible_get())
    names = {c.name for c in bpy.context.scene.collection.children}
    assert names == {"Crowd"}, "one collection"


def test_viewport_and_render_see_different_levels(layout: SimpleNamespace) -> None:
    bpy = layout.bpy
    crowd = make(layout, people=1, placements=2)
    bpy.context.view_layer.update()

    def drawn() -> list[int]:
        graph = bpy.context.evaluated_depsgraph_get()
        return [len(i.object.data.polygons) for i in graph.object_instances if i.is_instance]

    coarse, full = len(making.ball(3)["faces"]), len(making.ball(12)["faces"])
    assert drawn() == [coarse, coarse]
    assert bpy.ops.populace.crowd_display(display="FULL") == {"FINISHED"}
    assert drawn() == [full, full]
    assert bpy.ops.populace.crowd_display(display="BOX") == {"FINISHED"}
    assert drawn() == [24, 24]
    body = next(o for o in bpy.data.objects if o.populace.uuid)
    assert not body.hide_render, "the render sees people"
    assert all(o.hide_render for o in bpy.data.objects if layout.crowd_cast.PROXY in o)
    assert layout.crowd_cast.settings(crowd)["display"] == "BOX"


def test_surface_curve_markers(layout: SimpleNamespace) -> None:
    bpy = layout.bpy
    floor = plane(bpy, 8.0, 2.0)
    crowd = make(layout, where="SURFACE", on=floor.name, distance=0.5)
    at = points(layout, crowd)
    assert np.allclose(at[:, 2], 2.0, atol=1e-6)
    assert np.abs(at[:, :2]).max() <= 4.0
    for kind, is_closed in (("bezier_curve", False), ("bezier_circle", True)):
        getattr(bpy.ops.curve, f"primitive_{kind}_add")(radius=5)
        curve = bpy.context.object
        curve.data.bevel_depth = 0.3
        curve.location.z = 1.0
        bpy.context.view_layer.update()
        crowd = make(layout, where="CURVE", on=curve.name, facing="ALONG", placements=8, distance=0.5, jitter=0.0)
        at = points(layout, crowd)
        assert np.allclose(at[:, 2], 1.0, atol=1e-5), "on the curve, not on its bevel"
        step = np.linalg.norm(np.diff(at, axis=0), axis=1)
        assert step.min() > 0.5
        if is_closed:
            assert np.allclose(np.linalg.norm(at[:, :2], axis=1), 5, atol=0.02)
            assert np.ptp(step) < 0.05 * step.mean()
            turns = np.array([o.rotation_euler.z for o in layout.crowd_cast.placements(crowd)])
            ahead = np.stack([np.sin(turns), -np.cos(turns)], 1)
            assert np.abs((ahead * at[:, :2]).sum(1)).max() < 0.4, "across the radius"
    assert not [c for c in bpy.data.curves if not c.users]
    bpy.ops.object.select_all(action="DESELECT")
    for i in range(3):
        bpy.ops.object.empty_add(location=(i * 3, 1, 0.5), rotation=(0, 0, 0.3 * i))
    bpy.ops.object.select_all(action="SELECT")
    for o in bpy.context.selected_objects:
        o.select_set(o.type == "EMPTY" and layout.crowd_cast.PLACEMENT not in o)
    crowd = make(layout, where="MARKERS", facing="ALONG")
    places = layout.crowd_cast.placements(crowd)
    assert sorted(round(o.location.x, 3) for o in places) == [0, 3, 6]
    assert sorted(round(o.rotation_euler.z, 3) for o in places) == [0, 0.3, 0.6]


def test_facing_an_object(layout: SimpleNamespace) -> None:
    bpy = layout.bpy
    bpy.ops.object.empty_add(location=(50, 50, 3))
    stage = bpy.context.object
    crowd = make(layout, facing="TOWARDS", target=stage.name)
    for o in layout.crowd_cast.placements(crowd):
        to = np.array([50 - o.location.x, 50 - o.location.y])
        turn = o.rotation_euler.z
        assert np.dot(to / np.linalg.norm(to), (math.sin(turn), -math.cos(turn))) > 0.9999


def test_the_mix_reaches_the_generator(layout: SimpleNamespace) -> None:
    mix = [{"attribute": "sex", "value": [0, 0], "percent": 50}, {"attribute": "top", "value": "jacket", "percent": 25},
           {"attribute": "pose", "value": "sitting", "percent": 75}]  # fmt: skip
    make(layout, people=8, mix=json.dumps(mix))
    sets = [edit["values"] for r in layout.asked for edit in r.edits]
    assert sum(values.get("sex") == 0 for values in sets) == 4
    assert sum(values.get("top") == "jacket" for values in sets) == 2
    assert sum(r.pose == "sitting" for r in layout.asked) == 6


def test_wrong_settings_are_told(layout: SimpleNamespace) -> None:
    bpy = layout.bpy
    before = counts(bpy)
    for settings, sentence in (
        ({"where": "SURFACE"}, "Choose the object to stand on"), ({"where": "CURVE"}, "Choose the curve"),
        ({"where": "SURFACE", "on": "nothing"}, "no object nothing"), ({"facing": "TOWARDS"}, "to look at"),
        ({"mix": "{"}, "mix is not JSON"), ({"mix": "[3]"}, "mix is not JSON"), ({"where": "MARKERS"}, "Select"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=sentence):
            make(layout, **settings)
    assert counts(bpy) == before
    steep = plane(bpy)
    steep.rotation_euler.x = 1.2
    bpy.context.view_layer.update()
    with pytest.raises(RuntimeError, match="too steep"):
        make(layout, where="SURFACE", on=steep.name)
    for name in ("update_crowd", "make_missing", "cancel_crowd", "reseed_placement", "swap_placement", "update_lods",
                 "crowd_display", "remove_crowd", "crowd_form"):  # fmt: skip
        assert not getattr(bpy.ops.populace, name).poll()


# ------------------------------------------------------------------------------------------------------------- changes


def state(layout: SimpleNamespace, crowd: Any) -> list[tuple[Any, ...]]:
    return [(tuple(o.location), o.rotation_euler.z, o[layout.crowd_cast.PERSON], o.instance_collection.name)
            for o in layout.crowd_cast.placements(crowd)]  # fmt: skip


def test_a_new_person_for_one_placement_changes_only_that_one(layout: SimpleNamespace) -> None:
    bpy = layout.bpy
    crowd = make(layout)
    before, images = state(layout, crowd), len(bpy.data.images)
    chosen = layout.crowd_cast.placements(crowd)[5]
    bpy.ops.object.select_all(action="DESELECT")
    assert not bpy.ops.populace.reseed_placement.poll()
    chosen.select_set(True)
    assert bpy.ops.populace.reseed_placement(seed=77) == {"FINISHED"}
    after = state(layout, crowd)
    assert [i for i, (a, b) in enumerate(zip(before, after)) if a != b] == [5]
    assert layout.asked[-1].seed == 77
    assert len(bpy.data.images) == images + LEVELS * MAPS
    assert bpy.ops.populace.reseed_placement(seed=78) == {"FINISHED"}
    assert len(bpy.data.images) == images + LEVELS * MAPS, "the one before is gone"
    assert bpy.ops.populace.swap_placement() == {"FINISHED"}
    assert len(bpy.data.images) == images
    assert [a == b for a, b in zip(before, state(layout, crowd))].count(False) <= 1


def test_whoever_stood_nowhere_but_where_somebody_new_came_is_not_kept(layout: SimpleNamespace) -> None:
    bpy = layout.bpy
    crowd = make(layout, people=6, placements=6)
    meshes, images = len(bpy.data.meshes), len(bpy.data.images)
    for seed, chosen in enumerate(layout.crowd_cast.placements(crowd)[:2], 77):
        bpy.ops.object.select_all(action="DESELECT")
        chosen.select_set(True)
        assert bpy.ops.populace.reseed_placement(seed=seed) == {"FINISHED"}
    assert len(layout.crowd_cast.people(crowd)) == 6
    assert (len(bpy.data.meshes), len(bpy.data.images)) == (meshes, images)
    assert bpy.ops.populace.swap_placement() == {"FINISHED"}
    assert len(layout.crowd_cast.people(crowd)) == 5, "made for that place alone"
    bpy.ops.object.select_all(action="DESELECT")
    layout.crowd_cast.placements(crowd)[3].select_set(True)
    assert bpy.ops.populace.swap_placement() == {"FINISHED"}
    assert len(layout.crowd_cast.people(crowd)) == 5, "one of the cast can be had back"


def test_applying_settings_keeps_who_fits_them(layout: SimpleNamespace) -> None:
    crowd = make(layout, people=4, placements=12)
    chosen = layout.crowd_cast.placements(crowd)[2]
    chosen.select_set(True)
    layout.bpy.context.view_layer.objects.active = chosen
    layout.bpy.ops.populace.reseed_placement(seed=90)
    mine = chosen[layout.crowd_cast.PERSON]
    layout.asked.clear()
    assert layout.bpy.ops.populace.update_crowd(people=6, placements=20, **SAME) == {"FINISHED"}
    assert [r.seed for r in layout.asked] == [7, 8]
    assert len(layout.crowd_cast.placements(crowd)) == 20
    assert layout.crowd_cast.placements(crowd)[2][layout.crowd_cast.PERSON] == mine, "chosen by hand"
    assert layout.bpy.ops.populace.update_crowd(people=2, placements=2, **SAME) == {"FINISHED"}
    assert len(layout.crowd_cast.people(crowd)) == 2
    assert len(layout.bpy.data.meshes) == 2 * LEVELS + 1


def test_levels_follow_the_camera(layout: SimpleNamespace) -> None:
    bpy = layout.bpy
    crowd = make(layout, people=2, placements=9, gap=9.1, jitter=0.0)  # every 10 m
    assert not bpy.ops.populace.update_lods.poll()
    bpy.ops.object.camera_add(location=(-10, -10, 1))
    bpy.context.scene.camera = bpy.context.object
    bpy.context.view_layer.update()
    assert bpy.ops.populace.update_lods() == {"FINISHED"}

    def shown() -> list[int]:
        return [o.instance_collection[layout.crowd_cast.LEVEL] for o in layout.crowd_cast.placements(crowd)]

    assert shown() == [0, 1, 2, 1, 1, 2, 2, 2, 2]
    bpy.context.scene.camera.location = (10, 10, 1)
    bpy.context.view_layer.update()
    who = [o[layout.crowd_cast.PERSON] for o in layout.crowd_cast.placements(crowd)]
    assert bpy.ops.populace.update_lods() == {"FINISHED"}
    assert shown() == [2, 2, 2, 2, 1, 1, 2, 1, 0]
    assert who == [o[layout.crowd_cast.PERSON] for o in layout.crowd_cast.placements(crowd)]


def test_saved_reopened_and_changed(layout: SimpleNamespace, tmp_path: Path) -> None:
    bpy = layout.bpy
    floor = plane(bpy).name
    mix = json.dumps([{"attribute": "age_years", "value": [30, 40], "percent": 50},
                      {"attribute": "top_color", "value": [1, 0, 0], "percent": 20}])  # fmt: skip
    crowd = make(layout, where="SURFACE", on=floor, mix=mix)
    before = state(layout, crowd)
    path = str(tmp_path / "crowd ö.blend")
    bpy.ops.wm.save_as_mainfile(filepath=path)
    bpy.ops.wm.open_mainfile(filepath=path)
    crowd = layout.crowd_cast.active(bpy.context)
    assert state(layout, crowd) == before
    assert not layout.crowd_cast.missing(crowd)
    assert bpy.ops.populace.crowd_form() == {"FINISHED"}
    form = bpy.context.scene.populace_crowd
    assert (form.where, form.surface.name, form.people, form.placements) == ("SURFACE", floor, 4, 12)
    assert [(row.attribute, row.percent) for row in form.mix] == [("age_years", 50), ("top_color", 20)]
    assert form.mix[0].value == [30, 40]
    assert form.mix[1].value == pytest.approx([1, 0, 0])
    layout.asked.clear()
    assert bpy.ops.populace.update_crowd(where="SURFACE", on=floor, mix=mix, people=4, placements=12,
                                         **SAME) == {"FINISHED"}  # fmt: skip
    assert layout.asked == [], "nobody is made anew"
    assert state(layout, crowd) == before
    layout.crowd_cast.placements(crowd)[0].select_set(True)
    assert bpy.ops.populace.reseed_placement() == {"FINISHED"}


def test_settings_that_were_changed_are_told(layout: SimpleNamespace) -> None:
    crowd = make(layout)
    crowd[layout.crowd_cast.SETTINGS] = "[]"
    with pytest.raises(RuntimeError, match="cannot be read"):
        layout.bpy.ops.populace.crowd_form()


# ------------------------------------------------------------------------------------------------------------- leaving


def test_made_and_removed_a_hundred_times(layout: SimpleNamespace) -> None:
    bpy = layout.bpy
    before = counts(bpy)
    for i in range(100):
        crowd = make(layout, people=2, placements=4, seed=i)
        if i % 10 == 0:
            layout.crowd_cast.placements(crowd)[0].select_set(True)
            assert bpy.ops.populace.reseed_placement() == {"FINISHED"}
        assert bpy.ops.populace.remove_crowd() == {"FINISHED"}
        assert counts(bpy) == before


def test_undone_a_crowd_is_gone_and_redone_it_is_back(layout: SimpleNamespace) -> None:
    bpy = layout.bpy
    before = counts(bpy)
    for _ in range(5):
        assert bpy.ops.populace.make_crowd("EXEC_DEFAULT", True, people=2, placements=4) == {"FINISHED"}
        made = counts(bpy)
        bpy.ops.ed.undo()
        assert counts(bpy) == before
        bpy.ops.ed.redo()
        assert counts(bpy) == made
        bpy.ops.ed.undo()


def test_what_the_user_put_into_it_stays(layout: SimpleNamespace) -> None:
    bpy = layout.bpy
    crowd = make(layout)
    mine = plane(bpy)
    bpy.context.scene.collection.objects.unlink(mine)
    crowd.objects.link(mine)
    assert bpy.ops.populace.remove_crowd() == {"FINISHED"}
    assert [o.name for o in bpy.context.scene.objects] == [mine.name]


def test_a_failure_while_making_leaves_nothing(layout: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    before = counts(layout.bpy)

    def fails(*_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(layout.crowd_placement, "assign", fails)
    with pytest.raises(RuntimeError, match="no room"):
        make(layout)
    assert counts(layout.bpy) == before


# -------------------------------------------------------------------------------------------------------------- panels


def drawn(layout: SimpleNamespace, panel: str) -> Any:
    from tests.blender_addon.recorder import Layout

    found = Layout(layout.bpy)
    module = importlib.import_module(f"{PACKAGE}.crowd.panel")
    getattr(module, panel).draw.__wrapped__(SimpleNamespace(layout=found), layout.bpy.context)
    return found


def test_the_panels_draw_what_is_there(layout: SimpleNamespace) -> None:
    bpy = layout.bpy
    form = bpy.context.scene.populace_crowd
    for where, prop in (("SURFACE", "surface"), ("CURVE", "curve"), ("GRID", "gap"), ("MARKERS", "facing")):
        form.where = where
        found = drawn(layout, "POPULACE_PT_crowd")
        assert prop in found.props
        assert found.buttons == ["populace.add_share", "populace.make_crowd"]
    form.where, form.facing = "GRID", "TOWARDS"
    assert bpy.ops.populace.add_share(attribute="pose") == {"FINISHED"}
    assert bpy.ops.populace.add_share(attribute="words") == {"FINISHED"}
    assert [(row.attribute, row.percent) for row in form.mix] == [("pose", 50), ("pose", 50), ("words", 100)]
    assert bpy.ops.populace.remove_share(index=0) == {"FINISHED"}
    found = drawn(layout, "POPULACE_PT_crowd")
    assert {"target", "choice", "percent"} <= set(found.props)
    assert {"Mix (2)", "Pose", "Words, all"} <= set(found.texts)
    make(layout)
    found = drawn(layout, "POPULACE_PT_crowd")
    assert "4 people in 12 places" in found.texts
    assert {"populace.update_crowd", "populace.reseed_placement", "populace.remove_crowd"} <= set(found.buttons)
    assert {"populace.mark_asset", "populace.save_assets"} <= set(drawn(layout, "POPULACE_PT_assets").buttons)


# ---------------------------------------------------------------------------------------------------------- one by one


@pytest.fixture
def window(layout: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """As in a window, where people come later: `layout.jobs` waits for `come`."""
    layout.jobs = []

    def send(request: Any, target: Any) -> Any:
        layout.jobs.append(job := layout.session.Job(request, tag=target))
        layout.tasks.working_session().jobs[job.id] = job
        return job

    def come() -> None:
        job = layout.jobs.pop(0)
        job.status = layout.messages.Status(job.id, "done", fraction=1.0)
        job.human = layout.packet.read(person(job.request.seed))
        layout.tasks.pump()
        assert job.taken
        layout.last = job

    layout.come = come
    monkeypatch.setattr(layout.tasks, "send", send)
    monkeypatch.setattr(layout.crowd_arrivals, "_must_wait", lambda wait: wait)
    return layout


def test_arrivals_are_part_of_the_crowds_undo_step(window: SimpleNamespace, capfd: pytest.CaptureFixture[str]) -> None:
    bpy = window.bpy
    before = counts(bpy)

    def steps() -> list[str]:
        capfd.readouterr()
        bpy.context.window_manager.print_undo_steps()
        return [line for line in capfd.readouterr().out.splitlines() if "name=" in line or "'" in line]

    bpy.ops.populace.make_crowd("EXEC_DEFAULT", True, people=3, placements=6)
    crowd = window.crowd_cast.active(bpy.context)
    assert len(window.crowd_cast.placements(crowd)) == 6, "places at once"
    assert all(o.instance_collection is not None for o in window.crowd_cast.placements(crowd))
    made = len(steps())
    assert drawn(window, "POPULACE_PT_crowd").buttons[2] == "populace.cancel_crowd"
    for left in (2, 1, 0):
        window.come()
        assert len(window.crowd_cast.missing(window.crowd_cast.active(bpy.context))) == left
    assert len(steps()) == made, "no step of their own"
    bpy.ops.ed.undo()
    assert counts(bpy) == before
    bpy.ops.ed.redo()
    crowd = window.crowd_cast.active(bpy.context)
    assert not window.crowd_cast.missing(crowd), "redone with everybody"

    window.crowd_cast.placements(crowd)[1].select_set(True)
    bpy.ops.populace.reseed_placement("EXEC_DEFAULT", True)
    made = len(steps())
    window.come()
    assert len(steps()) == made
    bpy.ops.ed.undo()
    assert len(window.crowd_cast.people(window.crowd_cast.active(bpy.context))) == 3


def test_cancelled_people_are_made_later_and_those_of_a_crowd_undone_never(window: SimpleNamespace) -> None:
    bpy = window.bpy
    before = counts(bpy)
    bpy.ops.populace.make_crowd("EXEC_DEFAULT", True, people=3, placements=6)
    window.come()
    assert not bpy.ops.populace.make_missing.poll(), "they are on the way"
    assert bpy.ops.populace.cancel_crowd() == {"FINISHED"}
    crowd = window.crowd_cast.active(bpy.context)
    assert len(window.crowd_cast.missing(crowd)) == 2, "who is here stays"
    window.jobs.clear()
    assert bpy.ops.populace.make_missing("EXEC_DEFAULT", True) == {"FINISHED"}
    assert len(window.jobs) == 2
    window.come()
    bpy.ops.ed.undo()
    bpy.ops.ed.undo()
    assert counts(bpy) == before
    window.come()
    assert "not in this file any more" in window.last.note
    assert counts(bpy) == before
