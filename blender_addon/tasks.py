# SPDX-License-Identifier: GPL-3.0-or-later
"""The bridge between Blender and asyncio: one persistent timer pumps the session's loop, a few milliseconds at a time.

No threads. `pump` is all that the timer does, and tests call it where timers never fire. What becomes of a result the
job's tag knows, a `Target`. Modules that want to be called now and then add themselves to `watchers`. Volatile state
(connection, jobs) lives here in plain Python; it survives undo and loading files, since it holds no reference into
Blender's data.
"""

from __future__ import annotations

import asyncio
import logging
import selectors
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import bpy
from bpy.app.handlers import persistent

from . import compat, preferences, scene
from .messages import BackendError, Request
from .packet import Human
from .scene import Batch
from .session import Job, Link, Session

log = logging.getLogger(__name__)

TICK_BUDGET_S: Final = 0.005  # what is begun before is still ended: at most 10 ms in all
BUSY_INTERVAL_S: Final = 0.02
ACTIVE_INTERVAL_S: Final = 0.1
IDLE_INTERVAL_S: Final = 0.5
BUSY_BLENDER_S: Final = 2.0  # between two ticks
MODAL_PATIENCE_S: Final = 10.0
_QUIET_ROUNDS: Final = 3

watchers: list[Callable[[], bool]] = []
"""Called at every tick, for a millisecond or two; whoever returns True is called again soon."""


class Target(Protocol):
    """What becomes of a result: the tag of a job."""

    @property
    def label(self) -> str:
        """For the job's row in the panel."""
        ...

    @property
    def operator(self) -> str:
        """Of populace.*, takes a job_id and calls `apply` as one undo step; "" for what needs no step."""
        ...

    def apply(self, context: bpy.types.Context, human: Human) -> str:
        """Returns a remark for the user, or ""."""
        ...


@dataclass(frozen=True)
class InBatch:
    """A new person at its place in a batch."""

    batch: Batch
    index: int
    label: str
    mark_asset: bool = False
    operator: str = "insert_result"

    def apply(self, context: bpy.types.Context, human: Human) -> str:
        _, remark = scene.insert(context, human, self.batch, self.index)
        if self.mark_asset and hasattr(bpy.types, "POPULACE_OT_mark_asset"):
            bpy.ops.populace.mark_asset()  # the new person is selected and active
        return remark


class _Selector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Knows whether the last look at the sockets found something, so that a tick ends when nothing is left to do."""

    was_quiet = True

    def select(self, timeout: float | None = None) -> list[Any]:
        found = super().select(timeout)
        self.was_quiet = not found
        return found


class _Loop(asyncio.SelectorEventLoop):
    """Its clock stands still while Blender is too busy to run it. Else whatever waits for an answer would give up at
    once when Blender comes back, with the answer already there."""

    lost_s = 0.0

    def time(self) -> float:
        return super().time() - self.lost_s


class _Bridge:
    """The loop and the session of this Blender; made when first needed."""

    def __init__(self) -> None:
        self.selector = _Selector()
        self.loop = _Loop(self.selector)
        self.ran_at = time.perf_counter()
        self.session = Session(self.loop, preferences.python)
        self.drawn = -1  # the session's revision that the panels show
        self.hold = ""  # why results wait to be inserted
        self.modal_since = 0.0

    def run_loop(self, budget_s: float) -> None:
        """Run what is ready, until the budget is spent or nothing happens any more."""
        now, quiet = time.perf_counter(), 0
        end = now + budget_s
        if now - self.ran_at > BUSY_BLENDER_S:
            self.loop.lost_s += now - self.ran_at - IDLE_INTERVAL_S
        while quiet < _QUIET_ROUNDS and time.perf_counter() < end:
            self.loop.call_soon(self.loop.stop)
            self.loop.run_forever()
            quiet = quiet + 1 if self.selector.was_quiet else 0
        self.ran_at = time.perf_counter()

    def close(self) -> None:
        self.loop.run_until_complete(self.session.close())
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()


_bridge: _Bridge | None = None


def session() -> Session | None:
    """The session as it is, for reading: None until something was asked of the backend."""
    return _bridge.session if _bridge is not None else None


def listed_jobs() -> list[Job]:
    """The jobs that somebody asked for by name; not previews and the like."""
    return [job for job in _bridge.session.jobs.values() if step_of(job)] if _bridge is not None else []


def hold() -> str:
    """Why finished people are not inserted yet, "" if nothing waits."""
    return _bridge.hold if _bridge is not None else ""


def working_session() -> Session:
    """The session, made if needed, with the timer running: for whoever is about to ask something of it."""
    global _bridge
    if _bridge is None:
        _bridge = _Bridge()
    _keep_ticking()
    return _bridge.session


def _keep_ticking() -> None:
    if not bpy.app.background and not bpy.app.timers.is_registered(_tick):
        bpy.app.timers.register(_tick, first_interval=0.0, persistent=True)


def submit(requests: list[Request], batch: Batch) -> None:
    """New people, in a row."""
    for index, request in enumerate(requests):
        send(request, InBatch(batch, index, f"Seed {request.seed}"))


def send(request: Request, target: Target) -> Job:
    job = Job(request, tag=target)
    working_session().submit(job)
    return job


def pump(budget_s: float = TICK_BUDGET_S) -> bool:
    """One tick: let the loop run for a while, insert at most one person, redraw the panels if rows changed. Returns
    whether the next tick should come soon."""
    is_busy = False
    for watcher in tuple(watchers):
        try:
            is_busy |= watcher()
        except Exception:
            log.exception("watcher %s", watcher.__module__)
    if _bridge is None:
        return is_busy
    _bridge.run_loop(budget_s)
    arrived = _bridge.session.arrived
    quiet = next((job for job in arrived if not step_of(job)), None)
    why = _reason_to_wait() if arrived else ""
    if why != _bridge.hold:
        _bridge.hold = why
        _bridge.session.touch()
    if quiet is not None:
        _apply_quietly(_bridge.session, quiet)
    elif arrived and not why:
        _insert(_bridge.session, arrived[0])
        is_busy = True  # its picture is shown at the next tick
    if _bridge.drawn != _bridge.session.revision:
        _bridge.drawn = _bridge.session.revision
        redraw()
    return is_busy


def is_held() -> bool:
    """Whether the user is in the middle of something that a change of the scene would break."""
    return bool(_reason_to_wait())


def _tick() -> float:
    """Blender's timer. Never raises, since that would end it."""
    is_busy = False
    try:
        is_busy = pump()
    except Exception:
        log.exception("tick")
    if is_busy:
        return BUSY_INTERVAL_S
    if _bridge is None:
        return IDLE_INTERVAL_S
    state = _bridge.session
    if state.link in (Link.STARTING, Link.STOPPING) or any(job.is_fetching for job in state.jobs.values()):
        return BUSY_INTERVAL_S
    if state.arrived and not _bridge.hold:
        return BUSY_INTERVAL_S
    if state.open_jobs and state.link is Link.READY:
        return ACTIVE_INTERVAL_S
    return IDLE_INTERVAL_S


def _apply_quietly(working: Session, job: Job) -> None:
    """Without a step of undo, and then the job is forgotten: nobody asked for it by name."""
    human, job.taken, job.human = job.human, True, None
    working.jobs.pop(job.id, None)
    try:
        assert human is not None
        with _window_override():
            job.tag.apply(bpy.context, human)
    except Exception:
        log.exception("result %s", job.id)
    working.touch()


def _insert(working: Session, job: Job) -> None:
    """By operator, so that it is one named undo step."""
    try:
        with _window_override():
            getattr(bpy.ops.populace, step_of(job))("EXEC_DEFAULT", True, job_id=job.id)
    except Exception as error:  # a failing operator raises RuntimeError with its report
        log.warning("insert %s: %s", job.id, error)
        job.fail(BackendError("insert_failed", "The person could not be put into the scene.", _last_words(error)))
    job.taken, job.human = True, None
    working.touch()


def step_of(job: Job) -> str:
    """The operator that takes this job's result, "" for none."""
    return getattr(job.tag, "operator", "insert_result")


def _last_words(error: Exception) -> str:
    """What a failed operator says, without its traceback: that is in the log."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Location:")]
    return lines[-1].removeprefix("Error: ")[:300] if lines else type(error).__name__


def _reason_to_wait() -> str:
    """Inserting in the middle of something would break it, or break undo."""
    if bpy.app.background:
        return ""
    windows = bpy.context.window_manager.windows
    for window in windows:
        active = window.view_layer.objects.active
        if active is not None and active.mode != "OBJECT":
            return "Leave " + active.mode.replace("_", " ").title() + " Mode to insert"
    if bpy.app.is_job_running("RENDER"):
        return "Inserted after the render"
    busy = next(filter(None, map(compat.modal_operator, windows)), "")
    if not busy or _bridge is None:
        if _bridge is not None:
            _bridge.modal_since = 0.0
        return ""
    _bridge.modal_since = _bridge.modal_since or time.monotonic()  # some add-ons run a modal operator for ever
    return f"Inserted after {busy}" if time.monotonic() - _bridge.modal_since < MODAL_PATIENCE_S else ""


def _window_override() -> Any:
    """Timers have no window; operators and undo want one."""
    windows = bpy.context.window_manager.windows
    return bpy.context.temp_override(window=windows[0]) if len(windows) else bpy.context.temp_override()


def redraw() -> None:
    """The panels of all windows, and the preferences, whose buttons depend on the generator."""
    for window in bpy.context.window_manager.windows:
        for area in window.screen.areas:
            for region in area.regions:
                if (area.type, region.type) in (("VIEW_3D", "UI"), ("PREFERENCES", "WINDOW")):
                    region.tag_redraw()


@persistent
def _file_loaded(*_: Any) -> None:
    """Jobs go on; what they make goes into the file that is open then, and their row says so."""
    if _bridge is None:
        return
    for job in _bridge.session.jobs.values():
        if job.is_open or (job.human is not None and not job.taken):
            job.note = "Goes into the newly opened file"
    _bridge.session.touch()
    _keep_ticking()  # loading a file must never leave us without the timer


def register() -> None:
    bpy.app.handlers.load_post.append(_file_loaded)
    _keep_ticking()


def unregister() -> None:
    """Lets go of the backend; it ends a few seconds later if no other Blender holds it."""
    global _bridge
    if _file_loaded in bpy.app.handlers.load_post:
        bpy.app.handlers.load_post.remove(_file_loaded)
    if bpy.app.timers.is_registered(_tick):
        bpy.app.timers.unregister(_tick)
    if _bridge is not None:
        _bridge.close()
        _bridge = None
