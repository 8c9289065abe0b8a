# SPDX-License-Identifier: GPL-3.0-or-later
"""F25: a disk that is full, read-only, or taken away, at every single write."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backend import store
from backend.protocol import JobRequest, JobStatus, PopulaceError
from backend.store import JobStore
from tests.faults import stand_in_worker as kinds
from tests.faults.harness import Backend, new_id
from tests.faults.stand_in_worker import packet_of


class Failing:
    """Counts the calls that change the disk, and fails the n-th with an errno."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, code: int) -> None:
        self.count = 0
        for owner, name in ((os, "mkdir"), (os, "fsync"), (os, "replace")):
            monkeypatch.setattr(owner, name, self._wrap(getattr(owner, name), at, code))

    def _wrap(self, call: Callable[..., Any], at: int, code: int) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == at:
                raise OSError(code, os.strerror(code))
            return call(*args, **kwargs)

        return wrapped


def _job(seed: int) -> JobRequest:
    return JobRequest.model_validate({"id": new_id(), "client": "a", "request": {"family": "capsule", "seed": seed}})


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_f25_every_write_fails_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Whatever fails: one clear error, no partial file, and what was told before is what a new start finds."""

    problems: list[PopulaceError] = []

    def life(folder: Path) -> tuple[set[str], set[str]]:
        jobs = JobStore(folder)
        accepted, ended = set(), set()
        problems.clear()
        for seed in range(2):
            job = _job(seed)
            try:
                jobs.create(job, 1.0)
                accepted.add(job.id)
                jobs.finish(JobStatus(id=job.id, client="a", state="failed"), 2.0)
                ended.add(job.id)
            except PopulaceError as error:
                problems.append(error)
        return accepted, ended

    with monkeypatch.context() as patch:
        counter = Failing(patch, 0, code)
        assert [len(found) for found in life(tmp_path / "0")] == [2, 2]
    writes = counter.count
    assert writes >= 8
    for at in range(1, writes + 1):
        folder = tmp_path / str(at)
        with monkeypatch.context() as patch:
            Failing(patch, at, code)
            accepted, ended = life(folder)
        assert len(problems) == 1 or len(ended) == 2  # making a folder that is there already may fail
        assert all(problem.code == "out_of_disk" and " MB" in problem.message for problem in problems)
        assert {path.name for path in folder.glob("*")} == accepted
        assert not [*folder.glob("*/.*")]
        found = {job.id: job.status for job in JobStore(folder).load()}
        assert set(found) == accepted
        assert {job_id for job_id, status in found.items() if status} == ended


def test_f25_too_little_space_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**7, 10**7))
    with pytest.raises(PopulaceError, match=r"10 MB are free in .*, 67 MB are needed") as caught:
        JobStore(tmp_path).create(_job(1), 1.0)
    assert caught.value.code == "out_of_disk"
    monkeypatch.undo()
    JobStore(tmp_path).create(_job(1), 1.0)


def test_f25_folder_deleted_while_running(start: Callable[..., Backend]) -> None:
    backend = start()
    jobs = backend.home / "data" / "jobs"
    gone, running = backend.submit(1), backend.submit(kinds.SLOW + 400)
    backend.wait(gone)
    backend.wait(running, "running")
    shutil.rmtree(jobs)
    assert backend.wait(running)["state"] == "done"  # made again with its folder
    assert backend.result(running) == packet_of(kinds.SLOW + 400)
    assert backend.error("GET", f"/v1/jobs/{gone}/result") == (404, "not_found")
    backend.still_works()
    shutil.rmtree(jobs)
    jobs.write_bytes(b"a file where the folder should be")
    body = {"id": new_id(), "request": {"family": "capsule"}}
    assert backend.error("POST", "/v1/jobs", body) == (507, "out_of_disk")
    jobs.unlink()
    backend.still_works()


def test_f25_results_folder_survives_a_failed_job(backend: Backend) -> None:
    job_id = backend.submit(kinds.NO_SPACE)
    assert backend.wait(job_id)["error"]["code"] == "out_of_disk"
    folder = backend.home / "data" / "jobs" / job_id
    assert sorted(path.name for path in folder.iterdir()) == ["request.json", "status.json"]
    backend.still_works()


def test_f25_unwritable_end_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result was written, then the disk was full: the job is done all the same, now and after a new start."""
    from backend.jobs import Jobs
    from backend.settings import Settings

    settings = Settings(data_dir=tmp_path, runtime_dir=tmp_path)

    async def life() -> str:
        jobs = Jobs(settings, [])

        async def perform(job_id: str, *_: Any) -> int:
            data = packet_of(1)
            (settings.jobs_dir / job_id / "result.safetensors").write_bytes(data)
            Failing(monkeypatch, 1, errno.ENOSPC)
            return len(data)

        async def ready() -> None:
            return None

        monkeypatch.setattr(jobs.worker, "ensure", ready)
        monkeypatch.setattr(jobs.worker, "perform", perform)
        await jobs.start()
        job = await jobs.submit(_job(1))
        async for status in jobs.listen("a"):
            if status is not None and status.state == "done":
                break
        await jobs.close()
        return job.id

    job_id = asyncio.run(life())
    monkeypatch.undo()
    (stored,) = JobStore(settings.jobs_dir).load()
    assert stored.id == job_id
    assert stored.status is not None
    assert stored.status.state == "done"
