# SPDX-License-Identifier: GPL-3.0-or-later
"""What the installer can do: plan, install, roll back, uninstall."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from . import __doc__ as ABOUT
from .computer import BUILDS, Wheel, bytes_in, find_gpu, find_python, free_bytes
from .home import LOG, POINTER, RECORD, Home, python_of
from .pip import LAST, Job, fill, run
from .telling import Cancelled, Leash, SetupError, Teller

SPARE_BYTES: Final = 500_000_000
_DOCTOR_TIMEOUT_S: Final = 300.0


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
        run(job, python, "-I", "-m", "venv", environment)
        own = python_of(environment)
        fill(job, own, wheel, build)
        teller.progress("Checking that it works", LAST)
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


def doctor(job: Job, python: Path) -> None:
    """Raise `SetupError` unless the environment's own `populace doctor` finds everything well."""
    cwd = python.parent  # no modules there that could hide the environment's own
    try:
        with (
            open(job.home.folder / LOG, "ab") as log,
            job.leash.holding(
                python, "-I", "-m", "backend", "doctor", "--json", cwd=cwd, stdout=subprocess.PIPE, stderr=log
            ) as child,
        ):
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
    job.teller.progress("Removing", 0.0)
    trash = home.folder / f"trash-{os.getpid()}"
    if home.envs.is_dir():
        try:
            os.replace(home.envs, trash)  # fails as a whole where something in it runs
        except OSError:
            raise SetupError("in_use", "The generator is in use.",
                             "Stop it in every Blender, then try again.") from None  # fmt: skip
    (home.folder / POINTER).unlink(missing_ok=True)
    _remove_files(job, trash, freed)
    for path in list(home.folder.iterdir()):
        if path.name != "lock":
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return {"freed_bytes": freed - bytes_in(home.folder)}


def _remove_files(job: Job, folder: Path, total: int) -> None:
    """Of all `total` bytes, with progress: so many small files take minutes on a slow disk."""
    gone = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                path = Path(parent, name)
                size = path.lstat().st_size
                path.unlink()
                gone += size
                job.teller.progress("Removing", gone / total)


_COMMANDS: Final = {"plan": plan, "install": install, "roll_back": roll_back, "uninstall": uninstall}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: done, 1: failed, 3: cancelled. The last line on stdout says the same with reasons."""
    parser = argparse.ArgumentParser(prog="installer", description=ABOUT)
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
        failure = (
            SetupError("out_of_disk", "The disk is full.", "Free some space, then try again.")
            if full
            else SetupError(
                "no_permission", f"{error.filename or args.folder}: {error.strerror}.", "Check its permissions."
            )
        )
    if leash.cut.is_set():  # the failure is only how being stopped looked
        teller.say("cancelled")
        return 3
    job.log(f"{failure.code}: {failure.message} {failure.hint}")
    teller.say("error", code=failure.code, message=failure.message, hint=failure.hint)
    return 1
