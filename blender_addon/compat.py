# SPDX-License-Identifier: GPL-3.0-or-later
"""Differences between Blender versions, each with its reason. Supported: 4.2 LTS to 5.x."""

from __future__ import annotations

from typing import Any, Final

import bpy
import numpy as np

DOT_PREFIX: Final = "STRIP_COLOR_" if bpy.app.version >= (4, 4, 0) else "SEQUENCE_COLOR_"  # renamed in 4.4


def set_vertices(mesh: bpy.types.Mesh, vertices: np.ndarray[Any, Any]) -> None:
    """float32 [V, 3]. The attribute takes 0.1 ms where `vertices.foreach_set("co")` takes 26 (100k vertices)."""
    mesh.attributes["position"].data.foreach_set("vector", np.ascontiguousarray(vertices).ravel())


def set_corners(mesh: bpy.types.Mesh, faces: np.ndarray[Any, Any]) -> None:
    """int32 [F, 3]. `.corner_vert` is Blender's internal name, so there is a slow way without it."""
    corners = np.ascontiguousarray(faces, np.int32).ravel()
    attribute = mesh.attributes.get(".corner_vert")
    if attribute is not None:
        attribute.data.foreach_set("value", corners)
    else:
        mesh.loops.foreach_set("vertex_index", corners)
    mesh.polygons.foreach_set("loop_start", np.arange(0, len(corners), 3, dtype=np.int32))


def enable_nodes(material: bpy.types.Material) -> None:
    """Since 5.0 every material has nodes and setting `use_nodes` is deprecated."""
    if material.node_tree is None:
        material.use_nodes = True


def mark_as_data(image: bpy.types.Image) -> None:
    """Not a colour: with the standard colour configuration "Non-Color"; others name it differently."""
    try:
        image.colorspace_settings.name = "Non-Color"
    except TypeError:
        image.colorspace_settings.is_data = True


def modal_operator(window: bpy.types.Window) -> str:
    """The name of an operator that is in the middle of something in this window, "" if none."""
    return next((operator.name for operator in window.modal_operators), "")
