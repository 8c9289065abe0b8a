# SPDX-License-Identifier: GPL-3.0-or-later
"""How people come into a crowd: who is on the way, who has to be asked for, and the steps that put them in.

In a window people arrive one by one; each arrival takes the place of the crowd's undo step, so that a crowd is one
step. In background mode, or with `wait`, `bring` returns when everybody is there.
"""

from __future__ import annotations

import logging
from contextlib import closing
from typing import Final

import bpy
from bpy.props import StringProperty

from .. import preferences, tasks
from ..client import Client
from ..messages import BackendError
from ..session import Job
from . import cast

log = logging.getLogger(__name__)

ARRIVAL: Final = "_arrival"

Result = set[str]


def on_the_way(made: bpy.types.Collection) -> list[Job]:
    """Jobs for this crowd that are not over."""
    state, crowd_id = tasks.session(), made[cast.CROWD]
    return [job for job in (state.jobs.values() if state is not None else ())
            if isinstance(job.tag, cast.Arrival) and job.tag.crowd == crowd_id and _is_coming(job)]  # fmt: skip


def _is_coming(job: Job) -> bool:
    return job.is_open or (job.human is not None and not job.taken)


def not_asked(made: bpy.types.Collection) -> list[bpy.types.Collection]:
    asked = {job.tag.person for job in on_the_way(made)}
    return [person for person in cast.missing(made) if person[cast.PERSON] not in asked]


def bring(operator: bpy.types.Operator, context: bpy.types.Context, made: bpy.types.Collection,
          wait: bool) -> Result:  # fmt: skip
    """Let everybody be made who is missing: later, or now where timers never fire."""
    takes = _name(type(operator)) + ARRIVAL
    absent = [(cast.Arrival(made[cast.CROWD], person[cast.PERSON], person.name, takes), cast.request(person))
              for person in not_asked(made)]  # fmt: skip
    if not _must_wait(wait):
        wanted = {person[cast.PERSON] for person in cast.people(made)}
        for job in on_the_way(made):
            if job.tag.person not in wanted:
                tasks.working_session().cancel(job.id)
        for who, request in absent:
            tasks.send(request, who)
        return {"FINISHED"}
    done = 0
    try:
        with closing(Client(preferences.python()).generate_all(request for _, request in absent)) as humans:
            for (who, _), human in zip(absent, humans):
                cast.arrive(context, human, who)
                done += 1
    except BackendError as error:
        log.warning("crowd: %s", error)
        operator.report({"ERROR"}, f"{error} {done} of {len(absent)} people were made.")
    return {"FINISHED"}


def _name(operator: type) -> str:
    return operator.__name__.removeprefix("POPULACE_OT_")


def _must_wait(wait: bool) -> bool:
    return wait or bpy.app.background  # timers never fire there


class _ArrivalOperator:
    """Put this person into the crowd"""

    bl_label = "Crowd Arrival"
    bl_options = {"UNDO_GROUPED", "INTERNAL"}  # noqa: RUF012

    __annotations__ = {"job_id": StringProperty(options={"SKIP_SAVE"})}

    def execute(self, context: bpy.types.Context) -> Result:
        state = tasks.session()
        job = state.jobs.get(self.job_id) if state is not None else None
        if state is None or job is None or job.human is None or not isinstance(job.tag, cast.Arrival):
            self.report({"WARNING"}, "This job is no longer in the list")
            return {"CANCELLED"}
        job.note = job.tag.apply(context, job.human)
        if not job.note:
            return {"FINISHED"}
        if cast.find(context.scene, job.tag.crowd) is None:  # nobody waits for the rest either
            for other in list(state.jobs.values()):
                if isinstance(other.tag, cast.Arrival) and other.tag.crowd == job.tag.crowd:
                    state.cancel(other.id)
        return {"CANCELLED"}


def arrival(asked: type[bpy.types.Operator]) -> type[bpy.types.Operator]:
    """The operator that takes in whom `asked` had made: its undo step replaces that of `asked` while that is the last,
    so that both are one."""
    name = _name(asked) + ARRIVAL
    parts = {"bl_idname": f"populace.{name}", "bl_undo_group": asked.bl_label, "__doc__": _ArrivalOperator.__doc__,
             "__annotations__": _ArrivalOperator.__annotations__}  # fmt: skip
    return type(f"POPULACE_OT_{name}", (_ArrivalOperator, bpy.types.Operator), parts)
