# SPDX-License-Identifier: GPL-3.0-or-later
"""Weight files: what the manifest promises, whether a file keeps it, and its tensors as numpy arrays.

A file is used only after its size and SHA-256 matched the manifest that shipped with this version. The outcome is
remembered by (path, size, time of change) in the data folder, so a start does not read every file twice. Only
safetensors is read: there is no code path for pickles.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

import weights_manifest
from backend import packet
from backend.protocol import PopulaceError

log = logging.getLogger(__name__)

MANIFEST_FOLDER = Path(weights_manifest.__file__).parent


@dataclass(frozen=True)
class WeightFile:
    path: str  # relative, forward slashes
    size: int
    sha256: str
    repository: str | None = None  # where it can be had, when it is not embedded
    revision: str | None = None


@dataclass(frozen=True)
class Manifest:
    name: str
    title: str
    licence: str
    licence_url: str
    provenance: str
    embedded: bool
    files: tuple[WeightFile, ...]
    folder: Path  # of the TOML file
    licence_text: str = ""  # to be accepted before a download; "" where name and address say it all
    imported: bool = False  # brought by the user, not known to this version
    obtain: str = ""  # how the user gets what only the authors may give away; such a manifest names no files

    def location(self, file: WeightFile, data_dir: Path) -> Path:
        base = self.folder if self.embedded else data_dir / "weights" / self.name
        return base / file.path

    def is_here(self, data_dir: Path) -> bool:
        """Whether all files are there; `verify` says whether they are good."""
        return bool(self.files) and all(self.location(file, data_dir).is_file() for file in self.files)

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def sha256(self) -> str:
        """One hash for the whole set: the file's own if there is one, else that of the files' hashes in order."""
        if len(self.files) == 1:
            return self.files[0].sha256
        return hashlib.sha256("".join(file.sha256 for file in self.files).encode()).hexdigest()


@dataclass(frozen=True)
class Weights:
    """Verified files of one model, ready to read."""

    name: str
    sha256: str
    paths: tuple[Path, ...]

    def with_more(self, other: Weights, hashed: bool = True) -> Weights:
        """These and a companion's, under this name; the hash is that of both, or with `hashed` off still these's."""
        digest = hashlib.sha256(f"{self.sha256}{other.sha256}".encode()).hexdigest() if hashed else self.sha256
        return Weights(self.name, digest, self.paths + other.paths)

    def path(self, name: str) -> Path:
        """The file of this name. Raises `weights_corrupt` if there is none."""
        for path in self.paths:
            if path.name == name:
                return path
        raise _corrupt(self.name, f"{name} is missing")

    def read(self) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, str]]:
        """All arrays (read-only views) and the metadata of all files. Raises `weights_corrupt` if one is not
        safetensors."""
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        metadata: dict[str, str] = {}
        for path in self.paths:
            if path.suffix != ".safetensors":
                continue
            try:
                found, notes = packet.load_tensors(path.read_bytes())
            except ValueError as error:
                raise _corrupt(self.name, f"{path.name} is not a safetensors file: {error}") from None
            if both := found.keys() & arrays.keys():
                raise _corrupt(self.name, f"tensor {min(both)} is in two files")
            arrays |= found
            metadata |= notes
        return arrays, metadata


def manifests(folder: Path = MANIFEST_FOLDER, data_dir: Path | None = None) -> tuple[Manifest, ...]:
    """Every manifest that ships, by name; with `data_dir` also those that the user imported."""
    shipped = tuple(_read_manifest(path) for path in sorted(folder.glob("*.toml")))
    if data_dir is None:
        return shipped
    names, own = {manifest.name for manifest in shipped if manifest.files}, []
    for path in sorted(imports_folder(data_dir).glob("*.toml")):
        try:
            manifest = _read_manifest(path)
        except (OSError, ValueError) as error:  # not ours to correct
            log.warning("imported weights ignored: %s", error)
            continue
        if manifest.name not in names:
            own.append(manifest)
    brought = {manifest.name for manifest in own}
    return tuple(manifest for manifest in shipped if manifest.name not in brought) + tuple(own)


def find(name: str, data_dir: Path, folder: Path = MANIFEST_FOLDER) -> Manifest:
    """Shipped or imported. Raises `weights_missing` with the names that exist."""
    known = {manifest.name: manifest for manifest in manifests(folder, data_dir)}
    if name not in known:
        raise PopulaceError("weights_missing", f"This version ships no weights called {name!r}, and none of that "
                            "name were imported.", f"There are: {', '.join(known) or 'none'}.")  # fmt: skip
    return known[name]


def imports_folder(data_dir: Path) -> Path:
    """Where the manifests of imported weights are."""
    return data_dir / "weights" / "imported"


def locate(name: str, data_dir: Path, folder: Path = MANIFEST_FOLDER) -> Weights:
    """The verified weights called `name`, or those that the user put in their place (`replacements`).

    Raises `weights_missing` (with where to get them) or `weights_corrupt`.
    """
    manifest = find(replacements(data_dir).get(name, name), data_dir, folder)
    name = manifest.name
    if not manifest.files:
        what = f"The weights {name!r} ({manifest.title}) are not here."
        raise PopulaceError("weights_missing", what, manifest.obtain)
    for file in manifest.files:
        verify(manifest, file, data_dir)
    return Weights(name, manifest.sha256, tuple(manifest.location(file, data_dir) for file in manifest.files))


def verify(manifest: Manifest, file: WeightFile, data_dir: Path, fresh: bool = False) -> Path:
    """Check one file's size and SHA-256; `fresh` ignores what earlier checks remembered. Returns its path.

    A damaged file in the data folder is set aside as `<file>.corrupt`; embedded files are left where they are.
    """
    path = manifest.location(file, data_dir)
    try:
        stat = path.stat()
    except OSError:
        raise PopulaceError(
            "weights_missing", f"The weights {manifest.name!r} are not complete: {path} is missing.",
            _how_to_get(manifest, file, path)
        ) from None  # fmt: skip
    problem = f"{stat.st_size} bytes instead of {file.size}" if stat.st_size != file.size else ""
    if not problem:
        memory = _Memory(data_dir)
        key = [stat.st_size, stat.st_mtime_ns, file.sha256]
        if not fresh and memory.entries.get(str(path)) == key:
            return path
        if sha256_of(path) == file.sha256:
            memory.remember(str(path), key)
            return path
        problem = "its SHA-256 differs from the manifest's"
    if not manifest.embedded:
        with contextlib.suppress(OSError):
            os.replace(path, path.with_name(f"{path.name}.corrupt"))
    raise _corrupt(manifest.name, f"{path.name}: {problem}", _how_to_get(manifest, file, path))


def replacements(data_dir: Path) -> dict[str, str]:
    """Which weights are used in place of which, as `populace weights use` left it."""
    found = user_record(data_dir).get("use", {})
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def user_record(data_dir: Path) -> dict[str, Any]:
    """The user's own manifest, `<data_dir>/weights/user.json`: accepted licences and replacements."""
    try:
        found = json.loads((data_dir / "weights" / "user.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def check_tensors(
    name: str, tensors: Mapping[str, np.ndarray[Any, Any]], shapes: Mapping[str, Sequence[int]]
) -> None:
    """Raise `weights_corrupt` unless `tensors` are exactly those of `shapes`, and finite."""
    missing, extra = shapes.keys() - tensors.keys(), tensors.keys() - shapes.keys()
    if missing:
        raise _corrupt(name, f"{len(missing)} tensors are missing, the first is {min(missing)}")
    if extra:
        raise _corrupt(name, f"{len(extra)} tensors do not belong there, the first is {min(extra)}")
    for key, shape in shapes.items():
        array = tensors[key]
        if array.shape != tuple(shape):
            raise _corrupt(name, f"{key} has shape {list(array.shape)} instead of {list(shape)}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise _corrupt(name, f"{key} holds numbers that are not finite")


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(path: Path) -> str:
    """The manifest entry of a file, as TOML."""
    return f'[[files]]\npath = "{path.name}"\nsize = {path.stat().st_size}\nsha256 = "{sha256_of(path)}"\n'


def _read_manifest(path: Path) -> Manifest:
    """Raises ValueError when a manifest breaks the rules of weights_manifest/README.md: a mistake of ours."""
    raw = tomllib.loads(path.read_text("utf-8"))
    try:
        files = tuple(WeightFile(**entry) for entry in raw.pop("files", ()))
        manifest = Manifest(**raw, files=files, folder=path.parent)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path.name}: {error}") from None
    if manifest.name != path.stem or bool(files) == bool(manifest.obtain):
        raise ValueError(f"{path.name}: name differs from the file's, or there are neither files nor how to obtain any")
    for file in files:
        parts = PurePosixPath(file.path)
        kind = parts.suffix in (".safetensors", ".json")
        if parts.is_absolute() or ".." in parts.parts or not kind or "\\" in file.path:
            raise ValueError(f"{path.name}: {file.path!r} is not a relative path of a .safetensors or .json file")
        if not re.fullmatch(r"[0-9a-f]{64}", file.sha256) or file.size <= 0:
            raise ValueError(f"{path.name}: {file.path} has a bad sha256 or size")
        address = f"{file.repository}@{file.revision}"
        if not (manifest.embedded or manifest.imported) and not re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", address):
            raise ValueError(f"{path.name}: {file.path} names no repository with a 40-digit revision")
    return manifest


def _how_to_get(manifest: Manifest, file: WeightFile, path: Path) -> str:
    if manifest.embedded:
        return "They are part of Populace itself: reinstall it."
    if manifest.imported:
        return f"Import the file again, or put it at {path}."
    return (f"Run: populace weights fetch {manifest.name}, or bring {file.path} of huggingface.co/{file.repository} at "
            f"revision {file.revision} and put it at {path}.")  # fmt: skip


def _corrupt(name: str, what: str, hint: str = "") -> PopulaceError:
    return PopulaceError(
        "weights_corrupt", f"The weights {name!r} are damaged: {what}.", hint or "Reinstall or fetch them again."
    )


class _Memory:
    """What was verified before, in `<data_dir>/weights/verified.json`. Losing it only costs time."""

    def __init__(self, data_dir: Path) -> None:
        self.path = data_dir / "weights" / "verified.json"
        try:
            entries = json.loads(self.path.read_text("utf-8"))
        except (OSError, ValueError):
            entries = {}
        self.entries: dict[str, Any] = entries if isinstance(entries, dict) else {}

    def remember(self, path: str, key: list[Any]) -> None:
        self.entries[path] = key
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            packet.write_file(self.path, json.dumps(self.entries).encode())
        except (OSError, PopulaceError) as error:
            log.info("cannot remember verified weights: %s", error)
