# SPDX-License-Identifier: GPL-3.0-or-later
"""A long job in a process of its own (setting up, downloading) that reports JSON lines. No bpy, no threads.

The process writes into a file that `poll` reads on: nothing ever blocks. Its stdin is a leash: it ends by itself when
we close it or are gone. One that does not is ended with its whole process group.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Final

from . import process
from .messages import BackendError, masked

log = logging.getLogger(__name__)

CANCEL_PATIENCE_S: Final = 10.0
MAX_LINE_BYTES: Final = 1 << 20
_READ_BYTES: Final = 256 << 10
_TELLING: Final = 0.04  # of the whole: before a stage has come so far, nobody can say how fast it goes


class Phase(Enum):
    RUNNING = "running"
    CANCELLING = "cancelling"
    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"


class Chore:
    """Start with the constructor, call `poll` now and then, read the attributes. Never raises after that."""

    def __init__(self, name: str, argv: Sequence[str], cwd: str = "") -> None:
        """`name` is for the panel. Raises `BackendError` if the program cannot be run."""
        self.name = name
        self.phase = Phase.RUNNING
        self.stage, self.text, self.fraction = "", "", 0.0
        self.result: dict[str, Any] = {}
        self.error: BackendError | None = None
        self._outcome: tuple[Phase, BackendError | None] | None = None
        self._read_bytes, self._rest = 0, b""
        self._cancelled_at = time.monotonic()
        self._stage_began = time.monotonic(), 0.0  # when and at which fraction
        self._folder = Path(tempfile.mkdtemp(prefix=process.FOLDER_PREFIX))
        flags: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            flags = {"creationflags": subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP}
        try:
            with open(self._folder / "events", "wb") as events, open(self._folder / "errors", "wb") as errors:
                self._process = subprocess.Popen(
                    list(argv), cwd=cwd or process.quiet_folder(), env=process.clean_environment(), close_fds=True,
                    stdin=subprocess.PIPE, stdout=events, stderr=errors, **flags,
                )  # fmt: skip
        except OSError as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise BackendError("start_failed", f"{masked(argv[0])} could not be started ({error.strerror}).",
                               "Choose another Python.") from None  # fmt: skip

    @property
    def ended(self) -> bool:
        return self.phase in (Phase.DONE, Phase.CANCELLED, Phase.FAILED)

    @property
    def eta_s(self) -> float | None:
        """What is left at the pace of this stage: loading and unpacking have little to do with each other. None while
        nobody can tell."""
        since, first = self._stage_began
        if self.ended or self.fraction - first < _TELLING:
            return None
        return (time.monotonic() - since) * (1 - self.fraction) / (self.fraction - first)

    def poll(self) -> bool:
        """Take in what was said. True if something visible changed."""
        if self.ended:
            return False
        before = (self.phase, self.stage, self.text, self.fraction)
        code = self._exit_code()  # asked before reading: what an ended process said is all there
        while self._read_more() and code is not None:
            pass
        if code is not None:
            self._end(code)
        elif self.phase is Phase.CANCELLING and time.monotonic() - self._cancelled_at > CANCEL_PATIENCE_S:
            self._kill()
        return before != (self.phase, self.stage, self.text, self.fraction)

    def cancel(self) -> None:
        """Ask it to stop and clean up; it is ended by force if it has not within 10 s."""
        if self.phase is Phase.RUNNING:
            self.phase, self._cancelled_at = Phase.CANCELLING, time.monotonic()
            self._cut_leash()

    def close(self) -> None:
        """Blender goes, or the add-on: the process is told and cleans up by itself, within 2 s or by force."""
        if not self.ended:
            self._cut_leash()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(2.0)
            self._kill()
            self.phase = Phase.CANCELLED
        shutil.rmtree(self._folder, ignore_errors=True)

    # ---------------------------------------------------------------------------------------------------- the process

    def _cut_leash(self) -> None:
        leash = self._process.stdin
        if leash is not None and not leash.closed:
            with contextlib.suppress(OSError):
                leash.close()

    def _exit_code(self) -> int | None:
        """None while it runs. Children that it left behind are ended before its number can be anybody else's."""
        if sys.platform != "win32" and hasattr(os, "waitid") and self._process.returncode is None:
            with contextlib.suppress(ChildProcessError):
                if os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                    return None
                self._kill()
        return self._process.poll()

    def _kill(self) -> None:
        if self._process.returncode is not None:
            return
        if sys.platform == "win32":
            subprocess.run(["taskkill", "/T", "/F", "/PID", str(self._process.pid)], capture_output=True, check=False,
                           creationflags=subprocess.CREATE_NO_WINDOW)  # fmt: skip
        else:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)

    def _end(self, code: int) -> None:
        self._cut_leash()
        phase, error = self._outcome or (Phase.FAILED, None)
        if phase is Phase.DONE and code != 0:  # it stumbled after it had said so: do not believe it
            phase = Phase.FAILED
        if self.phase is Phase.CANCELLING and phase is Phase.FAILED:
            phase = Phase.CANCELLED
        elif phase is Phase.FAILED and error is None:
            error = BackendError("ended", f"{self.name} ended unexpectedly (code {code}).", self._last_words())
        self.phase, self.error = phase, error
        self.fraction = 1.0 if phase is Phase.DONE else self.fraction
        shutil.rmtree(self._folder, ignore_errors=True)

    def _last_words(self) -> str:
        try:
            lines = (self._folder / "errors").read_bytes()[-4000:].decode("utf-8", "replace").strip().splitlines()
        except OSError:
            lines = []
        return masked(lines[-1][:200]) if lines else "Try again."

    # ------------------------------------------------------------------------------------------------- what it says

    def _read_more(self) -> bool:
        """One mouthful of events. False when there is no more for now."""
        try:
            with open(self._folder / "events", "rb") as file:
                file.seek(self._read_bytes)
                data = file.read(_READ_BYTES)
        except OSError:
            return False
        self._read_bytes += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            self._rest = b""
        for line in lines:
            try:
                said = json.loads(line)
                if isinstance(said, dict) and self._outcome is None:
                    self._take(said)
            except (ValueError, TypeError, RecursionError):  # not for us, or nonsense: the end decides
                continue
        return len(data) == _READ_BYTES

    def _take(self, said: dict[str, Any]) -> None:
        """Raises ValueError or TypeError when it is nonsense."""
        event = said.get("event")
        if event == "progress":
            fraction, stage = float(said.get("fraction", 0.0)), str(said.get("stage", ""))[:80]
            if math.isfinite(fraction):
                self.fraction = min(max(fraction, self.fraction), 1.0)
            if stage != self.stage:
                self._stage_began = time.monotonic(), self.fraction
            self.stage, self.text = stage, str(said.get("text", ""))[:80]
        elif event == "done":
            result = said.get("result")
            self.result = result if isinstance(result, dict) else {}
            self._outcome = Phase.DONE, None
        elif event == "cancelled":
            self._outcome = Phase.CANCELLED, None
        elif event == "error":
            words = [str(said.get(key, ""))[:500] for key in ("code", "message", "hint")]
            self._outcome = Phase.FAILED, BackendError(words[0] or "failed", words[1] or "It failed.", words[2])
