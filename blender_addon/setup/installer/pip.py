# SPDX-License-Identifier: GPL-3.0-or-later
"""Filling an environment with packages: what pip says becomes progress, or one sentence about what went wrong."""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .computer import BUILDS, PIP_DEFAULT, Build, Wheel, free_bytes
from .home import LOG, Home
from .telling import Leash, SetupError, Teller

FIRST: Final = 0.05  # of the whole progress: making the environment comes before,
LAST: Final = 0.95  # checking that it works after


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


def run(job: Job, *command: str | Path) -> None:
    lines: list[str] = []
    with job.leash.holding(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
        for raw in child.stdout or ():
            lines.append(raw.decode("utf-8", "replace").rstrip())
            job.log(lines[-1])
    if child.returncode != 0:
        raise SetupError("start_failed", f"{command[0]} failed: {(lines or ['it says nothing'])[-1][:200]}.",
                         "Choose another Python under Options, or copy the log and report it.")  # fmt: skip


def fill(job: Job, python: Path, wheel: Wheel, build: str) -> None:
    """PyTorch from its own index first, then the generator with the rest."""
    args, size = job.args, BUILDS[build]
    pip = [python, "-I", "-m", "pip", "--disable-pip-version-check", "--no-input"]
    common = ["install", "--only-binary", ":all:"]
    if args.wheels:
        command = [*pip, *common, "--no-index", "--find-links", args.wheels, wheel.path]
        _pip(job, command, FIRST, LAST, size, is_local=True)
        return
    packages = ["--index-url", args.package_index] if args.package_index else []
    common += ["--cache-dir", job.home.cache, "--retries", "3", "--timeout", "30"]
    job.teller.progress("Making the environment", 0.03)
    with contextlib.suppress(SetupError):  # a new pip shows how far a download is and resumes it; the old one works too
        run(job, *pip, *common, "--quiet", "--upgrade", *packages, "pip>=25.1")
    if _pip_version(job, python) >= (24, 1):
        common += ["--progress-bar", "raw"]
    index = args.torch_index or size.index
    split = 0.75
    if wheel.torch:
        source = packages if index == PIP_DEFAULT else ["--index-url", index]
        _pip(job, [*pip, *common, *source, wheel.torch], FIRST, split, size)
    _pip(job, [*pip, *common, *packages, wheel.path], split if wheel.torch else FIRST, LAST, size)


def _pip_version(job: Job, python: Path) -> tuple[int, ...]:
    code = "import pip; print(pip.__version__)"
    with job.leash.holding(python, "-I", "-c", code, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        said, _ = child.communicate()
    return tuple(int(part) for part in re.findall(rb"\d+", said)[:2])


def _pip(
    job: Job, command: Sequence[str | Path], first: float, last: float, size: Build, is_local: bool = False
) -> None:
    """Run pip and turn what it says into progress from `first` to `last`: two thirds loading, one third unpacking, or
    all of it unpacking where nothing is loaded. The bytes of a run are taken to be its share of the progress."""
    split = first if is_local else first + (last - first) * 2 / 3
    share = (last - first) / (LAST - FIRST)
    done = file = seen = 0
    name, tail = "", []
    before = free_bytes(job.home.folder)
    unpacking = threading.Event()

    def watch() -> None:  # pip unpacks without a word: the disk tells how far it is
        while not unpacking.wait(0.5):
            pass
        while not over.wait(0.5):
            used = max(0, before - free_bytes(job.home.folder)) / (share * size.installed_bytes)
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
                    if is_local:
                        job.teller.progress("Looking at the wheels", first)
                        continue
                    text = f"{name} {seen / 1e6:.0f} of {file / 1e6:.0f} MB" if file else name
                    fraction = min((done + seen) / (share * size.download_bytes), 1.0)
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
