# SPDX-License-Identifier: GPL-3.0-or-later
"""The artist's workflows by mouse and keys in a real window, a picture of each state: create, slide with a preview,
re-roll a part, lock one, choose a variant, go back in the history, mix, mark as assets.

A driver, see README.md, for a window 1700 pixels high, so that all panels are in sight, and a generator that runs.
"""

from __future__ import annotations

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
    connect,
    look,
    module,
    nobody_active,
    over_view,
    people,
    press,
    seen,
    settled,
    shot,
    widen,
)


def drive(gui: Any) -> Iterator[Any]:
    bpy.data.batch_remove(list(bpy.data.objects))
    look(gui)
    yield from widen(gui)
    yield from shot(gui, "1_form")
    yield from connect(gui)

    # Create, by seed and words.
    form = bpy.context.scene.populace
    assign(form, SMALL | {"randomise_seed": False, "seed": 12, "prompt": "woman, long hair, blue t-shirt, jeans"})
    yield 1
    yield from press(gui, "Generate")
    yield 1.5
    yield from shot(gui, "2_working")
    yield from gui.until(lambda: len(people()) == 1, PATIENCE_S)
    root = people()[0]
    yield 3
    yield from shot(gui, "3_human")

    # A slider, moved by hand: previews on the way, one undo step at the end.
    _, y = yield from seen(gui, "Weight")
    left, _, width, _ = gui.box(gui.region("UI"))
    before = root.populace.height_m
    mesh = next(o for o in root.children if o.type == "MESH")
    gui.move(left + width * 0.55, y)
    yield 0.3
    gui.xdotool("mousedown", 1)
    for step in range(12):
        gui.move(left + width * (0.55 + 0.03 * step), y)
        yield 0.05
    yield from gui.until(lambda: "populace_original" in mesh.data, PATIENCE_S)
    yield from shot(gui, "4_slider_preview")
    gui.xdotool("mouseup", 1)
    yield from gui.until(settled(root, 2), PATIENCE_S)
    yield from shot(gui, "5_slider_done")
    assert abs(root.populace.height_m - before) < 0.05

    # Undo and redo.
    yield from over_view(gui)
    gui.key("ctrl+z")
    yield from gui.until(lambda: len(people()[0].populace.versions) == 1, 30)
    gui.key("ctrl+shift+z")
    yield from gui.until(lambda: len(people()[0].populace.versions) == 2, 30)
    root = people()[0]

    # Lock the shoes, re-roll the hair.
    yield from shot(gui, "6_parts")
    _, y = yield from seen(gui, "Shoes")
    yield from gui.click(left + 18, y)
    yield from gui.until(lambda: root.populace.locked_parts == ["shoes"], 30)
    _, y = yield from seen(gui, "Hair")
    yield from gui.click(left + width - 72, y)
    yield from gui.until(settled(root, 3), PATIENCE_S)
    yield from shot(gui, "7_parts_rerolled")

    # Variants.
    _, y = yield from seen(gui, "Strength")
    yield from gui.click(left + width - 50, y)
    yield 2
    yield from shot(gui, "8_variants_working")
    yield from gui.until(lambda: sum(bool(one.key) for one in module("editing").sheet(root)) == 6, PATIENCE_S)
    yield 2
    yield from shot(gui, "9_variants")
    yield from press(gui, "Choose", 1)
    yield from gui.until(settled(root, 4), PATIENCE_S)
    yield from shot(gui, "10_variant_chosen")

    # History: back to the first one.
    yield from shot(gui, "11_history")
    yield from press(gui, "Created")
    first = root.populace.versions[0].recipe
    yield from gui.until(lambda: root.populace.recipe == first, PATIENCE_S)
    yield from shot(gui, "12_restored")
    with gui.override():
        bpy.ops.populace.add_favourite(name="Ada")
    yield from shot(gui, "12_favourite")

    # Somebody else, and a mix of the two.
    bpy.context.scene.cursor.location = (1.1, 0, 0)
    with gui.override():
        bpy.ops.populace.generate(
            "EXEC_DEFAULT", seed=40, prompt="tall man, beard, red shirt, black trousers, bald", **SMALL
        )
    yield from gui.until(lambda: len(people()) == 2, PATIENCE_S)
    look(gui, (0.5, 0, 0.95), 5)
    root.select_set(True)
    bpy.context.view_layer.objects.active = root
    yield 1
    yield from press(gui, "Mix")
    yield 1.5
    bpy.context.window_manager.populace.mix = 0.5
    yield 0.5
    yield from gui.until(settled(root, 5), PATIENCE_S)
    yield from shot(gui, "13_mixed")

    # An asset of this file.
    yield from press(gui, "Mix")
    yield 1
    yield from press(gui, "Assets")
    yield 1
    yield from press(gui, "Mark")
    yield from gui.until(lambda: any(c.asset_data is not None for c in bpy.data.collections), PATIENCE_S)
    yield from shot(gui, "14_assets")
    nobody_active()
    yield from shot(gui, "15_nobody_active")
