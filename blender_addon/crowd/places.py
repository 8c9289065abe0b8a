# SPDX-License-Identifier: GPL-3.0-or-later
"""Changing who stands where in a crowd and how it is shown, as operators; and the timer that follows the camera."""

from __future__ import annotations

import logging
import secrets
from typing import Final

import bpy
from bpy.props import BoolProperty, IntProperty

from ..actions import in_object_mode, needs
from ..properties import MAX_SEED, RANDOM_SEEDS
from . import cast
from .arrivals import arrival, bring
from .form import crowd_properties

log = logging.getLogger(__name__)

WATCH_INTERVAL_S: Final = 0.5
WATCH_AFTER_S: Final = 2.0

Result = set[str]


class POPULACE_OT_reseed_placement(bpy.types.Operator):
    """Make somebody new for each selected placement, with the same share of the mix. Nobody else changes"""

    bl_idname = "populace.reseed_placement"
    bl_label = "New Person"
    bl_options = {"UNDO"}  # noqa: RUF012

    seed: IntProperty(name="Seed", description="Of the first new person; -1 draws one", min=-1, max=MAX_SEED,
                      default=-1, options={"SKIP_SAVE"})  # fmt: skip
    wait: BoolProperty(name="Wait", description="Return when everybody is there. Always so in background mode",
                       options={"SKIP_SAVE"})  # fmt: skip

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return _has_placement(cls, context)

    def execute(self, context: bpy.types.Context) -> Result:
        owner, places = _chosen(context)
        first = self.seed if self.seed >= 0 else secrets.randbelow(RANDOM_SEEDS)
        for i, place in enumerate(places):
            cast.new_person_for(owner, place, first + i)
        return bring(self, context, owner, self.wait)


class POPULACE_OT_swap_placement(bpy.types.Operator):
    """Let somebody else of the same crowd stand at each selected placement"""

    bl_idname = "populace.swap_placement"
    bl_label = "Swap Person"
    bl_options = {"REGISTER", "UNDO"}  # noqa: RUF012

    step: IntProperty(name="Step", description="How many people further on in the crowd", default=1)

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return _has_placement(cls, context)

    def execute(self, context: bpy.types.Context) -> Result:
        owner, places = _chosen(context)
        for place in places:
            everybody = cast.people(owner)
            now = next(i for i, person in enumerate(everybody) if person[cast.PERSON] == place[cast.PERSON])
            cast.give(owner, place, everybody[(now + self.step) % len(everybody)])
        return {"FINISHED"}


class POPULACE_OT_update_lods(bpy.types.Operator):
    """Give every placement of every crowd the level of detail for its distance to the camera"""

    bl_idname = "populace.update_lods"
    bl_label = "Update LODs"
    bl_options = {"REGISTER", "UNDO"}  # noqa: RUF012

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if not has_crowd(cls, context):
            return False
        if context.scene.camera is None:
            cls.poll_message_set("Add a camera to the scene first")
            return False
        return True

    def execute(self, context: bpy.types.Context) -> Result:
        changed = sum(cast.update_levels(context, made) for made in cast.crowds(context.scene))
        self.report({"INFO"}, f"{changed} placements changed their level of detail")
        return {"FINISHED"}


class POPULACE_OT_crowd_display(bpy.types.Operator):
    """Choose how the viewport shows the active crowd; renders are always full"""

    bl_idname = "populace.crowd_display"
    bl_label = "Crowd in Viewport"
    bl_options = {"REGISTER", "UNDO"}  # noqa: RUF012

    __annotations__ = {"display": crowd_properties()["display"]}

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return has_crowd(cls, context)

    def execute(self, context: bpy.types.Context) -> Result:
        made = cast.active(context)
        if made is None:
            return {"CANCELLED"}
        cast.set_display(made, self.display)
        return {"FINISHED"}


def _chosen(context: bpy.types.Context) -> tuple[bpy.types.Collection, list[bpy.types.Object]]:
    """The first selected placement's crowd, and all selected placements of it."""
    for made in cast.crowds(context.scene):
        known = {person[cast.PERSON] for person in cast.people(made)}
        places = [o for o in cast.placements(made) if o.select_get() and o.get(cast.PERSON) in known]
        if places:
            return made, places
    raise RuntimeError("no placement is selected")


def has_crowd(cls: type[bpy.types.Operator], context: bpy.types.Context) -> bool:
    return (in_object_mode(cls, context) and needs(
        cls, "Select a crowd: one of its placements or its collection", cast.active(context) is not None))  # fmt: skip


def _has_placement(cls: type[bpy.types.Operator], context: bpy.types.Context) -> bool:
    return (in_object_mode(cls, context) and needs(
        cls, "Select placements of a crowd", any(cast.PLACEMENT in o for o in context.selected_objects)))  # fmt: skip


# ------------------------------------------------------------------------------------------------------- live LODs


_seen: tuple[float, ...] = ()  # where the camera was when the levels were last brought up to date


def _watch() -> float:
    """Blender's timer: follow the camera while nothing else goes on. It only points placements at other levels that
    are there from the crowd's first step on, so undo finds nothing that it does not know."""
    global _seen
    try:
        context = bpy.context
        form, camera = context.scene.populace_crowd, context.scene.camera
        if not form.live or camera is None or context.mode != "OBJECT" or bpy.app.is_job_running("RENDER"):
            return WATCH_AFTER_S
        windows = context.window_manager.windows
        if any(window.screen.is_animation_playing or len(window.modal_operators) for window in windows):
            return WATCH_INTERVAL_S
        place = tuple(camera.matrix_world.translation)
        if place != _seen:
            _seen = place
            for made in cast.crowds(context.scene):
                cast.update_levels(context, made)
    except Exception:  # a raised exception would end the timer
        log.exception("live LODs")
        return WATCH_AFTER_S
    return WATCH_INTERVAL_S


_CLASSES = (
    POPULACE_OT_reseed_placement, POPULACE_OT_swap_placement, POPULACE_OT_update_lods, POPULACE_OT_crowd_display,
    arrival(POPULACE_OT_reseed_placement),
)  # fmt: skip


def register() -> None:
    for cls in _CLASSES:
        bpy.utils.register_class(cls)
    if not bpy.app.background:
        bpy.app.timers.register(_watch, first_interval=WATCH_AFTER_S, persistent=True)


def unregister() -> None:
    if bpy.app.timers.is_registered(_watch):
        bpy.app.timers.unregister(_watch)
    for cls in reversed(_CLASSES):
        bpy.utils.unregister_class(cls)
