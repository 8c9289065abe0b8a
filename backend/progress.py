# SPDX-License-Identifier: GPL-3.0-or-later
"""One line on the terminal that says how far a long command is: stage, percent, time left."""

from __future__ import annotations

import sys
import time
from typing import TextIO

WIDTH = 28
_INTERVAL_S = 0.1


class Progress:
    """A bar on `stream` if that is a terminal; else one line per stage if `plain`, else nothing. Use as a context."""

    def __init__(self, stream: TextIO | None = None, plain: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._plain = plain and not self._live
        self._begin = time.monotonic()
        self._drawn = -1.0
        self._stage = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def show(self, stage: str, fraction: float) -> None:
        """`fraction` of the whole command, 0..1."""
        now = time.monotonic()
        fraction = min(max(fraction, 0.0), 1.0)
        if self._live and (now - self._drawn >= _INTERVAL_S or stage != self._stage):
            full = round(WIDTH * fraction)
            bar = "█" * full + "░" * (WIDTH - full)
            left = f"{(now - self._begin) * (1 - fraction) / fraction:4.0f} s left" if fraction > 0.02 else ""
            self._stream.write(f"\r\x1b[K{bar} {100 * fraction:3.0f} %  {stage}  {left}")
            self._stream.flush()
            self._drawn = now
        elif self._plain and stage != self._stage:
            self._stream.write(f"{100 * fraction:3.0f} %  {stage}\n")
            self._stream.flush()
        self._stage = stage
