# SPDX-License-Identifier: GPL-3.0-or-later
"""The queue without processes: turns, repeated ids, time left, listeners, what is kept. The worker is a function."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend import jobs as jobs_module
from backend.jobs import FairQueue, Job, Jobs
from backend.protocol import (
    ENDED,
    HTTP_STATUS,
    ErrorCode,
    GenerateRequest,
    JobRequest,
    JobStatus,
    PopulaceError,
    parse_json,
)
from backend.settings import Settings
from backend.store import RESULT, JobStore
from backend.supervisor import WorkerDied, clean_environment, worker_command
from backend.worker import as_problem


def make_job(client: str, name: str) -> Job:
    return Job(name, client, 0, "capsule", 0.0, "")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["push", "pop", "remove", "again"])), max_size=60))
def test_queue_is_fair_and_loses_nothing(moves: list[tuple[str, str]]) -> None:
    """Against the plainest model: lists per client, and who was served longest ago."""
    queue, waiting = FairQueue(), {}
    turns: list[str] = []
    for count, (client, move) in enumerate(moves):
        jobs = waiting.setdefault(client, [])
        if move in ("push", "again"):
            job = make_job(client, str(count))
            queue.push(job, first=move == "again")
            jobs.insert(0, job) if move == "again" else jobs.append(job)
            if client not in turns:
                turns.append(client)
        elif move == "remove":
            queue.remove(jobs[-1] if jobs else make_job(client, "unknown"))
            if jobs:
                jobs.pop()
            if not jobs and client in turns:
                turns.remove(client)
        else:
            expected = None
            if turns:
                who = turns.pop(0)
                expected = waiting[who].pop(0)
                if waiting[who]:
                    turns.append(who)
            assert queue.pop() is expected
        assert len(queue) == sum(map(len, waiting.values()))


Perform = Callable[..., Awaitable[int]]


class Bench:
    """`Jobs` whose worker is the coroutine `perform(job_id, request, folder, deadline_s, heard)`."""

    def __init__(self, folder: Path, perform: Perform, **settings: Any) -> None:
        self.jobs = Jobs(Settings(data_dir=folder, runtime_dir=folder, **settings), [])
        self.jobs.worker.ensure = self._ready  # type: ignore[method-assign]
        self.jobs.worker.perform = perform  # type: ignore[method-assign]
        self.cancelled: list[str] = []
        self.jobs.worker.cancel = self.cancelled.append  # type: ignore[method-assign]

    async def _ready(self) -> None:
        return None

    async def __aenter__(self) -> Bench:
        await self.jobs.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.jobs.close()

    async def submit(self, seed: int = 0, client: str = "a", job_id: str = "") -> str:
        request = GenerateRequest(family="capsule", seed=seed)
        return (await self.jobs.submit(JobRequest(id=job_id or uuid.uuid4().hex, client=client, request=request))).id

    async def ended(self, job_id: str, client: str = "a") -> JobStatus:
        async with asyncio.timeout(20):
            async for status in self.jobs.listen(client):
                if status is not None and status.id == job_id and status.state in ENDED:
                    return status
        raise AssertionError


async def quick(job_id: str, request: dict[str, Any], folder: Path, *_: Any) -> int:
    (folder / RESULT).write_bytes(b"x" * 1000)
    return 1000


def test_repeated_ids(tmp_path: Path) -> None:
    async def life() -> None:
        async with Bench(tmp_path, quick) as bench:
            job_id = uuid.uuid4().hex
            assert set(await asyncio.gather(*(bench.submit(1, job_id=job_id) for _ in range(50)))) == {job_id}
            with pytest.raises(PopulaceError, match="another request") as caught:
                await bench.submit(2, job_id=job_id)
            assert caught.value.code == "conflict"
            with pytest.raises(PopulaceError):
                await bench.submit(1, "b", job_id)
            assert (await bench.ended(job_id)).state == "done"
            assert len(bench.jobs.all()) == 1

    asyncio.run(life())


def test_progress_time_left_and_listeners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "KEEP_ALIVE_S", 0.01)
    told, go = asyncio.Event(), asyncio.Event()

    async def perform(job_id: str, request: Any, folder: Path, deadline_s: float, heard: Any) -> int:
        heard("surface", 0.01)
        bench.jobs.find(job_id).started -= 3.0  # it has been running for 3 s
        for fraction in (0.2, 0.1, 0.25):
            heard("bake", fraction)
        told.set()
        await go.wait()
        return await quick(job_id, request, folder)

    bench = Bench(tmp_path, perform)

    async def life() -> None:
        async with bench:
            job_id = await bench.submit(5)
            await bench.submit(6, "b")
            await told.wait()
            status = bench.jobs.find(job_id).status()
            assert (status.state, status.stage, status.fraction) == ("running", "bake", 0.25)
            assert status.eta_s == pytest.approx(9.0, abs=1.0)
            stream = bench.jobs.listen("a")
            assert (first := await anext(stream)) is not None
            assert first.model_copy(update={"eta_s": None}) == status.model_copy(update={"eta_s": None})
            assert (await anext(stream)) is None  # nothing new: a keep-alive
            go.set()
            async for news in stream:
                if news is not None:
                    assert (news.id, news.state, news.eta_s, news.stage) == (job_id, "done", None, "")
                    break
            await stream.aclose()

    asyncio.run(life())


def test_worker_dies_once_and_twice(tmp_path: Path) -> None:
    tries: dict[str, int] = {}

    async def perform(job_id: str, request: dict[str, Any], folder: Path, *_: Any) -> int:
        tries[job_id] = tries.get(job_id, 0) + 1
        if tries[job_id] <= request["seed"]:
            raise WorkerDied
        return await quick(job_id, request, folder)

    async def life() -> None:
        async with Bench(tmp_path, perform) as bench:
            once, twice = await bench.submit(1), await bench.submit(2)
            assert (await bench.ended(once)).state == "done"
            failed = await bench.ended(twice)
            assert failed.error is not None
            assert (failed.state, failed.error.code) == ("failed", "worker_crashed")
            assert tries == {once: 2, twice: 2}

    asyncio.run(life())


def test_bug_in_a_job_does_not_stop_the_queue(tmp_path: Path) -> None:
    async def perform(job_id: str, request: dict[str, Any], folder: Path, *_: Any) -> int:
        if request["seed"] == 1:
            raise ZeroDivisionError
        return await quick(job_id, request, folder)

    async def life() -> None:
        async with Bench(tmp_path, perform) as bench:
            bad, good = await bench.submit(1), await bench.submit(2)
            failed = await bench.ended(bad)
            assert failed.error is not None
            assert failed.error.code == "internal_error"
            assert (await bench.ended(good)).state == "done"

    asyncio.run(life())


def test_accepted_cancel_wins_over_a_late_result(tmp_path: Path) -> None:
    async def perform(job_id: str, request: dict[str, Any], folder: Path, *_: Any) -> int:
        assert (await bench.jobs.cancel(job_id)).state == "cancelling"
        assert (await bench.jobs.cancel(job_id)).state == "cancelling"
        return await quick(job_id, request, folder)

    bench = Bench(tmp_path, perform)

    async def life() -> None:
        async with bench:
            job_id = await bench.submit()
            assert (await bench.ended(job_id)).state == "cancelled"
            assert bench.cancelled == [job_id]
            assert not bench.jobs.store.path(job_id, RESULT).exists()
            with pytest.raises(PopulaceError, match="is cancelled"):
                bench.jobs.result(job_id)

    asyncio.run(life())


def test_oldest_results_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def life() -> None:
        async with Bench(tmp_path, quick, max_results_bytes=3500) as bench:
            ids = []
            for seed in range(6):
                ids.append(await bench.submit(seed))
                await bench.ended(ids[-1])
            await bench.jobs._evict()
            assert [job.id for job in bench.jobs.all()] == ids[3:]
            await bench.jobs._on_disk(lambda: None)  # behind the removals of the queue itself
            assert {path.name for path in (tmp_path / "jobs").iterdir()} == set(ids[3:])
            with pytest.raises(PopulaceError, match="no job with this id"):
                bench.jobs.result(ids[0])
            bench.jobs.find(ids[3]).ended -= 48 * 3600
            await bench.jobs._evict()
            assert [job.id for job in bench.jobs.all()] == ids[4:]
            monkeypatch.setattr(jobs_module, "MAX_KEPT_JOBS", 1)
            await bench.jobs._evict()
            assert [job.id for job in bench.jobs.all()] == ids[5:]
        async with Bench(tmp_path, quick, max_results_bytes=1) as bench:  # the newest stays, whatever its size
            await bench.jobs._evict()
            assert [(job.id, job.state) for job in bench.jobs.all()] == [(ids[5], "done")]
            assert bench.jobs.result(ids[5]).read_bytes() == b"x" * 1000

    asyncio.run(life())


def test_restart_takes_up_what_was_left(tmp_path: Path) -> None:
    """As after a power cut: folders with a request only, with a result but no status, with half of something."""
    store = JobStore(tmp_path / "jobs")
    ids = [uuid.uuid4().hex for _ in range(6)]
    now = time.time()
    for i, job_id in enumerate(ids):
        request = JobRequest(id=job_id, client="a", request=GenerateRequest(family="capsule", seed=i))
        store.create(request, now + i if i < 5 else now - 48 * 3600)  # the last one is too old to be waited for
    store.path(ids[1], RESULT).write_bytes(b"whole")
    store.path(ids[2], f".{RESULT}.9.partial").write_bytes(b"ha")
    store.path(ids[3], "request.json").write_bytes(b'{"job": {"id":')
    store.finish(JobStatus(id=ids[4], client="a", state="done"), time.time())  # its result was lost
    (tmp_path / "jobs" / "not-ours").mkdir()
    seeds = []

    async def perform(job_id: str, request: dict[str, Any], folder: Path, *_: Any) -> int:
        seeds.append(request["seed"])
        return await quick(job_id, request, folder)

    async def life() -> None:
        async with Bench(tmp_path, perform) as bench:
            await bench.ended(ids[4])
            assert seeds == [0, 2, 4]
            assert {job.id: job.state for job in bench.jobs.all()} == {
                ids[0]: "done", ids[1]: "done", ids[2]: "done", ids[4]: "done"}  # fmt: skip
            assert bench.jobs.result(ids[1]).read_bytes() == b"whole"
            assert not [*(tmp_path / "jobs").glob("*/.*")]
            assert (tmp_path / "jobs" / "not-ours").exists()
            assert not (tmp_path / "jobs" / ids[3]).exists()
            assert not (tmp_path / "jobs" / ids[5]).exists()

    asyncio.run(life())


def test_leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "FIRST_LEASE_S", 30.0)
    monkeypatch.setattr(jobs_module, "LAST_LEASE_S", 0.05)

    async def life() -> None:
        async with Bench(tmp_path, quick) as bench:
            gone = asyncio.create_task(bench.jobs.abandoned())
            one, two = bench.jobs.listen("one"), bench.jobs.listen("two")
            readers = [asyncio.ensure_future(anext(stream)) for stream in (one, two)]
            await asyncio.sleep(0.2)
            assert not gone.done()
            for reader in readers[:1]:
                reader.cancel()
            await asyncio.sleep(0.2)
            assert not gone.done()  # one is left
            readers[1].cancel()
            await asyncio.wait_for(gone, 10)
            await asyncio.gather(*readers, return_exceptions=True)

    asyncio.run(life())


def test_every_error_code_is_a_failure_over_http() -> None:
    assert set(HTTP_STATUS) <= set(get_args(ErrorCode))
    assert all(400 <= status < 600 for status in HTTP_STATUS.values())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=20,
)  # fmt: skip


@given(json_values)
def test_strict_json_reads_what_json_writes(value: Any) -> None:
    assert parse_json(json.dumps(value).encode()) == value


@given(st.binary(max_size=200))
def test_strict_json_never_stumbles(data: bytes) -> None:
    try:
        parse_json(data)
    except PopulaceError as error:
        assert error.code == "invalid_request"  # noqa: PT017


def test_worker_gets_a_clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/blender/python")
    monkeypatch.setenv("PYTHONHOME", "/blender")
    environment = clean_environment()
    assert [name for name in environment if name.startswith("PYTHON")] == ["PYTHONUTF8"]
    command = worker_command(Settings(data_dir=Path("d"), runtime_dir=Path("r")))
    assert "-P" in command
    assert str(Path(jobs_module.__file__).parents[1]) in command


def test_what_the_user_is_told_about_exceptions() -> None:
    torch = pytest.importorskip("torch")
    assert as_problem(torch.OutOfMemoryError("CUDA out of memory")).code == "out_of_gpu_memory"
    assert as_problem(RuntimeError("DefaultCPUAllocator: not enough memory: you tried")).code == "out_of_memory"
    assert as_problem(PermissionError(13, "Permission denied")).code == "out_of_disk"
    assert as_problem(KeyError("x")).code == "internal_error"
    mine = PopulaceError("empty_surface", "Seed 3 gave no surface.")
    assert as_problem(mine) is mine
