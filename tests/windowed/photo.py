# SPDX-License-Identifier: GPL-3.0-or-later
"""A person from a photo by mouse in a real window, a picture of each state: the button, the file browser, the stages,
the person in the photo's pose through its camera, rest and back, an edit, the options of a drop, an error.

A driver, see README.md; PHOTO is a picture of a person before a plain background, FAMILY the family that reads it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bpy

sys.path.insert(0, str(Path(__file__).parent))
from gestures import PATIENCE_S, SHOTS, connect, look, module, nobody_active, over_view, people, press, shot, widen

PHOTO = Path(os.environ["PHOTO"])
FAMILY = os.environ.get("FAMILY", "people")


def turns(root: Any) -> list[tuple[float, ...]]:
    return [tuple(round(x, 4) for x in bone.rotation_quaternion) for bone in root.pose.bones]


def drive(gui: Any) -> Iterator[Any]:
    bpy.data.batch_remove(list(bpy.data.objects))
    look(gui)
    yield from widen(gui)
    form = bpy.context.scene.populace
    form.family, form.faces, form.grid_resolution, form.texture_size = FAMILY, 20000, 192, "1024"
    yield from connect(gui)
    yield from shot(gui, "40_button")

    # The button, the file browser, its options.
    yield from press(gui, "Photo")
    yield 2
    parameters = gui.area("FILE_BROWSER").spaces.active.params
    parameters.directory = str(PHOTO.parent).encode()
    parameters.display_type = "THUMBNAIL"
    yield 2
    parameters.filename = PHOTO.name
    operator = gui.area("FILE_BROWSER").spaces.active.active_operator
    operator.reference = True
    yield from shot(gui, "41_file_browser")
    yield from press(gui, "Human", 0, gui.region("EXECUTE", gui.area("FILE_BROWSER")))
    tasks = module("tasks")
    stages: set[str] = set()

    def here() -> bool:
        stages.update(job.status.stage for job in tasks.listed_jobs())
        assert not any(job.status.state == "failed" for job in tasks.listed_jobs()), tasks.listed_jobs()[-1].status
        return bool(people())

    yield from gui.until(lambda: here() or stages & {"encode", "fit", "invert"}, PATIENCE_S)
    yield from shot(gui, "42_stages")
    yield from gui.until(here, PATIENCE_S)
    root = people()[0]
    print("stages:", sorted(stages))
    facts = json.loads(root.populace.photo)
    maps = {row.sha256 for row in root.populace.maps}
    assert maps
    assert bpy.context.scene.camera.parent == root
    yield from shot(gui, "43_person")

    # Through the photo's camera.
    yield from over_view(gui)
    gui.key("KP_Insert")
    yield from shot(gui, "44_camera")
    gui.key("KP_Insert")
    yield 0.5
    look(gui)

    # Rest, and as in the photo.
    posed = turns(root)
    yield from press(gui, "Rest")
    yield from gui.until(lambda: turns(root) != posed, PATIENCE_S)
    assert all(turn[0] > 0.9999 for turn in turns(root)), turns(root)
    yield from shot(gui, "45_rest")
    yield from press(gui, "Pose")
    yield from gui.until(lambda: turns(root) == posed, PATIENCE_S)
    yield from shot(gui, "46_posed_again")

    # Taller: what the photo showed stays.
    count = len(root.populace.versions)
    bpy.ops.populace.set_attributes(values=json.dumps({"height_m": round(root.populace.height_m + 0.12, 2)}))
    yield from gui.until(lambda: len(root.populace.versions) > count, PATIENCE_S)
    assert {row.sha256 for row in root.populace.maps} == maps
    yield from shot(gui, "47_taller")
    bpy.ops.wm.save_as_mainfile(filepath=f"{SHOTS}/photo.blend")
    assert facts["camera"]

    # A file dragged onto the view: Blender asks what to do with it, then come the options. This one is broken.
    nobody_active()
    folder = Path(SHOTS).resolve() / "drop"
    folder.mkdir(exist_ok=True)
    (folder / "broken.png").write_bytes(PHOTO.read_bytes()[:-200])
    browser = gui.area("PROPERTIES")
    browser.ui_type = "FILES"
    yield 2
    browser.spaces.active.params.directory = str(folder).encode()
    browser.spaces.active.params.display_type = "THUMBNAIL"
    yield 3
    area, (x, y, _, _) = gui.box(gui.region("WINDOW")), gui.box(gui.region("WINDOW", browser))
    x, y, to_x, to_y = x + 60, y + 55, area[0] + 480, area[1] + 620
    gui.move(x, y + 200)
    yield 0.5
    gui.move(x, y)
    yield 1
    gui.xdotool("mousedown", 1)
    for step in range(8):  # slowly at first, else it becomes a selection
        gui.move(x - 3 * step, y)
        yield 0.2
    for step in range(12):
        gui.move(x + (to_x - x) * step / 11, y + (to_y - y) * step / 11)
        yield 0.2
    yield from shot(gui, "48_dragged")
    gui.xdotool("mouseup", 1)
    yield from shot(gui, "49_dropped")
    yield from gui.click(to_x, to_y - 8)  # the second of two
    yield from shot(gui, "50_drop_options")
    gui.key("Return")
    yield from gui.until(lambda: any(job.status.state == "failed" for job in tasks.listed_jobs()), PATIENCE_S)
    yield from shot(gui, "51_error")
