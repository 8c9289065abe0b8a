# SPDX-License-Identifier: GPL-3.0-or-later
"""More of the artist's workflows by mouse and keys in a real window, a picture of each: words and the colour picker on
the active human, output options, "Copy as Python", onto the face under the mouse, favourites, a part of somebody else,
an asset library.

A driver, see README.md, for a window 1700 pixels high and a generator that runs.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bpy
from bpy_extras import view3d_utils
from mathutils import Vector

sys.path.insert(0, str(Path(__file__).parent))
from gestures import (
    PATIENCE_S,
    SHOTS,
    SMALL,
    assign,
    connect,
    fill,
    look,
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
    left, top, width, _ = gui.box(gui.region("UI"))
    yield from connect(gui)
    form = bpy.context.scene.populace
    assign(form, SMALL | {"randomise_seed": False, "seed": 12, "prompt": "woman, long hair, blue t-shirt, jeans"})
    yield 1
    yield from press(gui, "Generate")
    yield from gui.until(lambda: len(people()) == 1, PATIENCE_S)
    root = people()[0]

    # Words: into the field above the attributes, and its button.
    _, y = yield from seen(gui, "Attributes")
    yield from gui.click(left + 90, y - 32)
    yield 0.3
    gui.type("red shirt, tall")
    gui.key("Return")
    yield 0.5
    height_before = root.populace.height_m
    yield from gui.click(left + width - 52, y - 32)
    yield from gui.until(settled(root, 2), PATIENCE_S)
    assert root.populace.height_m > height_before + 0.05
    yield from shot(gui, "20_words")

    # A colour: the swatch in the part's row opens Blender's wheel.
    _, y = yield from seen(gui, "Bottom")
    yield from gui.click(left + 199, y)
    yield from shot(gui, "21_colour_picker")
    yield from gui.click(left + 234, y - 258)
    yield from shot(gui, "22_colour_picked")
    yield from press(gui, "Body")  # a click beside the wheel closes it, and does nothing else
    yield from gui.until(settled(root, 3), PATIENCE_S)
    red, green, blue = json.loads(root.populace.attributes)["bottom_color"]
    assert green > max(red, blue), (red, green, blue)
    yield from shot(gui, "23_colour")

    # Output: a pose typed, garments apart, applied to her.
    yield from press(gui, "Output")
    yield 1
    _, y = yield from seen(gui, "Pose")
    yield from fill(gui, left + 190, y, "walking")
    yield from press(gui, "Separate")
    yield 0.5
    assert (form.pose, form.separate) == ("walking", True)
    yield from press(gui, "Apply")
    yield from gui.until(settled(root, 4), PATIENCE_S)
    assert len([o for o in root.children if o.type == "MESH"]) > 3, "garments apart"
    yield from shot(gui, "24_output")

    # The same as Python, from the menu beside her picture.
    _, y = yield from seen(gui, "Seed")
    yield from gui.click(left + 202, y + 21)
    yield from shot(gui, "25_copy_python")
    yield from gui.click(left + 247, y + 45)
    yield from gui.until(lambda: "populace.set_output" in bpy.context.window_manager.clipboard, 10)
    copied = bpy.context.window_manager.clipboard
    assert "pose='walking'" in copied, copied
    ast.parse(copied)

    # Onto a table: the button, a click on its top, and Ctrl-Z. A click on the sidebar and Esc leave her where she is.
    bpy.ops.mesh.primitive_cube_add(size=1, location=(1.3, 0, 0.4))
    bpy.context.object.scale = (1, 1, 0.8)
    bpy.ops.object.select_all(action="DESELECT")
    root.select_set(True)
    bpy.context.view_layer.objects.active = root
    bpy.ops.ed.undo_push(message="Table")
    look(gui, (0.5, 0, 0.95), 5, 1.2)
    yield 2  # the view's matrices are of what was drawn last
    view = gui.region("WINDOW")
    target = view3d_utils.location_3d_to_region_2d(view, gui.area().spaces.active.region_3d, (1.3, 0, 0.8))
    x, y = view.x + target[0], gui.window.height - view.y - target[1]
    _, seed = yield from seen(gui, "Seed")
    for away in ((left + 60, seed - 60), "Escape", (x, y)):
        yield from gui.click(left + 119, seed + 21)
        if away == "Escape":
            gui.move(x, y)
            yield from shot(gui, "26_place_on_face")
            gui.key(away)
        else:
            yield from gui.click(*away)
        yield 1
        assert away == (x, y) or not any(root.location), away
    assert (Vector(root.location) - Vector((1.3, 0, 0.8))).length < 0.02, root.location
    yield from shot(gui, "27_placed")
    yield from over_view(gui)
    gui.key("ctrl+z")
    yield from gui.until(lambda: not any(people()[0].location), 30)
    root = people()[0]
    bpy.data.objects.remove(bpy.data.objects["Cube"])
    bpy.context.view_layer.objects.active = root
    look(gui)
    yield 1

    # A favourite: kept by the heart, made once more while nobody is active.
    yield from press(gui, "Output")
    _, y = yield from seen(gui, "Seed")
    yield from gui.click(left + 137, y + 21)
    yield 1
    nobody_active()
    bpy.context.scene.cursor.location = (1.1, 0, 0)
    look(gui, (0.5, 0, 0.95), 5)
    yield from shot(gui, "28_favourite")
    yield from press(gui, "Seed", 1)
    yield from gui.until(lambda: len(people()) == 2, PATIENCE_S)
    twin = next(o for o in people() if o != root)
    assert twin.populace.recipe == root.populace.recipe
    assert bpy.context.view_layer.objects.active == twin
    yield from shot(gui, "29_favourite_used")

    # Somebody else's hair: both selected, one button.
    yield from gui.click(left - 500, top + 300)  # nobody
    bpy.data.batch_remove([twin, *twin.children_recursive])
    with gui.override():
        bpy.ops.populace.generate(
            "EXEC_DEFAULT", seed=40, prompt="tall man, short black hair, yellow shirt, black trousers", **SMALL
        )
    yield from gui.until(lambda: len(people()) == 2, PATIENCE_S)
    other = next(o for o in people() if o != root)
    other.select_set(True)
    root.select_set(True)
    bpy.context.view_layer.objects.active = root
    yield from shot(gui, "30_two_selected", 3)
    yield from press(gui, "Hair", 1)
    yield from gui.until(settled(root, 5), PATIENCE_S)
    assert root.populace.versions[-1].label == "Other hair"
    yield from shot(gui, "31_swapped")

    # Both into a library folder.
    folder = Path(SHOTS).resolve() / "library"
    other.select_set(True)
    yield from press(gui, "Assets")
    yield 3  # until the panel has slid open
    _, y = yield from seen(gui, "Library")
    yield from fill(gui, left + 170, y, str(folder))
    assert Path(bpy.context.scene.populace_assets.folder) == folder, bpy.context.scene.populace_assets.folder
    yield from press(gui, "Save")
    yield from gui.until(lambda: len(list(folder.glob("*.blend"))) == 2, PATIENCE_S)
    assert (folder / "blender_assets.cats.txt").is_file()
    yield from shot(gui, "32_library")
