# SPDX-License-Identifier: GPL-3.0-or-later
"""Installs the generator into an environment of its own: a program, run by Blender's Python in a process of its own.

It imports nothing but the standard library and needs no Blender. It says what it does as JSON lines on stdout, writes
everything that pip says to `setup.log`, and ends when its stdin closes: so it cannot outlive Blender.

    <folder>/current.json     which environment is in use, and which one was before: switched in one rename
    <folder>/envs/<name>/     whole environments; one that the pointer does not name is a leftover and is removed
    <folder>/cache/           what pip has downloaded, so that a second attempt goes on where the first one stopped
"""

from __future__ import annotations

import argparse
import contextlib
import email
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

PYTORCH: Final = "https://download.pytorch.org/whl"
PIP_DEFAULT: Final = "pip"  # instead of an address: wherever pip looks by its own configuration
POINTER: Final = "current.json"
LOG: Final = "setup.log"
RECORD: Final = "populace-environment.json"
MIN_CUDA_DRIVER: Final = 525  # CUDA 12 by minor version compatibility
MIN_CUDA_CAPABILITY: Final = 7.5  # the newer builds leave older cards out
SPARE_BYTES: Final = 500_000_000
_DOCTOR_TIMEOUT_S: Final = 300.0
_SAY_EVERY_S: Final = 0.1
_IS_WINDOWS: Final = os.name == "nt"


@dataclass(frozen=True)
class Build:
    """One of PyTorch's builds; the sizes are of everything together, rounded up."""

    title: str
    index: str
    download_bytes: int
    installed_bytes: int


BUILDS: Final = {
    "cpu": Build("processor only", f"{PYTORCH}/cpu", 420_000_000, 1_500_000_000),
    "cuda": Build("NVIDIA GPU, CUDA 12.8", f"{PYTORCH}/cu128", 3_600_000_000, 8_000_000_000),
    "cuda_older": Build("older NVIDIA GPU, CUDA 12.6", f"{PYTORCH}/cu126", 3_400_000_000, 7_500_000_000),
    "macos": Build("macOS", PIP_DEFAULT, 300_000_000, 1_300_000_000),
}


class SetupError(Exception):
    """One sentence for the user, and what to do."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.hint = code, message, hint


class Cancelled(Exception):
    """Asked to stop, or nobody listens any more."""


# ---------------------------------------------------------------------------------------------- talking to the add-on


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
        if stage == self._stage and now - self._last < _SAY_EVERY_S:
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
        if _IS_WINDOWS:
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
    if _IS_WINDOWS:
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(child.pid)], capture_output=True, check=False,
                       creationflags=0x08000000)  # fmt: skip
    elif os.getpgrp() == os.getpid():  # the group is ours: whatever is in it comes from us
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
    child.kill()


# ------------------------------------------------------------------------------------------------------- looking around


@dataclass(frozen=True)
class Wheel:
    """The generator's wheel, as its own metadata describes it."""

    path: Path
    version: str
    oldest: tuple[int, int]  # Python, inclusive
    newest: tuple[int, int]  # Python, exclusive
    torch: str  # requirement

    @classmethod
    def read(cls, path: Path) -> Wheel:
        try:
            with zipfile.ZipFile(path) as archive:
                name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
                about = email.message_from_bytes(archive.read(name))
            oldest, newest = (re.search(rf"{sign}\s*(\d+)\.(\d+)", about["Requires-Python"]) for sign in (">=", "<"))
            torch = next((r for r in about.get_all("Requires-Dist", []) if re.match(r"torch\b", r)), "")
            return cls(path, about["Version"], _pair(oldest), _pair(newest), torch)
        except (OSError, zipfile.BadZipFile, StopIteration, TypeError, AttributeError):
            raise SetupError("broken_wheel", f"The generator's package {path.name} is missing or damaged.",
                             "Download the add-on again and install it anew.") from None  # fmt: skip


def _pair(match: re.Match[str] | None) -> tuple[int, int]:
    assert match is not None
    return int(match[1]), int(match[2])


def find_python(wheel: Wheel, asked: str, leash: Leash) -> tuple[Path, str]:
    """A Python that can make environments, and its version: the one asked for, ours, or one found on this computer."""
    wanted = f"{wheel.oldest[0]}.{wheel.oldest[1]} to {wheel.newest[0]}.{wheel.newest[1] - 1}"
    why = ""
    for python in [Path(asked).expanduser()] if asked else _pythons(wheel):
        version, problem = _examine(python, wheel, leash)
        if not problem:
            return python, version
        why = why or f"{python} {problem}"
    raise SetupError(
        "no_python", f"No Python was found that can make the environment: {why}." if why else "No Python was found.",
        f"Install Python {wanted} from python.org (64 bit; on Debian and Ubuntu also python3-venv), then try again or "
        "choose it under Options.",
    )


def _pythons(wheel: Wheel) -> Iterator[Path]:
    seen: set[Path] = set()
    names = [f"python3.{minor}" for minor in range(wheel.newest[1] - 1, wheel.oldest[1] - 1, -1)]
    found: list[str | None] = [sys.executable, *map(shutil.which, [*names, "python3", "python"])]
    if _IS_WINDOWS:
        programs = Path(os.environ.get("LOCALAPPDATA", "")) / "Programs" / "Python"
        found += [str(programs / name.replace("python", "Python").replace(".", "") / "python.exe") for name in names]
    elif sys.platform == "darwin":
        found += [f"{folder}/{name}" for name in names for folder in
                  ("/opt/homebrew/bin", "/usr/local/bin", "/Library/Frameworks/Python.framework/Versions/Current/bin")]
    for path in map(Path, filter(None, found)):
        if path not in seen and path.is_file():
            seen.add(path)
            yield path


def _examine(python: Path, wheel: Wheel, leash: Leash) -> tuple[str, str]:
    """Version, and what is wrong with it ("" if nothing)."""
    code = ("import sys, struct, json; v = sys.version_info; m = ''\n"
            "try:\n import venv, ensurepip\nexcept ImportError as e: m = e.name or 'venv'\n"
            "print(json.dumps([v[0], v[1], '%d.%d.%d' % v[:3], struct.calcsize('P'), m]))")  # fmt: skip
    try:
        with leash.holding(python, "-I", "-c", code, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
            said, _ = child.communicate(timeout=20)
        major, minor, version, width, missing = json.loads(said)
    except (SetupError, subprocess.TimeoutExpired, ValueError):
        return "", "does not run"
    if not wheel.oldest <= (major, minor) < wheel.newest:
        return version, f"is Python {major}.{minor}"
    if width != 8:
        return version, "is a 32-bit Python"
    return version, f"(Python {version}) lacks its module {missing}" if missing else ""


def find_gpu(leash: Leash) -> tuple[str, str, str]:
    """The NVIDIA card's name, the build that fits, and a remark when the card cannot be used."""
    if sys.platform == "darwin":
        return "", "macos", ""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "", "cpu", ""
    try:
        with leash.holding(tool, "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader",
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:  # fmt: skip
            said, _ = child.communicate(timeout=20)
        name, driver, capability = (part.strip() for part in said.decode("utf-8", "replace").splitlines()[0].split(","))
        if int(driver.split(".")[0]) < MIN_CUDA_DRIVER:
            return name, "cpu", f"Its driver {driver} is too old: {MIN_CUDA_DRIVER} or newer is needed to use the GPU"
        return name, "cuda" if float(capability) >= MIN_CUDA_CAPABILITY else "cuda_older", ""
    except (SetupError, subprocess.TimeoutExpired, ValueError, IndexError):
        return "", "cpu", "nvidia-smi is there but does not answer: the NVIDIA driver may need a restart"


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free


def bytes_in(folder: Path) -> int:
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


# ----------------------------------------------------------------------------------------------------------- the folder


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
    return environment / ("Scripts/python.exe" if _IS_WINDOWS else "bin/python")


# ------------------------------------------------------------------------------------------------------------- commands


@dataclass
class Job:
    """What all commands share."""

    home: Home
    teller: Teller
    leash: Leash
    args: argparse.Namespace

    def log(self, line: str) -> None:
        with contextlib.suppress(OSError):
            self.home.folder.mkdir(parents=True, exist_ok=True)
            with open(self.home.folder / LOG, "a", encoding="utf-8", errors="replace") as file:
                file.write(line.rstrip() + "\n")


def plan(job: Job) -> dict[str, Any]:
    """What `install` would do here, and whether it can: everything that a person should know before agreeing."""
    home, folder = job.home, job.home.folder
    names = home.pointer()
    gpu, build, remark = find_gpu(job.leash)
    found: dict[str, Any] = {
        "folder": str(folder), "free_bytes": free_bytes(folder), "spare_bytes": SPARE_BYTES, "gpu": gpu,
        "build": build, "remark": remark, "cached_bytes": bytes_in(home.cache),
        "builds": {name: {"title": b.title, "index": b.index, "download_bytes": b.download_bytes,
                          "installed_bytes": b.installed_bytes} for name, b in BUILDS.items()},
        "installed": home.record(names.get("current", "")), "previous": home.record(names.get("previous", "")),
        "version": "", "python": "", "python_version": "", "problem": "", "hint": "",
    }  # fmt: skip
    try:
        wheel = Wheel.read(job.args.wheel)
        found["version"] = wheel.version
        if sys.platform == "darwin" and platform.machine() == "x86_64":
            raise SetupError("no_build", "PyTorch is no longer made for Macs with Intel processors.",
                             "Use a Mac with Apple silicon, or another computer.")  # fmt: skip
        python, found["python_version"] = find_python(wheel, job.args.python, job.leash)
        found["python"] = str(python)
    except SetupError as error:
        found |= {"problem": error.message, "hint": error.hint}
    return found


def install(job: Job) -> dict[str, Any]:
    """Make a new environment beside the old one; switch to it when its own doctor finds it well."""
    home, args, teller = job.home, job.args, job.teller
    began = time.monotonic()
    teller.progress("Looking at this computer", 0.0)
    wheel = Wheel.read(args.wheel)
    python, version = find_python(wheel, args.python, job.leash)
    build = find_gpu(job.leash)[1] if args.build == "auto" else args.build
    home.tidy()
    _check_space(home, build)
    names = home.pointer()
    name = f"{wheel.version}-{build}-{time.strftime('%Y%m%d-%H%M%S')}"
    environment = home.envs / name
    job.log(f"\n=== {time.strftime('%Y-%m-%d %H:%M:%S')} Populace {wheel.version}, {build}, {python} ({version})")
    try:
        teller.progress("Making the environment", 0.01)
        environment.parent.mkdir(parents=True, exist_ok=True)
        home.temporary.mkdir(exist_ok=True)
        os.environ |= dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(home.temporary))  # of pip: an ended one leaves files
        _run(job, python, "-I", "-m", "venv", environment)
        own = python_of(environment)
        _fill(job, own, wheel, build)
        teller.progress("Checking that it works", 0.95)
        doctor(job, own)
        record = {"version": wheel.version, "build": build, "python": version, "bytes": bytes_in(environment),
                  "wheel_sha256": hashlib.sha256(wheel.path.read_bytes()).hexdigest(),
                  "installed": time.strftime("%Y-%m-%dT%H:%M:%S%z")}  # fmt: skip
        (environment / RECORD).write_text(json.dumps(record), "utf-8")
        if job.leash.cut.is_set():
            raise Cancelled
        home.point(name, names.get("current", ""))
    finally:
        freed = home.tidy()  # a half environment, or the one before the previous
    shutil.rmtree(home.cache, ignore_errors=True)
    return record | {"seconds": round(time.monotonic() - began, 1), "freed_bytes": freed, "is_upgrade": bool(names)}


def _check_space(home: Home, build: str) -> None:
    needs = BUILDS[build].download_bytes + BUILDS[build].installed_bytes + SPARE_BYTES
    if (free := free_bytes(home.folder)) < needs:
        raise SetupError("out_of_disk", f"The set-up needs {needs / 1e9:.1f} GB, {free / 1e9:.1f} GB are free "
                         f"where {home.folder} is.", "Free some space, then try again.")  # fmt: skip


def _fill(job: Job, python: Path, wheel: Wheel, build: str) -> None:
    """PyTorch from its own index first, then the generator with the rest."""
    args, size = job.args, BUILDS[build]
    pip = [python, "-I", "-m", "pip", "--disable-pip-version-check", "--no-input"]
    common = ["install", "--only-binary", ":all:"]
    if args.wheels:
        _pip(job, [*pip, *common, "--no-index", "--find-links", args.wheels, wheel.path], 0.05, 0.95, size)
        return
    packages = ["--index-url", args.package_index] if args.package_index else []
    common += ["--cache-dir", job.home.cache, "--retries", "3", "--timeout", "30"]
    job.teller.progress("Making the environment", 0.03)
    with contextlib.suppress(SetupError):  # a new pip shows how far a download is and resumes it; the old one works too
        _run(job, *pip, *common, "--quiet", "--upgrade", *packages, "pip>=25.1")
    if _pip_version(job, python) >= (24, 1):
        common += ["--progress-bar", "raw"]
    index = args.torch_index or size.index
    split = 0.75
    if wheel.torch:
        source = packages if index == PIP_DEFAULT else ["--index-url", index]
        _pip(job, [*pip, *common, *source, wheel.torch], 0.05, split, size)
    _pip(job, [*pip, *common, *packages, wheel.path], split if wheel.torch else 0.05, 0.95, size)


def _pip_version(job: Job, python: Path) -> tuple[int, ...]:
    code = "import pip; print(pip.__version__)"
    with job.leash.holding(python, "-I", "-c", code, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        said, _ = child.communicate()
    return tuple(int(part) for part in re.findall(rb"\d+", said)[:2])


def _pip(job: Job, command: Sequence[str | Path], first: float, last: float, size: Build) -> None:
    """Run pip and turn what it says into progress from `first` to `last`: two thirds loading, one third unpacking."""
    split = first + (last - first) * 2 / 3
    done = file = seen = 0
    name, tail = "", []
    before = free_bytes(job.home.folder)
    unpacking = threading.Event()

    def watch() -> None:  # pip unpacks without a word: the disk tells how far it is
        while not unpacking.wait(0.5):
            pass
        while not over.wait(0.5):
            used = max(0, before - free_bytes(job.home.folder)) / size.installed_bytes
            job.teller.progress("Unpacking", split + (last - split) * min(used, 0.98))

    over = threading.Event()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        with job.leash.holding(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
            for raw in child.stdout or ():
                line = raw.decode("utf-8", "replace").rstrip()
                if match := re.fullmatch(r"Progress (\d+) of (\d+)", line):
                    seen, file = int(match[1]), int(match[2])
                else:
                    job.log(line)
                    tail = [*tail[-30:], line]
                    if match := re.match(r"\s*Downloading (?:\S+/)?([^\s/]+) \(", line):
                        done, seen, file, name = done + file, 0, 0, match[1].split("-")[0]
                    elif line.startswith("Installing collected packages"):
                        unpacking.set()
                        job.teller.progress("Unpacking", split)
                        continue
                if not unpacking.is_set():
                    text = f"{name} {seen / 1e6:.0f} of {file / 1e6:.0f} MB" if file else name
                    fraction = min((done + seen) / size.download_bytes, 1.0)
                    job.teller.progress("Downloading", first + (split - first) * fraction, text)
    finally:
        over.set()
        unpacking.set()
        watcher.join()
    if child.returncode != 0:
        raise _why_pip_failed(tail, job)


_CAUSES: Final = (  # what pip says, code, sentence, what to do
    (r"No space left|Errno 28|not enough space", "out_of_disk", "The disk is full.",
     "Free some space, then try again."),
    (r"CERTIFICATE_VERIFY|SSLError|SSL:", "no_trust", "The connection is not trusted: a proxy or scanner replaces its "
     "certificate.", "Ask who runs your network, or install from a folder of wheels."),
    (r"407 Proxy|ProxyError|Cannot connect to proxy", "no_network", "The proxy refuses the connection.",
     "Set HTTPS_PROXY, or install from a folder of wheels."),
    (r"THESE PACKAGES DO NOT MATCH THE HASHES|hash", "corrupt_download", "A download was damaged.", "Try again."),
    (r"NewConnectionError|Temporary failure|getaddrinfo|Name or service|timed out|ReadTimeout|ConnectionReset|"
     r"Connection aborted|IncompleteRead|Remote end closed|Connection refused|Max retries", "no_network",
     "The connection to the package index failed.", "Try again: what is already downloaded is kept."),
    (r"No matching distribution|Could not find a version", "no_package", "A package is not to be had for this "
     "computer: {package}.", "Check the index addresses or the folder of wheels under Options."),
    (r"Permission denied|Access is denied|Errno 13|WinError 5", "no_permission", "A file could not be written.",
     "Close other programs that use the generator, then try again."),
)  # fmt: skip


def _why_pip_failed(tail: list[str], job: Job) -> SetupError:
    text = "\n".join(tail)
    package = re.search(r"(?:No matching distribution found for|satisfies the requirement) (\S+)", text)
    for pattern, code, sentence, hint in _CAUSES:
        if re.search(pattern, text):
            return SetupError(code, sentence.format(package=package[1] if package else "see the log"), hint)
    errors = [line for line in tail if line.startswith("ERROR:")] or tail
    return SetupError("pip_failed", f"pip failed: {errors[-1].removeprefix('ERROR: ')[:200] if errors else '?'}",
                      "Copy the log and report it.")  # fmt: skip


def doctor(job: Job, python: Path) -> None:
    """Raise `SetupError` unless the environment's own `populace doctor` finds everything well."""
    cwd = python.parent  # no modules there that could hide the environment's own
    try:
        with open(job.home.folder / LOG, "ab") as log, job.leash.holding(
            python, "-I", "-m", "backend", "doctor", "--json", cwd=cwd, stdout=subprocess.PIPE, stderr=log
        ) as child:
            said, _ = child.communicate(timeout=_DOCTOR_TIMEOUT_S)
        report = json.loads(said)
        well, problems = report["ok"] is True, [str(problem) for problem in report["problems"]]
    except subprocess.TimeoutExpired:
        raise SetupError("doctor_failed", "The new environment did not answer in time.", "Try again.") from None
    except (ValueError, TypeError, KeyError):
        raise SetupError("doctor_failed", "The new environment does not run.", "Copy the log and report it.") from None
    job.log(said.decode("utf-8", "replace"))
    if not well:
        why = problems[0] if problems else "it gives no reason"
        raise SetupError("doctor_failed", f"The new environment is not well: {why}",
                         "Copy the log; what was there before is still in use.")  # fmt: skip


def roll_back(job: Job) -> dict[str, Any]:
    """Use the environment from before the last upgrade again; the newer one is kept as the other one."""
    names = job.home.pointer()
    if not names.get("previous") or not job.home.record(names["previous"]):
        raise SetupError("nothing_before", "There is no earlier version to go back to.")
    job.teller.progress("Checking the earlier version", 0.1)
    doctor(job, python_of(job.home.envs / names["previous"]))
    job.home.point(names["previous"], names["current"])
    return job.home.record(names["previous"])


def uninstall(job: Job) -> dict[str, Any]:
    """Remove every environment and download. People, results and weights in other folders stay."""
    home = job.home
    freed = bytes_in(home.folder)
    job.teller.progress("Removing", 0.1)
    trash = home.folder / f"trash-{os.getpid()}"
    if home.envs.is_dir():
        try:
            os.replace(home.envs, trash)  # fails as a whole where something in it runs
        except OSError:
            raise SetupError("in_use", "The generator is in use.",
                             "Stop it in every Blender, then try again.") from None  # fmt: skip
    (home.folder / POINTER).unlink(missing_ok=True)
    for path in list(home.folder.iterdir()):
        if path.name != "lock":
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return {"freed_bytes": freed - bytes_in(home.folder)}


def _run(job: Job, *command: str | Path) -> None:
    lines: list[str] = []
    with job.leash.holding(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
        for raw in child.stdout or ():
            lines.append(raw.decode("utf-8", "replace").rstrip())
            job.log(lines[-1])
    if child.returncode != 0:
        raise SetupError("start_failed", f"{command[0]} failed: {(lines or ['it says nothing'])[-1][:200]}.",
                         "Choose another Python under Options, or copy the log and report it.")  # fmt: skip


_COMMANDS: Final = {"plan": plan, "install": install, "roll_back": roll_back, "uninstall": uninstall}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: done, 1: failed, 3: cancelled. The last line on stdout says the same with reasons."""
    parser = argparse.ArgumentParser(prog="installer", description=__doc__)
    parser.add_argument("command", choices=sorted(_COMMANDS))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--wheel", type=Path, default=Path())
    parser.add_argument("--python", default="", help="the Python to make the environment with")
    parser.add_argument("--build", choices=("auto", *BUILDS), default="auto")
    parser.add_argument("--wheels", default="", help="a folder of wheels: nothing is downloaded")
    parser.add_argument("--torch-index", default=os.environ.get("POPULACE_TORCH_INDEX", ""))
    parser.add_argument("--package-index", default="")
    args = parser.parse_args(argv)
    teller, leash = Teller(sys.stdout), Leash()
    signal.signal(signal.SIGTERM, leash.pull)
    leash.watch(sys.stdin.fileno())
    job = Job(Home(args.folder.absolute()), teller, leash, args)
    try:
        if args.command == "plan":
            teller.say("done", result=plan(job))
            return 0
        with job.home.locked():
            teller.say("done", result=_COMMANDS[args.command](job))
        return 0
    except Cancelled:
        teller.say("cancelled")
        return 3
    except SetupError as error:
        failure = error
    except OSError as error:
        full = error.errno in (28, 122)
        failure = SetupError("out_of_disk", "The disk is full.", "Free some space, then try again.") if full else \
            SetupError("no_permission", f"{error.filename or args.folder}: {error.strerror}.", "Check its permissions.")
    if leash.cut.is_set():  # the failure is only how being stopped looked
        teller.say("cancelled")
        return 3
    job.log(f"{failure.code}: {failure.message} {failure.hint}")
    teller.say("error", code=failure.code, message=failure.message, hint=failure.hint)
    return 1


if __name__ == "__main__":
    sys.exit(main())
