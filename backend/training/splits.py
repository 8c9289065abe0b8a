# SPDX-License-Identifier: GPL-3.0-or-later
"""Train, validation and test people never overlap: the seed alone says where a person belongs."""

from __future__ import annotations

import itertools
import zlib
from typing import Literal

Split = Literal["train", "validation", "test"]


def split_of(seed: int) -> Split:
    """80 % train, 10 % validation, 10 % test, by a hash of the seed."""
    bucket = zlib.crc32(str(int(seed)).encode()) % 10
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"


def seeds(split: Split, count: int, start: int = 0) -> list[int]:
    """The first `count` seeds of a split, from `start` on."""
    return list(itertools.islice((s for s in itertools.count(start) if split_of(s) == split), count))
