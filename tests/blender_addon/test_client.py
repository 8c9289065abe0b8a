# SPDX-License-Identifier: GPL-3.0-or-later
"""The add-on's client against a scripted backend: slow, dying, lying, too large. No Blender."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import stat
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from blender_addon import api, process, session
from blender_addon.client import Client
from blender_addon.messages import PROTOCOL_VERSION, BackendError, BadReply, Request, Status, error_from_json, inline
from blender_addon.session import Job, Link, Session
from tests.blender_addon import making
from tests.blender_addon.fake_backend import TOKEN, FakeBackend

needs_posix = pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for the backend")


async def until(condition: Callable[[], Any], timeout_s: float = 20) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def run(scenario: Callable[[FakeBackend, Session], Awaitable[None]], home: Path, python: str = "/nowhere") -> None:
    """A scenario with a fake backend that runs and a session that has not looked for it yet."""

    async def whole() -> None:
        async with FakeBackend(home, making.packet(rings=4)) as fake:
            made = Session(asyncio.get_running_loop(), lambda: python)
            try:
                await scenario(fake, made)
            finally:
                await made.close()

    asyncio.run(whole())


def test_job_from_request_to_person(home: Path) -> None:
    async def scenario(fake: FakeBackend, made: Session) -> None:
        job, stages = Job(Request(seed=7, family="capsule")), set()
        made.submit(job)
        revision = made.revision
        waiting = asyncio.ensure_future(made.result(job.id))
        while not waiting.done():
            stages.add((job.status.state, job.status.stage))
            await asyncio.sleep(0.001)
        assert len(waiting.result().parts[0].faces) == len(making.ball(4)["faces"])
        assert ("running", "surface") in stages
        assert made.revision > revision
        assert made.link is Link.READY
        assert not made.open_jobs
        assert fake.leases == 1
        await made.close()
        await until(lambda: fake.leases == 0)

    run(scenario, home)


def test_images_are_sent_ahead_and_named_by_their_ids(home: Path, tmp_path: Path) -> None:
    photo, png = tmp_path / "photo.jpg", b"a map " * 70_000  # more than one piece
    photo.write_bytes(b"jpeg")
    latents = {"top/tex": [[0.0]]}
    edit = {"op": "part", "parts": ["top"], "other": {"latents": latents, "latent_maps": {"top/photo": inline(png)}}}

    async def scenario(fake: FakeBackend, made: Session) -> None:
        job = Job(Request(photos=[photo, {"image": str(photo), "person": 1}], edits=[edit]))
        made.submit(job)
        await made.result(job.id)
        ids = [hashlib.sha256(data).hexdigest() for data in (b"jpeg", png)]
        assert fake.images == dict(zip(ids, (b"jpeg", png)))
        assert fake.seen.count("POST /v1/images") == 2
        (request,) = fake.requests
        assert request["photos"] == [{"mask": None, "person": person, "image": ids[0]} for person in (0, 1)]
        assert request["edits"][0]["other"]["latent_maps"] == {"top/photo": ids[1]}
        assert request["pose"] == "photo"
        assert edit["other"]["latent_maps"] == {"top/photo": inline(png)}

    run(scenario, home)


def test_photos_that_cannot_be_sent_fail_the_job_only(home: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("text")

    async def scenario(fake: FakeBackend, made: Session) -> None:
        fake.bad_image = {"code": "image_unreadable", "message": "This is not a picture.", "hint": "Give a photo."}
        for path, said in ((tmp_path / "none.jpg", "No such file"), (text, "not a picture")):
            job = Job(Request(photos=[path]))
            made.submit(job)
            with pytest.raises(BackendError, match=said) as caught:
                await made.result(job.id)
            assert caught.value.code == "image_unreadable"
        fake.bad_image = None
        fake.raw["/v1/images"] = b'HTTP/1.1 200 X\r\nContent-Length: 12\r\n\r\n{"id": ".."}'
        job = Job(Request(photos=[text]))
        made.submit(job)
        with pytest.raises(BadReply, match="without an id"):
            await made.result(job.id)
        assert not fake.jobs
        job = Job(Request(seed=1))
        made.submit(job)
        await made.result(job.id)

    run(scenario, home)


def test_token_is_never_shown() -> None:
    assert TOKEN not in repr(api.Address(1, TOKEN))


def test_twenty_jobs_arrive_and_are_cleared(home: Path) -> None:
    async def scenario(fake: FakeBackend, made: Session) -> None:
        jobs = [Job(Request(seed=i)) for i in range(20)]
        for job in jobs:
            made.submit(job)
        for job in jobs:
            await made.result(job.id)
        assert len(fake.jobs) == 20
        assert made.clear() == 20
        assert not made.jobs

    run(scenario, home)


def test_cancel_of_running_waiting_and_unknown(home: Path) -> None:
    async def scenario(fake: FakeBackend, made: Session) -> None:
        fake.hold = True
        job = Job(Request())
        made.submit(job)
        await until(lambda: job.status.state == "running")
        made.cancel(job.id)
        assert job.status.state == "cancelling"
        await until(lambda: job.status.state == "cancelled")
        made.cancel(job.id)
        made.cancel("f" * 32)
        with pytest.raises(BackendError, match="cancelled"):
            await made.result(job.id)
        lost = Job(Request())
        made.submit(lost)
        await until(lambda: lost.id in fake.jobs)
        fake.jobs.pop(lost.id)["task"].cancel()
        made.cancel(lost.id)
        await until(lambda: lost.status.state == "cancelled")

    run(scenario, home)


def test_failed_job_speaks_and_the_next_works(home: Path) -> None:
    async def scenario(fake: FakeBackend, made: Session) -> None:
        message = f"Baking needs 9.8 GB in {Path.home()}/x."
        fake.error = {"code": "out_of_memory", "message": message, "hint": "Try 2048."}
        job = Job(Request())
        made.submit(job)
        with pytest.raises(BackendError, match=r"Baking needs 9.8 GB in ~/x. Try 2048."):
            await made.result(job.id)
        fake.error = None
        job = Job(Request())
        made.submit(job)
        await made.result(job.id)

    run(scenario, home)


@pytest.mark.parametrize(
    "result",
    [b"", b"\0" * 100, making.packet(rings=4)[:-3], json.dumps({"not": "a packet"}).encode()],
    ids=["empty", "zeros", "cut", "json"],
)
def test_damaged_result_fails_the_job_only(home: Path, result: bytes) -> None:
    async def scenario(fake: FakeBackend, made: Session) -> None:
        good, fake.result = fake.result, result
        job = Job(Request())
        made.submit(job)
        with pytest.raises(BackendError, match="damaged"):
            await made.result(job.id)
        fake.result = good
        job = Job(Request())
        made.submit(job)
        await made.result(job.id)

    run(scenario, home)


_HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01 not http\r\n\r\n", b"HTTP/1.1 2x0 OK\r\n\r\n", _HEAD + b"Content-Length: -5\r\n\r\n",
        _HEAD + b"Content-Length: 99999999999\r\n\r\n", _HEAD + b"Content-Length: 10\r\n\r\n123", b"", _HEAD,
        _HEAD + b"X: " + b"y" * 20000 + b"\r\n\r\n", b"HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\n<h1>",
        _HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", _HEAD + b"Content-Length: 4\r\n\r\nnull",
        _HEAD + b"Content-Length: 6\r\n\r\n[1e400", _HEAD + b"Content-Length: 16\r\n\r\n{\"protocol\": \"1\"}"[:60],
        _HEAD + b"\r\n" + b"[" * (5 << 20),
    ],
    ids=["tls", "status", "negative", "huge", "short", "nothing", "cut_head", "long_head", "html", "chunk", "null",
         "cut_json", "wrong_type", "endless"],
)  # fmt: skip
def test_lies_of_whatever_listens_there(home: Path, raw: bytes) -> None:
    """Any answer but ours gives an error with a sentence; nothing hangs and memory stays bounded."""

    async def scenario(fake: FakeBackend, made: Session) -> None:
        fake.raw["/v1/health"] = raw
        made.connect()
        await until(lambda: made.link is Link.FAILED)
        assert made.error is not None
        assert made.error.message
        fake.raw.clear()
        made.connect()
        await until(lambda: made.link is Link.READY)

    run(scenario, home)


def test_result_larger_than_allowed_is_not_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MAX_RESULT_BYTES", 1000)

    async def scenario(fake: FakeBackend, made: Session) -> None:
        job = Job(Request())
        made.submit(job)
        with pytest.raises(BadReply, match="more than the 1000 allowed"):
            await made.result(job.id)

    run(scenario, home)


@pytest.mark.parametrize("event", [b"data: {]\n\n", b"data: [1]\n\n", b"data: " + b"x" * 70000, b'data: {"id":1}\n\n'])
def test_lying_event_stream_ends_the_connection_with_a_reason(home: Path, event: bytes) -> None:
    async def scenario(fake: FakeBackend, made: Session) -> None:
        fake.raw["/v1/events"] = _HEAD + b"\r\n" + event
        made.connect()
        await until(lambda: made.link in (Link.LOST, Link.FAILED))
        assert made.error is not None
        assert "unexpected" in made.error.message

    run(scenario, home)


def test_mute_backend_is_given_up(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "CALL_TIMEOUT_S", 0.2)
    monkeypatch.setattr(session, "WATCH_INTERVAL_S", 0.1)

    async def scenario(fake: FakeBackend, made: Session) -> None:
        made.connect()
        await until(lambda: made.link is Link.READY)
        fake.mute = True
        await until(lambda: made.link is Link.LOST)
        assert made.error is not None
        assert "unexpectedly" in made.error.message

    run(scenario, home)


def test_silent_event_stream_is_given_up(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "STALL_TIMEOUT_S", 0.3)

    async def scenario(fake: FakeBackend, made: Session) -> None:
        made.connect()
        await until(lambda: made.link is Link.READY)
        await until(lambda: made.link is Link.LOST)

    run(scenario, home)


def opened(fake: FakeBackend) -> int:
    return sum(line.startswith("GET /v1/events") for line in fake.seen)


def test_broken_stream_with_open_jobs_reconnects_and_finishes(home: Path) -> None:
    async def scenario(fake: FakeBackend, made: Session) -> None:
        fake.hold = True
        job = Job(Request())
        made.submit(job)
        await until(lambda: job.status.stage == "bake")
        fake.kill_streams()
        await until(lambda: opened(fake) == 2)
        fake.hold = False
        await made.result(job.id)
        assert len(fake.jobs) == 1, "the same job, not another"

    run(scenario, home)


def test_a_backend_that_still_runs_is_taken_up_again(home: Path) -> None:
    """As after a Blender that was busy for longer than its connections wait: nobody has to press Restart."""

    async def scenario(fake: FakeBackend, made: Session) -> None:
        made.connect()
        await until(lambda: made.link is Link.READY and fake.leases == 1)
        fake.kill_streams()
        await until(lambda: made.link is Link.READY and opened(fake) == 2)
        assert made.error is None

    run(scenario, home)


def test_broken_streams_do_not_loop_for_ever(home: Path) -> None:
    async def scenario(fake: FakeBackend, made: Session) -> None:
        fake.hold = True
        made.submit(Job(Request()))
        for times in range(1, process.RESTARTS + 2):
            await until(lambda: made.link is Link.READY and fake.leases and opened(fake) == times)  # noqa: B023
            fake.kill_streams()
        await until(lambda: made.link is Link.LOST)
        await asyncio.sleep(0.1)
        assert made.link is Link.LOST, "a person decides now"
        made.connect()
        await until(lambda: made.link is Link.READY)

    run(scenario, home)


@pytest.mark.parametrize(("protocol", "advice"), [(PROTOCOL_VERSION + 1, "Update the Populace add-on"),
                                                  (PROTOCOL_VERSION - 1, "Update the generator")])  # fmt: skip
def test_handshake_says_which_side_to_update(home: Path, protocol: int, advice: str) -> None:
    async def scenario(fake: FakeBackend, made: Session) -> None:
        fake.protocol = protocol
        made.connect()
        await until(lambda: made.link is Link.FAILED)
        assert made.error is not None
        assert made.error.code == "protocol_mismatch"
        assert advice in made.error.hint

    run(scenario, home)


def test_shutdown_cancels_and_ends(home: Path) -> None:
    async def scenario(fake: FakeBackend, made: Session) -> None:
        fake.hold = True
        job = Job(Request())
        made.submit(job)
        await until(lambda: job.status.state == "running")
        made.shutdown()
        await until(lambda: made.link is Link.OFF)
        assert fake.stopped.is_set()
        assert f"DELETE /v1/jobs/{job.id}" in fake.seen
        assert job.status.state == "cancelled"
        assert made.error is None

    run(scenario, home)


def test_shutdown_may_start_another(home: Path) -> None:
    """After an upgrade: the old one ends before the new one is looked for."""
    async def scenario(fake: FakeBackend, made: Session) -> None:
        made.connect()
        await until(lambda: made.link is Link.READY)
        links: list[Link] = []
        connect = made.connect
        made.connect = lambda: (links.append(made.link), connect())[1]  # type: ignore[method-assign]
        made.shutdown(start_again=True)
        await until(lambda: bool(links))
        assert links == [Link.OFF]
        assert fake.stopped.is_set()
        assert made.link in (Link.STARTING, Link.READY)  # this one still answers after it was asked to end

    run(scenario, home)


def test_closing_ends_although_a_call_fails_just_then(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Blender that was busy for long: when its loop runs again to close, calls have timed out in the meantime."""
    failed = []

    async def scenario(fake: FakeBackend, made: Session) -> None:
        made.connect()
        await until(lambda: made.link is Link.READY)
        health, calls = api.Api.health, []

        async def silent(self: api.Api) -> Any:
            calls.append(self)
            if len(calls) > 1:
                return await health(self)
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                failed.append(self)
                raise api.Unreachable("it fell silent") from None

        monkeypatch.setattr(api.Api, "health", silent)
        await until(lambda: bool(calls))
        async with asyncio.timeout(10):
            await made.close()

    monkeypatch.setattr(session, "WATCH_INTERVAL_S", 0.05)
    run(scenario, home)
    assert failed


# ------------------------------------------------------------------------------------------- processes of our own


def script(home: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> str:
    """A `populace` executable that is the fake backend."""
    path = home / "bin" / "populace"
    path.parent.mkdir(exist_ok=True)
    fake = Path(__file__).with_name("fake_backend.py")
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{fake}" "$@"\n')
    path.chmod(0o755)
    (home / "result").write_bytes(making.packet(rings=4))
    monkeypatch.setenv("FAKE_RESULT", str(home / "result"))
    monkeypatch.setenv("FAKE_MODE", mode)
    return str(path)


def own(home: Path, scenario: Callable[[Session], Awaitable[None]], python: str) -> None:
    async def whole() -> None:
        made = Session(asyncio.get_running_loop(), lambda: python)
        try:
            await scenario(made)
        finally:
            await made.close()

    asyncio.run(whole())
    await_no_child()


def await_no_child() -> None:
    """Every process that was started has ended and is reaped."""
    end = time.monotonic() + 20
    while any(child.poll() is None for child in process._left_alone):
        assert time.monotonic() < end
        time.sleep(0.02)
    process._left_alone.clear()


@needs_posix
@pytest.mark.parametrize("mode", ["good", "noisy"])
def test_blocking_client_starts_the_backend_and_lets_go_of_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    for name, value in {"PYTHONPATH": "/evil", "PYTHONHOME": "/evil", "http_proxy": "http://10.0.0.1:1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    heard: list[Status] = []
    client = Client(script(home, monkeypatch, mode), heard.append)
    people = [human.recipe["seed"] for human in client.generate_all(Request(seed=i) for i in range(3))]
    assert people == [7, 7, 7]
    assert heard[-1].state == "done"
    starts = (home / "starts").read_text().splitlines()
    assert len(starts) == 1
    environment = json.loads(starts[0].partition(" ")[2])
    assert "PYTHONPATH" not in environment
    assert "PYTHONHOME" not in environment
    assert "NO_PROXY" in environment
    assert any(child.poll() is None for child in process._left_alone), "it outlives its last lease for a while"
    await_no_child()


@needs_posix
def test_client_in_a_with_block_keeps_one_connection(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with Client(script(home, monkeypatch, "good")) as client:
        assert client._line is not None
        session = client._line[1]
        assert client.generate(seed=1).recipe["seed"] == 7
        people = client.generate_all(Request(seed=i) for i in range(9))
        next(people)
        people.close()  # the rest is not wanted: what was sent ahead is cancelled
        assert client.generate(seed=2, pose="rest").recipe["seed"] == 7
        assert client.export("glb", seed=3) == making.packet(rings=4), "bytes as they came"
        assert session.link is Link.READY
    assert len((home / "starts").read_text().splitlines()) == 1
    assert session.link is Link.OFF
    await_no_child()


@needs_posix
@pytest.mark.parametrize(
    ("mode", "code", "said"),
    [
        ("garbage", "start_failed", "the disk is made of cheese"), ("exits_0", "start_failed", "code 0"),
        ("no_module", "not_installed", "pip install ."), ("newer", "protocol_mismatch", "Update the Populace"),
    ],
)  # fmt: skip
def test_start_that_fails_says_why(
    home: Path, monkeypatch: pytest.MonkeyPatch, mode: str, code: str, said: str
) -> None:
    with pytest.raises(BackendError) as error:
        Client(script(home, monkeypatch, mode)).generate(seed=1)
    assert error.value.code == code
    assert said in str(error.value)
    await_no_child()


@needs_posix
def test_backend_that_never_gets_ready_is_ended(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "READY_TIMEOUT_S", 0.3)

    async def scenario(made: Session) -> None:
        made.connect()
        await until(lambda: made.stage.startswith("Starting Python"))
        await until(lambda: made.link is Link.FAILED)
        assert made.error is not None
        assert made.error.code == "start_timeout"

    own(home, scenario, script(home, monkeypatch, "never_ready"))


@needs_posix
def test_backend_that_dies_at_every_job_is_not_restarted_for_ever(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(made: Session) -> None:
        made.submit(Job(Request()))
        await until(lambda: made.link is Link.LOST, 20)
        assert made.error is not None
        assert "stopped unexpectedly" in made.error.message

    own(home, scenario, script(home, monkeypatch, "dies_at_work"))
    assert len((home / "starts").read_text().splitlines()) == 1 + process.RESTARTS


def test_folders_of_killed_blenders_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    old, new, other = (tmp_path / name for name in ("populace-start-old", "populace-start-new", "somebody-else"))
    for folder in (old, new, other):
        (folder / "log").mkdir(parents=True)
    for folder in (old, other):
        os.utime(folder, (1e9, 1e9))
    with pytest.raises(BackendError, match="could not be started"):
        process.Child(process.Command((str(tmp_path / "nothing"),), str(tmp_path)))
    assert sorted(tmp_path.iterdir()) == [new, other], "and its own is gone"


@needs_posix
def test_stop_while_starting_ends_the_child(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(made: Session) -> None:
        made.connect()
        await until(lambda: made.stage.startswith("Starting Python"))
        made.shutdown()
        await until(lambda: made.link is Link.OFF)

    own(home, scenario, script(home, monkeypatch, "never_ready"))


def test_backend_that_is_not_there(home: Path) -> None:
    with pytest.raises(BackendError, match="not found") as error:
        Client("/nowhere/python").generate(seed=1)
    assert "pip install ." in error.value.hint


# ---------------------------------------------------------------------------------------------------- runtime file


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"port": 0, "token": "0123456789abcdef", "protocol": 1}', b"\xff\xfe", b"[" * 70000,
     b'{"port": "80", "token": "0123456789abcdef", "protocol": 1}', b'{"port": 80, "token": "x", "protocol": 1}',
     b'{"port": 80, "token": "0123456789abcdef\\r\\nX: y", "protocol": 1}', b'{"port": 80, "protocol": 1}'],
)  # fmt: skip
def test_strange_runtime_file_is_ignored(home: Path, content: bytes) -> None:
    path = home / "run" / process.RUNTIME_FILE
    path.parent.mkdir()
    path.touch(mode=0o600)
    path.write_bytes(content)
    assert process.find_running() is None


@needs_posix
def test_runtime_file_that_others_can_read_is_ignored(home: Path) -> None:
    path = home / "run" / process.RUNTIME_FILE
    path.parent.mkdir()
    path.write_text(json.dumps({"port": 80, "token": TOKEN, "protocol": 1}))
    path.chmod(0o600)
    assert process.find_running() == api.Address(80, TOKEN, 1)
    path.chmod(stat.S_IRUSR | stat.S_IROTH)
    assert process.find_running() is None


def test_stale_runtime_file_leads_to_a_new_start(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = home / "run" / process.RUNTIME_FILE
    path.parent.mkdir()
    path.touch(mode=0o600)
    path.write_text(json.dumps({"port": 9, "token": TOKEN, "protocol": 1, "pid": os.getpid()}))
    with pytest.raises(BackendError, match="not found"):
        Client("/nowhere/python").generate(seed=1)


# -------------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize("raw", [None, [], {}, {"id": 1, "state": "done"}, {"id": "x"}, {"id": "x", "state": "lost"}])
def test_status_without_substance_is_refused(raw: Any) -> None:
    with pytest.raises(BadReply):
        Status.from_json(raw)


def test_status_is_cut_to_what_a_panel_can_show() -> None:
    status = Status.from_json({"id": "x", "state": "failed", "stage": "a\nb" * 100, "fraction": 1e9, "eta_s": -3,
                               "error": {"code": 5, "message": "m" * 9999}})  # fmt: skip
    assert (len(status.stage), status.fraction, status.eta_s) == (80, 1.0, 0.0)
    assert status.error is not None
    assert len(status.error.message) == 600
    assert Status.from_json({"id": "x", "state": "running", "fraction": "NaN", "eta_s": True}).eta_s is None
    assert error_from_json("nonsense").hint
