# SPDX-License-Identifier: GPL-3.0-or-later
"""The worker process seen from the server: start it, give it a job, notice its end, start it again. No torch.

One JSON object per line. To the worker: {"job", "request", "folder"} and {"cancel"}. From it, first
{"ready": {"device", "torch"}} or {"error"}; then per job any number of {"job", "stage", "fraction"} and one of
{"job", "done": {"bytes"}}, {"job", "error": {"code", "message", "hint"}}, {"job", "cancelled": true}.
It ends when its stdin does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from backend.protocol import Cancelled, Error, PopulaceError, parse_json
from backend.settings import Settings

log = logging.getLogger(__name__)
worker_log = logging.getLogger(f"{__name__}.output")

START_TIMEOUT_S = 180.0  # importing torch from a cold disk
CANCEL_TIMEOUT_S = 0.8  # a worker that does not answer a cancel is replaced: xatlas, say, cannot be interrupted
STOP_TIMEOUT_S = 2.0
RESTART_WINDOW_S = 300.0
_MAX_LINE_BYTES = 1 << 16

State = Literal["stopped", "starting", "ready", "busy", "broken"]


class WorkerDied(Exception):
    """The process ended, or spoke nonsense and was ended, with a job in its hands."""


def worker_command(settings: Settings) -> list[str]:
    """`python -m backend.worker`, but with our own package first and no folder that happens to be current."""
    root = str(Path(__file__).resolve().parent.parent)
    boot = "import sys; sys.path.insert(0, sys.argv.pop(1)); from backend.worker import main; sys.exit(main())"
    return [sys.executable, "-P", "-X", "utf8", "-c", boot, root,
            "--device", settings.device, "--data-dir", str(settings.data_dir)]  # fmt: skip


def clean_environment() -> dict[str, str]:
    """Our environment without what another Python (Blender's) may have put there."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {"PYTHONUTF8": "1"}


class Worker:
    """Keeps one worker process alive. `on_end` is called whenever it is gone or may be started again."""

    def __init__(self, command: Sequence[str], restarts: int, on_end: Callable[[], None]) -> None:
        self.device = ""  # once it has said so
        self.error: PopulaceError | None = None  # why it is not started any more
        self._command = list(command)
        self._restarts = restarts
        self._on_end = on_end
        self._process: asyncio.subprocess.Process | None = None
        self._starting = False
        self._job = ""
        self._limit: asyncio.Timeout | None = None
        self._cancelling = False
        self._crashes: deque[float] = deque()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def state(self) -> State:
        if self.error is not None:
            return "broken"
        if self._starting:
            return "starting"
        if self._process is None:
            return "stopped"
        return "busy" if self._job else "ready"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def ensure(self) -> PopulaceError | None:
        """Start the process if there is none. Returns why that is no longer tried, None when it is ready."""
        while self._process is None and self.error is None:
            self._starting = True
            try:
                await self._start()
            finally:
                self._starting = False
        return self.error

    def restart(self) -> None:
        """A person wants it tried again."""
        self.error = None
        self._crashes.clear()
        self._on_end()

    async def perform(
        self, job_id: str, request: dict[str, Any], folder: Path, deadline_s: float, heard: Callable[[str, float], None]
    ) -> int:
        """Do one job. Returns the size of its result; raises what the worker reports, `deadline_exceeded`, `Cancelled`,
        or `WorkerDied`. `heard` gets stage and fraction."""
        process = self._process
        if process is None:
            raise WorkerDied
        self._job, self._cancelling = job_id, False
        try:
            async with asyncio.timeout(deadline_s) as self._limit:
                self._send({"job": job_id, "request": request, "folder": str(folder)})
                while True:
                    message = await self._line(process)
                    if message.get("job") != job_id:
                        continue
                    if "done" in message:
                        return int(message["done"]["bytes"])
                    if "error" in message:
                        raise _error_from(message["error"])
                    if "cancelled" in message:
                        raise Cancelled
                    heard(str(message.get("stage", ""))[:80], min(max(float(message.get("fraction", 0)), 0.0), 1.0))
        except TimeoutError:
            await self._end(process, at_once=True)
            if self._cancelling:
                log.warning("the worker did not answer a cancel for %.1f s and was replaced", CANCEL_TIMEOUT_S)
                raise Cancelled from None
            raise PopulaceError(
                "deadline_exceeded", f"The job was ended after {deadline_s:.0f} s.",
                "Try a smaller grid or texture, or raise job_deadline_s."
            ) from None  # fmt: skip
        except (KeyError, TypeError, ValueError):  # not our protocol
            await self._end(process)
            self._crashed("it spoke nonsense")
            raise WorkerDied from None
        finally:
            self._job, self._limit = "", None

    def cancel(self, job_id: str) -> None:
        """Ask for the end of the running job; if that is not it any more, nothing happens."""
        if self._job == job_id and self._limit is not None and not self._cancelling:
            self._cancelling = True
            self._send({"cancel": job_id})
            soon = asyncio.get_running_loop().time() + CANCEL_TIMEOUT_S
            if not self._limit.expired():
                self._limit.reschedule(min(self._limit.when() or soon, soon))

    async def close(self) -> None:
        if self._process is not None:
            await self._end(self._process)
        if tasks := list(self._tasks):  # they end when the pipes do; asyncio complains of pipes left open
            await asyncio.wait(tasks, timeout=STOP_TIMEOUT_S)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------------------------------------------------------------- process

    async def _start(self) -> None:
        flags: dict[str, Any] = {"start_new_session": True}  # Ctrl-C in a terminal is the server's affair
        if sys.platform == "win32":
            flags = {"creationflags": subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP}
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env=clean_environment(), limit=_MAX_LINE_BYTES, **flags
            )  # fmt: skip
        except OSError as error:
            self.error = PopulaceError("worker_crashed", f"The worker cannot be started: {error.strerror}.",
                                       "Install Populace again.")  # fmt: skip
            return
        self._process = process
        self._spawn(self._copy_errors(process))
        self._spawn(self._watch(process))
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                first = await self._line(process)
            if "error" in first:  # it knows why, and that another try would end the same
                self.error = _error_from(first["error"])
                await self._end(process)
                return
            self.device = str(first["ready"]["device"])
            log.info("worker %d is ready: %s", process.pid, first["ready"])
        except WorkerDied:
            pass
        except (TimeoutError, KeyError, TypeError, ValueError):
            await self._end(process)
            self._crashed("it did not become ready")
        except BaseException:
            await self._end(process)
            raise

    def _send(self, message: dict[str, Any]) -> None:
        """Never fails: the end of a process is noticed by reading."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(ConnectionError, RuntimeError):
                self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def _line(self, process: asyncio.subprocess.Process) -> dict[str, Any]:
        """The next message. Raises WorkerDied at the end, when everything about it is settled, and ValueError."""
        assert process.stdout is not None
        line = await process.stdout.readline()  # ValueError when it is too long
        if not line.endswith(b"\n"):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
            if process.returncode is None:  # it closed its stdout and goes on: of no use any more
                process.kill()
            while self._process is process:  # until `_watch` has counted it
                await asyncio.sleep(0.01)
            raise WorkerDied
        try:
            message = parse_json(line)
        except PopulaceError as error:
            raise ValueError(error.message) from None
        if not isinstance(message, dict):
            raise ValueError("not an object")
        return message

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Notice the end, also of an idle worker."""
        code = await process.wait()
        if self._process is process:
            self._process = None
            self._crashed(f"exit code {code}")
        self._on_end()

    def _crashed(self, how: str) -> None:
        now = time.monotonic()
        self._crashes.append(now)
        while now - self._crashes[0] > RESTART_WINDOW_S:
            self._crashes.popleft()
        log.error("the worker ended (%s), %d times in %.0f s", how, len(self._crashes), RESTART_WINDOW_S)
        if len(self._crashes) > self._restarts:
            self.error = PopulaceError(
                "worker_crashed", f"The worker ended {len(self._crashes)} times in {RESTART_WINDOW_S / 60:.0f} min "
                f"(the last time: {how}).", "See the log, then restart the generator."
            )  # fmt: skip

    async def _end(self, process: asyncio.subprocess.Process, at_once: bool = False) -> None:
        """On purpose, so it does not count as a crash. `at_once`: it was asked already and did not answer."""
        if self._process is process:
            self._process = None
        if process.stdin is not None:
            process.stdin.close()
        if not at_once:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if process.stdout is not None:  # what nobody will read, up to the end of the pipe
            with contextlib.suppress(TimeoutError, RuntimeError):
                await asyncio.wait_for(process.stdout.read(), STOP_TIMEOUT_S)

    async def _copy_errors(self, process: asyncio.subprocess.Process) -> None:
        """What it writes to stderr goes to our log, so that one process alone rotates the files."""
        assert process.stderr is not None
        rest = b""
        while piece := await process.stderr.read(_MAX_LINE_BYTES):
            *lines, rest = (rest + piece).split(b"\n")
            rest = rest[-_MAX_LINE_BYTES:]
            for line in lines:
                worker_log.info("%s", line.decode("utf-8", "replace").rstrip())
        if rest:
            worker_log.info("%s", rest.decode("utf-8", "replace"))

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _error_from(raw: Any) -> PopulaceError:
    """Raises ValueError when that is no error of ours (pydantic's is one)."""
    error = Error.model_validate(raw)
    return PopulaceError(error.code, error.message, error.hint)
