# SPDX-License-Identifier: GPL-3.0-or-later
"""More of the artist's workflows by mouse and keys in a real window, a picture of each: words and the colour picker on
the active human, output options, favourites, a part of somebody else, "Copy as Python", an asset library.

A driver, see `artist.py`: a window 1700 pixels high, a generator that runs already, pictures go to the folder SHOTS.
"""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bpy
from mathutils import Quaternion, Vector

SHOTS = os.environ.get("SHOTS", "shots")
PATIENCE_S = 420
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
    """Where a word of the sidebar is, once it is drawn: `x, y = yield from seen(...)`."""
    while True:
        try:
            return gui.find_word(word, gui.region("UI"), nth)
        except RuntimeError:
            tries -= 1
            if not tries:
                raise
            yield 1


def press(gui: Any, word: str, nth: int = 0) -> Iterator[Any]:
    yield from gui.click(*(yield from seen(gui, word, nth)))


def shot(gui: Any, name: str) -> Iterator[Any]:
    yield 1.5
    gui.shot(f"{SHOTS}/{name}.png")


def settled(root: Any, versions: int) -> Any:
    return lambda: len(root.populace.versions) >= versions


def drive(gui: Any) -> Iterator[Any]:
    bpy.data.batch_remove(list(bpy.data.objects))
    look(gui)
    left, top, _, height = gui.box(gui.region("UI"))
    yield from gui.drag(left + 2, top + height * 0.7, left - 110, top + height * 0.7)
    yield 0.5
    left, top, width, height = gui.box(gui.region("UI"))
    bpy.ops.populace.start_backend()
    yield from gui.until(lambda: hasattr(bpy.context.window_manager, "populace_sliders"), PATIENCE_S)
    form = bpy.context.scene.populace
    form.faces, form.grid_resolution, form.texture_size = FACES, GRID, TEXTURE
    form.randomise_seed, form.seed, form.prompt = False, 12, "woman, long hair, blue t-shirt, jeans"
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
    gui.move(left - 300, y)
    yield from gui.until(settled(root, 3), PATIENCE_S)
    red, green, blue = json.loads(root.populace.attributes)["bottom_color"]
    assert green > max(red, blue), (red, green, blue)
    yield from shot(gui, "23_colour")

    # Output: a pose typed, garments apart, applied to her.
    yield from press(gui, "Output")
    yield 1
    _, y = yield from seen(gui, "Pose")
    yield from gui.click(left + 190, y, count=2)
    yield 0.3
    gui.key("ctrl+a")
    gui.type("walking")
    yield 0.5
    gui.key("Return")
    yield 0.5
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

    # A favourite: kept by the heart, made once more while nobody is active.
    yield from press(gui, "Output")
    _, y = yield from seen(gui, "Seed")
    yield from gui.click(left + 121, y + 21)
    yield 1
    bpy.ops.object.select_all(action="DESELECT")
    bpy.context.view_layer.objects.active = None
    bpy.context.scene.cursor.location = (1.1, 0, 0)
    look(gui, (0.5, 0, 0.95), 5)
    yield from shot(gui, "26_favourite")
    yield from press(gui, "Seed", 1)
    yield from gui.until(lambda: len(people()) == 2, PATIENCE_S)
    twin = next(o for o in people() if o != root)
    assert twin.populace.recipe == root.populace.recipe
    assert bpy.context.view_layer.objects.active == twin
    yield from shot(gui, "27_favourite_used")

    # Somebody else's hair: both selected, one button.
    yield from gui.click(left - 500, top + 300)  # nobody
    bpy.data.batch_remove([twin, *twin.children_recursive])
    with gui.override():
        bpy.ops.populace.generate(
            "EXEC_DEFAULT",
            seed=40,
            prompt="tall man, short black hair, yellow shirt, black trousers",
            faces=FACES,
            grid_resolution=GRID,
            texture_size=TEXTURE,
        )
    yield from gui.until(lambda: len(people()) == 2, PATIENCE_S)
    other = next(o for o in people() if o != root)
    other.select_set(True)
    root.select_set(True)
    bpy.context.view_layer.objects.active = root
    yield from shot(gui, "28_two_selected")
    yield from press(gui, "Hair", 1)
    yield from gui.until(settled(root, 5), PATIENCE_S)
    assert root.populace.versions[-1].label == "Other hair"
    yield from shot(gui, "29_swapped")

    # Both into a library folder.
    folder = Path(SHOTS).resolve() / "library"
    other.select_set(True)
    yield from press(gui, "Assets")
    yield 1
    _, y = yield from seen(gui, "Library")
    yield from gui.click(left + 170, y, count=2)
    yield 0.3
    gui.key("ctrl+a")
    gui.type(str(folder))
    gui.key("Return")
    yield 1
    assert Path(bpy.context.scene.populace_assets.folder) == folder, bpy.context.scene.populace_assets.folder
    yield from press(gui, "Save")
    yield from gui.until(lambda: len(list(folder.glob("*.blend"))) == 2, PATIENCE_S)
    assert (folder / "blender_assets.cats.txt").is_file()
    yield from shot(gui, "30_library")
