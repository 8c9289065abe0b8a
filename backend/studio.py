# SPDX-License-Identifier: GPL-3.0-or-later
"""A headless Blender with the add-on in it, and a photo studio for people. Of the backend's modules only this one
imports bpy, and nothing on the road from request to packet imports this one: `demo` and `interchange_blender` do.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from backend.protocol import PopulaceError

if TYPE_CHECKING:
    from blender_addon.packet import Human

SPACING_M = 1.0  # between people whose arms are down
_GREY = (0.30, 0.31, 0.33, 1.0)


def start() -> Any:
    """An empty scene in the bpy module, with private user folders. Returns bpy. Call once per process."""
    folder = tempfile.mkdtemp(prefix="populace-blender-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["BLENDER_USER_RESOURCES"] = folder
    try:
        bpy: Any = importlib.import_module("bpy")  # it comes without types
    except ImportError as error:
        raise PopulaceError(
            "internal_error", f"This needs Blender as a Python module, which is not here ({error}).",
            'Install it with: pip install ".[blender]" (Python 3.11).'
        ) from None  # fmt: skip
    with quiet():
        bpy.ops.wm.read_factory_settings(use_empty=True)
        enabled = importlib.import_module("addon_utils").enable("blender_addon", default_set=True)
    if enabled is None:
        raise PopulaceError("internal_error", "Blender cannot load the Populace add-on.", "Run again with --verbose.")
    return bpy


def insert(bpy: Any, human: Human, index: int, count: int) -> tuple[float, list[Any]]:
    """Let the add-on insert a person, one of `count` in a row. Returns the seconds it took and the mesh objects that
    are seen: those of the full level of detail."""
    from blender_addon import scene

    begin = time.perf_counter()
    batch = scene.Batch("Populace", count, (0.0, 0.0, 0.0), spacing_m=SPACING_M)
    root, _ = scene.insert(bpy.context, human, batch, index)
    seconds = time.perf_counter() - begin
    bpy.context.view_layer.update()
    return seconds, [o for o in (root, *root.children_recursive) if o.type == "MESH" and not o.hide_render]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Blender writes to the process's standard output; keep that from the user's terminal and from pipes."""
    sys.stdout.flush()
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


def light(bpy: Any, height_m: float) -> None:
    """A grey backdrop that curves up behind, a large key light, a fill, and two edge lights."""
    scene = bpy.context.scene
    _backdrop(bpy)
    target = (0.0, 0.0, 0.55 * height_m)
    for name, place, size, watts, colour in (
        ("Key", (-2.6, -3.4, 3.4), 1.6, 170, (1.0, 0.96, 0.91)),
        ("Fill", (3.4, -3.0, 1.9), 3.0, 35, (0.90, 0.95, 1.0)),
        ("Edge left", (-3.0, 1.9, 2.9), 1.0, 80, (1.0, 1.0, 1.0)),
        ("Edge right", (3.0, 1.9, 2.9), 1.0, 80, (1.0, 1.0, 1.0)),
    ):
        lamp = bpy.data.lights.new(name, "AREA")
        lamp.energy, lamp.size, lamp.color = watts, size, colour
        obj = bpy.data.objects.new(name, lamp)
        scene.collection.objects.link(obj)
        _aim(obj, place, target)
    world = scene.world or bpy.data.worlds.new("Studio")
    scene.world = world
    background = _node(world, "BACKGROUND")
    background.inputs["Color"].default_value = (0.75, 0.8, 0.9, 1.0)
    background.inputs["Strength"].default_value = 0.12


def photograph(
    bpy: Any, objects: Sequence[Any], path: Path, size: tuple[int, int], report: Callable[[float], None],
    samples: int = 8,
) -> None:
    """Render `objects` with Cycles on the CPU into a PNG: a long lens at chest height that just frames them.

    `report` hears the fraction done.
    """  # fmt: skip
    scene = bpy.context.scene
    low, high = _bounds(bpy, objects)
    lens_mm, sensor_mm = 70.0, 36.0
    camera = bpy.data.cameras.new("Camera")
    camera.lens, camera.sensor_width, camera.sensor_fit = lens_mm, sensor_mm, "HORIZONTAL"
    width, height = (high[0] - low[0]) + 0.7, (high[2] - low[2]) + 0.3
    distance = max(width, height * size[0] / size[1]) * lens_mm / sensor_mm
    obj = bpy.data.objects.new("Camera", camera)
    scene.collection.objects.link(obj)
    middle = (low + high) / 2
    aim = (float(middle[0]), float(middle[1]), float(middle[2]))
    _aim(obj, (aim[0], aim[1] - distance, aim[2] + 0.12), aim)
    scene.camera = obj
    scene.render.engine = "CYCLES"
    scene.cycles.device = "CPU"
    scene.cycles.samples = samples
    scene.cycles.use_denoising = True
    scene.cycles.denoising_quality = "FAST"
    scene.cycles.max_bounces = 3
    scene.cycles.use_light_tree = False  # a third of the time, with four lights
    scene.render.resolution_x, scene.render.resolution_y = size
    scene.render.resolution_percentage = 100
    scene.render.image_settings.file_format = "PNG"
    scene.render.filepath = str(path.resolve())
    scene.view_settings.look = "AgX - Medium High Contrast"

    def heard(text: Any, _: Any) -> None:
        if sample := re.search(r"Sample (\d+)/", str(text)):
            report(int(sample[1]) / samples)

    bpy.app.handlers.render_stats.append(heard)
    try:
        with quiet():
            bpy.ops.render.render(write_still=True)
    finally:
        bpy.app.handlers.render_stats.remove(heard)


def save(bpy: Any, path: Path) -> None:
    """Write the scene, compressed. Raises `out_of_disk` or `internal_error` with Blender's reason."""
    try:
        with quiet():
            bpy.ops.wm.save_as_mainfile(filepath=str(path.resolve()), compress=True)
    except RuntimeError as error:
        code = "out_of_disk" if "No space left" in str(error) else "internal_error"
        raise PopulaceError(code, f"Blender cannot write {path}: {error}", "Choose another folder.") from None


def _bounds(bpy: Any, objects: Sequence[Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Corners of the box around the objects as they are posed, in the world."""
    points, depsgraph = [], bpy.context.evaluated_depsgraph_get()
    for obj in (original.evaluated_get(depsgraph) for original in objects):
        box = np.array([[*corner, 1.0] for corner in obj.bound_box])
        points.append((box @ np.array(obj.matrix_world).T)[:, :3])
    every = np.concatenate(points)
    return every.min(0), every.max(0)


def _aim(obj: Any, place: tuple[float, float, float], target: tuple[float, float, float]) -> None:
    obj.location = place
    towards = importlib.import_module("mathutils").Vector(target) - obj.location
    obj.rotation_euler = towards.to_track_quat("-Z", "Y").to_euler()


def _node(datablock: Any, kind: str) -> Any:
    """A node of the tree that a new material or world has, or gets before Blender 5.0 when asked to."""
    if not datablock.node_tree:
        datablock.use_nodes = True
    return next(node for node in datablock.node_tree.nodes if node.type == kind)


def _backdrop(bpy: Any) -> None:
    """Floor, a quarter round, a wall: one smooth strip along x."""
    angles = np.linspace(0, np.pi / 2, 24)
    radius, start = 2.0, 2.5
    profile = [(-14.0, 0.0), (0.0, 0.0)]
    profile += [(start + radius * np.sin(a), radius - radius * np.cos(a)) for a in angles]
    profile.append((start + radius, 12.0))
    vertices = [(x, y, z) for y, z in profile for x in (-20.0, 20.0)]
    faces = [(2 * i, 2 * i + 1, 2 * i + 3, 2 * i + 2) for i in range(len(profile) - 1)]
    mesh = bpy.data.meshes.new("Backdrop")
    mesh.from_pydata(vertices, [], faces)
    mesh.shade_smooth()
    material = bpy.data.materials.new("Backdrop")
    shader = _node(material, "BSDF_PRINCIPLED")
    shader.inputs["Base Color"].default_value = _GREY
    shader.inputs["Roughness"].default_value = 0.9
    mesh.materials.append(material)
    bpy.context.scene.collection.objects.link(bpy.data.objects.new("Backdrop", mesh))
