# SPDX-License-Identifier: GPL-3.0-or-later
"""`populace renders --meshes`: starts `renders_blender` as a process of its own and hears how it gets on."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from backend.progress import Progress
from backend.protocol import PopulaceError

_LAST_WORDS = 20  # lines of its output that are kept


def run(
    meshes: Path, out: Path, purpose: str, views: int, size: int, seed: int, lit: bool, height: float | None,
    progress: Progress,
) -> None:  # fmt: skip
    """Raises PopulaceError with Blender's reason."""
    if importlib.util.find_spec("bpy") is None:
        raise PopulaceError(
            "invalid_request", "Rendering meshes needs Blender as a Python module, which is not here.",
            'Install it with: pip install ".[blender]" (Python 3.11), or run backend/training/renders_blender.py in '
            "your Blender; it says how."
        )  # fmt: skip
    command = [sys.executable, "-m", "backend.training.renders_blender", "--meshes", str(meshes), "--out", str(out),
               "--for", purpose, "--views", str(views), "--size", str(size), "--seed", str(seed)]  # fmt: skip
    command += ["--lit"] if lit else []
    command += ["--height", str(height)] if height is not None else []
    with tempfile.TemporaryDirectory(prefix="populace-") as private:
        environment = {**os.environ, "PYTHONUTF8": "1", "BLENDER_USER_RESOURCES": private}
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True, errors="replace", env=environment)  # fmt: skip
        assert process.stderr is not None
        said: list[str] = []
        try:
            for line in process.stderr:
                word, _, rest = line.strip().partition(" ")
                if word == "RENDERED":
                    done, count, name = rest.split(" ", 2)
                    progress.show(name, int(done) / int(count))
                elif line.strip():
                    said = [*said, line.strip()][-_LAST_WORDS:]
        except BaseException:
            process.kill()
            raise
        finally:
            code = process.wait()
            process.stderr.close()
    if code:
        problem = next((line.removeprefix("PROBLEM ") for line in said if line.startswith("PROBLEM ")), None)
        if problem is not None:
            raise PopulaceError("invalid_request", problem, "Mend or remove that file, and start with an empty folder.")
        raise PopulaceError("internal_error", f"Blender ended with {code}: {' '.join(said)[-300:]}", "Run it again.")
