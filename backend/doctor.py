# SPDX-License-Identifier: GPL-3.0-or-later
"""`populace doctor`: what is installed, what is missing, and what will run where."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

import psutil

from backend import __version__, families, weights
from backend.protocol import GenerateRequest, PopulaceError
from backend.settings import Settings

_PACKAGES = ("torch", "numpy", "numba", "scipy", "fastapi", "uvicorn", "safetensors", "bpy", "xatlas", "nvdiffrast")
_LOW_DISK_GB = 2.0


def examine(settings: Settings) -> dict[str, Any]:
    """Everything as JSON. `ok` is False if the default family cannot run; `problems` says why, with the next step."""
    problems: list[str] = []
    report: dict[str, Any] = {
        "versions": {"populace": __version__, "python": platform.python_version(),
                     **{name: _version(name) for name in _PACKAGES}},
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(),
                    "memory_gb": round(psutil.virtual_memory().total / 1e9, 1)},
        "device": _device(problems),
        "folders": {"data": _folder(settings.data_dir, problems), "runtime": _folder(settings.runtime_dir, problems)},
        "families": [_family(info, settings, problems) for info in families.infos()],
    }  # fmt: skip
    on = f"on {report['device']['gpu']}" if report["device"]["gpu"] else "on the CPU"
    has = {name: report["versions"][name] is not None for name in _PACKAGES}
    report["plan"] = {
        "generating": f"{on}, {report['device']['threads']} threads",
        "unwrap": "atlas by default; xatlas on request" if has["xatlas"] else
        "atlas; for --unwrap xatlas install it: pip install xatlas",
        "rasterising for training": "nvdiffrast" if has["nvdiffrast"] and report["device"]["gpu"] else "portable",
        "demo and --format blend": f"bpy {report['versions']['bpy']}" if has["bpy"] else
        'not available; needs Python 3.11 and: pip install ".[blender]"',
    }  # fmt: skip
    return report | {"problems": problems, "ok": not problems}


def as_text(report: dict[str, Any]) -> str:
    lines = []

    def section(title: str, rows: dict[str, Any]) -> None:
        lines.append(title)
        lines.extend(f"  {name:<26}{'-' if value is None else value}" for name, value in rows.items())

    section("Versions", report["versions"])
    section("Machine", report["machine"] | report["device"])
    section("Folders", {name: f"{row['path']}  ({row['free_gb']} GB free)" for name, row in report["folders"].items()})
    section("Families", {row["name"]: f"{row['title']}: {row['state']}" for row in report["families"]})
    section("What will run how", report["plan"])
    lines += ["", *(f"Problem: {problem}" for problem in report["problems"])]
    lines.append("Something is missing, see above." if report["problems"] else "All is well.")
    return "\n".join(lines)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(problems: list[str]) -> dict[str, Any]:
    if importlib.util.find_spec("torch") is None:
        problems.append("PyTorch is not installed. Reinstall Populace.")
        return {"gpu": None, "gpu_memory_gb": None, "threads": 0}
    import torch

    gpu = memory = None
    if torch.cuda.is_available():
        gpu, memory = torch.cuda.get_device_name(), round(torch.cuda.mem_get_info()[1] / 1e9, 1)
    return {"gpu": gpu, "gpu_memory_gb": memory, "threads": torch.get_num_threads()}


def _folder(path: Path, problems: list[str]) -> dict[str, Any]:
    """The folder's free space, asked of its nearest parent that exists; whether it can be written is tried."""
    parent = next(p for p in (path, *path.parents) if p.exists())
    free = round(shutil.disk_usage(parent).free / 1e9, 1)
    try:
        with tempfile.NamedTemporaryFile(dir=parent):
            writable = parent.is_dir()
    except OSError:
        writable = False
    if not writable:
        problems.append(f"{parent} cannot be written. Set POPULACE_HOME to a folder that can.")
    elif free < _LOW_DISK_GB:
        problems.append(f"Only {free} GB are free in {parent}. Free some space.")
    return {"path": str(path), "free_gb": free, "writable": writable}


def _family(info: Any, settings: Settings, problems: list[str]) -> dict[str, Any]:
    state = "ready, needs no weights"
    if info.weights:
        try:
            state = f"ready, weights {weights.locate(info.weights, settings.data_dir).sha256[:12]}"
        except PopulaceError as error:
            state = error.message
            if info.name == GenerateRequest().family:  # weights of the others are the user's to fetch, if wanted
                problems.append(str(error))
    return {"name": info.name, "title": info.title, "licence": info.licence, "state": state}
