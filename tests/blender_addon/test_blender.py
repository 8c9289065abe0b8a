# SPDX-License-Identifier: GPL-3.0-or-later
"""The add-on inside Blender: registration, operators, the pump, the panel, undo and file load. The backend is faked."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.blender_addon import making
from tests.blender_addon.conftest import PACKAGE
from tests.blender_addon.recorder import Layout
from tests.blender_addon.test_client import script
from tests.blender_addon.test_scene import counts

JOBS = "POPULACE_PT_jobs"
HUMAN = ("POPULACE_PT_human", "POPULACE_PT_attributes", "POPULACE_PT_parts", "POPULACE_PT_variants", "POPULACE_PT_mix",
         "POPULACE_PT_output", "POPULACE_PT_details", "POPULACE_PT_history")  # fmt: skip

pytestmark = pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for the backend")


def pump_until(addon: SimpleNamespace, condition: Callable[[], Any], timeout_s: float = 30) -> None:
    """What Blender's timer would do."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"timed out; {addon.tasks.session() and vars(addon.tasks.session())}"
        addon.tasks.pump()
        time.sleep(0.005)


@pytest.fixture
def faked(addon: SimpleNamespace, home: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The add-on with a fake backend to start; `addon.mode("...")` chooses its behaviour."""

    def mode(word: str) -> None:
        preferences = addon.bpy.context.preferences.addons[PACKAGE].preferences
        preferences.python = script(home, monkeypatch, word)

    addon.mode = mode
    addon.home = home
    mode("good")
    yield addon
    state = addon.tasks.session()
    if state is not None and state.link in (addon.session.Link.READY, addon.session.Link.STARTING):
        state.shutdown()
        pump_until(addon, lambda: state.link is addon.session.Link.OFF)
    addon.bpy.context.preferences.addons[PACKAGE].preferences.python = ""
    end = time.monotonic() + 20
    while any(child.poll() is None for child in addon.process._left_alone):
        assert time.monotonic() < end
        time.sleep(0.02)
    addon.process._left_alone.clear()


def submit(addon: SimpleNamespace, count: int = 1, **batch: Any) -> list[Any]:
    made = addon.scene.Batch(f"Humans {count}", count, (0.0, 0.0, 0.0), **batch)
    addon.tasks.submit([addon.messages.Request(seed=i) for i in range(count)], made)
    return list(addon.tasks.session().jobs.values())[-count:]


def people(bpy: Any) -> list[Any]:
    return [o for o in bpy.data.objects if o.populace.uuid]


def draw(addon: SimpleNamespace, panel: str = "POPULACE_PT_main") -> Layout:
    layout = Layout(addon.bpy)
    cls = getattr(addon.panel, panel, None) or getattr(addon.human_panel, panel)
    cls.draw.__wrapped__(SimpleNamespace(layout=layout), addon.bpy.context)
    return layout


# ---------------------------------------------------------------------------------------------------- registration


def test_off_and_on_twenty_times_leaves_nothing(enabled: Any) -> None:
    bpy = enabled
    addon_utils = importlib.import_module("addon_utils")

    def ours() -> list[str]:
        found = [name for name in dir(bpy.types) if "POPULACE" in name.upper()]
        lists = [getattr(bpy.app.handlers, name) for name in dir(bpy.app.handlers) if not name.startswith("_")]
        found += [f"handler {f.__name__}" for handlers in lists if isinstance(handlers, list)
                  for f in handlers if "populace" in f.__module__]  # fmt: skip
        found += [f"{kind}.{name}" for kind in ("Scene", "Object", "WindowManager", "Collection", "Mesh")
                  for name in dir(getattr(bpy.types, kind)) if name.startswith("populace")]  # fmt: skip
        found += list(dir(bpy.ops.populace))
        return sorted(found)

    whole = ours()
    assert any(name.startswith("handler") for name in whole)
    for _ in range(20):
        addon_utils.disable(PACKAGE, default_set=True)
        assert ours() == []
        tasks = sys.modules[f"{PACKAGE}.tasks"]
        assert tasks._bridge is None
        for name, timer in (("tasks", "_tick"), ("chores", "_tick"), ("crowd.places", "_watch")):
            assert not bpy.app.timers.is_registered(getattr(sys.modules[f"{PACKAGE}.{name}"], timer))
        assert addon_utils.enable(PACKAGE, default_set=True)
        assert ours() == whole


def test_every_operator_explains_itself(addon: SimpleNamespace) -> None:
    for cls in (*addon.operators._CLASSES, *addon.edit_operators.CLASSES):
        assert cls.bl_idname.startswith("populace.")
        assert cls.__name__ == f"POPULACE_OT_{cls.bl_idname.partition('.')[2]}"
        assert cls.__doc__, cls
        assert not cls.__doc__.endswith("."), cls
        small = {"as", "by", "from", "the", "to"}  # in titles as Blender writes them
        assert all(word[0].isupper() for word in cls.bl_label.split() if word not in small), cls


def test_manifest_is_accepted_by_blenders_own_tool(enabled: Any) -> None:
    import subprocess

    scripts = Path(enabled.utils.system_resource("SCRIPTS"))
    tool = scripts / "addons_core" / "bl_pkg" / "cli" / "blender_ext.py"
    tags = scripts / "modules" / "_bpy_internal" / "extensions" / "tags.py"
    source = Path(__file__).resolve().parents[2] / "blender_addon"
    done = subprocess.run([sys.executable, str(tool), "validate", "--valid-tags", str(tags), str(source)],
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------ the way of a job


def test_two_people_through_the_pump(faked: SimpleNamespace) -> None:
    bpy = faked.bpy
    bpy.context.scene.cursor.location = (1, 2, 3)
    jobs = submit(faked, 2)
    assert people(bpy) == [], "submitting does not block"
    pump_until(faked, lambda: all(job.taken for job in jobs))
    assert len(people(bpy)) == 2
    assert {c.name for person in people(bpy) for c in person.users_collection} == {"Humans 2"}
    assert all(job.human is None for job in jobs), "no result is kept in memory"


def test_each_tick_inserts_one_person(faked: SimpleNamespace) -> None:
    jobs = submit(faked, 3)
    state = faked.tasks.session()
    while len(state.arrived) < 3:
        faked.tasks._bridge.run_loop(0.01)
    for expected in (1, 2, 3):
        faked.tasks.pump()
        assert len(people(faked.bpy)) == expected
    assert all(job.taken for job in jobs)


def test_insertion_is_one_named_undo_step(faked: SimpleNamespace, capfd: pytest.CaptureFixture[str]) -> None:
    bpy = faked.bpy
    before = counts(bpy)
    jobs = submit(faked)
    pump_until(faked, lambda: jobs[0].taken)
    capfd.readouterr()
    bpy.context.window_manager.print_undo_steps()
    steps = [line for line in capfd.readouterr().out.splitlines() if "Insert Human" in line or "start" in line]
    assert sum("Insert Human" in line for line in steps) == 1
    bpy.ops.ed.undo()
    assert people(bpy) == []
    assert counts(bpy) == before
    bpy.ops.ed.redo()
    assert len(people(bpy)) == 1


def test_a_busy_blender_does_not_lose_its_generator(faked: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """While Blender computes something for itself no tick comes. That is no silence of the generator."""
    monkeypatch.setattr(faked.tasks, "BUSY_BLENDER_S", 0.5)
    monkeypatch.setattr(faked.api, "STALL_TIMEOUT_S", 3.0)
    faked.bpy.ops.populace.start_backend()
    state = faked.tasks.session()
    pump_until(faked, lambda: state.link is faked.session.Link.READY)
    api, end = state._api, time.monotonic() + 0.2
    pump_until(faked, lambda: time.monotonic() > end)
    time.sleep(4.0)  # longer than the event stream may be silent
    end = time.monotonic() + 0.3
    pump_until(faked, lambda: time.monotonic() > end)
    assert state.link is faked.session.Link.READY
    assert state._api is api, "the same connection"


def test_a_person_is_fetched_and_inserted_again_after_undo(faked: SimpleNamespace) -> None:
    bpy = faked.bpy
    before = counts(bpy)
    job = submit(faked)[0]
    pump_until(faked, lambda: job.taken)
    bpy.ops.ed.undo()
    for _ in range(3):
        assert bpy.ops.populace.insert_result(job_id=job.id) == {"CANCELLED"}, "it is fetched once more"
        pump_until(faked, lambda: job.taken)
        assert len(people(bpy)) == 1
        bpy.ops.ed.undo()
        assert counts(bpy) == before


def test_insert_undo_redo_a_hundred_times_leaves_no_datablock_and_no_memory(faked: SimpleNamespace) -> None:
    """A person whom a leak would show: a third of a megabyte of mesh, kept a hundred times, is more than the
    allocator's noise."""
    bench = importlib.import_module(f"{PACKAGE}.bench")
    job = submit(faked)[0]
    pump_until(faked, lambda: job.taken)
    faked.bpy.ops.ed.undo()
    human = faked.packet.read(making.packet(rings=40, texture=256))
    size = sum(a.nbytes for part in human.parts for a in vars(part).values() if hasattr(a, "nbytes"))
    assert size > 300_000
    found = bench._cycles(faked.tasks.session(), job, human, 100)
    assert found["leaked"] == {}
    assert [found[name]["count"] for name in ("insert", "undo", "redo")] == [100] * 3
    assert people(faked.bpy) == []
    if found["grown_mib"] is not None:  # between the 20th and the last
        assert found["grown_mib"] < 80 * size / 2**20 / 4, "less than a quarter of what keeping them would take"


def test_a_leak_would_be_seen(faked: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measure itself: an insertion that makes a datablock without a step of undo, and one that keeps memory. What
    is kept is counted, for a process that has freed much before does not grow by so little."""
    bench, kept = importlib.import_module(f"{PACKAGE}.bench"), []
    job = submit(faked)[0]
    pump_until(faked, lambda: job.taken)
    faked.bpy.ops.ed.undo()

    def careless(*_: Any) -> None:
        kept.append(bytearray(b"x" * 400_000))

    human, insert = faked.packet.read(making.packet()), faked.tasks._insert
    monkeypatch.setattr(faked.tasks, "_insert", lambda *args: (insert(*args), careless()))
    measured = bench._resident_mib()
    assert measured is None or measured > 50
    monkeypatch.setattr(bench, "_resident_mib", lambda: 100 + sum(map(len, kept)) / 2**20)
    found = bench._cycles(faked.tasks.session(), job, human, 50)
    assert found["grown_mib"] == pytest.approx(39 * 400_000 / 2**20, rel=0.05)
    monkeypatch.setattr(bench, "_counts", lambda: {"meshes": len(kept)})
    assert bench._cycles(faked.tasks.session(), job, human, 2)["leaked"] == {"meshes": 2}


def test_panels_are_redrawn_only_when_something_to_see_has_changed(
    faked: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(faked.tasks, "redraw", lambda: drawn.append(1))
    job = submit(faked)[0]
    pump_until(faked, lambda: job.taken)
    assert drawn
    faked.tasks.pump()
    drawn.clear()
    for _ in range(50):
        faked.tasks.pump()
    assert not drawn


def test_a_tick_that_fails_does_not_end_the_timer(
    faked: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(faked.tasks, "pump", lambda: 1 / 0)
    assert faked.tasks._tick() > 0
    assert "ZeroDivisionError" in caplog.text


def test_add_on_off_in_mid_job_and_on_again(faked: SimpleNamespace) -> None:
    addon_utils = importlib.import_module("addon_utils")
    submit(faked, 3)
    faked.tasks.pump()
    addon_utils.disable(PACKAGE, default_set=True)
    assert faked.tasks.session() is None
    assert not hasattr(faked.bpy.types.Object, "populace")
    assert addon_utils.enable(PACKAGE, default_set=True)
    faked.mode("good")  # the preferences went with it
    job = submit(faked)[0]
    pump_until(faked, lambda: job.taken)
    assert len(people(faked.bpy)) == 1


class _Blender:
    """bpy as a window has it, for the reasons to wait."""

    def __init__(self, bpy: Any, **jobs: bool) -> None:
        self.app = SimpleNamespace(background=False, is_job_running=lambda name: jobs.get(name, False))
        self.windows = [SimpleNamespace(view_layer=bpy.context.view_layer, modal_operators=[])]
        self.context = SimpleNamespace(window_manager=SimpleNamespace(windows=self.windows))


def test_results_wait_for_a_render_a_mode_and_a_modal_operator(
    faked: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, bpy = faked.tasks, faked.bpy
    job = submit(faked)[0]
    pump_until(faked, lambda: job.taken)
    jobs: dict[str, bool] = {}
    window = _Blender(bpy)
    window.app.is_job_running = lambda name: jobs.get(name, False)
    monkeypatch.setattr(tasks, "bpy", window)
    assert tasks._reason_to_wait() == ""
    jobs["RENDER"] = True
    assert tasks._reason_to_wait() == "Inserted after the render"
    jobs["RENDER"] = False
    window.windows[0].modal_operators.append(SimpleNamespace(name="Move"))
    assert tasks._reason_to_wait() == "Inserted after Move"
    tasks._bridge.modal_since -= tasks.MODAL_PATIENCE_S
    assert tasks._reason_to_wait() == "", "some run for ever"
    window.windows[0].modal_operators.clear()
    mesh = bpy.data.objects.new("Cube", bpy.data.meshes.new("Cube"))
    bpy.context.scene.collection.objects.link(mesh)
    bpy.context.view_layer.objects.active = mesh
    bpy.ops.object.mode_set(mode="EDIT")
    assert tasks._reason_to_wait() == "Leave Edit Mode to insert"
    bpy.ops.object.mode_set(mode="OBJECT")
    assert tasks._reason_to_wait() == ""
    monkeypatch.setattr(tasks, "bpy", bpy)


def test_while_a_render_runs_people_wait_and_come_after_it(
    faked: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = [True]
    monkeypatch.setattr(faked.tasks, "_reason_to_wait", lambda: "Inserted after the render" if running[0] else "")
    jobs = submit(faked, 2)
    pump_until(faked, lambda: len(faked.tasks.session().arrived) == 2)
    faked.tasks.pump()
    assert people(faked.bpy) == []
    running[0] = False
    pump_until(faked, lambda: all(job.taken for job in jobs))
    assert len(people(faked.bpy)) == 2


def test_the_batchs_collection_deleted_during_a_job_is_made_anew(faked: SimpleNamespace) -> None:
    jobs = submit(faked, 2)
    while len(faked.tasks.session().arrived) < 2:
        faked.tasks._bridge.run_loop(0.01)
    faked.tasks.pump()
    (first,) = people(faked.bpy)
    faked.bpy.data.collections.remove(first.users_collection[0])
    pump_until(faked, lambda: all(job.taken for job in jobs))
    assert any("collection was gone" in job.note for job in jobs)


def test_undo_during_a_batch_makes_the_collection_anew_and_says_so(faked: SimpleNamespace) -> None:
    jobs = submit(faked, 2)
    pump_until(faked, lambda: jobs[0].taken or jobs[1].taken)
    last = jobs[1] if jobs[0].taken else jobs[0]
    if not last.taken:
        faked.bpy.ops.ed.undo()
        pump_until(faked, lambda: last.taken)
        assert "collection was gone" in last.note
    assert len(people(faked.bpy)) == 1


def test_file_load_during_a_job_puts_the_person_into_the_new_file(faked: SimpleNamespace) -> None:
    job = submit(faked)[0]
    faked.bpy.ops.wm.read_homefile(use_empty=True, use_factory_startup=True)
    assert "newly opened file" in job.note
    pump_until(faked, lambda: job.taken)
    assert len(people(faked.bpy)) == 1
    assert faked.tasks.session().link is faked.session.Link.READY, "the backend survives loading a file"


def test_failing_insertion_is_told_and_the_next_works(faked: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(faked.scene, "_link", fails)
    before = counts(faked.bpy)
    job = submit(faked)[0]
    pump_until(faked, lambda: job.taken)
    assert job.status.state == "failed"
    assert "no room" in job.status.error.hint
    assert counts(faked.bpy) == before
    monkeypatch.undo()
    monkeypatch.setenv("POPULACE_HOME", str(faked.home))
    job = submit(faked)[0]
    pump_until(faked, lambda: job.taken)
    assert len(people(faked.bpy)) == 1


def test_blocking_operator_as_scripts_use_it(faked: SimpleNamespace) -> None:
    bpy = faked.bpy
    bpy.context.scene.cursor.location = (0, 0, 2)
    assert bpy.ops.populace.generate(seed=3, count=2, with_rig=False) == {"FINISHED"}
    assert [person.type for person in people(bpy)] == ["MESH", "MESH"]
    assert {person.location.z for person in people(bpy)} == {2}
    faked.mode("garbage")
    (faked.home / "run" / "backend.json").unlink()
    with pytest.raises(RuntimeError, match="made of cheese"):
        bpy.ops.populace.generate(seed=3)
    with pytest.raises(RuntimeError, match="latents are not JSON"):
        bpy.ops.populace.generate(seed=3, latents="{")


def test_recipe_goes_back_into_the_form_and_the_clipboard(faked: SimpleNamespace) -> None:
    bpy = faked.bpy
    assert not bpy.ops.populace.copy_recipe.poll()
    asked = {"prompt": "tall", "edits": [{"op": "remove", "parts": ["top"]}], "pose": "sitting", "lods": 2}
    human = faked.packet.read(making.packet(seed=77, truncation_psi=0.25, texture_size=2048, faces=1234, **asked))
    root, _ = faked.scene.insert(bpy.context, human, faked.scene.Batch("H", 1, (0, 0, 0)))
    bpy.context.view_layer.objects.active = root.children[0]
    assert bpy.ops.populace.use_recipe() == {"FINISHED"}
    form = bpy.context.scene.populace
    assert (form.seed, form.texture_size, form.faces, form.family) == (77, "2048", 1234, "ball")
    assert form.truncation_psi == pytest.approx(0.25)
    assert not form.randomise_seed
    recipe = json.loads(root.populace.recipe)
    assert recipe.items() >= asked.items(), "the whole request is kept"
    request = faked.recipes.request_of(recipe)
    assert request.latents == faked.packet.recipe_latents(recipe)
    assert (request.pose, request.lods) == ("sitting", 2)
    assert (request.prompt, request.edits) == (None, []), "the latents have them in already"
    bpy.ops.populace.make_again()
    assert len(people(bpy)) == 2
    bpy.context.view_layer.objects.active = root
    root.populace.recipe = "{"
    with pytest.raises(RuntimeError, match="cannot be read"):
        bpy.ops.populace.make_again()


# ------------------------------------------------------------------------------------------------------- the panel


def test_panel_in_every_state(faked: SimpleNamespace) -> None:
    tasks = faked.tasks
    layout = draw(faked)
    assert "Generator is off" in layout.texts
    assert {"populace.start_backend", "populace.generate"} <= set(layout.buttons)
    assert {"seed", "count", "truncation_psi", "texture_size", "faces", "family"} <= set(layout.props)

    faked.bpy.ops.populace.start_backend()
    state, link = tasks.session(), faked.session.Link
    assert state.link is link.STARTING
    assert "populace.stop_backend" in draw(faked).buttons
    seen = set()
    pump_until(faked, lambda: seen.update(draw(faked).texts) or state.link is link.READY)
    assert any(text.startswith("Starting Python") for text in seen)
    assert "Ready on CPU" in draw(faked).texts
    assert not faked.bpy.ops.populace.start_backend.poll()

    jobs = submit(faked, 12)
    assert "Making 12 people" in draw(faked).texts
    seen.clear()
    pump_until(faked, lambda: seen.update(draw(faked, JOBS).texts) or all(job.taken for job in jobs))
    assert "Surface 50%, 1 s left" in seen
    layout = draw(faked, JOBS)
    assert "and 4 more" in layout.texts
    assert layout.buttons.count("populace.insert_result") == faked.panel.MAX_ROWS

    faked.bpy.context.view_layer.objects.active = people(faked.bpy)[0]
    for name in HUMAN:
        assert getattr(faked.human_panel, name).poll(faked.bpy.context)
    assert {"7", "1.80 m", "Ball", "abababababab", "0.0.1"} <= set(draw(faked, "POPULACE_PT_details").texts)
    assert "Made with other weights" not in str(draw(faked, "POPULACE_PT_human").texts)
    assert "populace.restore_version" in draw(faked, "POPULACE_PT_history").buttons
    assert {"populace.reroll", "populace.lock_part"} <= set(draw(faked, "POPULACE_PT_parts").buttons)
    assert "variation" in draw(faked, "POPULACE_PT_variants").props
    assert "mix" in draw(faked, "POPULACE_PT_mix").props, "all twelve are selected"
    assert "shape_keys" in draw(faked, "POPULACE_PT_output").props

    Error = faked.messages.BackendError
    for status in (
        {"state": "cancelled"}, {"state": "cancelling"}, {"state": "queued"}, {"state": "done"},
        {"state": "failed", "error": Error("x", "A long sentence. " * 20, "Do this.")},
    ):  # fmt: skip
        job = faked.session.Job(faked.messages.Request(seed=1), tag=None)
        job.status = faked.messages.Status(job.id, **status)
        job.note = "A note"
        state.jobs = {job.id: job}
        assert "A note" in draw(faked, JOBS).texts
    state.jobs = {}

    faked.bpy.ops.populace.stop_backend()
    assert "Stopping" in draw(faked).texts
    pump_until(faked, lambda: state.link is link.OFF)
    faked.mode("garbage")
    faked.bpy.ops.populace.start_backend()
    pump_until(faked, lambda: state.link is link.FAILED)
    layout = draw(faked)
    assert "Generator not available" in layout.texts
    assert any("cheese" in text for text in layout.texts)
    assert {"populace.start_backend", "populace.copy_error"} <= set(layout.buttons)
    assert faked.bpy.ops.populace.copy_error() == {"FINISHED"}

    faked.bpy.context.preferences.addons[PACKAGE].preferences.python = "/nowhere"
    state.connect()
    pump_until(faked, lambda: state.link is link.FAILED)
    assert "populace.choose_python" in draw(faked).buttons
    (faked.home / "run" / "backend.json").unlink(missing_ok=True)  # with one, somebody may be running
    with pytest.raises(RuntimeError, match="preferences"):
        faked.bpy.ops.populace.start_backend()


def test_draw_never_raises(addon: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addon.panel, "_draw_form", lambda *_: 1 / 0)
    layout = Layout(addon.bpy)
    addon.panel.POPULACE_PT_main.draw(SimpleNamespace(layout=layout), addon.bpy.context)
    assert "This panel could not be drawn" in layout.texts


def test_preferences_draw_with_and_without_a_generator(faked: SimpleNamespace) -> None:
    cls = faked.preferences.PopulacePreferences
    for python, sentence in (("", "Generator"), ("/nowhere", "No generator found")):
        prefs = faked.bpy.context.preferences.addons[PACKAGE].preferences
        if python:
            prefs.python = python
        layout = Layout(faked.bpy)
        cls.draw(SimpleNamespace(layout=layout, python=prefs.python, bl_rna=prefs.bl_rna), faked.bpy.context)
        assert any(text.startswith(sentence) for text in layout.texts)


def test_results_wait_while_the_user_edits(faked: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only in a window; the reason shows in the panel and goes away."""
    monkeypatch.setattr(faked.tasks, "_reason_to_wait", lambda: "Leave Edit Mode to insert")
    job = submit(faked)[0]
    pump_until(faked, lambda: faked.tasks.hold())
    faked.tasks.pump()
    assert people(faked.bpy) == []
    assert "Leave Edit Mode to insert" in draw(faked).texts
    monkeypatch.setattr(faked.tasks, "_reason_to_wait", lambda: "")
    pump_until(faked, lambda: job.taken)
    assert faked.tasks.hold() == ""
