# SPDX-License-Identifier: GPL-3.0-or-later
"""Makes the zip that Blender installs, and has Blender's own validator look at it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from backend.protocol import PopulaceError

SOURCE = Path(__file__).resolve().parents[1] / "blender_addon"
_LEFT_OUT = {"__pycache__", "pictures"}


def build(out: Path) -> Path:
    """Write `<id>-<version>.zip` into the folder `out` (made if needed). The same source gives the same bytes."""
    manifest = tomllib.loads((SOURCE / "blender_manifest.toml").read_text("utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{manifest['id']}-{manifest['version']}.zip"
    files = {file.relative_to(SOURCE).as_posix(): file for file in SOURCE.rglob("*") if file.is_file()}
    files = {name: file for name, file in files.items()
             if not _LEFT_OUT & set(Path(name).parts) and not file.name.startswith(".")}  # fmt: skip
    files["LICENSE"] = _licence()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, file in sorted(files.items()):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, file.read_bytes())
    return path


def validate(path: Path) -> bool:
    """Let Blender's extension tool check a zip or folder; False if no Blender module is installed here.

    Raises `internal_error` with what the tool says when it finds fault.
    """
    spec = importlib.util.find_spec("bpy")
    if spec is None or spec.origin is None:
        return False
    scripts = next(Path(spec.origin).parent.glob("*/scripts"))
    tool = scripts / "addons_core/bl_pkg/cli/blender_ext.py"
    tags = scripts / "modules/_bpy_internal/extensions/tags.py"
    command = [sys.executable, str(tool), "validate", "--valid-tags", str(tags), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        said = " ".join((done.stdout + done.stderr).split())
        raise PopulaceError("internal_error", f"Blender's validator refuses {path.name}: {said}")
    return True


def _licence() -> Path:
    """The licence text: beside the packages in a checkout, in the distribution's metadata when installed."""
    beside = SOURCE.parent / "LICENSE"
    if beside.is_file():
        return beside
    for file in importlib.metadata.files("populace") or ():
        if file.name == "LICENSE":
            return Path(str(file.locate()))
    raise PopulaceError("internal_error", "The licence text is missing from this installation.", "Reinstall Populace.")
