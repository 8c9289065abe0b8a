# SPDX-License-Identifier: GPL-3.0-or-later
"""What operators have in common: when they may run, how they wait, how they are copied as Python.

An `Action` asks the generator for people. From a button it returns at once and a tick puts the result in; with `wait`,
and always in background mode, it returns when the result stands in the scene. Holding Alt while pressing the button
copies the line of Python that does the same.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from typing import Any, ClassVar

import bpy
from bpy.props import BoolProperty

from . import preferences, snippets, tasks
from .client import Client
from .messages import BackendError, Request
from .properties import active_human, other_human

log = logging.getLogger(__name__)

Result = set[str]
Work = Sequence[tuple[Request, tasks.Target]]


def needs(cls: Any, reason: str, *conditions: Any) -> bool:
    """For `poll`: whether all conditions hold; if not, Blender shows the reason."""
    if not all(conditions):
        cls.poll_message_set(reason)
        return False
    return True


def has_human(cls: Any, context: bpy.types.Context) -> bool:
    return needs(cls, "Select a generated human", active_human(context) is not None)


def can_edit(cls: Any, context: bpy.types.Context) -> bool:
    """A person of this file, and Blender in Object Mode."""
    root = active_human(context)
    return (has_human(cls, context)
            and needs(cls, "This human is linked from another file: make it local first", not root.library)
            and in_object_mode(cls, context))  # fmt: skip


def has_two(cls: Any, context: bpy.types.Context) -> bool:
    """The active person and another selected one that it can be mixed with."""
    root, other = active_human(context), other_human(context)
    return (can_edit(cls, context) and needs(cls, "Select another human as well", other is not None)
            and needs(cls, "Both humans must be of one family", root.populace.family == other.populace.family))


def in_object_mode(cls: Any, context: bpy.types.Context) -> bool:
    return needs(cls, "Switch to Object Mode first", context.mode == "OBJECT")


class Action:
    """Of an operator that asks the generator for people. `work` says what for."""

    bl_options: ClassVar[set[str]] = {"REGISTER"}
    undo_name = "Edit Human"

    wait: BoolProperty(name="Wait", description="Return when it stands in the scene. Always so in background mode",
                       options={"SKIP_SAVE", "HIDDEN"})  # fmt: skip

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return can_edit(cls, context)

    def work(self, context: bpy.types.Context) -> Work:
        """Requests, each with its target. Raises `BackendError`."""
        raise NotImplementedError

    def arguments(self) -> dict[str, Any]:
        """What differs from the defaults, as a script would give it."""
        found = {}
        for prop in self.properties.bl_rna.properties:
            name = prop.identifier
            if name not in ("rna_type", "wait") and self.properties.is_property_set(name):
                value = getattr(self.properties, name)
                found[name] = tuple(value) if getattr(prop, "is_array", False) else value
                if value == getattr(prop, "default", None):
                    del found[name]
        return found

    def invoke(self, context: bpy.types.Context, event: Any) -> Result:
        self.gather(context)
        if event is not None and event.alt:
            context.window_manager.clipboard = snippets.script(snippets.call(self.bl_idname, self.arguments()))
            self.report({"INFO"}, "Copied as Python")
            return {"FINISHED"}
        return self.execute(context)

    def gather(self, context: bpy.types.Context) -> None:
        """What a button takes from the panel."""

    def execute(self, context: bpy.types.Context) -> Result:
        try:
            work = self.work(context)
        except BackendError as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        snippets.note(self.bl_idname, self.arguments())
        if self.wait or bpy.app.background:
            return self._work_now(context, work)
        for request, target in work:
            tasks.send(request, target)
        return {"FINISHED"}

    def _work_now(self, context: bpy.types.Context, work: Work) -> Result:
        client, done = Client(preferences.python()), 0
        try:
            with closing(client.generate_all(request for request, _ in work)) as humans:
                for human, (_, target) in zip(humans, work):
                    if remark := target.apply(context, human):
                        self.report({"INFO"}, remark)
                    done += 1
        except BackendError as error:
            log.warning("%s: %s", self.bl_idname, error)
            self.report({"ERROR"}, f"{error} {done} of {len(work)} people were made.")
            return {"CANCELLED"}
        finally:
            if done and not bpy.app.background:
                bpy.ops.ed.undo_push(message=self.undo_name)
        self.report({"INFO"}, f"{done} people made" if done > 1 else "1 person made")
        return {"FINISHED"}
