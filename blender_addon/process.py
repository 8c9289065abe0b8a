# SPDX-License-Identifier: GPL-3.0-or-later
"""Find, start and watch the backend process. Pure Python: no bpy, no threads.

Every Blender of a user shares one backend. It writes a *runtime file* (port and token, mode 0600) when it is ready and
ends itself a few seconds after the last Blender let go of it. So this module never kills a process by a number read
from a file; at most it ends the child that it started itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .api import Address, parse_address
from .messages import BackendError, masked

log = logging.getLogger(__name__)

READY_TIMEOUT_S: Final = 60.0
RESTARTS: Final = 3
RESTARTS_PER_S: Final = 300.0
RUNTIME_FILE: Final = "backend.json"
POINTER: Final = "current.json"  # written by setup/installer/home.py
_MAX_RUNTIME_FILE_BYTES: Final = 64 << 10
POLL_S: Final = 0.05
FOLDER_PREFIX: Final = "populace-start-"
_DAY_S: Final = 24 * 3600.0
_IS_WINDOWS: Final = os.name == "nt"

INSTALL_HINT: Final = "Set it up in the Populace tab, or run pip install . in its source folder and choose that Python."


# ------------------------------------------------------------------------------------------------------------ finding


@dataclass(frozen=True)
class Command:
    """How to run the backend's command line: `argv` plus its arguments, from the folder `cwd`."""

    argv: tuple[str, ...]
    cwd: str


def find_command(configured: str = "") -> Command | None:
    """The backend to start: the configured Python (or its folder, or a `populace` executable), else the one that the
    add-on has set up, else the first place where one is usually installed. None if there is none. Looks at files only,
    runs nothing."""
    beside = Path(__file__).resolve().parent.parent  # a source checkout, or site-packages: the backend is our neighbour
    home = str(beside) if (beside / "backend" / "__main__.py").is_file() else ""
    if configured:
        path = Path(os.path.expanduser(configured))
        python = _python_in(path) if path.is_dir() else path
        if python is None or not python.is_file():
            return None
        if python.stem.lower() == "populace":
            return Command((str(python),), quiet_folder())
        return Command((str(python), "-m", "backend"), home or quiet_folder())
    for python in _usual_pythons(beside):
        if _has(python, "populace-*.dist-info") or (home and _has(python, "torch")):
            return Command((str(python), "-m", "backend"), home or quiet_folder())
    return None


def _usual_pythons(beside: Path) -> Iterator[Path]:
    """Python executables that exist, likeliest first."""
    named = os.environ.get("POPULACE_PYTHON")
    if named:
        yield Path(named)
    if python := installed_python():
        yield python
    home = Path.home()
    data = Path(os.environ.get("LOCALAPPDATA") or home / ".local" / "share")
    folders = [beside / ".venv", home / "populace" / ".venv", home / "populace" / "venv", home / ".venvs" / "populace",
               data / "pipx" / "venvs" / "populace", home / "pipx" / "venvs" / "populace",
               home / ".local" / "pipx" / "venvs" / "populace", data / "pipx" / "pipx" / "venvs" / "populace",
               data / "uv" / "tools" / "populace"]  # fmt: skip
    folders += [Path(os.environ[name]) for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if os.environ.get(name)]
    if roaming := os.environ.get("APPDATA"):
        folders.append(Path(roaming) / "uv" / "tools" / "populace")
    if script := shutil.which("populace"):
        folders += [Path(script).resolve().parent.parent, Path(script).parent.parent]
    for folder in folders:
        if python := _python_in(folder):
            yield python
    for executable in (sys.executable, shutil.which("python3"), shutil.which("python")):
        if executable:  # Blender's own Python is sorted out by `_has`
            yield Path(executable)


def setup_folder() -> Path:
    """Where "Set Up Generator" puts environments: in the backend's data folder, so that all Blenders of a user share
    one and removing the add-on removes nothing unasked. The same rules as `backend/settings.py`."""
    if named := os.environ.get("POPULACE_DATA_DIR"):
        return Path(named).expanduser() / "backend"
    if home := os.environ.get("POPULACE_HOME"):
        return Path(home).expanduser() / "data" / "backend"
    if _IS_WINDOWS:
        local = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        return local / "populace" / "populace" / "backend"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "populace" / "backend"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "populace" / "backend"


def installed_python() -> Path | None:
    """The Python of the environment that the add-on has set up, if there is one."""
    folder = setup_folder()
    try:
        name = json.loads((folder / POINTER).read_text("utf-8"))["current"]
        return _python_in(folder / "envs" / Path(name).name)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _python_in(folder: Path) -> Path | None:
    names = ("Scripts/python.exe", "python.exe") if _IS_WINDOWS else ("bin/python", "bin/python3")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _has(python: Path, pattern: str) -> bool:
    """Whether a package can be seen in this interpreter's own folders."""
    prefix = python.parent if (python.parent / "Lib").is_dir() else python.parent.parent
    places = ("Lib/site-packages", "lib/python3*/site-packages", "lib/python3*/dist-packages")
    try:
        return any(True for place in places for _ in prefix.glob(f"{place}/{pattern}"))
    except OSError:
        return False


def quiet_folder() -> str:
    """A folder to start in that has no modules which could hide the backend's."""
    return str(Path.home())


def runtime_folders() -> list[Path]:
    """Where a backend of this user may have left its runtime file; the same rules as `backend/settings.py`."""
    if named := os.environ.get("POPULACE_RUNTIME_DIR"):
        return [Path(named).expanduser()]
    if home := os.environ.get("POPULACE_HOME"):
        return [Path(home).expanduser() / "run"]
    temporary = Path(tempfile.gettempdir())
    if _IS_WINDOWS:
        local = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "Temp"
        return [local / "populace", local / "populace" / "populace"]
    folders = []
    if xdg := os.environ.get("XDG_RUNTIME_DIR"):
        folders.append(Path(xdg) / "populace")
    if sys.platform == "darwin":
        folders.append(Path.home() / "Library" / "Caches" / "TemporaryItems" / "populace")
    user = os.getuid()
    return [*folders, Path(f"/run/user/{user}/populace"), temporary / f"runtime-{user}" / "populace"]


def find_running() -> Address | None:
    """The address in the first sound runtime file, if there is one. Whether somebody answers there is another question:
    files of ended backends are normal."""
    for folder in runtime_folders():
        try:
            return read_runtime_file(folder / RUNTIME_FILE)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            log.warning("runtime file in %s ignored: %s", folder, error)
    return None


def read_runtime_file(path: Path) -> Address:
    """Raises OSError or ValueError; also when the file could have been written or read by another user."""
    with open(path, "rb") as file:
        about = os.fstat(file.fileno())
        if not _IS_WINDOWS and (about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o077):
            raise ValueError("it is open to other users")
        if about.st_size > _MAX_RUNTIME_FILE_BYTES:
            raise ValueError("it is too large")
        return parse_address(json.loads(file.read(_MAX_RUNTIME_FILE_BYTES)))


# ----------------------------------------------------------------------------------------------------------- starting

_left_alone: list[subprocess.Popen[Any]] = []  # children that may still run, kept so that they can be reaped


class Child:
    """A backend that this Blender started. It may outlive us: its output goes to files, not to pipes that would break.

    If another Blender started one first, our child says where that one is and ends with 0.
    """

    def __init__(self, command: Command) -> None:
        """Raises `BackendError` if the program cannot be run at all."""
        _left_alone[:] = [process for process in _left_alone if process.poll() is None]
        _sweep()
        self._folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
        self._process: subprocess.Popen[Any] | None = None
        flags: dict[str, Any] = {"start_new_session": True}  # Ctrl-C in Blender's terminal is not meant for it
        if sys.platform == "win32":
            flags = {"creationflags": subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP}
        try:
            with open(self._folder / "ready", "wb") as ready, open(self._folder / "log", "wb") as errors:
                self._process = subprocess.Popen(
                    [*command.argv, "serve", "--json"], cwd=command.cwd, env=clean_environment(),
                    stdin=subprocess.DEVNULL, stdout=ready, stderr=errors, close_fds=True, **flags,
                )  # fmt: skip
        except OSError as error:
            self.forget()
            raise BackendError("start_failed", f"{masked(command.argv[0])} could not be started ({error.strerror}).",
                               INSTALL_HINT) from None  # fmt: skip

    def ended(self) -> int | None:
        """The exit code, None while it runs."""
        return self._process.poll() if self._process is not None else -1

    def runtime_file(self) -> Path | None:
        """Where the ready backend left its address; None until it says so."""
        for line in self._read("ready").splitlines(keepends=True):
            try:
                said = json.loads(line) if line.endswith("\n") else None
            except ValueError:
                continue
            if isinstance(said, dict) and isinstance(said.get("runtime_file"), str):
                return Path(said["runtime_file"])
        return None

    def log_tail(self) -> str:
        return masked(self._read("log")[-4000:].strip())

    def terminate(self) -> None:
        """End it if it still runs. Only ever our own child."""
        if self._process is not None and self.ended() is None:
            self._process.terminate()

    def forget(self) -> None:
        """Remove its files; a backend that still runs writes on into nothing, and is reaped when it has ended."""
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._process is not None:
            _left_alone.append(self._process)

    def _read(self, name: str) -> str:
        try:
            with open(self._folder / name, "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - (64 << 10)))
                return file.read().decode("utf-8", "replace")
        except OSError:
            return ""


def _sweep() -> None:
    """Remove what Blenders that were killed could not."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _DAY_S:
                shutil.rmtree(folder, ignore_errors=True)


async def start(command: Command, started: Callable[[Child], None], report: Callable[[str], None]) -> Address:
    """Start a backend and wait until it is ready. `started` gets the child at once, `report` the stage for the panel.

    Raises `BackendError` when it ends or says nothing for 60 s; the child is ended then.
    """
    began = time.monotonic()
    child = Child(command)
    started(child)
    try:
        while True:
            code = child.ended()  # asked before the file is read: what an ended child said is all there
            if (path := child.runtime_file()) is not None:
                break
            if code is not None:
                raise _why_it_ended(code, child.log_tail())
            waited = time.monotonic() - began
            if waited > READY_TIMEOUT_S:
                raise BackendError("start_timeout", f"The generator was not ready after {READY_TIMEOUT_S:.0f} s.",
                                   (child.log_tail().splitlines() or ["Try again."])[-1])  # fmt: skip
            report(f"Starting Python, {waited:.0f} s")
            await asyncio.sleep(POLL_S)
        return read_runtime_file(path)
    except (OSError, ValueError) as error:
        child.terminate()
        raise BackendError("start_failed", f"The generator's runtime file cannot be read ({error}).",
                           "Restart the generator.") from None  # fmt: skip
    except BaseException:
        child.terminate()
        raise


def _why_it_ended(code: int, tail: str) -> BackendError:
    """A sentence for the causes we know, the last line of the log for the others."""
    if "No module named backend" in tail or "No module named 'backend'" in tail:
        return BackendError("not_installed", "This Python does not have the generator installed.", INSTALL_HINT)
    if missing := tail.rpartition("No module named ")[2] if "No module named " in tail else "":
        return BackendError("not_installed", f"The generator's Python lacks the package {missing.splitlines()[0]}.",
                            "Install the generator again.")  # fmt: skip
    last = tail.splitlines()[-1][:200] if tail else "It said nothing"
    return BackendError("start_failed", f"The generator ended at once with code {code}.", f"{last}.".replace("..", "."))


def clean_environment() -> dict[str, str]:
    """Our environment without what Blender's Python or a launcher added to it; the backend has its own interpreter."""
    env = {name: value for name, value in os.environ.items()
           if not name.startswith(("PYTHON", "BLENDER_")) and name not in ("LD_PRELOAD", "VIRTUAL_ENV")}  # fmt: skip
    env |= {"PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
    for name in ("NO_PROXY", "no_proxy"):
        env[name] = ",".join(filter(None, (env.get(name), "127.0.0.1", "localhost")))
    return env


class RestartBudget:
    """Allows a few automatic restarts in a while; after that a person decides, so that nothing loops."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def take(self) -> bool:
        now = time.monotonic()
        self._times = [t for t in self._times if now - t < RESTARTS_PER_S]
        if len(self._times) >= RESTARTS:
            return False
        self._times.append(now)
        return True
