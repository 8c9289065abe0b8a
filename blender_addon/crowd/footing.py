# SPDX-License-Identifier: GPL-3.0-or-later
"""What the people of a crowd stand on, as `placement` wants it: triangles, lines, markers of the scene."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import bpy
import numpy as np

from .. import scene
from . import placement

Array = np.ndarray[Any, Any]


def spots(context: bpy.types.Context, asked: Mapping[str, Any], surface: bpy.types.Object | None,
          markers: Sequence[bpy.types.Object]) -> placement.Spots:  # fmt: skip
    """Where people stand, in scene units. Raises ValueError with a sentence when the settings lack something."""
    units = scene.units_per_metre(context)
    count, seed, distance = asked["placements"], asked["seed"], asked["distance"] * units
    where = asked["where"]
    if where == "GRID":
        found = placement.in_grid(count, distance, seed, asked["gap"] * units, asked["columns"], asked["jitter"])
        found.points[:] += context.scene.cursor.location
    elif where == "MARKERS":
        if not markers:
            raise ValueError("Select the objects to stand at, then try again")
        matrices = np.array([o.matrix_world for o in markers])
        return placement.Spots(matrices[:, :3, 3], placement.level(-matrices[:, :3, 1]))
    elif surface is None:
        raise ValueError("Choose the object to stand on" if where == "SURFACE" else "Choose the curve to stand along")
    elif where == "SURFACE":
        found = placement.on_surface(_triangles(context, surface), count, distance, seed, asked["max_slope"])
    else:
        found = placement.along_curve(_lines(context, surface), count, distance, seed, asked["width"] * units,
                                      asked["jitter"])  # fmt: skip
    if not len(found):
        raise ValueError(f"There is no place to stand on {surface.name if surface else 'it'}: is it too steep?")
    return found


def _triangles(context: bpy.types.Context, surface: bpy.types.Object) -> Array:
    """f64 [T, 3, 3] in the world, with the object's modifiers."""
    evaluated = surface.evaluated_get(context.evaluated_depsgraph_get())
    mesh = evaluated.to_mesh()
    try:
        mesh.calc_loop_triangles()
        points = np.empty((len(mesh.vertices), 3), np.float32)
        corners = np.empty((len(mesh.loop_triangles), 3), np.int32)
        mesh.vertices.foreach_get("co", points.ravel())
        mesh.loop_triangles.foreach_get("vertices", corners.ravel())
    finally:
        evaluated.to_mesh_clear()
    return _in_world(points, surface)[corners]


def _lines(context: bpy.types.Context, surface: bpy.types.Object) -> list[Array]:
    """The polylines of a curve without its bevel; f64 [P, 3] each, closed ones repeat their first point."""
    copy = surface.copy()
    data = surface.data.copy()
    try:
        copy.data = data
        data.dimensions = "3D"  # of 2D curves the inside would be filled
        data.bevel_depth = data.extrude = 0.0
        data.bevel_object = None
        mesh = copy.to_mesh()
        points = np.empty((len(mesh.vertices), 3), np.float32)
        edges = np.empty((len(mesh.edges), 2), np.int32)
        mesh.vertices.foreach_get("co", points.ravel())
        mesh.edges.foreach_get("vertices", edges.ravel())
        copy.to_mesh_clear()
    finally:
        bpy.data.batch_remove([copy, data])
    world = _in_world(points, surface)
    pairs = np.sort(edges, axis=1)
    steps = np.sort(pairs[pairs[:, 1] == pairs[:, 0] + 1][:, 0])
    ends = set(map(tuple, pairs.tolist()))
    runs = np.split(steps, np.flatnonzero(np.diff(steps) > 1) + 1) if len(steps) else []
    lines = [[*run.tolist(), int(run[-1]) + 1] for run in runs]
    return [world[[*line, line[0]] if len(line) > 2 and (line[0], line[-1]) in ends else line] for line in lines]


def _in_world(points: Array, owner: bpy.types.Object) -> Array:
    matrix = np.array(owner.matrix_world)
    return points.astype(np.float64) @ matrix[:3, :3].T + matrix[:3, 3]
