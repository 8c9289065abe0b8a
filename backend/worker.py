# SPDX-License-Identifier: GPL-3.0-or-later
"""The worker process: torch, one warm model, one job at a time. Replaceable at any moment; see supervisor.py.

Only `main` and what it calls need torch: the loop `run` is the same for the stand-ins that tests put in its place.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import faulthandler
import json
import logging
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from backend.photo.album import Folder
from backend.protocol import Cancelled, Error, GenerateRequest, PopulaceError, parse_request
from backend.settings import Settings
from backend.store import RESULT, STATS

if TYPE_CHECKING:
    from backend.families.base import FamilyModel, Step

log = logging.getLogger(__name__)

PROGRESS_INTERVAL_S = 0.05
_WARM_UP = GenerateRequest(seed=0, grid_resolution=32, faces=2000, texture_size=512)


class Work(Protocol):
    """What a worker does for its living."""

    def begin(self) -> dict[str, Any]:
        """Get ready; the result is what the worker says of itself. Raises `PopulaceError` if it never will be."""
        ...

    def warm_up(self, step: Step) -> None:
        """Spend idle time so that the first job is quick. `step` raises `Cancelled` when a job comes."""
        ...

    def perform(self, request: GenerateRequest, folder: Path, step: Step) -> int:
        """Leave result and stats in the folder; returns the size of the result."""
        ...


class Pipeline:
    """The real work. Keeps the model that was used last."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._device = ""
        self._model: FamilyModel | None = None

    def begin(self) -> dict[str, Any]:
        import torch

        from backend import families

        torch.set_num_threads(_cores())
        self._device = families.resolve_device(self._settings.device)
        return {"device": self._device, "torch": torch.__version__}

    def warm_up(self, step: Step) -> None:
        """Load the default model and make a tiny person with it: imports, compiled kernels, buffers."""
        from backend import pipeline

        pipeline.generate(_WARM_UP, self._loaded(_WARM_UP.family), step)

    def perform(self, request: GenerateRequest, folder: Path, step: Step) -> int:
        from backend import packet, pipeline

        begin = time.perf_counter()
        model = self._loaded(request.family)
        loading_s = time.perf_counter() - begin
        asset, stats = pipeline.generate(request, model, step, Folder(self._settings.images_dir))
        begin = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        size = packet.write(folder / RESULT, asset)
        stats["seconds"] |= {"load": round(loading_s, 4), "write": round(time.perf_counter() - begin, 4)}
        packet.write_file(folder / STATS, json.dumps(stats).encode())
        return size

    def _loaded(self, family: str) -> FamilyModel:
        from backend import families

        if self._model is None or self._model.name != family:
            self._model = None  # room for the next one
            self._model = families.load(family, self._device, self._settings)
        return self._model


@dataclass
class _Job:
    id: str
    request: Any
    folder: Path
    cancelled: threading.Event = field(default_factory=threading.Event)


def run(commands: BinaryIO, replies: BinaryIO, work: Work) -> None:
    """Serve jobs until `commands` ends; then the process ends at once, whatever it is doing."""
    jobs: queue.Queue[_Job] = queue.Queue()

    def say(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message).encode() + b"\n")
        replies.flush()

    def read() -> None:
        last: _Job | None = None
        for line in commands:
            command = json.loads(line)
            if "cancel" in command:
                if last is not None and last.id == command["cancel"]:
                    last.cancelled.set()
            else:
                last = _Job(command["job"], command["request"], Path(command["folder"]))
                jobs.put(last)
        os._exit(0)  # the server is gone: nobody wants the result

    threading.Thread(target=read, name="commands", daemon=True).start()
    try:
        say({"ready": work.begin()})
    except PopulaceError as error:
        say({"error": Error.of(error).model_dump()})
        return

    def step_if_idle(stage: str, fraction: float) -> None:
        if not jobs.empty():
            raise Cancelled

    try:
        work.warm_up(step_if_idle)
    except PopulaceError as error:
        log.info("warm-up: %s", error)  # a job will meet it again and say so
    except Exception:
        log.exception("warm-up")
    while True:
        _perform(jobs.get(), work, say)


def _perform(job: _Job, work: Work, say: Any) -> None:
    told_stage, told_at = "", 0.0

    def step(stage: str, fraction: float) -> None:
        nonlocal told_stage, told_at
        if job.cancelled.is_set():
            raise Cancelled
        now = time.monotonic()
        if stage != told_stage or now - told_at >= PROGRESS_INTERVAL_S:
            told_stage, told_at = stage, now
            say({"job": job.id, "stage": stage, "fraction": round(fraction, 4)})

    try:
        say({"job": job.id, "done": {"bytes": work.perform(parse_request(job.request), job.folder, step)}})
    except Cancelled:
        say({"job": job.id, "cancelled": True})
    except Exception as error:
        say({"job": job.id, "error": Error.of(as_problem(error)).model_dump()})
    finally:
        free_memory()


def as_problem(error: Exception) -> PopulaceError:
    """What the user is told. A broken CUDA context ends the process: only a new one can use the GPU again."""
    if isinstance(error, PopulaceError):
        return error
    log.error("%s", "".join(traceback.format_exception(error)))
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
        return PopulaceError(
            "out_of_gpu_memory", f"The GPU memory is full: {free / 1e9:.1f} of {total / 1e9:.1f} GB are free.",
            "Try a smaller grid or texture, or close other programs that use the GPU."
        )  # fmt: skip
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "not enough memory" in str(error)):
        import psutil

        memory = psutil.virtual_memory()
        return PopulaceError(
            "out_of_memory",
            f"The memory is full: {memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB are free.",
            "Try a smaller grid or texture, or close other programs."
        )  # fmt: skip
    if isinstance(error, RuntimeError) and "CUDA error" in str(error):
        os._exit(1)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return PopulaceError("out_of_disk", f"The result cannot be written: {error.strerror}.",
                             "Make room, or choose another folder with --data-dir.")  # fmt: skip
    return PopulaceError("internal_error", f"The generator stumbled ({type(error).__name__}).",
                         "See the log and report this.")  # fmt: skip


def free_memory() -> None:
    """Give the GPU's unused blocks back to other programs."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def protocol_streams() -> tuple[BinaryIO, BinaryIO]:
    """stdin and stdout for the protocol alone; a stray print goes to stderr instead."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    commands = os.fdopen(os.dup(0), "rb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    return commands, replies


def _cores() -> int:
    """Physical ones that this process may use: two threads on one core only get in each other's way."""
    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable, psutil.cpu_count(logical=False) or usable))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="backend.worker", description="Started by the server, not by people.")
    parser.add_argument("--device", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    args = parser.parse_args(argv)
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    commands, replies = protocol_streams()
    run(commands, replies, Pipeline(Settings.load(device=args.device, data_dir=args.data_dir)))
    return 1


if __name__ == "__main__":
    sys.exit(main())
