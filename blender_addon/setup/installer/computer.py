# SPDX-License-Identifier: GPL-3.0-or-later
"""What this computer has: a Python, a graphics card, free space; and which build of PyTorch fits."""

from __future__ import annotations

import contextlib
import email
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .telling import IS_WINDOWS, Leash, SetupError

PYTORCH: Final = "https://download.pytorch.org/whl"
PIP_DEFAULT: Final = "pip"  # instead of an address: wherever pip looks by its own configuration
MIN_CUDA_DRIVER: Final = 525  # CUDA 12 by minor version compatibility
MIN_CUDA_CAPABILITY: Final = 7.5  # the newer builds leave older cards out


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
        "no_python",
        f"No Python was found that can make the environment: {why}." if why else "No Python was found.",
        f"Install Python {wanted} from python.org (64 bit; on Debian and Ubuntu also python3-venv), then try again or "
        "choose it under Options.",
    )


def _pythons(wheel: Wheel) -> Iterator[Path]:
    seen: set[Path] = set()
    names = [f"python3.{minor}" for minor in range(wheel.newest[1] - 1, wheel.oldest[1] - 1, -1)]
    found: list[str | None] = [sys.executable, *map(shutil.which, [*names, "python3", "python"])]
    if IS_WINDOWS:
        programs = Path(os.environ.get("LOCALAPPDATA", "")) / "Programs" / "Python"
        found += [str(programs / name.replace("python", "Python").replace(".", "") / "python.exe") for name in names]
    elif sys.platform == "darwin":
        found += [
            f"{folder}/{name}"
            for name in names
            for folder in (
                "/opt/homebrew/bin",
                "/usr/local/bin",
                "/Library/Frameworks/Python.framework/Versions/Current/bin",
            )
        ]
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
