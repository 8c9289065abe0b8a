# SPDX-License-Identifier: GPL-3.0-or-later
"""The artist's workflows by mouse and keys in a real window, a picture of each state: create, slide with a preview,
re-roll a part, lock one, choose a variant, go back in the history, favourites, mix, mark as assets.

A driver: whatever runs it gives `gui` (shot, click, click_word, drag, key, type, until, region) and has opened the tab
"Populace" in Blender with the add-on, in a window 1700 pixels high so that all panels are in sight. It wants a
generator that runs already. Pictures go to the folder SHOTS.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import bpy
from mathutils import Quaternion, Vector

SHOTS = os.environ.get("SHOTS", "shots")
PATIENCE_S = 240
FACES, GRID, TEXTURE = 8000, 128, "512"  # a small person is made soon


def people() -> list[Any]:
    return [o for o in bpy.data.objects if o.populace.uuid]


def look(gui: Any, at: tuple[float, float, float] = (0, 0, 0.95), distance: float = 4.2) -> None:
    view = gui.area().spaces.active
    view.shading.type, view.shading.color_type, view.shading.light = "SOLID", "TEXTURE", "STUDIO"
    view.overlay.show_relationship_lines = view.overlay.show_extras = view.overlay.show_cursor = False
    view.overlay.show_outline_selected = False
    view.lens = 60
    view.region_3d.view_location, view.region_3d.view_distance = Vector(at), distance
    view.region_3d.view_rotation = Quaternion((0, 0, 1), 0.35) @ Quaternion((1, 0, 0), 1.5)


def seen(gui: Any, word: str, nth: int = 0, tries: int = 10) -> Iterator[Any]:
    """Where a word of the sidebar is, once it is drawn: `_, y = yield from seen(...)`."""
    while True:
        try:
            return gui.find_word(word, gui.region("UI"), nth)
        except RuntimeError:
            tries -= 1
            if not tries:
                raise
            yield 1


def widen(gui: Any) -> Iterator[Any]:
    """The sidebar as wide as people have it who work in it."""
    left, top, _, height = gui.box(gui.region("UI"))
    yield from gui.drag(left + 2, top + height * 0.7, left - 110, top + height * 0.7)
    yield 0.5


def shot(gui: Any, name: str) -> Iterator[Any]:
    yield 0.8
    gui.shot(f"{SHOTS}/{name}.png")


def settled(root: Any, versions: int) -> Any:
    return lambda: len(root.populace.versions) >= versions


def drive(gui: Any) -> Iterator[Any]:
    bpy.data.batch_remove(list(bpy.data.objects))
    look(gui)
    yield from widen(gui)
    yield from shot(gui, "1_form")
    bpy.ops.populace.start_backend()
    yield from gui.until(lambda: hasattr(bpy.context.window_manager, "populace_sliders"), PATIENCE_S)

    # Create, by seed and words.
    form = bpy.context.scene.populace
    form.faces, form.grid_resolution, form.texture_size = FACES, GRID, TEXTURE
    form.randomise_seed, form.seed, form.prompt = False, 12, "woman, long hair, blue t-shirt, jeans"
    yield 1
    yield from gui.click_word("Generate")
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
    area = gui.box(gui.region("WINDOW"))
    gui.move(area[0] + area[2] / 3, area[1] + area[3] / 2)
    yield 0.3
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
    addon = next(name for name in sys.modules if name.endswith("populace.editing"))
    yield from gui.until(lambda: sum(bool(one.key) for one in sys.modules[addon].sheet(root)) == 6, PATIENCE_S)
    yield 2
    yield from shot(gui, "9_variants")
    yield from gui.click_word("Choose", 1)
    yield from gui.until(settled(root, 4), PATIENCE_S)
    yield from shot(gui, "10_variant_chosen")

    # History: back to the first one.
    yield from shot(gui, "11_history")
    yield from gui.click_word("Created")
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
            "EXEC_DEFAULT",
            seed=40,
            prompt="tall man, beard, red shirt, black trousers, bald",
            faces=FACES,
            grid_resolution=GRID,
            texture_size=TEXTURE,
        )
    yield from gui.until(lambda: len(people()) == 2, PATIENCE_S)
    look(gui, (0.5, 0, 0.95), 5)
    root.select_set(True)
    bpy.context.view_layer.objects.active = root
    yield 1
    yield from gui.click_word("Mix")
    yield 1.5
    bpy.context.window_manager.populace.mix = 0.5
    yield 0.5
    yield from gui.until(settled(root, 5), PATIENCE_S)
    yield from shot(gui, "13_mixed")

    # An asset of this file.
    yield from gui.click_word("Mix")
    yield 1
    yield from gui.click_word("Assets")
    yield 1
    yield from gui.click(*(yield from seen(gui, "Mark")))
    yield from gui.until(lambda: any(c.asset_data is not None for c in bpy.data.collections), PATIENCE_S)
    yield from shot(gui, "14_assets")
    bpy.ops.object.select_all(action="DESELECT")
    bpy.context.view_layer.objects.active = None
    yield 1
    yield from shot(gui, "15_nobody_active")
