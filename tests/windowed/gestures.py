# SPDX-License-Identifier: GPL-3.0-or-later
"""What the drivers of this folder share: how they look, read, press and wait. A driver puts its own folder into
`sys.path` before it imports this, because Blender runs it as a text and not as a module.

`gui` is what runs a driver hands it, see README.md; places are pixels of a picture, from its top left.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import bpy
from mathutils import Quaternion, Vector

SHOTS = os.environ.get("SHOTS", "shots")
PATIENCE_S = float(os.environ.get("PATIENCE_S", "420"))
LINE = 16  # pixels that two lines are apart at least
SMALL = {"faces": 8000, "grid_resolution": 128, "texture_size": "512"}  # a person that is made soon


def module(name: str) -> ModuleType:
    """A module of the add-on; Blender gives its package another name with every repository."""
    return sys.modules[next(full for full in sys.modules if full.endswith(f".populace.{name}"))]


def preferences() -> Any:
    """The add-on's own."""
    addons = bpy.context.preferences.addons
    return next(addons[name].preferences for name in addons.keys() if name.endswith(".populace"))  # noqa: SIM118


def people() -> list[Any]:
    return [o for o in bpy.data.objects if o.populace.uuid]


def settled(root: Any, versions: int) -> Callable[[], bool]:
    """Whether a person has come to so many versions."""
    return lambda: len(root.populace.versions) >= versions


def look(gui: Any, at: Any = (0, 0, 0.95), distance: float = 4.2, tilt: float = 1.5, turn: float = 0.35) -> None:
    """A plain view of the scene with textures, of a point in metres from so many metres away."""
    view = gui.area().spaces.active
    view.shading.type, view.shading.color_type, view.shading.light = "SOLID", "TEXTURE", "STUDIO"
    view.overlay.show_relationship_lines = view.overlay.show_extras = view.overlay.show_cursor = False
    view.overlay.show_outline_selected = False
    view.lens = 60
    view.region_3d.view_location, view.region_3d.view_distance = Vector(at), distance
    view.region_3d.view_rotation = Quaternion((0, 0, 1), turn) @ Quaternion((1, 0, 0), tilt)


def widen(gui: Any) -> Iterator[float]:
    """The sidebar as wide as people have it who work in it."""
    left, top, _, height = gui.box(gui.region("UI"))
    yield from gui.drag(left + 2, top + height * 0.7, left - 110, top + height * 0.7)
    yield 0.5


def over_view(gui: Any) -> Iterator[float]:
    """The mouse over the view, where keys then go."""
    left, top, width, height = gui.box(gui.region("WINDOW"))
    gui.move(left + width / 3, top + height / 2)
    yield 0.5


def seen(gui: Any, word: str, nth: int = 0, region: Any = None, tries: int = 10) -> Iterator[Any]:
    """Where a word is once it is drawn, in the sidebar or another region, the `nth` as one reads:
    `x, y = yield from seen(...)`."""
    while True:
        words = gui.words(region or gui.region("UI"))
        found = _as_read([(x, y) for text, x, y in words if word.lower() in text.lower()])
        if len(found) > nth:
            return found[nth]
        tries -= 1
        assert tries, (word, [text for text, _, _ in words])
        yield 1


def press(gui: Any, word: str, nth: int = 0, region: Any = None) -> Iterator[float]:
    """A button by a word of it, once it stands still: panels slide, and on a slow machine for seconds."""
    before, place = None, (yield from seen(gui, word, nth, region))
    while before is None or max(abs(a - b) for a, b in zip(before, place, strict=True)) > 2:
        yield 0.5
        before, place = place, (yield from seen(gui, word, nth, region))
    yield from gui.click(*place)


def _as_read(places: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return sorted(places, key=lambda place: (round(place[1] / LINE), place[0]))


def press_anywhere(gui: Any, word: str, nth: int = 0, tries: int = 5) -> Iterator[float]:
    """A button anywhere in the window, a dialog's as well, by a whole word of its label; -1 is the last one there."""
    while True:
        words = gui.words()
        place = _as_read([(x, y) for text, x, y in words if text.strip(".,") == word])
        if len(place) > nth or (place and nth < 0):
            break
        tries -= 1
        assert tries, (word, [text for text, _, _ in words])
        yield 1
    yield from gui.click(*place[nth])


def fill(gui: Any, x: float, y: float, text: str) -> Iterator[float]:
    """Type into the field at a place, instead of what it held."""
    yield from gui.click(x, y, count=2)
    yield 0.3
    gui.key("ctrl+a")
    gui.type(text)
    yield 0.5
    gui.key("Return")
    yield 0.5


def shot(gui: Any, name: str, after: float = 1.5) -> Iterator[float]:
    yield after
    gui.shot(f"{SHOTS}/{name}.png")


def connect(gui: Any) -> Iterator[float]:
    """To the generator that runs, until its attributes are known."""
    bpy.ops.populace.start_backend()
    yield from gui.until(lambda: hasattr(bpy.context.window_manager, "populace_sliders"), PATIENCE_S)


def generator_ready(gui: Any) -> Iterator[float]:
    session = module("tasks").session
    yield from gui.until(lambda: session() is not None and session().link.value == "ready", PATIENCE_S)
    yield from gui.until(lambda: session().health.worker in ("ready", "busy"), PATIENCE_S)
    yield 1


def chore_ended(gui: Any, phase: str = "done", patience_s: float = 1800) -> Iterator[float]:
    """A set-up or a download, as it should end."""
    current = module("chores").current
    yield from gui.until(lambda: current() is not None and current().ended, patience_s)
    assert current().phase.value == phase, (current().phase, current().error)
    yield 1


def nobody_active() -> None:
    bpy.ops.object.select_all(action="DESELECT")
    bpy.context.view_layer.objects.active = None


def assign(target: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(target, name, value)
