# SPDX-License-Identifier: GPL-3.0-or-later
"""The photo's camera in the scene, with the photo behind the person."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any, Final

import bpy
from mathutils import Matrix

from .. import scene
from ..messages import BackendError

# The generator's world (Y up, facing +Z) to Blender's (Z up, facing -Y). Both cameras look down their own -Z.
AXES: Final = Matrix(((1, 0, 0, 0), (0, 0, -1, 0), (0, 1, 0, 0), (0, 0, 0, 1)))
OPACITY: Final = 0.5
_TURNS: Final = {3: math.pi, 6: -math.pi / 2, 8: math.pi / 2}  # what EXIF says is to be done with the picture


def add(context: bpy.types.Context, root: bpy.types.Object, facts: Mapping[str, Any], photo: bytes,
        file: str) -> bpy.types.Object:  # fmt: skip
    """A camera that sees the person as the photo did, child of the person, the scene's camera from now on; the render
    gets the photo's size. `file` is the photo's name. Raises `BackendError` if the facts are none, and leaves nothing
    behind then."""
    try:
        told = facts["camera"]
        c2w = Matrix([[float(x) for x in row] for row in told["c2w"]])
        fov, width, height = float(told["fov_y_rad"]), int(told["width"]), int(told["height"])
        if not (0.001 < fov < 3.1 and min(width, height) >= 1 and max(width, height) <= 1 << 16 and len(c2w.row) == 4):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise BackendError("no_camera", "The generator told no camera of this photo.", "Add one yourself.") from None
    stage = scene.Stage()
    try:
        data = stage.new(bpy.data.cameras, f"{root.name} Photo")
        made = stage.new(bpy.data.objects, data.name, data)
        data.sensor_fit, data.angle = "VERTICAL", fov
        image = scene.packed_image(stage, data.name, photo, file)
        background = data.background_images.new()
        background.image, background.alpha, background.frame_method = image, OPACITY, "FIT"
        background.display_depth = "FRONT"
        background.rotation = _TURNS.get(orientation(photo), 0.0)
        data.show_background_images = True
        c2w = AXES @ c2w
        c2w.translation *= scene.units_per_metre(context)
        made.parent = root
        made.matrix_basis = c2w
        for collection in root.users_collection:
            collection.objects.link(made)
    except BaseException:
        stage.roll_back()
        raise
    context.scene.camera = made
    render = context.scene.render
    render.resolution_x, render.resolution_y, render.resolution_percentage = width, height, 100
    return made


def orientation(data: bytes) -> int:
    """How a JPEG wants to be turned, 1 to 8 as EXIF has it; 1 for everything else. Never raises."""
    at = 2
    try:
        while data[:2] == b"\xff\xd8" and data[at] == 0xFF and data[at + 1] != 0xDA:
            kind, size = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
            segment = data[at + 4 : at + 2 + size]
            if kind == 0xE1 and segment.startswith(b"Exif\0\0"):
                return _tag(segment[6:])
            at += 2 + size
    except (IndexError, struct.error):
        pass
    return 1


def _tag(tiff: bytes) -> int:
    order = "<" if tiff[:2] == b"II" else ">"
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, start)
    for i in range(count):
        tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, start + 2 + 12 * i)
        if tag == 0x0112 and kind == 3:
            return value if 1 <= value <= 8 else 1
    return 1
