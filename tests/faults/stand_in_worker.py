# SPDX-License-Identifier: GPL-3.0-or-later
"""A worker without torch: the real loop and protocol, with work that is quick, slow or disastrous as its seed says.

    python stand_in_worker.py REPOSITORY
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

SLOW = 1_000_000  # plus the milliseconds it takes, in steps of 10
DEAF = 2_000_000  # a minute without a step
DIES = 3_000_000
DIES_ONCE = 4_000_000
NO_SPACE = 5_000_000
NO_MEMORY = 6_000_000
BUG = 7_000_000
NONSENSE = 8_000_000
PRINTS = 9_000_000
BIG = 10_000_000  # a result of 24 MB
ENDLESS_LINE = 11_000_000
BIG_BYTES = 24 << 20


def packet_of(seed: int) -> bytes:
    """The golden person under another seed."""
    from backend import packet
    from tests.contract import golden

    asset = golden.asset()
    parts = asset.parts
    if seed == BIG:
        png = parts[0].base_color_png
        parts = (replace(parts[0], base_color_png=png + bytes(BIG_BYTES)), *parts[1:])
    recipe = {**asset.meta["recipe"], "seed": seed}
    return packet.dumps(replace(asset, parts=parts, meta={**asset.meta, "recipe": recipe}))


class StandIn:
    def __init__(self, replies: Any) -> None:
        self._replies = replies

    def begin(self) -> dict[str, Any]:
        return {"device": "stand-in", "torch": ""}

    def warm_up(self, step: Any) -> None:
        pass

    def perform(self, request: Any, folder: Path, step: Any) -> int:
        from backend import packet

        seed = request.seed
        step("surface", 0.25)
        if SLOW < seed < DEAF:
            end = (seed - SLOW) // 10
            for i in range(end):
                time.sleep(0.01)
                step("surface", i / end)
        elif seed == DEAF:
            time.sleep(60)
        elif seed == DIES or (seed == DIES_ONCE and not (folder / "died").exists()):
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        elif seed == NO_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif seed == NO_MEMORY:
            raise MemoryError
        elif seed == BUG:
            raise ZeroDivisionError(f"in {Path.home()}/secret")
        elif seed == NONSENSE:
            self._replies.write(b"Segmentation fault? no: \xff\n")
        elif seed == ENDLESS_LINE:
            self._replies.write(b"x" * (1 << 18))
            self._replies.flush()
        elif seed == PRINTS:
            print('{"job": "no", "done": {"bytes": -1}}', flush=True)
            os.system("echo from a child")
        data = packet_of(seed)
        folder.mkdir(parents=True, exist_ok=True)
        packet.write_file(folder / "result.safetensors", data)
        packet.write_file(folder / "stats.json", b'{"seconds": {"total": 0.5}}')
        step("encode", 1.0)
        return len(data)


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    from backend import worker

    commands, answers = worker.protocol_streams()
    worker.run(commands, answers, StandIn(answers))
