# SPDX-License-Identifier: GPL-3.0-or-later
"""Making crowds, changing them as a whole and removing them, as operators for the panel and for scripts."""

from __future__ import annotations

import json
from typing import Any, Final

import bpy
from bpy.props import BoolProperty, StringProperty

from .. import snippets, tasks
from ..actions import Action, in_object_mode, needs
from . import cast, footing, placement
from .arrivals import arrival, bring, not_asked, on_the_way
from .form import add_row, crowd_properties
from .places import has_crowd

ON: Final = "populace_on"  # on a crowd's collection: what its people stand on
TARGET: Final = "populace_target"  # what they look at

Result = set[str]


class _CrowdOperator:
    """What making and changing have in common."""

    wait: bool

    def _fill(self, context: bpy.types.Context) -> None:
        """Take the form's values."""
        form = context.scene.populace_crowd
        for name in crowd_properties():
            setattr(self, name, getattr(form, name))
        chosen = {"SURFACE": form.surface, "CURVE": form.curve}.get(form.where)
        self.on = chosen.name if chosen is not None else ""
        self.target = form.target.name if form.target is not None else ""
        self.mix = json.dumps([{"attribute": row.attribute, "value": row.value, "percent": row.percent}
                               for row in form.mix])  # fmt: skip

    arguments = Action.arguments

    def invoke(self, context: bpy.types.Context, event: Any) -> Result:
        self._fill(context)
        if event is not None and event.alt:
            context.window_manager.clipboard = snippets.script(snippets.call(self.bl_idname, self.arguments()))
            self.report({"INFO"}, "Copied as Python")
            return {"CANCELLED"}
        return self.execute(context)

    def _asked(self) -> dict[str, Any]:
        """Raises ValueError with a sentence."""
        asked = {name: getattr(self, name) for name in crowd_properties()}
        try:
            rows = json.loads(self.mix) if self.mix else []
            asked["mix"] = [{"attribute": str(row["attribute"]), "value": row["value"],
                             "percent": float(row.get("percent", 100))} for row in rows]  # fmt: skip
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError("The mix is not JSON rows of attribute, value and percent") from None
        return asked

    def _run(self, context: bpy.types.Context, made: bpy.types.Collection | None) -> Result:
        try:
            asked = self._asked()
            on, target = _object(context, self.on), _object(context, self.target)
            if asked["facing"] == "TOWARDS" and target is None:
                raise ValueError("Choose the object to look at")
            markers = [o for o in context.selected_objects if cast.PLACEMENT not in o]
            places = footing.spots(context, asked, on, markers)
            look_at = None if target is None or asked["facing"] != "TOWARDS" else target.matrix_world.translation
            turns = placement.headings(places, asked["seed"], asked["angle"], asked["spread"], look_at,
                                       asked["facing"] == "ALONG")  # fmt: skip
            made = cast.make(context, asked, places, turns, made)
        except ValueError as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        for key, thing in ((ON, on), (TARGET, target)):
            made.pop(key, None)
            if thing is not None:
                made[key] = thing
        if len(places) < asked["placements"] and asked["where"] != "MARKERS":
            self.report({"WARNING"}, f"Only {len(places)} of {asked['placements']} fit at this distance")
        snippets.note(self.bl_idname, self.arguments())
        return bring(self, context, made, self.wait)


class POPULACE_OT_make_crowd(_CrowdOperator, bpy.types.Operator):
    """Make different people and let them stand in many places. Manikins hold the places until the people arrive"""

    bl_idname = "populace.make_crowd"
    bl_label = "Make Crowd"
    bl_options = {"UNDO"}  # noqa: RUF012

    __annotations__ = {
        **crowd_properties(),
        "on": StringProperty(name="On", description="Name of the mesh or curve to stand on", options={"SKIP_SAVE"}),
        "target": StringProperty(name="Target", description="Name of the object to look at", options={"SKIP_SAVE"}),
        "mix": StringProperty(name="Mix", description="JSON rows of attribute, value and percent; a value is a number, "
                              "[low, high], [r, g, b], a choice or words", options={"SKIP_SAVE"}),
        "wait": BoolProperty(name="Wait", description="Return when everybody is there. Always so in background mode",
                             options={"SKIP_SAVE"}),
    }  # fmt: skip

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return in_object_mode(cls, context)

    def execute(self, context: bpy.types.Context) -> Result:
        return self._run(context, None)


class POPULACE_OT_update_crowd(_CrowdOperator, bpy.types.Operator):
    """Change the active crowd to the settings above: people and placements that fit them stay, others are made or go"""

    bl_idname = "populace.update_crowd"
    bl_label = "Apply to Crowd"
    bl_options = {"UNDO"}  # noqa: RUF012

    __annotations__ = POPULACE_OT_make_crowd.__annotations__

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return has_crowd(cls, context)

    def execute(self, context: bpy.types.Context) -> Result:
        return self._run(context, cast.active(context))


class POPULACE_OT_make_missing(bpy.types.Operator):
    """Make the people of this crowd who never arrived, because they were cancelled or failed"""

    bl_idname = "populace.make_missing"
    bl_label = "Make Missing People"
    bl_options = {"UNDO"}  # noqa: RUF012

    wait: BoolProperty(name="Wait", description="Return when everybody is there. Always so in background mode",
                       options={"SKIP_SAVE"})  # fmt: skip

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if not has_crowd(cls, context):
            return False
        made = cast.active(context)
        return needs(cls, "Everybody is here or on the way", made is not None and not_asked(made))

    def execute(self, context: bpy.types.Context) -> Result:
        made = cast.active(context)
        return bring(self, context, made, self.wait) if made is not None else {"CANCELLED"}


class POPULACE_OT_cancel_crowd(bpy.types.Operator):
    """Stop making people for this crowd; who has arrived stays, the others remain manikins"""

    bl_idname = "populace.cancel_crowd"
    bl_label = "Cancel Crowd"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        made = cast.active(context)
        return needs(cls, "Nobody is on the way to this crowd", made is not None and on_the_way(made))

    def execute(self, context: bpy.types.Context) -> Result:
        made = cast.active(context)
        for job in on_the_way(made) if made is not None else ():
            tasks.working_session().cancel(job.id)
        return {"FINISHED"}


class POPULACE_OT_remove_crowd(bpy.types.Operator):
    """Remove the active crowd with its people; objects of yours in its collection stay"""

    bl_idname = "populace.remove_crowd"
    bl_label = "Remove Crowd"
    bl_options = {"UNDO"}  # noqa: RUF012

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return has_crowd(cls, context)

    def invoke(self, context: bpy.types.Context, event: Any) -> Result:
        return context.window_manager.invoke_confirm(self, event)

    def execute(self, context: bpy.types.Context) -> Result:
        made = cast.active(context)
        if made is None:
            return {"CANCELLED"}
        for job in on_the_way(made):
            tasks.working_session().cancel(job.id)
        cast.remove(made)
        return {"FINISHED"}


class POPULACE_OT_crowd_form(bpy.types.Operator):
    """Take the settings of the active crowd into the form"""

    bl_idname = "populace.crowd_form"
    bl_label = "Use Crowd Settings"
    bl_options = {"REGISTER", "UNDO"}  # noqa: RUF012

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return has_crowd(cls, context)

    def execute(self, context: bpy.types.Context) -> Result:
        form, made = context.scene.populace_crowd, cast.active(context)
        try:
            asked = cast.settings(made) if made is not None else {}
            for name in crowd_properties():
                setattr(form, name, asked[name])
            form.mix.clear()
            for row in asked["mix"]:
                add_row(form, row["attribute"], row["value"], row["percent"])
        except (ValueError, KeyError, TypeError):
            self.report({"ERROR"}, "This crowd's settings were changed and cannot be read")
            return {"CANCELLED"}
        on = made.get(ON) if made is not None else None
        form.surface = on if form.where == "SURFACE" else form.surface
        form.curve = on if form.where == "CURVE" else form.curve
        form.target = made.get(TARGET) if made is not None else None
        return {"FINISHED"}


def _object(context: bpy.types.Context, name: str) -> bpy.types.Object | None:
    found = context.scene.objects.get(name) if name else None
    if name and found is None:
        raise ValueError(f"There is no object {name} in this scene")
    return found


_MAKING = (POPULACE_OT_make_crowd, POPULACE_OT_update_crowd, POPULACE_OT_make_missing)
_CLASSES = (
    *_MAKING, POPULACE_OT_cancel_crowd, POPULACE_OT_remove_crowd, POPULACE_OT_crowd_form, *map(arrival, _MAKING),
)  # fmt: skip


def register() -> None:
    for cls in _CLASSES:
        bpy.utils.register_class(cls)


def unregister() -> None:
    for cls in reversed(_CLASSES):
        bpy.utils.unregister_class(cls)
