# SPDX-License-Identifier: GPL-3.0-or-later
"""What can go wrong in a job: cancel at any time, a worker that dies, lies, is deaf, or runs out of something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import stand_in_worker as kinds
from tests.faults.harness import Backend, new_id, until


def _cancel(backend: Backend, job_id: str) -> str:
    status, _, data = backend.call("DELETE", f"/v1/jobs/{job_id}")
    assert status == 200, data
    return backend.get(f"/v1/jobs/{job_id}")["state"]


def test_f36_cancel_running_and_queued(backend: Backend) -> None:
    running, queued, left = (backend.submit(kinds.SLOW + ms) for ms in (60_000, 10, 20))
    backend.wait(running, "running")
    worker = backend.worker()
    assert _cancel(backend, queued) == "cancelled"
    assert _cancel(backend, running) in ("cancelling", "cancelled")
    assert backend.wait(running)["state"] == "cancelled"
    assert backend.wait(left)["state"] == "done"
    assert [_cancel(backend, job_id) for job_id in (running, queued, left)] == ["cancelled", "cancelled", "done"]
    assert backend.worker() == worker  # it did as asked, nobody had to end it
    for job_id in (running, queued):
        assert backend.error("GET", f"/v1/jobs/{job_id}/result") == (409, "conflict")
    assert backend.error("DELETE", f"/v1/jobs/{new_id()}") == (404, "not_found")
    backend.still_works()


def test_f36_cancel_at_any_moment(backend: Backend) -> None:
    """Also while it begins or ends: an accepted cancel is never followed by a result."""
    for ms in range(0, 120, 7):
        job_id = backend.submit(kinds.SLOW + 60)
        if ms:
            backend.wait(job_id, "running", "done")
        with backend.events(new_id()) as _:  # a little time that differs
            answered = _cancel(backend, job_id)
        ended = backend.wait(job_id)["state"]
        assert ended == ("done" if answered == "done" else "cancelled")
        files = {path.name for path in (backend.home / "data" / "jobs" / job_id).iterdir()}
        assert ("result.safetensors" in files) == (ended == "done")
    backend.still_works()


def test_f36_cancel_twice_a_deaf_worker(backend: Backend) -> None:
    worker = backend.worker()
    job_id = backend.submit(kinds.DEAF)
    until(lambda: backend.get(f"/v1/jobs/{job_id}")["stage"] == "surface")  # there it stops listening
    assert [_cancel(backend, job_id) for _ in range(3)] == ["cancelling"] * 3
    assert backend.wait(job_id)["state"] == "cancelled"
    assert not worker.is_running()
    backend.still_works()
    assert backend.get("/v1/health")["worker"] == "ready"


def test_f24_worker_dies_in_a_job(backend: Backend) -> None:
    once, always, other = (backend.submit(seed) for seed in (kinds.DIES_ONCE, kinds.DIES, 5))
    assert backend.wait(once)["state"] == "done"
    failed = backend.wait(always)
    assert (failed["state"], failed["error"]["code"]) == ("failed", "worker_crashed")
    assert backend.wait(other)["state"] == "done"
    backend.still_works()


@pytest.mark.parametrize("kind", ["NONSENSE", "ENDLESS_LINE"])
def test_f24_worker_speaks_nonsense(backend: Backend, kind: str) -> None:
    failed = backend.wait(backend.submit(getattr(kinds, kind)))
    assert (failed["state"], failed["error"]["code"]) == ("failed", "worker_crashed")
    backend.still_works()


@pytest.mark.parametrize(
    ("kind", "code", "says"),
    [("NO_SPACE", "out_of_disk", "No space"), ("NO_MEMORY", "out_of_memory", " GB "),
     ("BUG", "internal_error", "ZeroDivisionError")],
)  # fmt: skip
def test_f23_f25_f26_worker_runs_out(backend: Backend, kind: str, code: str, says: str) -> None:
    failed = backend.wait(backend.submit(getattr(kinds, kind)))
    assert (failed["state"], failed["error"]["code"]) == ("failed", code)
    assert says in failed["error"]["message"]
    assert failed["error"]["hint"]
    assert "secret" not in str(failed)
    backend.still_works()


def test_traceback_is_in_the_log_without_the_home_folder(backend: Backend) -> None:
    backend.wait(backend.submit(kinds.BUG))
    backend.still_works()
    text = (backend.home / "data" / "logs" / "backend.log").read_text()
    assert "ZeroDivisionError: in ~/secret" in text
    assert str(Path.home()) + "/" not in text
    assert backend.token not in text


def test_stray_prints_do_not_reach_the_protocol(backend: Backend) -> None:
    assert backend.wait(backend.submit(kinds.PRINTS))["state"] == "done"
    backend.still_works()


def test_deadline(start: Callable[..., Backend]) -> None:
    backend = start(environment={"POPULACE_JOB_DEADLINE_S": "0.5"})
    for kind in (kinds.DEAF, kinds.SLOW + 60_000):
        failed = backend.wait(backend.submit(kind))
        assert (failed["state"], failed["error"]["code"]) == ("failed", "deadline_exceeded")
    backend.still_works()


def test_f35_restart_loop_ends_and_a_button_helps(start: Callable[..., Backend]) -> None:
    backend = start(environment={"POPULACE_WORKER_RESTARTS": "1"})
    waiting = [backend.submit(kinds.DIES), backend.submit(1), backend.submit(2)]
    for job_id in waiting:
        failed = backend.wait(job_id)
        assert (failed["state"], failed["error"]["code"]) == ("failed", "worker_crashed")
    health = backend.get("/v1/health")
    assert health["worker"] == "broken"
    assert "2 times" in health["worker_error"]["message"]
    assert backend.wait(backend.submit(3))["error"] == health["worker_error"]
    backend.call("POST", "/v1/worker/restart", {})
    backend.still_works()
    assert backend.get("/v1/health")["worker_error"] is None


def test_queue_full(start: Callable[..., Backend]) -> None:
    backend = start(environment={"POPULACE_MAX_QUEUED_JOBS": "2"})
    running = backend.submit(kinds.SLOW + 60_000)
    backend.wait(running, "running")
    queued = [backend.submit(1), backend.submit(2)]
    body = {"id": new_id(), "request": {"family": "capsule"}}
    assert backend.error("POST", "/v1/jobs", body) == (429, "queue_full")
    _cancel(backend, queued[0])
    _cancel(backend, running)
    backend.still_works()
    assert backend.get(f"/v1/jobs/{queued[1]}")["state"] == "done"
