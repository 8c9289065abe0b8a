# SPDX-License-Identifier: GPL-3.0-or-later
"""The one long job outside that this Blender runs at a time, pumped by a timer of its own while there is one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Final

import bpy

from .chore import Chore, Phase
from .tasks import redraw

log = logging.getLogger(__name__)

INTERVAL_S: Final = 0.1

_current: Chore | None = None
_when_ended: Callable[[Chore], None] | None = None


def current() -> Chore | None:
    """What runs, or what ran last and was not dismissed."""
    return _current


def is_busy() -> bool:
    return _current is not None and not _current.ended


def begin(chore: Chore, when_ended: Callable[[Chore], None] | None = None) -> None:
    """Take charge of a chore; `when_ended` is called once, on the main thread. The caller checked `is_busy`."""
    global _current, _when_ended
    if _current is not None:
        _current.close()
    _current, _when_ended = chore, when_ended
    if not bpy.app.background and not bpy.app.timers.is_registered(_tick):
        bpy.app.timers.register(_tick, first_interval=INTERVAL_S, persistent=True)
    redraw()


def pump() -> None:
    """One tick. Tests and `wait` call it where timers never fire."""
    global _when_ended
    if _current is None:
        return
    if _current.poll():
        redraw()
    if _current.ended and _when_ended is not None:
        call, _when_ended = _when_ended, None
        call(_current)


def wait() -> Chore | None:
    """Block until the chore is over: for scripts and background mode."""
    while is_busy():
        pump()
        time.sleep(0.02)
    pump()
    return _current


def dismiss() -> None:
    global _current
    if _current is not None and _current.ended:
        _current.close()
        _current = None
        redraw()


def _tick() -> float | None:
    """Blender's timer. Never raises, since that would end it."""
    try:
        pump()
    except Exception:
        log.exception("tick")
    return INTERVAL_S if is_busy() else None


class POPULACE_OT_cancel_chore(bpy.types.Operator):
    """Stop it. What is already downloaded is kept for the next attempt, everything else is removed"""

    bl_idname = "populace.cancel_chore"
    bl_label = "Cancel"
    bl_options = {"INTERNAL"}  # noqa: RUF012

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if _current is None or _current.phase is not Phase.RUNNING:
            cls.poll_message_set("Nothing is running")
            return False
        return True

    def execute(self, context: bpy.types.Context) -> set[str]:
        if _current is not None:
            _current.cancel()
            redraw()
        return {"FINISHED"}


class POPULACE_OT_dismiss_chore(bpy.types.Operator):
    """Remove this message"""

    bl_idname = "populace.dismiss_chore"
    bl_label = "Dismiss"
    bl_options = {"INTERNAL"}  # noqa: RUF012

    def execute(self, context: bpy.types.Context) -> set[str]:
        dismiss()
        return {"FINISHED"}


_CLASSES: tuple[Any, ...] = (POPULACE_OT_cancel_chore, POPULACE_OT_dismiss_chore)


def register() -> None:
    for cls in _CLASSES:
        bpy.utils.register_class(cls)


def unregister() -> None:
    """Whatever runs is ended: it must not outlive the add-on."""
    global _current, _when_ended
    if bpy.app.timers.is_registered(_tick):
        bpy.app.timers.unregister(_tick)
    _when_ended = None
    if _current is not None:
        _current.close()
        _current = None
    for cls in reversed(_CLASSES):
        bpy.utils.unregister_class(cls)
