# SPDX-License-Identifier: GPL-3.0-or-later
"""Makes the zips that Blender installs and the index of a repository that serves them; Blender's validator looks on.

Two zips of the same add-on: *slim* has the add-on alone and keeps the extension platform's rules, which allow no
installing of packages; *full* carries the generator as a wheel, weights included, and the buttons that set it up. Both
have the same id, so that one replaces the other; Blender refuses two of one id in a repository, so each kind is served
from a folder of its own.
"""

from __future__ import annotations

import hashlib
import html
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from backend.packet import write_file
from backend.protocol import PopulaceError

SOURCE = Path(__file__).resolve().parents[1] / "blender_addon"
_LEFT_OUT = {"__pycache__", "pictures"}
FULL_ONLY = "setup/"
_MANIFEST = "blender_manifest.toml"
_FULL_FILES = "Reads the generator's address file; installs, starts it"  # 64 characters at most, no full stop
_FULL_NETWORK = "Talks to 127.0.0.1; downloads the generator when asked"
_EPOCH = "315532800"  # 1980, where zip's calendar begins


def build(out: Path, full: bool = False) -> Path:
    """Write `<id>-<version>.zip` or `<id>-full-<version>.zip` into the folder `out` (made if needed). The same source
    gives the same bytes. The full one needs a checkout and setuptools."""
    manifest = tomllib.loads((SOURCE / _MANIFEST).read_text("utf-8"))
    files = {file.relative_to(SOURCE).as_posix(): file.read_bytes() for file in SOURCE.rglob("*") if file.is_file()
             and not _LEFT_OUT & set(file.relative_to(SOURCE).parts) and not file.name.startswith(".")}  # fmt: skip
    files["LICENSE"] = _licence().read_bytes()
    if full:
        wheel = build_wheel()
        files[wheel[0]] = wheel[1]
        files[_MANIFEST] = _full_manifest(files[_MANIFEST].decode("utf-8"), manifest["permissions"]).encode()
    else:
        files = {name: data for name, data in files.items() if not name.startswith(FULL_ONLY)}
    path = out / f"{manifest['id']}{'-full' if full else ''}-{manifest['version']}.zip"
    out.mkdir(parents=True, exist_ok=True)
    _write_zip(path, files)
    return path


def build_wheel() -> tuple[str, bytes]:
    """Name and bytes of the generator's wheel, the same for the same source. Raises `internal_error` without a checkout
    or setuptools."""
    project = SOURCE.parent
    if not (project / "pyproject.toml").is_file():
        raise PopulaceError("internal_error", "The full zip carries the generator's wheel and needs Populace's source.",
                            "Run this in a checkout.")  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        copy = Path(work, "source")  # setuptools leaves folders behind, and finds older ones
        copy.mkdir()
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy2(project / name, copy)
        for package in ("backend", "blender_addon", "weights_manifest"):
            shutil.copytree(project / package, copy / package, ignore=shutil.ignore_patterns("__pycache__", "pictures"))
        code = f"import setuptools.build_meta as b; b.build_wheel({work!r})"
        done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True,
                              env=os.environ | {"SOURCE_DATE_EPOCH": _EPOCH}, check=False)  # fmt: skip
        made = next(Path(work).glob("*.whl"), None)
        if done.returncode != 0 or made is None:
            said = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            raise PopulaceError("internal_error", f"The generator's wheel could not be built: {said}",
                                'Install its tool: pip install "setuptools>=77".')  # fmt: skip
        with zipfile.ZipFile(made) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        _write_zip(made, files)  # once more, since setuptools keeps the files' modes and order
        return made.name, made.read_bytes()


def write_index(folder: Path, with_html: bool = False) -> Path:
    """Write `index.json` (and `index.html`) for the extension zips in a folder: the listing that Blender subscribes to,
    as `blender --command extension server-generate` would. Raises `invalid_request` for what Blender would refuse."""
    rows = [_listed(path) for path in sorted(folder.glob("*.zip"))]
    if not rows:
        raise PopulaceError("invalid_request", f"There are no zips in {folder}.", "Build one: populace addon build.")
    if len({row["id"] for row in rows}) < len(rows):
        raise PopulaceError("invalid_request", f"Two zips in {folder} are of the same extension; Blender refuses that.",
                            "Keep one version, and serve slim and full from folders of their own.")  # fmt: skip
    path = folder / "index.json"
    write_file(path, json.dumps({"version": "v1", "blocklist": [], "data": rows}, indent=2).encode())
    if with_html:
        write_file(folder / "index.html", _page(rows).encode())
    return path


def _listed(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    try:
        with zipfile.ZipFile(path) as archive:
            manifest = tomllib.loads(archive.read(_MANIFEST).decode("utf-8"))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        raise PopulaceError("invalid_request", f"{path.name} is no Blender extension.", "Remove it.") from None
    row = {key: value for key, value in manifest.items() if key not in ("build", "wheels")}
    return row | {"archive_size": len(data), "archive_hash": f"sha256:{hashlib.sha256(data).hexdigest()}",
                  "archive_url": f"./{quote(path.name)}"}  # fmt: skip


def _page(rows: list[dict[str, Any]]) -> str:
    """Links that can be dragged into Blender."""
    lines = []
    for row in rows:
        oldest = row["blender_version_min"]
        query = urlencode({"repository": "./index.json", "blender_version_min": oldest})
        about = f"{row['tagline']}. Blender {oldest} or newer, {row['archive_size'] / 1e6:.1f} MB"
        link = f'<a href="{html.escape(row["archive_url"] + "?" + query)}">'
        lines.append(f"<p>{link}{html.escape(row['name'])} {html.escape(row['version'])}</a>: {html.escape(about)}</p>")
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Populace</title></head>\n<body>\n'
            "<p>Drag a link into Blender, or add this page's address with index.json at its end under Preferences, "
            "Get Extensions, Repositories.</p>\n" + "\n".join(lines) + "\n</body></html>\n")  # fmt: skip


def validate(path: Path) -> bool:
    """Let Blender's extension tool check a zip or folder; False if no Blender module is installed here.

    Raises `internal_error` with what the tool says when it finds fault.
    """
    tool = blender_tool()
    if tool is None:
        return False
    tags = tool.parents[3] / "modules/_bpy_internal/extensions/tags.py"
    command = [sys.executable, str(tool), "validate", "--valid-tags", str(tags), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        said = " ".join((done.stdout + done.stderr).split())
        raise PopulaceError("internal_error", f"Blender's validator refuses {path.name}: {said}")
    return True


def blender_tool() -> Path | None:
    """Blender's extension tool, a plain script, where the Blender module is installed."""
    spec = importlib.util.find_spec("bpy")
    if spec is None or spec.origin is None:
        return None
    scripts = next(Path(spec.origin).parent.glob("*/scripts"))
    return scripts / "addons_core/bl_pkg/cli/blender_ext.py"


def _write_zip(path: Path, files: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_STORED if name.endswith(".whl") else zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, files[name])


def _full_manifest(text: str, permissions: Mapping[str, str]) -> str:
    """The manifest with what the full add-on does beyond the slim one."""
    return text.replace(permissions["files"], _FULL_FILES).replace(permissions["network"], _FULL_NETWORK)


def _licence() -> Path:
    """The licence text: beside the packages in a checkout, in the distribution's metadata when installed."""
    beside = SOURCE.parent / "LICENSE"
    if beside.is_file():
        return beside
    for file in importlib.metadata.files("populace") or ():
        if file.name == "LICENSE":
            return Path(str(file.locate()))
    raise PopulaceError("internal_error", "The licence text is missing from this installation.", "Reinstall Populace.")
