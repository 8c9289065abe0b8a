# SPDX-License-Identifier: GPL-3.0-or-later
"""The states of the panel in a real window, a picture of each: idle, working, done, the generator lost, and back.

A driver, see README.md. It wants a generator that runs with the POPULACE_HOME of this process; the driver ends it, and
somebody must start another within a minute or two. Ticks of the timer are measured on the way: ticks.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bpy
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from gestures import PATIENCE_S, SHOTS, SMALL, assign, connect, module, nobody_active, people, press, shot, widen


def measured(tasks: Any) -> tuple[list[float], list[float]]:
    """Milliseconds of every tick from now on, and of the insertions in them."""
    pump, insert, ticks, inserts = tasks.pump, tasks._insert, [], []

    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        is_busy = pump(*args)
        ticks.append((time.perf_counter() - start) * 1000)
        return is_busy

    def timed_insert(*args: Any) -> None:
        start = time.perf_counter()
        insert(*args)
        inserts.append((time.perf_counter() - start) * 1000)

    tasks.pump, tasks._insert = timed, timed_insert
    return ticks, inserts


def running_pid() -> int:
    return int(json.loads(Path(os.environ["POPULACE_HOME"], "run", "backend.json").read_text("utf-8"))["pid"])


def drive(gui: Any) -> Iterator[Any]:
    bpy.data.batch_remove(list(bpy.data.objects))
    tasks = module("tasks")
    yield from widen(gui)
    wanted = {"randomise_seed": False, "seed": 12, "count": 2, "prompt": "woman, long hair, jeans"}
    assign(bpy.context.scene.populace, SMALL | wanted)
    yield from connect(gui)
    yield from shot(gui, "idle")
    ticks, inserts = measured(tasks)
    yield from press(gui, "Generate")
    yield from gui.until(lambda: any(job.status.fraction > 0.2 for job in tasks.listed_jobs()), PATIENCE_S)
    yield from shot(gui, "working", 0.3)
    yield from gui.until(lambda: len(people()) == 2, PATIENCE_S)
    p50, p99 = np.percentile(sorted(ticks)[: -len(inserts)], (50, 99))  # those that insert are the longest ones
    found = {"ticks": len(ticks), "p50_ms": p50, "p99_ms": p99, "inserts_ms": inserts}
    Path(SHOTS, "ticks.json").write_text(json.dumps(found, indent=1), "utf-8")
    nobody_active()
    yield from shot(gui, "done")
    os.kill(running_pid(), signal.SIGKILL)
    yield from gui.until(lambda: tasks.session().link.value == "lost", 60)
    yield from shot(gui, "lost")
    yield from gui.until(lambda: Path(f"/proc/{running_pid()}").exists(), 120)
    yield from press(gui, "Restart")
    yield from gui.until(lambda: tasks.session().link.value == "ready", PATIENCE_S)
    yield from shot(gui, "back")
