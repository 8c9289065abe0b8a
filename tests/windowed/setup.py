# SPDX-License-Identifier: GPL-3.0-or-later
"""Sets up the generator by mouse in a real window with a fresh profile, photographs every state of it, and makes a
person with what was set up: offline, no Python, consent, progress, cancelled, done, ready, a person, an error.

A driver: whatever runs it gives `gui` (shot, click, click_word, words, until, region) and has opened the tab. It wants
the full zip, a POPULACE_HOME that is empty, and in SETUP_PATH a folder with a Python that Populace can use.
Packages come from where pip is configured to look. Pictures go to the folder SHOTS. `setup_later.py` goes on.
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


def preferences() -> Any:
    return bpy.context.preferences.addons[PACKAGE].preferences


def press(gui: Any, word: str) -> Iterator[float]:
    """A button anywhere in the window, by its whole label."""
    place = [(x, y) for text, x, y in gui.words() if text.strip(".,") == word]
    assert place, [text for text, _, _ in gui.words()]
    yield from gui.click(*place[-1])


def until_ended(gui: Any) -> Iterator[float]:
    chores = module("chores")
    yield from gui.until(lambda: chores.current() is not None and chores.current().ended, timeout=PATIENCE_S)
    yield 1


def install(gui: Any) -> Iterator[float]:
    """From the status row's button to the dialog's."""
    known = module("setup.operators").known
    yield from gui.click_word("Set")
    yield from gui.until(lambda: known.plan_is_fresh, timeout=60)
    yield 1.5
    gui.shot(f"{SHOTS}/dialog.png")
    yield from press(gui, "Install")
    yield from gui.until(lambda: module("chores").is_busy())


def drive(gui: Any) -> Iterator[float]:
    chores = module("chores")
    gui.shot(f"{SHOTS}/offline.png")
    assert not bpy.ops.populace.setup_backend.poll()  # online access is off in a fresh profile
    bpy.context.preferences.system.use_online_access = True
    yield 1
    gui.shot(f"{SHOTS}/missing.png")

    yield from gui.click_word("Set")  # no Python that will do: the dialog says so
    yield 6
    gui.shot(f"{SHOTS}/no_python.png")
    yield from press(gui, "Cancel")
    yield 1
    module("setup.operators").known.plan = {}
    os.environ["PATH"] = f"{os.environ['SETUP_PATH']}:{os.environ['PATH']}"

    preferences().torch_index, preferences().package_index = "pip", ""
    yield from install(gui)
    yield from gui.until(lambda: chores.current().fraction > 0.02, timeout=PATIENCE_S)
    yield 0.5
    gui.shot(f"{SHOTS}/progress.png")
    bpy.ops.populace.cancel_chore()
    yield from until_ended(gui)
    gui.shot(f"{SHOTS}/cancelled.png")
    assert chores.current().phase.value == "cancelled"
    chores.dismiss()
    yield 1

    yield from install(gui)
    yield from gui.until(lambda: chores.current().fraction > 0.45 or chores.current().ended, timeout=PATIENCE_S)
    yield 0.5
    gui.shot(f"{SHOTS}/unpacking.png")
    yield from until_ended(gui)
    gui.shot(f"{SHOTS}/done.png")
    assert chores.current().phase.value == "done", chores.current().error
    yield from gui.until(lambda: module("tasks").session().link.value == "ready", timeout=120)
    yield from gui.until(lambda: module("tasks").session().health.worker in ("ready", "busy"), timeout=120)
    yield 1
    gui.shot(f"{SHOTS}/ready.png")

    # Somebody, made by what was set up just now.
    yield from gui.click_word("Dismiss")
    bpy.data.batch_remove(list(bpy.data.objects))
    form = bpy.context.scene.populace
    form.faces, form.grid_resolution, form.randomise_seed, form.seed = 8000, 128, False, 12
    yield 1
    yield from gui.click_word("Generate")
    yield from gui.until(lambda: any(o.populace.uuid for o in bpy.data.objects), timeout=240)
    with gui.override():
        bpy.ops.view3d.view_selected()
    gui.area().spaces.active.shading.color_type = "TEXTURE"
    yield 2
    gui.shot(f"{SHOTS}/person.png")

    preferences().torch_index = preferences().package_index = "http://127.0.0.1:9/simple"  # nobody listens there
    os.environ |= {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
    bpy.ops.populace.setup_backend("EXEC_DEFAULT", agree=True)
    yield from until_ended(gui)
    gui.shot(f"{SHOTS}/error.png")
    assert chores.current().error.code in ("no_network", "no_package"), chores.current().error
    assert module("process").installed_python() is not None  # the old one is still in use
