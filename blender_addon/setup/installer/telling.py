# SPDX-License-Identifier: GPL-3.0-or-later
"""Talking to the add-on: what is said on stdout, and the leash that ends everything when nobody listens."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

SAY_EVERY_S: Final = 0.1
IS_WINDOWS: Final = os.name == "nt"


class SetupError(Exception):
    """One sentence for the user, and what to do."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.hint = code, message, hint


class Cancelled(Exception):
    """Asked to stop, or nobody listens any more."""


class Teller:
    """Says things on stdout, one JSON object a line, progress not too often and never backwards."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream, self._lock = stream, threading.Lock()
        self._last, self._fraction, self._stage = 0.0, 0.0, ""

    def say(self, event: str, **what: Any) -> None:
        with self._lock, contextlib.suppress(OSError, ValueError):  # whoever listened may be gone
            self._stream.write(json.dumps({"event": event, **what}) + "\n")
            self._stream.flush()

    def progress(self, stage: str, fraction: float, text: str = "") -> None:
        self._fraction = max(self._fraction, min(fraction, 1.0))
        now = time.monotonic()
        if stage == self._stage and now - self._last < SAY_EVERY_S:
            return
        self._stage, self._last = stage, now
        self.say("progress", stage=stage, fraction=round(self._fraction, 4), text=text)


class Leash:
    """Ends what runs when stdin says so or closes. A thread waits for that: this process has no Blender in it."""

    def __init__(self) -> None:
        self.cut = threading.Event()
        self._child: subprocess.Popen[Any] | None = None
        self._lock = threading.RLock()  # the signal handler may come while this very thread holds it

    def watch(self, descriptor: int) -> None:
        """Of a pipe. It is read without Python's buffer, whose lock a thread must not hold when the program ends."""

        def wait() -> None:
            with contextlib.suppress(OSError):
                os.read(descriptor, 1)
            self.pull()

        threading.Thread(target=wait, daemon=True).start()

    def pull(self, *_: Any) -> None:
        with self._lock:
            self.cut.set()
            if self._child is not None and self._child.poll() is None:
                _end(self._child)

    @contextlib.contextmanager
    def holding(self, *command: str | Path, **options: Any) -> Iterator[subprocess.Popen[Any]]:
        """Run a program; raises `Cancelled` instead of, during, or after it when the leash is cut."""
        if IS_WINDOWS:
            options["creationflags"] = 0x08000000  # CREATE_NO_WINDOW
        with self._lock:
            if self.cut.is_set():
                raise Cancelled
            try:
                child = subprocess.Popen([str(part) for part in command], stdin=subprocess.DEVNULL, **options)
            except OSError as error:
                raise SetupError("start_failed", f"{command[0]} could not be started ({error.strerror}).",
                                 "Choose another Python.") from None  # fmt: skip
            self._child = child
            if self.cut.is_set():
                self.pull()
        try:
            yield child
            child.wait()
        finally:
            if child.poll() is None:
                _end(child)
            child.wait()
            with self._lock:
                self._child = None
        if self.cut.is_set():
            raise Cancelled


def _end(child: subprocess.Popen[Any]) -> None:
    """End a child with everything that it started."""
    if IS_WINDOWS:
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(child.pid)], capture_output=True, check=False,
                       creationflags=0x08000000)  # fmt: skip
    elif os.getpgrp() == os.getpid():  # the group is ours: whatever is in it comes from us
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
    child.kill()
