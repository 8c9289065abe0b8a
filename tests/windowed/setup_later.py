# SPDX-License-Identifier: GPL-3.0-or-later
"""What comes after the set-up, by mouse in a real window: an add-on that brings a newer generator, upgrade, roll back
and forward, uninstall, set up again from a folder of wheels, each with a picture, and a person made at the end.

A driver, see `setup.py`: it wants the POPULACE_HOME that `setup.py` left, the full zip of another version, SETUP_PATH
as there, and in WHEELS a folder filled by `pip download --only-binary :all: -d FOLDER populace-VERSION.whl`. STEPS
names those of upgrade, preferences and folder that are wanted; each begins where the one before ended.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bpy

sys.path.insert(0, str(Path(__file__).parent))
import gestures
from gestures import (
    PATIENCE_S,
    SMALL,
    assign,
    chore_ended,
    generator_ready,
    look,
    module,
    people,
    press,
    press_anywhere,
    shot,
)


def off(gui: Any) -> Iterator[float]:
    yield from gui.until(lambda: module("tasks").session().link.value == "off", PATIENCE_S)
    yield 1


def restart(gui: Any) -> Iterator[float]:
    yield from press_anywhere(gui, "Restart")
    yield from gui.until(lambda: module("tasks").session().link.value != "ready", PATIENCE_S)
    yield from generator_ready(gui)


def upgrade(gui: Any) -> Iterator[float]:
    """The old one works on; then the newer one takes its place, by the button that says so."""
    chores, known = module("chores"), module("setup.operators").known
    old, new = known.installed["version"], known.version
    assert known.can_upgrade, (old, new)
    yield from shot(gui, "can_upgrade")
    bpy.ops.populace.start_backend()
    yield from generator_ready(gui)
    assert module("tasks").session().health.version == old
    yield from press(gui, "Upgrade")
    yield from gui.until(lambda: known.plan_is_fresh, PATIENCE_S)
    yield from shot(gui, "upgrade_dialog")
    yield from press_anywhere(gui, "Install", -1)
    yield from gui.until(chores.is_busy, PATIENCE_S)
    yield from gui.until(lambda: chores.current().stage == "Unpacking" or chores.current().ended, 1800)
    yield from shot(gui, "upgrade_unpacking", 20)
    yield from chore_ended(gui)
    yield from shot(gui, "upgraded")
    assert known.installed["version"] == new
    yield from restart(gui)
    assert module("tasks").session().health.version == new
    yield from shot(gui, "upgraded_ready")
    bpy.ops.populace.stop_backend()
    yield from off(gui)


def preferences(gui: Any) -> Iterator[float]:
    """Back to the version from before, forward again without a download, then away with both."""
    chores, known = module("chores"), module("setup.operators").known
    area, before, after = gui.area(), known.previous["version"], known.installed["version"]
    area.ui_type = "PREFERENCES"
    bpy.context.preferences.active_section = "ADDONS"
    bpy.context.window_manager.addon_search = "Populace"
    yield 2
    place = [(x, y) for text, x, y in gui.words() if text == "Populace"]
    yield from gui.click(place[-1][0] - 60, place[-1][1])  # the triangle before the name
    yield from shot(gui, "preferences", 2)
    yield from press_anywhere(gui, "Back")
    yield from gui.until(chores.is_busy)
    yield from chore_ended(gui)
    assert known.installed["version"] == before
    yield from generator_ready(gui)  # at once
    yield from shot(gui, "rolled_back")
    yield from press_anywhere(gui, "Use")  # the newer one again
    yield from gui.until(chores.is_busy)
    yield from chore_ended(gui)
    assert known.installed["version"] == after
    yield from shot(gui, "forward_again")
    assert module("tasks").session().health.version == before
    yield from restart(gui)
    assert module("tasks").session().health.version == after
    yield from shot(gui, "restarted")
    yield from press_anywhere(gui, "Stop")
    yield from off(gui)
    yield from press_anywhere(gui, "Uninstall")
    yield from shot(gui, "uninstall_dialog")
    yield from press_anywhere(gui, "Uninstall", -1)  # the dialog's
    yield from gui.until(lambda: chores.current().result.get("freed_bytes", 0) > 1e9, PATIENCE_S)
    yield from shot(gui, "uninstalled")
    assert not known.installed
    assert module("process").installed_python() is None
    chores.dismiss()
    area.ui_type = "VIEW_3D"
    yield from gui.open_tab("Populace")


def folder(gui: Any) -> Iterator[float]:
    """Without a network, from a folder of wheels, by the file browser; then a person."""
    chores = module("chores")
    bpy.context.preferences.system.use_online_access = False
    yield from shot(gui, "offline_again")
    yield from press(gui, "Folder")
    yield 3
    browser = gui.area("FILE_BROWSER")
    browser.spaces.active.params.directory = os.environ["WHEELS"].encode()
    yield from shot(gui, "choose_folder", 2)
    left, top, width, height = gui.box(gui.region("EXECUTE", browser))
    yield from gui.click(left + width - 60, top + height / 2)
    yield from gui.until(chores.is_busy)
    yield from gui.until(lambda: chores.current().stage == "Unpacking" or chores.current().ended, 1800)
    yield from shot(gui, "folder_unpacking", 20)
    yield from chore_ended(gui)
    yield from generator_ready(gui)
    yield from shot(gui, "from_folder")
    assert module("tasks").session().health.version == module("setup.operators").known.version
    bpy.data.batch_remove(list(bpy.data.objects))
    look(gui)
    assign(bpy.context.scene.populace, SMALL | {"randomise_seed": False, "seed": 12})
    yield 1
    yield from press(gui, "Generate")
    yield from gui.until(people, PATIENCE_S)
    yield from shot(gui, "person_again")


def drive(gui: Any) -> Iterator[float]:
    os.environ["PATH"] = f"{os.environ['SETUP_PATH']}:{os.environ['PATH']}"
    bpy.context.preferences.system.use_online_access = True
    addon = gestures.preferences()
    addon.torch_index, addon.package_index = "pip", ""
    yield 1
    for step in os.environ.get("STEPS", "upgrade,preferences,folder").split(","):
        yield from {"upgrade": upgrade, "preferences": preferences, "folder": folder}[step](gui)
