# SPDX-License-Identifier: GPL-3.0-or-later
"""Makes a crowd by mouse in a real window, on a plane, and photographs it: in progress, done, undone, seen by a camera
that goes away and comes back, one person changed.

A driver, see README.md, for a generator that runs: PEOPLE in PLACES, coarse ones with QUICK.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bpy
from mathutils import Vector

sys.path.insert(0, str(Path(__file__).parent))
from gestures import PATIENCE_S, SHOTS, SMALL, assign, fill, look, nobody_active, over_view, press, seen, shot

PEOPLE = int(os.environ.get("PEOPLE", "20"))
QUICK = "QUICK" in os.environ  # coarse people, for a slow machine
PLACES = int(os.environ.get("PLACES", "100"))


def crowds() -> list[Any]:
    return [c for c in bpy.data.collections if "populace_crowd" in c]


def arrived() -> int:
    return sum(bool(o.populace.uuid) for o in bpy.data.objects)


def people() -> int:
    return sum("populace_person" in c for c in crowds()[0].children_recursive)


def levels() -> list[int]:
    """Which level of detail each place shows."""
    return [o.instance_collection["populace_level"] for o in crowds()[0].objects if "populace_placement" in o]


def stage() -> None:
    """A floor that people stand on, a sun and a camera at eye height."""
    for o in list(bpy.data.objects):
        bpy.data.objects.remove(o)
    bpy.ops.mesh.primitive_plane_add(size=18)
    floor = bpy.context.object
    floor.name = "Square"
    material = bpy.data.materials.new("Paving")
    material.diffuse_color = (0.34, 0.33, 0.31, 1)
    floor.data.materials.append(material)
    bpy.ops.object.light_add(type="SUN", rotation=(0.7, 0.2, 0.5))
    bpy.context.object.data.energy = 3
    bpy.ops.object.camera_add(location=(0, -13, 3.2), rotation=(1.36, 0, 0))
    bpy.context.scene.camera = bpy.context.object
    bpy.ops.object.select_all(action="DESELECT")


def field(gui: Any, label: str, text: str, away: int = 150) -> Iterator[Any]:
    """Type into the field right of a label."""
    x, y = yield from seen(gui, label)
    yield from fill(gui, x + away, y, text)


def drive(gui: Any) -> Iterator[Any]:
    stage()
    look(gui, (0, -1, 0.8), 20, 1.25, 0.25)
    gui.area().spaces.active.shading.show_cavity = True
    form = bpy.context.scene.populace_crowd
    if QUICK:
        assign(form, SMALL | {"faces": 3000, "grid_resolution": 64})
    yield 1
    yield from press(gui, "Crowd")
    yield from shot(gui, "crowd_form")
    yield from field(gui, "People", str(PEOPLE))
    yield from field(gui, "Placements", str(PLACES))
    assert (form.people, form.placements) == (PEOPLE, PLACES)
    yield from press(gui, "Surface")
    yield from gui.until(lambda: form.where == "SURFACE")
    yield 0.6
    x, y = yield from seen(gui, "Slope")
    yield from gui.click(x + 120, y - 24)  # the field above: the surface
    yield 0.6
    gui.type("Square")
    yield 0.5
    gui.key("Return")
    yield from gui.until(lambda: form.surface is not None)
    yield from shot(gui, "crowd_filled")
    yield from press(gui, "Make")
    yield from gui.until(lambda: crowds())
    yield from shot(gui, "crowd_manikins")
    yield from gui.until(lambda: arrived() >= PEOPLE // 3, PATIENCE_S)
    yield from shot(gui, "crowd_progress")
    yield from gui.until(lambda: arrived() >= PEOPLE, 2 * PATIENCE_S)
    yield from shot(gui, "crowd_done")
    look(gui, (0, -6, 0.9), 8, 1.45, 0.1)
    bpy.ops.populace.crowd_display(display="FULL")
    yield from shot(gui, "crowd_near")

    # Ctrl+Z undoes the crowd at once, and Ctrl+Shift+Z brings it back with everybody.
    bpy.ops.populace.crowd_display(display="LIGHT")
    yield from over_view(gui)
    steps = 0
    while crowds() and steps < 4:
        gui.key("ctrl+z")
        steps += 1
        yield 3
    print(f"undo steps to the empty square: {steps}")
    assert not crowds()
    yield from shot(gui, "crowd_undone")
    gui.key("ctrl+shift+z")
    yield from gui.until(lambda: crowds())
    yield 2
    assert arrived() == PEOPLE, "one step holds everybody"
    form = bpy.context.scene.populace_crowd  # undo made another scene of it

    # Live levels of detail: the button beside Update LODs, then the camera goes far away and comes back.
    box = gui.box(gui.region("UI"))
    _, y = yield from seen(gui, "Update")
    yield from gui.click(box[0] + box[2] - 50, y)
    yield from gui.until(lambda: form.live)
    near = levels()
    camera, home = bpy.context.scene.camera, bpy.context.scene.camera.location.copy()
    assert len(set(near)) > 1, "near ones are finer than far ones"
    camera.location = (0, -90, 3.2)
    yield from gui.until(lambda: set(levels()) == {form.lods - 1}, timeout=30)
    yield from shot(gui, "crowd_camera_far")
    camera.location = home
    yield from gui.until(lambda: levels() == near, timeout=30)
    yield from shot(gui, "crowd_camera_near")

    # Another person at one place, by the button.
    place = min((o for o in crowds()[0].objects if "populace_placement" in o), key=lambda o: o.location.y)
    others = {o.name: o.instance_collection.name for o in crowds()[0].objects if o != place}
    before = place["populace_person"]
    nobody_active()
    place.select_set(True)
    bpy.context.view_layer.objects.active = place
    look(gui, tuple(place.location + Vector((0, 0, 0.9))), 4, 1.45, 0.0)
    yield from shot(gui, "crowd_before_reseed")
    yield from press(gui, "New")
    yield from gui.until(lambda: place["populace_person"] != before and arrived() >= people(), PATIENCE_S)
    yield from shot(gui, "crowd_after_reseed")
    assert others == {o.name: o.instance_collection.name for o in crowds()[0].objects if o.name in others}
    bpy.ops.wm.save_as_mainfile(filepath=f"{SHOTS}/crowd.blend")
