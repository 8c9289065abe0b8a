# SPDX-License-Identifier: GPL-3.0-or-later
"""Job folders on disk. Plain files, each written whole or not at all, so that any process may die at any moment.

<data_dir>/jobs/<id>/request.json         what was asked, by whom, when; the job exists when this file does
                     result.safetensors   the packet, written by the worker; the job is done when this file exists
                     stats.json           seconds per stage, written by the worker
                     status.json          how the job ended; a job with neither this nor a result runs again
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from backend.packet import write_file
from backend.protocol import JobRequest, JobStatus, PopulaceError, parse_json

log = logging.getLogger(__name__)

RESULT, STATS = "result.safetensors", "stats.json"
MIN_FREE_BYTES = 64 << 20  # a result is a few MB, a large one some tens


@dataclass(frozen=True)
class Stored:
    """A job as the disk knows it. Times are seconds since the epoch."""

    id: str
    client: str
    seed: int
    family: str
    created: float
    digest: str  # of the request, to tell a repeated submission from a conflicting one
    status: JobStatus | None  # None: it has not ended
    ended: float
    bytes: int  # of the result
    images: tuple[str, ...] = ()  # that the request names


class JobStore:
    """All methods block, and raise `out_of_disk` with the numbers when the disk is full or cannot be written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, job_id: str, name: str = "") -> Path:
        return self.folder / job_id / name

    def create(self, job: JobRequest, created: float) -> None:
        """Raises when there is too little space for a result."""
        with writing_to(self.folder), contextlib.ExitStack() as undo:
            self.path(job.id).mkdir(mode=0o700, parents=True, exist_ok=True)
            undo.callback(self.remove, job.id)
            free = shutil.disk_usage(self.folder).free
            if free < MIN_FREE_BYTES:
                raise PopulaceError(
                    "out_of_disk", f"{free / 1e6:.0f} MB are free in {self.folder}, {MIN_FREE_BYTES / 1e6:.0f} MB are "
                    "needed.", "Free some space or choose another folder with --data-dir."
                )  # fmt: skip
            self._write(job.id, "request.json", {"job": job.model_dump(mode="json"), "created": created})
            undo.pop_all()

    def read_request(self, job_id: str) -> dict[str, Any]:
        """The request as JSON."""
        with writing_to(self.folder):
            return json.loads(self.path(job_id, "request.json").read_bytes())["job"]["request"]

    def finish(self, status: JobStatus, ended: float) -> None:
        with writing_to(self.folder):
            self.path(status.id).mkdir(mode=0o700, parents=True, exist_ok=True)
            self._write(status.id, "status.json", {"status": status.model_dump(mode="json"), "ended": ended})

    def drop_result(self, job_id: str) -> None:
        for name in (RESULT, STATS):
            try:
                self.path(job_id, name).unlink(missing_ok=True)
            except OSError as error:
                log.warning("%s of job %s stays: %s", name, job_id, error)

    def remove(self, job_id: str) -> None:
        shutil.rmtree(self.path(job_id), ignore_errors=True)

    def load(self) -> list[Stored]:
        """Every job there is, oldest first. What cannot be read is removed: it was never accepted."""
        found = []
        try:
            folders = [path for path in self.folder.iterdir() if re.fullmatch(r"[0-9a-f]{32}", path.name)]
        except FileNotFoundError:
            return []
        except OSError as error:
            log.warning("the job folder cannot be read: %s", error)
            return []
        for path in folders:
            try:
                found.append(self._load_one(path))
            except (OSError, ValueError, KeyError, TypeError, ValidationError, PopulaceError) as error:
                log.warning("job folder %s is damaged and removed: %s", path.name, type(error).__name__)
                self.remove(path.name)
        return sorted(found, key=lambda job: job.created)

    def _load_one(self, path: Path) -> Stored:
        raw = parse_json((path / "request.json").read_bytes())
        created = float(raw["created"])
        job = JobRequest.model_validate(raw["job"])
        if job.id != path.name:
            raise ValueError("the folder has another name")
        for left in path.glob(".*.partial"):
            left.unlink(missing_ok=True)
        status, ended, size = None, created, 0
        if (path / "status.json").exists():
            raw = parse_json((path / "status.json").read_bytes())
            status, ended = JobStatus.model_validate(raw["status"]), float(raw["ended"])
        if (path / RESULT).exists():  # the server may have been killed before it could note the end
            about = (path / RESULT).stat()
            size = about.st_size
            if status is None:
                ended = about.st_mtime
                status = JobStatus(id=job.id, client=job.client, state="done", fraction=1.0, created=created,
                                   seed=job.request.seed, family=job.request.family)  # fmt: skip
        elif status is not None and status.state == "done":
            status = None  # the result was lost: make it again
        return Stored(job.id, job.client, job.request.seed, job.request.family, created, digest_of(job), status,
                      ended, size, tuple(job.request.images()))  # fmt: skip

    def _write(self, job_id: str, name: str, value: dict[str, Any]) -> None:
        write_file(self.path(job_id, name), json.dumps(value, allow_nan=False).encode())


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """What goes wrong with a folder inside becomes `out_of_disk`, with the numbers."""
    try:
        yield
    except OSError as error:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        raise PopulaceError(
            "out_of_disk", f"{folder} cannot be used: {error.strerror or type(error).__name__}; "
            f"{shutil.disk_usage(there).free / 1e6:.0f} MB are free.",
            "Make room there, allow writing, or choose another folder with --data-dir."
        ) from error  # fmt: skip


def digest_of(job: JobRequest) -> str:
    """Equal for submissions that mean the same."""
    text = json.dumps([job.client, job.request.model_dump(mode="json")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
