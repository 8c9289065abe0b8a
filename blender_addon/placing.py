# SPDX-License-Identifier: GPL-3.0-or-later
"""The active human onto the face under the mouse: a click collects the place, an operator of its own is the step."""

from __future__ import annotations

from typing import Any, Final

import bpy
from bpy.app.translations import pgettext_iface as iface
from bpy.props import FloatVectorProperty
from bpy_extras import view3d_utils
from mathutils import Vector

from . import snippets
from .actions import Action, Result, can_edit
from .properties import active_human, person_of

STEP_M: Final = 1e-4  # behind a face of the person's own, before the ray goes on
MAX_FACES: Final = 64  # of the person's own that a ray may pass


def point_under(
    context: bpy.types.Context, origin: Vector, direction: Vector, without: bpy.types.Object
) -> Vector | None:
    """Where a ray first meets a face that is not the person's own, in the world; None if nowhere."""
    depsgraph, direction = context.evaluated_depsgraph_get(), direction.normalized()
    for _ in range(MAX_FACES):
        found, location, _, _, met, _ = context.scene.ray_cast(depsgraph, origin, direction)
        if not found:
            return None
        if person_of(met.original) != without:
            return location
        origin = location + direction * STEP_M
    return None


class POPULACE_OT_stand_at(bpy.types.Operator):
    """Let the active human stand at a point of the world, feet on its height"""

    bl_idname = "populace.stand_at"
    bl_label = "Stand at Point"
    bl_options = {"REGISTER", "UNDO"}  # noqa: RUF012

    location: FloatVectorProperty(name="Location", description="Where the feet are, in the world",
                                  subtype="TRANSLATION", size=3)  # fmt: skip
    arguments = Action.arguments

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return can_edit(cls, context)

    def execute(self, context: bpy.types.Context) -> Result:
        root = active_human(context)
        matrix = root.matrix_world.copy()
        matrix.translation = self.location
        root.matrix_world = matrix
        snippets.note(self.bl_idname, self.arguments())
        return {"FINISHED"}


class POPULACE_OT_place_human(bpy.types.Operator):
    """Click on a face to let the active human stand there. Right-click leaves it where it is"""

    bl_idname = "populace.place_human"
    bl_label = "Place on Face"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return can_edit(cls, context)

    def invoke(self, context: bpy.types.Context, event: Any) -> Result:
        context.window.cursor_modal_set("CROSSHAIR")
        context.workspace.status_text_set(iface("Click: stand on this face    Esc or right click: stay"))
        context.window_manager.modal_handler_add(self)
        return {"RUNNING_MODAL"}

    def execute(self, context: bpy.types.Context) -> Result:
        self.report({"ERROR"}, "This needs a mouse: use bpy.ops.populace.stand_at")
        return {"CANCELLED"}

    def modal(self, context: bpy.types.Context, event: Any) -> Result:
        if event.type in ("RIGHTMOUSE", "ESC"):
            _let_go(context)
            return {"CANCELLED"}
        if event.type != "LEFTMOUSE" or event.value != "PRESS":
            return {"PASS_THROUGH"}
        _let_go(context)
        root, ray = active_human(context), _ray(context, event.mouse_x, event.mouse_y)
        place = point_under(context, *ray, root) if root is not None and ray is not None else None
        if place is None:
            self.report({"WARNING"}, "There is no face under the mouse")
            return {"CANCELLED"}
        bpy.ops.populace.stand_at("EXEC_DEFAULT", True, location=place)
        return {"FINISHED"}


def _let_go(context: bpy.types.Context) -> None:
    context.window.cursor_modal_restore()
    context.workspace.status_text_set(None)


def _holds(region: bpy.types.Region, x: int, y: int) -> bool:
    return 0 <= x - region.x < region.width and 0 <= y - region.y < region.height


def _ray(context: bpy.types.Context, x: int, y: int) -> tuple[Vector, Vector] | None:
    """Origin and direction of the ray under a point of the window; None outside the 3D views, and on a sidebar or
    header that lies over one."""
    for area in (area for area in context.screen.areas if area.type == "VIEW_3D"):
        region = next(region for region in area.regions if region.type == "WINDOW")
        if any(_holds(other, x, y) for other in area.regions if other != region and other.width > 1):
            return None
        if _holds(region, x, y):
            at = x - region.x, y - region.y
            view = area.spaces.active.region_3d
            return (view3d_utils.region_2d_to_origin_3d(region, view, at),
                    view3d_utils.region_2d_to_vector_3d(region, view, at))  # fmt: skip
    return None


_CLASSES = (POPULACE_OT_stand_at, POPULACE_OT_place_human)


def register() -> None:
    for cls in _CLASSES:
        bpy.utils.register_class(cls)


def unregister() -> None:
    for cls in reversed(_CLASSES):
        bpy.utils.unregister_class(cls)
