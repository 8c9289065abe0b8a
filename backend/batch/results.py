# SPDX-License-Identifier: GPL-3.0-or-later
"""The folder that a batch fills. Plain files, so that any process on any machine may die at any moment.

    OUT/items/<id>/            a person: the files, and done.json with their sizes and SHA-256; appears by one rename
    OUT/logs/<shard>.<machine>.<pid>.jsonl    what a run did, one JSON object per line
    OUT/manifest.json          all people of the plan, once all are there; the same bytes however the plan was split
    OUT/.partial/              people being made; leftovers of killed runs are removed by the next one
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import psutil

from backend import __version__
from backend.batch.plan import Item
from backend.protocol import PopulaceError
from backend.tensors import write_file

SCHEMA: Final = "populace.batch/1"
DONE: Final = "done.json"
MANIFEST: Final = "manifest.json"
VARYING: Final = frozenset({".blend"})  # Blender writes addresses in memory into them: no two are alike


def folder(out: Path, item_id: str) -> Path:
    return out / "items" / item_id


def done(out: Path, item: Item, thorough: bool = False) -> dict[str, Any] | None:
    """What done.json says if the item is there, made from this very request, and whole; else None.

    Files are compared by size; `thorough` also reads them and compares their SHA-256.
    """
    place = folder(out, item.id)
    try:
        facts = json.loads((place / DONE).read_bytes())
        if facts["digest"] != item.digest:
            return None
        for name, about in facts["files"].items():
            if (place / name).stat().st_size != about["bytes"]:
                return None
            if thorough and sha256(place / name) != about["sha256"]:
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return facts


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def making(out: Path, item: Item, facts: dict[str, Any]) -> Iterator[Path]:
    """An empty folder to write the item's files into. At the end it becomes the item's folder, with `facts` in
    done.json; when anything is raised it is removed."""
    mine = out / ".partial" / f"{_machine()}-{os.getpid()}"
    scratch = mine / item.id
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        files = {path.relative_to(scratch).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
                 for path in sorted(scratch.rglob("*")) if path.is_file()}  # fmt: skip
        known = {"id": item.id, "digest": item.digest, "files": files}
        write_file(scratch / DONE, json.dumps({**known, **facts}, sort_keys=True).encode())
        _publish(scratch, folder(out, item.id))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        for empty in (mine, mine.parent):
            try:
                empty.rmdir()
            except OSError:
                break


def _publish(scratch: Path, target: Path) -> None:
    """One rename. What is there already came from another run of the same item, and gives way."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        scratch.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        aside = scratch.with_name(f"{scratch.name}.old")
        target.rename(aside)
        scratch.rename(target)
        shutil.rmtree(aside, ignore_errors=True)


def sweep(out: Path) -> None:
    """Remove what killed processes of this machine left unfinished."""
    for leftover in (out / ".partial").glob(f"{_machine()}-*"):
        pid = leftover.name.rpartition("-")[2]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)


def manifest(out: Path, items: Sequence[Item]) -> dict[str, Any]:
    """All that is there of a plan. Nothing in it depends on time, machine or how the work was split."""
    people, missing = [], []
    for item in items:
        facts = done(out, item)
        if facts is None:
            missing.append(item.id)
            continue
        facts["files"] = {
            name: {} if Path(name).suffix in VARYING else about for name, about in facts["files"].items()
        }
        people.append(facts)
    plan = hashlib.sha256("".join(item.digest for item in items).encode()).hexdigest()
    return {"schema": SCHEMA, "version": __version__, "plan": plan, "items": people, "missing": missing}


def write_manifest(out: Path, items: Sequence[Item], even_if_incomplete: bool = False) -> dict[str, Any]:
    """Merge: write OUT/manifest.json if the whole plan is there. Returns it; its "missing" names what is not."""
    found = manifest(out, items)
    if even_if_incomplete or not found["missing"]:
        write_file(out / MANIFEST, json.dumps(found, indent=1, sort_keys=True).encode() + b"\n")
    return found


def expected_bytes(item: Item) -> int:
    """Roughly what the files of an item take: 60 bytes a triangle, 2 a texel, a third more for coarser levels."""
    request = item.request
    one = 60 * request.faces + 2 * request.texture_size**2
    return len(item.formats) * (one if request.lods == 1 else one * 4 // 3)


def check_space(out: Path, items: Sequence[Item], spare_bytes: int = 64 << 20) -> int:
    """Raises `out_of_disk` if the items will hardly fit. Returns the bytes expected."""
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    need, free = sum(map(expected_bytes, items)), shutil.disk_usage(there).free
    if free < need + spare_bytes:
        numbers = f"{len(items)} people need about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in {there}."
        raise PopulaceError("out_of_disk", numbers, "Free space, or make smaller textures or a part of the plan.")
    return need


def _machine() -> str:
    return "".join(c if c.isalnum() else "_" for c in socket.gethostname())[:40] or "machine"
