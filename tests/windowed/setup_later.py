# SPDX-License-Identifier: GPL-3.0-or-later
"""What comes after the set-up, by mouse in a real window: an add-on that brings a newer generator, upgrade, roll back,
uninstall, set up again from a folder of wheels, each with a picture, and a person made at the end.

A driver, see `setup.py`: it wants the POPULACE_HOME that `setup.py` left, the full zip of another version, SETUP_PATH
as there, and in WHEELS a folder filled by `pip download --only-binary :all: -d FOLDER populace-VERSION.whl`. STEPS
names those of upgrade, preferences and folder that are wanted; each begins where the one before ended.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import bpy

SHOTS = os.environ.get("SHOTS", "shots")
PATIENCE_S = float(os.environ.get("PATIENCE_S", "1800"))
PACKAGE = next(name for name in bpy.context.preferences.addons.keys() if name.endswith(".populace"))  # noqa: SIM118


def module(name: str) -> Any:
    return sys.modules[f"{PACKAGE}.{name}"]


def press(gui: Any, word: str, nth: int = 0, tries: int = 3) -> Iterator[float]:
    """A button anywhere in the window, by a word of its label."""
    while True:
        place = [(x, y) for text, x, y in gui.words() if text.strip(".,") == word]
        if len(place) > nth:
            break
        tries -= 1
        assert tries, (word, [text for text, _, _ in gui.words()])
        yield 1
    yield from gui.click(*place[nth])


def ended(gui: Any, phase: str = "done") -> Iterator[float]:
    chores = module("chores")
    yield from gui.until(lambda: chores.current() is not None and chores.current().ended, timeout=PATIENCE_S)
    assert chores.current().phase.value == phase, chores.current().error
    yield 1


def ready(gui: Any) -> Iterator[float]:
    session = module("tasks").session
    yield from gui.until(lambda: session() is not None and session().link.value == "ready", timeout=120)
    yield from gui.until(lambda: session().health.worker in ("ready", "busy"), timeout=120)
    yield 1


def off(gui: Any) -> Iterator[float]:
    yield from gui.until(lambda: module("tasks").session().link.value == "off", timeout=60)
    yield 1


def upgrade(gui: Any) -> Iterator[float]:
    """The old one still works; then the newer one, which takes its place when it was stopped and started."""
    chores, known = module("chores"), module("setup.operators").known
    old, new = known.installed["version"], known.version
    assert known.can_upgrade, (old, new)
    gui.shot(f"{SHOTS}/can_upgrade.png")
    bpy.ops.populace.start_backend()
    yield from ready(gui)
    assert module("tasks").session().health.version == old
    yield from gui.click_word("Upgrade")
    yield from gui.until(lambda: known.plan_is_fresh, timeout=60)
    yield 1.5
    gui.shot(f"{SHOTS}/upgrade_dialog.png")
    yield from press(gui, "Install")
    yield from gui.until(chores.is_busy)
    yield from ended(gui)
    gui.shot(f"{SHOTS}/upgraded.png")
    assert known.installed["version"] == new
    assert chores.current().result["is_upgrade"]
    bpy.ops.populace.stop_backend()
    yield from off(gui)
    bpy.ops.populace.start_backend()
    yield from ready(gui)
    assert module("tasks").session().health.version == new
    gui.shot(f"{SHOTS}/upgraded_ready.png")
    bpy.ops.populace.stop_backend()
    yield from off(gui)


def preferences(gui: Any) -> Iterator[float]:
    """Back to the version from before, then away with both."""
    chores, known = module("chores"), module("setup.operators").known
    area, before = gui.area(), known.previous["version"]
    area.ui_type = "PREFERENCES"
    bpy.context.preferences.active_section = "ADDONS"
    bpy.context.window_manager.addon_search = "Populace"
    yield 2
    place = [(x, y) for text, x, y in gui.words() if text == "Populace"]
    yield from gui.click(place[-1][0] - 60, place[-1][1])  # the triangle before the name
    yield 2
    gui.shot(f"{SHOTS}/preferences.png")
    yield from press(gui, "Back")
    yield from gui.until(chores.is_busy, timeout=20)
    yield from ended(gui)
    assert known.installed["version"] == before
    yield from ready(gui)  # at once
    gui.shot(f"{SHOTS}/rolled_back.png")
    yield from press(gui, "Stop")
    yield from off(gui)
    yield from press(gui, "Uninstall")
    yield 1.5
    gui.shot(f"{SHOTS}/uninstall_dialog.png")
    yield from press(gui, "Uninstall")  # the dialog's, which covers the other
    yield from gui.until(lambda: chores.current().result.get("freed_bytes", 0) > 1e9, timeout=120)
    yield 1
    gui.shot(f"{SHOTS}/uninstalled.png")
    assert not known.installed
    assert module("process").installed_python() is None
    chores.dismiss()
    area.ui_type = "VIEW_3D"
    yield from gui.open_tab("Populace")


def folder(gui: Any) -> Iterator[float]:
    """Without a network, from a folder of wheels, by the file browser; then a person."""
    chores = module("chores")
    bpy.context.preferences.system.use_online_access = False
    yield 1
    gui.shot(f"{SHOTS}/offline_again.png")
    yield from gui.click_word("Folder")
    yield 3
    browser = gui.area("FILE_BROWSER")
    browser.spaces.active.params.directory = os.environ["WHEELS"].encode()
    yield 2
    gui.shot(f"{SHOTS}/choose_folder.png")
    left, top, width, height = gui.box(gui.region("EXECUTE", browser))
    yield from gui.click(left + width - 60, top + height / 2)
    yield from gui.until(chores.is_busy, timeout=20)
    yield from ended(gui)
    yield from ready(gui)
    gui.shot(f"{SHOTS}/from_folder.png")
    assert module("tasks").session().health.version == module("setup.operators").known.version
    bpy.data.batch_remove(list(bpy.data.objects))
    form = bpy.context.scene.populace
    form.faces, form.grid_resolution, form.randomise_seed, form.seed = 8000, 128, False, 12
    yield 1
    yield from gui.click_word("Generate")
    yield from gui.until(lambda: any(o.populace.uuid for o in bpy.data.objects), timeout=240)
    yield 2
    gui.shot(f"{SHOTS}/person_again.png")


def drive(gui: Any) -> Iterator[float]:
    os.environ["PATH"] = f"{os.environ['SETUP_PATH']}:{os.environ['PATH']}"
    bpy.context.preferences.system.use_online_access = True
    addon = bpy.context.preferences.addons[PACKAGE].preferences
    addon.torch_index, addon.package_index = "pip", ""
    yield 1
    for step in os.environ.get("STEPS", "upgrade,preferences,folder").split(","):
        yield from {"upgrade": upgrade, "preferences": preferences, "folder": folder}[step](gui)
