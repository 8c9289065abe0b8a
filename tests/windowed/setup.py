# SPDX-License-Identifier: GPL-3.0-or-later
"""Sets up the generator by mouse in a real window with a fresh profile, photographs every state of it, and makes a
person with what was set up: offline, no Python, consent, progress, cancelled, done, ready, a person, an error.

A driver, see README.md. It wants the full zip, a POPULACE_HOME that is empty, no Python that Populace can use on the
PATH and a folder with one in SETUP_PATH. Packages come from where pip is configured to look. `setup_later.py` goes on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bpy

sys.path.insert(0, str(Path(__file__).parent))
from gestures import (
    PATIENCE_S,
    SMALL,
    assign,
    chore_ended,
    generator_ready,
    look,
    module,
    people,
    preferences,
    press,
    press_anywhere,
    seen,
    shot,
)


def install(gui: Any) -> Iterator[float]:
    """From the status row's button to the dialog's."""
    known = module("setup.operators").known
    yield from press(gui, "Set")
    yield from gui.until(lambda: known.plan_is_fresh, PATIENCE_S)
    yield from shot(gui, "dialog")
    yield from press_anywhere(gui, "Install", -1)
    yield from gui.until(lambda: module("chores").is_busy(), PATIENCE_S)


def drive(gui: Any) -> Iterator[float]:
    chores = module("chores")
    yield from shot(gui, "offline")
    assert not bpy.ops.populace.setup_backend.poll()  # online access is off in a fresh profile
    yield from press(gui, "Allow")
    yield from gui.until(lambda: bpy.context.preferences.system.use_online_access)
    yield from shot(gui, "missing")

    yield from press(gui, "Set")  # no Python that will do: the dialog says so
    yield from gui.until(lambda: module("setup.operators").known.plan_is_fresh, PATIENCE_S)
    yield from shot(gui, "no_python")
    yield from press_anywhere(gui, "Cancel", -1)
    yield 1
    module("setup.operators").known.plan = {}
    os.environ["PATH"] = f"{os.environ['SETUP_PATH']}:{os.environ['PATH']}"

    preferences().torch_index, preferences().package_index = "pip", ""
    yield from install(gui)
    yield from gui.until(lambda: chores.current().fraction > 0.02, PATIENCE_S)
    yield from shot(gui, "progress", 0.5)
    bpy.ops.populace.cancel_chore()
    yield from chore_ended(gui, "cancelled")
    yield from shot(gui, "cancelled")
    yield from press(gui, "Dismiss")
    yield 1

    yield from install(gui)
    yield from gui.until(lambda: chores.current().stage == "Unpacking" or chores.current().ended, 1800)
    yield from shot(gui, "unpacking", 8)
    yield from chore_ended(gui)
    yield from shot(gui, "done")
    yield from generator_ready(gui)
    yield from shot(gui, "ready")

    # Somebody, made by what was set up just now.
    yield from press(gui, "Dismiss")
    bpy.data.batch_remove(list(bpy.data.objects))
    look(gui)
    assign(bpy.context.scene.populace, SMALL | {"randomise_seed": False, "seed": 12})
    yield 1
    yield from press(gui, "Generate")
    yield from gui.until(people, PATIENCE_S)
    yield from shot(gui, "person")

    # Set up again while nobody answers: it says why, and what was there stays in use.
    preferences().torch_index = preferences().package_index = "http://127.0.0.1:9/simple"  # nobody listens there
    os.environ |= {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
    bpy.ops.populace.setup_backend("EXEC_DEFAULT", agree=True)
    yield from chore_ended(gui, "failed")
    yield from shot(gui, "error")
    assert chores.current().error.code in ("no_network", "no_package"), chores.current().error
    assert module("process").installed_python() is not None
    yield from seen(gui, "Again")
