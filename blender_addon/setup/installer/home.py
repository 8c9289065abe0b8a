# SPDX-License-Identifier: GPL-3.0-or-later
"""The folder of all environments."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from .computer import bytes_in
from .telling import IS_WINDOWS, SetupError

POINTER: Final = "current.json"
LOG: Final = "setup.log"
RECORD: Final = "populace-environment.json"


class Home:
    """The folder of all environments. Nothing in it counts but what the pointer names."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.envs, self.cache, self.temporary = folder, folder / "envs", folder / "cache", folder / "tmp"

    def pointer(self) -> dict[str, str]:
        """{"current": name, "previous": name or ""}; {} if nothing is installed."""
        try:
            raw = json.loads((self.folder / POINTER).read_text("utf-8"))
            names = {key: raw.get(key, "") for key in ("current", "previous")}
        except (OSError, ValueError, AttributeError):
            return {}
        if not all(isinstance(name, str) and Path(name).name == name for name in names.values()):
            return {}
        return names if names["current"] and (self.envs / names["current"]).is_dir() else {}

    def point(self, current: str, previous: str) -> None:
        """In one rename, three times if something (a virus scanner) holds the file."""
        temporary = self.folder / f"{POINTER}.new"
        temporary.write_text(json.dumps({"current": current, "previous": previous}), "utf-8")
        for attempt in range(4):
            try:
                os.replace(temporary, self.folder / POINTER)
                return
            except PermissionError:
                if attempt == 3:
                    raise
                time.sleep(0.2 * (attempt + 1))

    def record(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self.envs / name / RECORD).read_text("utf-8")) if name else {}
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def tidy(self) -> int:
        """Remove what the pointer does not name: half environments, temporary files. Returns the bytes freed."""
        kept, freed = set(self.pointer().values()), 0
        leftovers = [self.temporary, *self.folder.glob("trash-*"), *self.envs.glob("*")]
        for path in leftovers:
            if path.is_dir() and not (path.parent == self.envs and path.name in kept):
                freed += bytes_in(path)
                shutil.rmtree(path, ignore_errors=True)
        return freed

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One installer at a time; the system lets go of the lock when its holder dies."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "a+b") as file:
            try:
                if sys.platform == "win32":
                    import msvcrt

                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                else:
                    import fcntl

                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise SetupError("busy", "Another Blender is setting up the generator right now.",
                                 "Wait until it has finished.") from None  # fmt: skip
            except OSError:
                pass  # a file system without locks: the pointer's rename still keeps things whole
            yield


def python_of(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if IS_WINDOWS else "bin/python")
