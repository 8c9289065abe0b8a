# SPDX-License-Identifier: GPL-3.0-or-later
"""Setting up the generator inside Blender: consent, online access, progress, every outcome. The installer is faked."""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.blender_addon.conftest import PACKAGE
from tests.blender_addon.recorder import Layout
from tests.blender_addon.test_chore import gone, is_alive

FAKE = Path(__file__).with_name("fake_installer.py")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and process groups")


@pytest.fixture
def setup(addon: SimpleNamespace, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The add-on as the full zip brings it, with a scripted installer; `setup.mode("...")` chooses its behaviour."""
    for name in ("chore", "chores", "setup.operators", "setup.panel"):
        setattr(addon, name.replace(".", "_"), importlib.import_module(f"{PACKAGE}.{name}"))
    monkeypatch.setattr(addon.setup_operators, "PROGRAM", FAKE)
    monkeypatch.setattr(addon.process, "find_command", lambda configured="": None)
    monkeypatch.setattr(addon.process, "_usual_pythons", lambda beside: iter(()))
    addon.setup_operators.refresh()
    known = addon.setup_operators.known
    known.wheel, known.version, known.plan = tmp_path / "populace-2.0-py3-none-any.whl", "2.0", {}
    addon.known = known
    addon.mode = lambda word: monkeypatch.setenv("FAKE_INSTALLER", word)
    addon.online = lambda on: setattr(addon.bpy.context.preferences.system, "use_online_access", on)
    # After an installation the disk is looked at again; the wheel is none of the files beside the add-on's source.
    real = addon.setup_operators.refresh

    def refresh() -> None:
        wheel, version = known.wheel, known.version
        real()
        known.wheel, known.version = wheel, version

    monkeypatch.setattr(addon.setup_operators, "refresh", refresh)
    yield addon
    addon.online(False)
    addon.chores.unregister()
    addon.chores.register()
    monkeypatch.undo()
    addon.setup_operators.refresh()
    known.plan = {}


def install(folder: Path, version: str, previous: str = "") -> None:
    """What a finished installation leaves on the disk."""
    for name in filter(None, (version, previous)):
        python = folder / "envs" / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.touch()
        record = {"version": name, "build": "cpu", "bytes": 1_400_000_000}
        (folder / "envs" / name / "populace-environment.json").write_text(json.dumps(record))
    (folder / "current.json").write_text(json.dumps({"current": version, "previous": previous}))


def draw(addon: Any, call: Callable[..., None], *args: Any) -> Layout:
    layout = Layout(addon.bpy)
    call(layout, *args)
    return layout


def panel(addon: Any) -> Layout:
    layout = Layout(addon.bpy)
    cls = addon.setup_panel.POPULACE_PT_setup
    assert cls.poll(addon.bpy.context)
    cls.draw.__wrapped__(SimpleNamespace(layout=layout), addon.bpy.context)
    return layout


def pump_until(addon: Any, condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        addon.chores.pump()
        time.sleep(0.01)


def test_without_online_access_the_button_is_grey_and_there_is_another_way(setup: Any) -> None:
    setup.online(False)
    ops = setup.bpy.ops.populace
    assert not ops.setup_backend.poll()
    assert ops.setup_backend_offline.poll()
    with pytest.raises(RuntimeError, match="Online access is off: allow it in Preferences"):
        ops.setup_backend(agree=True)
    shown = panel(setup)
    assert shown.buttons == ["populace.setup_backend_offline"]
    assert shown.props == ["use_online_access"]
    setup.online(True)
    assert ops.setup_backend.poll()
    assert not setup.setup_panel.POPULACE_PT_setup.poll(setup.bpy.context)  # nothing to say


def test_the_slim_add_on_says_what_it_lacks(setup: Any) -> None:
    setup.online(True)
    setup.known.wheel = None
    for operator in (setup.bpy.ops.populace.setup_backend, setup.bpy.ops.populace.setup_backend_offline):
        assert not operator.poll()
        with pytest.raises(RuntimeError, match="carries no generator"):
            operator()


def test_nothing_happens_without_consent(setup: Any) -> None:
    setup.online(True)
    setup.mode("good")
    with pytest.raises(RuntimeError, match="agree=True"):
        setup.bpy.ops.populace.setup_backend()
    assert setup.chores.current() is None


def test_installed_from_a_script(setup: Any, home: Path) -> None:
    setup.online(True)
    setup.mode("good")
    install(home / "data/backend", "2.0", "1.0")
    assert setup.bpy.ops.populace.setup_backend(agree=True) == {"FINISHED"}
    assert "Generator 1.2.3 is set up, 0 MB" in " ".join(panel(setup).texts)
    assert setup.known.installed["version"] == "2.0"
    shown = draw(setup, setup.setup_panel.draw_preferences, setup.bpy.context)
    assert any("Generator 2.0, processor only, 1.4 GB" in text for text in shown.texts)
    assert "Roll Back to 1.0" in shown.texts
    assert "Use 2.0 Again" not in shown.texts
    setup.bpy.ops.populace.dismiss_chore()
    assert setup.chores.current() is None
    assert not setup.setup_panel.POPULACE_PT_setup.poll(setup.bpy.context)
    for name in ("roll_back_backend", "uninstall_backend"):
        assert getattr(setup.bpy.ops.populace, name)() == {"FINISHED"}


def test_a_newer_generator_that_was_left_is_not_downloaded_again(setup: Any, home: Path) -> None:
    """After rolling back, what the add-on brings is the other environment: no button says to go back to it."""
    setup.online(True)
    setup.mode("good")
    install(home / "data/backend", "1.0", setup.known.version)
    setup.setup_operators.refresh()
    again = f"Use {setup.known.version} Again"
    shown = panel(setup)
    assert shown.buttons == ["populace.roll_back_backend"]
    assert again in shown.texts
    shown = draw(setup, setup.setup_panel.draw_preferences, setup.bpy.context)
    assert again in shown.texts
    assert "Set Up Again" in shown.texts
    assert not any(text.startswith(("Upgrade", "Roll Back")) for text in shown.texts)


def test_a_generator_that_still_runs_is_restarted_by_a_button(
    setup: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.online(True)
    setup.mode("good")  # it sets up 1.2.3
    install(home / "data/backend", "2.0", "1.0")
    assert setup.bpy.ops.populace.setup_backend(agree=True) == {"FINISHED"}
    assert panel(setup).buttons == ["populace.dismiss_chore"], "nothing runs"
    asked: list[bool] = []
    state = SimpleNamespace(link=setup.setup_operators.Link.READY, health=SimpleNamespace(version="1.2.3"),
                            shutdown=lambda start_again: asked.append(start_again))  # fmt: skip
    monkeypatch.setattr(setup.tasks, "session", lambda: state)
    monkeypatch.setattr(setup.tasks, "working_session", lambda: state)
    assert panel(setup).buttons == ["populace.dismiss_chore"], "the new one runs"
    state.health.version = "1.0"
    shown = panel(setup)
    assert "Generator 1.0 is still running." in shown.texts
    assert shown.buttons == ["populace.restart_backend", "populace.dismiss_chore"]
    assert setup.bpy.ops.populace.restart_backend() == {"FINISHED"}
    assert asked == [True]


def test_an_installer_that_lies_is_found_out(setup: Any) -> None:
    setup.online(True)
    setup.mode("good")
    with pytest.raises(RuntimeError, match="ended without a generator"):
        setup.bpy.ops.populace.setup_backend(agree=True)
    with pytest.raises(RuntimeError, match="No generator was set up here"):
        setup.bpy.ops.populace.uninstall_backend()


def test_a_failure_shows_what_to_do(setup: Any) -> None:
    setup.online(True)
    setup.mode("failing")
    with pytest.raises(RuntimeError, match="The disk is full"):
        setup.bpy.ops.populace.setup_backend(agree=True)
    shown = panel(setup)
    assert shown.texts[:2] == ["The disk is full.", "Free some space."]
    assert shown.buttons == ["populace.setup_backend", "populace.copy_setup_log", "populace.dismiss_chore"]


def test_from_a_folder_of_wheels(setup: Any, home: Path, tmp_path: Path) -> None:
    rna = setup.bpy.ops.populace.setup_backend_offline.get_rna_type().properties
    assert rna["filter_glob"].default == "*.whl"
    assert "filename" in rna, "else Blender's file browser shows an empty folder"
    setup.mode("good")
    install(home / "data/backend", "2.0")
    with pytest.raises(RuntimeError, match=r"no wheels in this folder.*pip download"):
        setup.bpy.ops.populace.setup_backend_offline(directory=str(tmp_path))
    (tmp_path / "torch-2.9-py3-none-any.whl").touch()
    assert setup.bpy.ops.populace.setup_backend_offline(directory=str(tmp_path)) == {"FINISHED"}


def test_progress_and_cancel(setup: Any) -> None:
    setup.online(True)
    setup.mode("slow")
    setup.setup_operators._start("install", when_ended=setup.setup_operators._installed)
    job = setup.chores.current()
    pump_until(setup, lambda: job.stage)
    shown = panel(setup)
    assert shown.texts[0] == "Downloading 25%"
    assert shown.texts[1] == "torch 50 of 200 MB"  # one figure alone is no pace
    job._take({"event": "progress", "stage": "Downloading", "fraction": 0.5})
    assert panel(setup).texts[1].endswith(" s left")
    assert not setup.bpy.ops.populace.setup_backend.poll()  # one at a time
    setup.bpy.ops.populace.cancel_chore()
    assert panel(setup).texts[0] == "Cancelling"
    pump_until(setup, lambda: job.ended)
    assert "Cancelled. What was downloaded is kept" in " ".join(panel(setup).texts)


def test_the_installer_does_not_outlive_the_add_on(setup: Any) -> None:
    setup.mode("slow")
    setup.setup_operators._start("install", when_ended=setup.setup_operators._installed)
    job = setup.chores.current()
    pump_until(setup, lambda: job.stage)
    pid = job._process.pid
    assert is_alive(pid)
    setup.chores.unregister()
    assert gone(pid)
    setup.chores.register()


PLAN = {
    "folder": "/data", "free_bytes": 70 * 10**9, "spare_bytes": 5 * 10**8, "gpu": "", "build": "cpu", "remark": "",
    "cached_bytes": 0, "installed": {}, "previous": {}, "version": "2.0", "python": "/usr/bin/python3.13",
    "python_version": "3.13.1", "problem": "", "hint": "",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "About 420 MB from download.pytorch.org and PyPI"),
        ({}, "About 1.5 GB of 70.0 GB free"),
        ({"free_bytes": 10**9}, "Not enough space: 2.4 GB are needed while installing"),
        ({"python": "", "problem": "No Python was found.", "hint": "Install one."}, "No Python was found."),
        ({"gpu": "RTX 4090", "build": "cuda"}, "PyTorch is free software; NVIDIA's CUDA libraries come under NVIDIA's "
                                               "own licence."),
        ({"installed": {"version": "1.0"}}, "The installed generator stays in use until the new one has proved to "
                                            "work."),
    ],
)  # fmt: skip
def test_the_dialog_says_what_it_costs(
    setup: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], says: str
) -> None:
    monkeypatch.setenv("FAKE_PLAN", json.dumps(PLAN | changes))
    setup.setup_operators._start("plan", when_ended=setup.setup_operators._planned)
    pump_until(setup, lambda: setup.known.plan_is_fresh)
    assert setup.chores.current() is None
    rna = setup.bpy.ops.populace.setup_backend.get_rna_type()
    operator = SimpleNamespace(build="auto", python="", bl_rna=rna)
    shown = draw(setup, setup.setup_panel.draw_plan, operator, setup.bpy.context)
    assert says in shown.texts
    assert shown.props == ["build", "python"]


def test_an_upgrade_is_offered(setup: Any, home: Path) -> None:
    setup.online(True)
    install(home / "data/backend", "1.0")
    setup.setup_operators.refresh()
    shown = panel(setup)
    assert "Upgrade to 2.0" in shown.texts
    assert shown.buttons == ["populace.setup_backend"]


def test_the_log_is_copied(setup: Any, home: Path) -> None:
    assert setup.bpy.ops.populace.copy_setup_log() == {"CANCELLED"}
    folder = home / "data/backend"
    folder.mkdir(parents=True)
    (folder / "setup.log").write_text(f"{Path.home()}/x failed\n")
    assert setup.bpy.ops.populace.copy_setup_log() == {"FINISHED"}
