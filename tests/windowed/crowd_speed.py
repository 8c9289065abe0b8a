# SPDX-License-Identifier: GPL-3.0-or-later
"""Measures a crowd in a real window: 500 placements of 20 people. Frames per second while the view turns, the longest
tick while people arrive, the size of the file. Writes crowd_speed.json to the folder SHOTS.

A driver, see README.md, for a generator that runs. The machine's own speed is in the first number, that of
the empty scene.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bpy
import numpy as np
from mathutils import Quaternion

SHOTS = os.environ.get("SHOTS", "shots")
FRAMES = 5


def frame_ms(gui: Any) -> float:
    """Median time of a whole redraw of the window while the view turns."""
    view = gui.area().spaces.active.region_3d
    times = []
    with gui.override():
        for _ in range(FRAMES):
            view.view_rotation = Quaternion((0, 0, 1), 0.05) @ view.view_rotation
            start = time.perf_counter()
            bpy.ops.wm.redraw_timer(type="DRAW_WIN_SWAP", iterations=1)
            times.append((time.perf_counter() - start) * 1000)
    return round(float(np.median(times)), 1)


def drive(gui: Any) -> Iterator[Any]:
    for o in list(bpy.data.objects):
        bpy.data.objects.remove(o)
    package = next(name for name in sys.modules if name.endswith(".populace.tasks"))
    tasks, ticks = importlib.import_module(package), []
    pump = tasks.pump

    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        is_busy = pump(*args)
        ticks.append((time.perf_counter() - start) * 1000)
        return is_busy

    tasks.pump = timed
    view = gui.area().spaces.active
    view.shading.type, view.shading.color_type = "SOLID", "TEXTURE"
    view.overlay.show_extras = view.overlay.show_relationship_lines = False
    view.region_3d.view_distance = 45
    view.region_3d.view_rotation = Quaternion((0, 0, 1), 0.3) @ Quaternion((1, 0, 0), 1.1)
    bpy.ops.mesh.primitive_plane_add(size=40)
    floor = bpy.context.object
    bpy.ops.object.camera_add(location=(0, -24, 2), rotation=(1.5, 0, 0))
    bpy.context.scene.camera = bpy.context.object
    yield 1
    found: dict[str, Any] = {"empty_ms": frame_ms(gui)}
    start = time.perf_counter()
    bpy.ops.populace.make_crowd("EXEC_DEFAULT", True, people=20, placements=500, where="SURFACE", on=floor.name)
    found["placed_ms"] = round((time.perf_counter() - start) * 1000, 1)
    people = lambda: sum(bool(o.populace.uuid) for o in bpy.data.objects)  # noqa: E731
    yield 1
    found["manikins_while_arriving_ms"] = frame_ms(gui)
    yield from gui.until(lambda: people() == 20, timeout=900)
    found["tick_ms_p99"] = round(float(np.percentile(ticks, 99)), 1)
    found["tick_ms_most"] = round(max(ticks), 1)
    yield 1
    for display in ("BOX", "LIGHT", "FULL"):
        bpy.ops.populace.crowd_display(display=display)
        bpy.context.view_layer.update()
        yield 1.5
        gui.shot(f"{SHOTS}/speed_{display.lower()}.png")
        found[f"{display.lower()}_ms"] = frame_ms(gui)
    start = time.perf_counter()
    bpy.ops.populace.update_lods()
    found["update_lods_ms"] = round((time.perf_counter() - start) * 1000, 1)
    path = Path(SHOTS) / "crowd_speed.blend"
    bpy.ops.wm.save_as_mainfile(filepath=str(path))
    found["file_mb"] = round(path.stat().st_size / 1e6, 1)
    Path(SHOTS, "crowd_speed.json").write_text(json.dumps(found, indent=1), "utf-8")
