# SPDX-License-Identifier: GPL-3.0-or-later
"""Making and changing crowds, as operators for the panel and for scripts.

In a window people arrive one by one; each arrival takes the place of the crowd's undo step, so that a crowd is one
step. In background mode, or with `wait`, the operators return when everybody is there.
"""

from __future__ import annotations

import json
import logging
import secrets
from contextlib import closing
from typing import Any, Final

import bpy
from bpy.props import BoolProperty, IntProperty, StringProperty

from . import crowd, footing, placement, preferences, snippets, tasks
from .actions import Action
from .client import Client
from .crowd_form import add_row, crowd_properties
from .messages import BackendError
from .properties import MAX_SEED, RANDOM_SEEDS
from .session import Job

log = logging.getLogger(__name__)

WATCH_INTERVAL_S: Final = 0.5
WATCH_AFTER_S: Final = 2.0
ARRIVAL: Final = "_arrival"
ON: Final = "populace_on"  # on a crowd's collection: what its people stand on
TARGET: Final = "populace_target"  # what they look at

Result = set[str]


# ------------------------------------------------------------------------------------------------------------- making


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
            markers = [o for o in context.selected_objects if crowd.PLACEMENT not in o]
            places = footing.spots(context, asked, on, markers)
            look_at = None if target is None or asked["facing"] != "TOWARDS" else target.matrix_world.translation
            turns = placement.headings(places, asked["seed"], asked["angle"], asked["spread"], look_at,
                                       asked["facing"] == "ALONG")  # fmt: skip
            made = crowd.make(context, asked, places, turns, made)
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
        return _request(self, context, made, self.wait)


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
        return _object_mode(cls, context)

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
        return _crowd_needed(cls, context)

    def execute(self, context: bpy.types.Context) -> Result:
        return self._run(context, crowd.active(context))


class POPULACE_OT_make_missing(bpy.types.Operator):
    """Make the people of this crowd who never arrived, because they were cancelled or failed"""

    bl_idname = "populace.make_missing"
    bl_label = "Make Missing People"
    bl_options = {"UNDO"}  # noqa: RUF012

    wait: BoolProperty(name="Wait", description="Return when everybody is there. Always so in background mode",
                       options={"SKIP_SAVE"})  # fmt: skip

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if not _crowd_needed(cls, context):
            return False
        made = crowd.active(context)
        if made is None or not _not_asked(made):
            cls.poll_message_set("Everybody is here or on the way")
            return False
        return True

    def execute(self, context: bpy.types.Context) -> Result:
        made = crowd.active(context)
        return _request(self, context, made, self.wait) if made is not None else {"CANCELLED"}


class POPULACE_OT_cancel_crowd(bpy.types.Operator):
    """Stop making people for this crowd; who has arrived stays, the others remain manikins"""

    bl_idname = "populace.cancel_crowd"
    bl_label = "Cancel Crowd"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        made = crowd.active(context)
        if made is None or not on_the_way(made):
            cls.poll_message_set("Nobody is on the way to this crowd")
            return False
        return True

    def execute(self, context: bpy.types.Context) -> Result:
        made = crowd.active(context)
        for job in on_the_way(made) if made is not None else ():
            tasks.working_session().cancel(job.id)
        return {"FINISHED"}


# ----------------------------------------------------------------------------------------------------- changing places


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
        return _placement_needed(cls, context)

    def execute(self, context: bpy.types.Context) -> Result:
        owner, places = _chosen(context)
        first = self.seed if self.seed >= 0 else secrets.randbelow(RANDOM_SEEDS)
        for i, place in enumerate(places):
            crowd.new_person_for(owner, place, first + i)
        return _request(self, context, owner, self.wait)


class POPULACE_OT_swap_placement(bpy.types.Operator):
    """Let somebody else of the same crowd stand at each selected placement"""

    bl_idname = "populace.swap_placement"
    bl_label = "Another Person"
    bl_options = {"REGISTER", "UNDO"}  # noqa: RUF012

    step: IntProperty(name="Step", description="How many people further on in the crowd", default=1)

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return _placement_needed(cls, context)

    def execute(self, context: bpy.types.Context) -> Result:
        owner, places = _chosen(context)
        for place in places:
            cast = crowd.people(owner)
            now = next(i for i, person in enumerate(cast) if person[crowd.PERSON] == place[crowd.PERSON])
            crowd.give(owner, place, cast[(now + self.step) % len(cast)])
        return {"FINISHED"}


class POPULACE_OT_update_lods(bpy.types.Operator):
    """Give every placement of every crowd the level of detail for its distance to the camera"""

    bl_idname = "populace.update_lods"
    bl_label = "Update LODs"
    bl_options = {"REGISTER", "UNDO"}  # noqa: RUF012

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if not _crowd_needed(cls, context):
            return False
        if context.scene.camera is None:
            cls.poll_message_set("Add a camera to the scene first")
            return False
        return True

    def execute(self, context: bpy.types.Context) -> Result:
        changed = sum(crowd.update_levels(context, made) for made in crowd.crowds(context.scene))
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
        return _crowd_needed(cls, context)

    def execute(self, context: bpy.types.Context) -> Result:
        made = crowd.active(context)
        if made is None:
            return {"CANCELLED"}
        crowd.set_display(made, self.display)
        return {"FINISHED"}


class POPULACE_OT_remove_crowd(bpy.types.Operator):
    """Remove the active crowd with its people; objects of yours in its collection stay"""

    bl_idname = "populace.remove_crowd"
    bl_label = "Remove Crowd"
    bl_options = {"UNDO"}  # noqa: RUF012

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return _crowd_needed(cls, context)

    def invoke(self, context: bpy.types.Context, event: Any) -> Result:
        return context.window_manager.invoke_confirm(self, event)

    def execute(self, context: bpy.types.Context) -> Result:
        made = crowd.active(context)
        if made is None:
            return {"CANCELLED"}
        for job in on_the_way(made):
            tasks.working_session().cancel(job.id)
        crowd.remove(made)
        return {"FINISHED"}


class POPULACE_OT_crowd_form(bpy.types.Operator):
    """Take the settings of the active crowd into the form"""

    bl_idname = "populace.crowd_form"
    bl_label = "Use Crowd Settings"
    bl_options = {"REGISTER", "UNDO"}  # noqa: RUF012

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return _crowd_needed(cls, context)

    def execute(self, context: bpy.types.Context) -> Result:
        form, made = context.scene.populace_crowd, crowd.active(context)
        try:
            asked = crowd.settings(made) if made is not None else {}
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


# ------------------------------------------------------------------------------------------------------------ together


def on_the_way(made: bpy.types.Collection) -> list[Job]:
    """Jobs for this crowd that are not over."""
    state, crowd_id = tasks.session(), made[crowd.CROWD]
    return [job for job in (state.jobs.values() if state is not None else ())
            if isinstance(job.tag, crowd.Arrival) and job.tag.crowd == crowd_id and _is_coming(job)]  # fmt: skip


def _is_coming(job: Job) -> bool:
    return job.is_open or (job.human is not None and not job.taken)


def _not_asked(made: bpy.types.Collection) -> list[bpy.types.Collection]:
    asked = {job.tag.person for job in on_the_way(made)}
    return [person for person in crowd.missing(made) if person[crowd.PERSON] not in asked]


def _request(operator: bpy.types.Operator, context: bpy.types.Context, made: bpy.types.Collection,
             wait: bool) -> Result:  # fmt: skip
    """Let everybody be made who is missing: later, or now where timers never fire."""
    takes = _name(type(operator)) + ARRIVAL
    absent = [(crowd.Arrival(made[crowd.CROWD], person[crowd.PERSON], person.name, takes), crowd.request(person))
              for person in _not_asked(made)]  # fmt: skip
    if not _must_wait(wait):
        wanted = {person[crowd.PERSON] for person in crowd.people(made)}
        for job in on_the_way(made):
            if job.tag.person not in wanted:
                tasks.working_session().cancel(job.id)
        for arrival, request in absent:
            tasks.send(request, arrival)
        return {"FINISHED"}
    done = 0
    try:
        with closing(Client(preferences.python()).generate_all(request for _, request in absent)) as humans:
            for (arrival, _), human in zip(absent, humans):
                crowd.arrive(context, human, arrival)
                done += 1
    except BackendError as error:
        log.warning("crowd: %s", error)
        operator.report({"ERROR"}, f"{error} {done} of {len(absent)} people were made.")
    return {"FINISHED"}


def _name(operator: type) -> str:
    return operator.__name__.removeprefix("POPULACE_OT_")


def _must_wait(wait: bool) -> bool:
    return wait or bpy.app.background  # timers never fire there


def _object(context: bpy.types.Context, name: str) -> bpy.types.Object | None:
    found = context.scene.objects.get(name) if name else None
    if name and found is None:
        raise ValueError(f"There is no object {name} in this scene")
    return found


def _chosen(context: bpy.types.Context) -> tuple[bpy.types.Collection, list[bpy.types.Object]]:
    """The first selected placement's crowd, and all selected placements of it."""
    for made in crowd.crowds(context.scene):
        known = {person[crowd.PERSON] for person in crowd.people(made)}
        places = [o for o in crowd.placements(made) if o.select_get() and o.get(crowd.PERSON) in known]
        if places:
            return made, places
    raise RuntimeError("no placement is selected")


def _object_mode(cls: type[bpy.types.Operator], context: bpy.types.Context) -> bool:
    if context.mode != "OBJECT":
        cls.poll_message_set("Switch to Object Mode first")
        return False
    return True


def _crowd_needed(cls: type[bpy.types.Operator], context: bpy.types.Context) -> bool:
    if not _object_mode(cls, context):
        return False
    if crowd.active(context) is None:
        cls.poll_message_set("Select a crowd: one of its placements or its collection")
        return False
    return True


def _placement_needed(cls: type[bpy.types.Operator], context: bpy.types.Context) -> bool:
    if not _object_mode(cls, context):
        return False
    if not any(crowd.PLACEMENT in o for o in context.selected_objects):
        cls.poll_message_set("Select placements of a crowd")
        return False
    return True


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
            for made in crowd.crowds(context.scene):
                crowd.update_levels(context, made)
    except Exception:  # a raised exception would end the timer
        log.exception("live LODs")
        return WATCH_AFTER_S
    return WATCH_INTERVAL_S


class _ArrivalOperator:
    """Put this person into the crowd"""

    bl_label = "Crowd Arrival"
    bl_options = {"UNDO_GROUPED", "INTERNAL"}  # noqa: RUF012

    __annotations__ = {"job_id": StringProperty(options={"SKIP_SAVE"})}

    def execute(self, context: bpy.types.Context) -> Result:
        state = tasks.session()
        job = state.jobs.get(self.job_id) if state is not None else None
        if state is None or job is None or job.human is None or not isinstance(job.tag, crowd.Arrival):
            self.report({"WARNING"}, "This job is no longer in the list")
            return {"CANCELLED"}
        job.note = job.tag.apply(context, job.human)
        if not job.note:
            return {"FINISHED"}
        if crowd.find(context.scene, job.tag.crowd) is None:  # nobody waits for the rest either
            for other in list(state.jobs.values()):
                if isinstance(other.tag, crowd.Arrival) and other.tag.crowd == job.tag.crowd:
                    state.cancel(other.id)
        return {"CANCELLED"}


def _arrival(asked: type[bpy.types.Operator]) -> type[bpy.types.Operator]:
    """The operator that takes in whom `asked` had made: its undo step replaces that of `asked` while that is the last,
    so that both are one."""
    name = _name(asked) + ARRIVAL
    parts = {"bl_idname": f"populace.{name}", "bl_undo_group": asked.bl_label, "__doc__": _ArrivalOperator.__doc__,
             "__annotations__": _ArrivalOperator.__annotations__}  # fmt: skip
    return type(f"POPULACE_OT_{name}", (_ArrivalOperator, bpy.types.Operator), parts)


_CLASSES = (
    POPULACE_OT_make_crowd, POPULACE_OT_update_crowd,
    POPULACE_OT_make_missing, POPULACE_OT_cancel_crowd, POPULACE_OT_reseed_placement, POPULACE_OT_swap_placement,
    POPULACE_OT_update_lods, POPULACE_OT_crowd_display, POPULACE_OT_remove_crowd, POPULACE_OT_crowd_form,
    *map(_arrival, (POPULACE_OT_make_crowd, POPULACE_OT_update_crowd, POPULACE_OT_make_missing,
                    POPULACE_OT_reseed_placement)),
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
