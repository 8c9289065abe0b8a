# SPDX-License-Identifier: GPL-3.0-or-later
"""Processes that are killed, start twice, or are left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from backend import runtime
from backend.packet import loads
from tests.faults import stand_in_worker as kinds
from tests.faults.harness import Backend, until
from tests.faults.stand_in_worker import packet_of

POSIX = os.name == "posix"
KILLS = 10


def test_f28_kill_the_worker_at_random_moments(start: Callable[..., Backend]) -> None:
    """Every item of the batch ends exactly once, and no file is damaged."""
    seed = random.randrange(1 << 32)
    print(f"seed of the random moments: {seed}")
    chance = random.Random(seed)
    backend = start(environment={"POPULACE_WORKER_RESTARTS": "100"})
    client = "batch"
    ended: Counter[str] = Counter()
    with backend.events(client) as events:
        batch = {backend.submit(kinds.SLOW + chance.choice((10, 20, 40)), client): None for _ in range(40)}

        def listen() -> None:
            for event in events:
                if event["state"] in ("done", "failed", "cancelled"):
                    ended[event["id"]] += 1
                    if len(ended) == len(batch):
                        return

        listener = threading.Thread(target=listen)
        listener.start()
        for _ in range(KILLS):
            backend.worker().kill()
            time.sleep(chance.uniform(0, 0.2))
        listener.join(60)
        assert not listener.is_alive()
    assert ended == Counter(list(batch)), seed
    for job in backend.get(f"/v1/jobs?client={client}"):
        if job["state"] == "done":
            assert backend.result(job["id"]) == packet_of(job["seed"])
        else:
            assert job["error"]["code"] == "worker_crashed"
            assert backend.error("GET", f"/v1/jobs/{job['id']}/result") == (409, "conflict")
    backend.still_works()


def test_f29_kill_the_server(start: Callable[..., Backend], tmp_path: Path) -> None:
    first = start()
    done, slow, waiting = first.submit(1), first.submit(kinds.SLOW + 300), first.submit(2)
    cancelled = first.submit(3)
    first.call("DELETE", f"/v1/jobs/{cancelled}")
    first.wait(done, "done")
    first.wait(slow, "running")
    worker = first.worker()
    first.process.kill()
    psutil.wait_procs([worker], timeout=10)
    assert not worker.is_running()
    jobs = tmp_path / "home" / "data" / "jobs"
    (jobs / slow / ".result.safetensors.1.partial").write_bytes(b"half of")  # it was killed in mid-write
    (jobs / waiting / "status.json").write_bytes(b"")  # a disk that lost what it had promised
    second = start()
    assert second.token != first.token
    assert {second.wait(job_id)["state"] for job_id in (done, slow)} == {"done"}
    assert second.result(slow) == packet_of(kinds.SLOW + 300)
    assert second.get(f"/v1/jobs/{cancelled}")["state"] == "cancelled"
    assert second.error("GET", f"/v1/jobs/{waiting}") == (404, "not_found")  # said, not hung
    assert not [*jobs.glob("*/.*.partial")]
    second.still_works()


def test_f30_killed_client_and_its_lease(start: Callable[..., Backend]) -> None:
    backend = start(stay=False)
    server, worker = backend.server, backend.worker()
    code = (
        "import socket, sys, time; s = socket.create_connection(('127.0.0.1', int(sys.argv[1]))); "
        "s.sendall(('GET /v1/events?client=' + sys.argv[3] + ' HTTP/1.1\\r\\nHost: 127.0.0.1:' + sys.argv[1] + "
        "'\\r\\nAuthorization: Bearer ' + sys.argv[2] + '\\r\\n\\r\\n').encode()); "
        "print(s.recv(15).decode(), flush=True); time.sleep(600)"
    )

    def client(name: str) -> subprocess.Popen[bytes]:
        made = subprocess.Popen(
            [sys.executable, "-c", code, str(backend.port), backend.token, name], stdout=subprocess.PIPE
        )
        assert made.stdout is not None
        assert made.stdout.readline() == b"HTTP/1.1 200 OK\n"
        made.stdout.close()
        return made

    one, two = client("one"), client("two")
    job_id = backend.submit(kinds.SLOW + 800, "one")
    backend.wait(job_id, "running")
    one.kill()  # in mid-job, as a Blender that crashed
    one.wait()
    time.sleep(1.0)  # twice as long as an orphaned backend waits here
    assert backend.wait(job_id)["state"] == "done"  # the other one's lease keeps it alive
    assert backend.result(job_id) == packet_of(kinds.SLOW + 800)
    backend.still_works()
    left = backend.submit(kinds.SLOW + 60_000, "two")
    backend.wait(left, "running")
    two.kill()
    two.wait()
    _, alive = psutil.wait_procs([server, worker], timeout=30)
    assert not alive
    assert backend.process.wait() == 0
    assert not Path(backend.said["runtime_file"]).exists()
    next_one = start(stay=True)
    assert next_one.result(job_id) == packet_of(kinds.SLOW + 800)  # a finished result is still there
    next_one.call("DELETE", f"/v1/jobs/{left}")
    next_one.still_works()


def test_nobody_ever_came(start: Callable[..., Backend]) -> None:
    backend = start(stay=False, constants={"backend.jobs.FIRST_LEASE_S": 0.2})
    assert backend.process.wait(30) == 0


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "shutdown"])
def test_clean_end(start: Callable[..., Backend], how: str) -> None:
    backend = start()
    job_id = backend.submit(kinds.SLOW + 60_000)
    backend.wait(job_id, "running")
    server, worker = backend.server, backend.worker()
    with backend.events("me") as events:
        if how == "shutdown":
            assert backend.call("POST", "/v1/shutdown", {})[0] == 200
        else:
            server.send_signal(getattr(signal, how))
        assert list(events) == []  # the stream is ended, not cut
    _, alive = psutil.wait_procs([server, worker], timeout=30)
    assert not alive
    assert "Traceback" not in backend.stop()
    assert backend.process.returncode == 0
    assert not Path(backend.said["runtime_file"]).exists()


def test_f32_two_start_at_once(start: Callable[..., Backend]) -> None:
    both = [start(wait=False) for _ in range(2)]
    said = [backend.wait_ready().said for backend in both]
    assert said[0] == said[1]
    until(lambda: [b for b in both if b.process.poll() is not None])
    ended, alive = sorted(both, key=lambda b: b.process.poll() is None)
    assert ended.process.returncode == 0
    assert alive.process.pid == said[0]["pid"]
    with alive.events("a") as _, alive.events("b") as _:
        pass
    alive.still_works()
    if POSIX:
        path = Path(said[0]["runtime_file"])
        assert [path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777] == [0o600, 0o700]


STALE: dict[str, Any] = {"protocol": 1, "version": "0", "pid": os.getpid(), "port": 9, "token": "t" * 43, "started": 0}


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", b"\xff\xfe", b"[]", b"[" * 100_000, b"{}", b" " * 100_000, json.dumps(STALE).encode(),
     *(json.dumps(STALE | change).encode() for change in (
         {"port": 0}, {"port": "80"}, {"port": 99999}, {"token": "tökén"}, {"token": "a\r\nHost: b"}, {"token": 1},
         {"port": True}, {"more": 1}))],
    ids=range(16),  # the contents name this process: they are no names that two runs share
)  # fmt: skip
def test_f33_bad_runtime_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / runtime.RUNTIME_FILE
    path.write_bytes(content)
    path.chmod(0o600)
    assert runtime.find_live(tmp_path) is None
    with runtime.claim(tmp_path) as live:
        assert live is None
        address = runtime.Address.new(1234)
        runtime.publish(tmp_path, address)
        assert runtime._read(path) == address
        runtime.withdraw(tmp_path, runtime.Address.new(1234))
        assert path.exists()  # of somebody else
        runtime.withdraw(tmp_path, address)
        assert not path.exists()


def test_f33_stranger_at_the_port(start: Callable[..., Backend], tmp_path: Path) -> None:
    """A runtime file left behind, its port and pid taken by others: us. It is replaced, and we are not killed."""

    class Stranger(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Stranger) as stranger:
        threading.Thread(target=stranger.serve_forever, daemon=True).start()
        folder = tmp_path / "home" / "run"
        runtime.private_folder(folder)
        runtime.publish(folder, runtime.Address.new(stranger.server_port))
        backend = start()
        stranger.shutdown()
    assert backend.port != stranger.server_port
    backend.still_works()


@pytest.mark.skipif(not POSIX, reason="modes")
def test_f33_open_to_others(start: Callable[..., Backend], tmp_path: Path) -> None:
    backend = start()
    path = Path(backend.said["runtime_file"])
    assert runtime.find_live(path.parent) is not None
    path.chmod(0o644)
    assert runtime.find_live(path.parent) is None
    path.chmod(0o600)
    backend.still_works()
    path.parent.chmod(0o755)
    runtime.private_folder(path.parent)
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_f34_port_in_use(start: Callable[..., Backend], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        made = start(wait=False, command=["-m", "backend", "serve", "--json", "--port", str(port)])
        assert made.process.wait(60) == 1
        errors = made.stop()
    assert f"Port {port} on 127.0.0.1 cannot be used" in errors
    assert "Leave out --port" in errors
    assert "Traceback" not in errors
    start(environment={"POPULACE_PORT": str(port)}).still_works()  # free again, and asked for


def test_result_is_a_sound_packet() -> None:
    """The stand-in's packets are real ones."""
    assert loads(packet_of(7)).meta["recipe"]["seed"] == 7
