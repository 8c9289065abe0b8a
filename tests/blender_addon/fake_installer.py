# SPDX-License-Identifier: GPL-3.0-or-later
"""A scripted installer for tests: good, slow, dying, lying, stubborn.

`python fake_installer.py MODE`, or in place of the real one with the mode in the environment variable FAKE_INSTALLER;
asked for a plan it gives the one in FAKE_PLAN.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any


def say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def child() -> int:
    """Something that the installer started: it sleeps for a minute."""
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid


def obey() -> None:
    os.read(0, 1)
    say(event="cancelled")
    os._exit(3)


def main(mode: str) -> int:
    if mode != "stubborn":
        threading.Thread(target=obey, daemon=True).start()
    say(event="progress", stage="Downloading", fraction=0.25, text="torch 50 of 200 MB")
    if mode == "plan":
        say(event="done", result=json.loads(os.environ["FAKE_PLAN"]))
        return 0
    if mode == "good":
        say(event="done", result={"version": "1.2.3", "bytes": 5})
        return 0
    if mode == "slow":
        time.sleep(60)
    elif mode == "failing":
        say(event="error", code="out_of_disk", message="The disk is full.", hint="Free some space.")
        return 1
    elif mode == "dying":
        print("Killed by a test", file=sys.stderr)
        say(event="progress", stage="Unpacking", fraction=0.5, text=str(child()))
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    elif mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        say(event="progress", stage="Unpacking", fraction=0.5, text=str(child()))
        time.sleep(60)
    elif mode == "lying":
        for line in (b"\xff\xfe\n", b"{}\n", b"[1, 2]\n", b"null\n", b'{"event": "progress", "fraction": NaN}\n',
                     b'{"event": "progress", "fraction": "much"}\n', b'{"event": "progress", "fraction": -5}\n',
                     b'{"event": "progress", "fraction": 1e300, "stage": 7}\n', b"[" * 100_000 + b"\n",
                     b"x" * 3_000_000):  # fmt: skip
            sys.stdout.buffer.write(line)
        sys.stdout.buffer.write(b'\n{"event": "done", "result": "all of it"}\n')
        sys.stdout.flush()
        return 9
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if sys.argv[1] == "plan" else os.environ.get("FAKE_INSTALLER", sys.argv[1])))
