# SPDX-License-Identifier: GPL-3.0-or-later
"""How long Blender waits for us: ticks while people are made, insertions, undo and redo; and whether anything is left.

`blender --command populace bench` prints it as JSON. In background mode timers never fire, so the ticks are called here
at the intervals that they ask for, through the real connection; what is missing is the drawing of panels.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import bpy
import numpy as np

from . import tasks
from .messages import BackendError, Request
from .scene import Batch
from .session import Job, Link, Session

WARM_SHARE: Final = 0.2  # of the cycles: until then allocators and caches of Blender still grow
_KINDS: Final = ("objects", "meshes", "materials", "images", "armatures", "collections", "node_groups", "actions",
                 "shape_keys")  # fmt: skip


class Stopwatch:
    """Milliseconds of what it runs: of the clock, and of this thread's processor, which other programs cannot slow."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def run(self, call: Callable[..., Any], *args: Any) -> Any:
        wall, cpu = time.perf_counter(), time.thread_time()
        result = call(*args)
        self.wall.append((time.perf_counter() - wall) * 1000)
        self.cpu.append((time.thread_time() - cpu) * 1000)
        return result

    def give_last_to(self, other: Stopwatch) -> None:
        other.wall.append(self.wall.pop())
        other.cpu.append(self.cpu.pop())

    def summary(self) -> dict[str, Any]:
        if not self.wall:
            return {"count": 0}
        p50, p99 = np.percentile(self.wall, (50, 99))
        return {"count": len(self.wall), "p50_ms": round(float(p50), 3), "p99_ms": round(float(p99), 3),
                "max_ms": round(max(self.wall), 3), "cpu_p99_ms": round(float(np.percentile(self.cpu, 99)), 3),
                "cpu_max_ms": round(max(self.cpu), 3)}  # fmt: skip


def run(request: Request, people: int, cycles: int) -> dict[str, Any]:
    """Make that many people from the request's seed on, then insert, undo, redo and undo the last one `cycles` times.
    Raises `BackendError` when one of them cannot be made."""
    starting, waiting, arriving, inserting = (Stopwatch() for _ in range(4))
    state, insert, humans = tasks.working_session(), tasks._insert, []
    state.connect()
    while state.link is Link.STARTING:
        time.sleep(starting.run(tasks._tick))
    if state.trouble is not None:
        raise state.trouble
    began = time.monotonic()
    tasks.submit([replace(request, seed=request.seed + i) for i in range(people)], Batch("Bench", people, (0, 0, 0)))
    jobs = [job for job in state.jobs.values() if isinstance(job.tag, tasks.InBatch)]

    def watched(working: Session, job: Job) -> None:
        humans[:] = [job.human]
        inserting.run(insert, working, job)

    tasks._insert = watched
    try:
        while not all(job.taken or job.status.state in ("failed", "cancelled") for job in jobs):
            done = len(inserting.wall)
            pause_s = waiting.run(tasks._tick)
            if len(inserting.wall) > done:
                waiting.give_last_to(arriving)
            time.sleep(pause_s)
    finally:
        tasks._insert = insert
    made_s = time.monotonic() - began
    for job in jobs:
        if not job.taken or job.status.state == "failed":
            raise job.status.error or BackendError("cancelled", "A person was cancelled.")
    found = {
        "people": people, "seconds": round(made_s, 2), "ticks_starting": starting.summary(),
        "ticks_working": waiting.summary(), "ticks_inserting": arriving.summary(),
        "insertions": inserting.summary(),
    }  # fmt: skip
    return found | ({"cycles": _cycles(state, jobs[-1], humans[0], cycles)} if cycles else {})


def _cycles(state: Any, job: Job, human: Any, count: int) -> dict[str, Any]:
    """Insert, undo, redo, undo; each insertion is the operator's own step. `leaked` says what is there more than
    before, after any of the cycles."""
    watches = {name: Stopwatch() for name in ("insert", "undo", "redo")}
    bpy.ops.ed.undo_push(message="Bench")
    before, leaked, resident = _counts(), {}, []
    for _ in range(count):
        job.human, job.taken = human, False
        watches["insert"].run(tasks._insert, state, job)
        if job.status.state == "failed":
            raise job.status.error or BackendError("insert_failed", "The person could not be inserted.")
        watches["undo"].run(bpy.ops.ed.undo)
        watches["redo"].run(bpy.ops.ed.redo)
        bpy.ops.ed.undo()
        leaked |= {kind: n - before[kind] for kind, n in _counts().items() if n != before[kind]}
        resident.append(_resident_mib())
    grown = _growth(resident)
    return {"count": count, "leaked": leaked, "resident_mib": resident[-1], "grown_mib": grown,
            **{name: watch.summary() for name, watch in watches.items()}}  # fmt: skip


def _growth(resident: Sequence[float | None]) -> float | None:
    """From the end of the warm-up to the end, by a line through all in between: single values jump."""
    known = [mib for mib in resident[int(len(resident) * WARM_SHARE) :] if mib is not None]
    if len(known) < 3:
        return None
    slope = np.polyfit(np.arange(len(known)), known, 1)[0]
    return round(float(slope) * (len(known) - 1), 2)


def _counts() -> dict[str, int]:
    return {kind: len(getattr(bpy.data, kind)) for kind in _KINDS}


def _resident_mib() -> float | None:
    """Memory of this process; known on Linux only."""
    if not sys.platform.startswith("linux"):
        return None
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return round(pages * 4096 / 2**20, 1)
