# SPDX-License-Identifier: GPL-3.0-or-later
"""A backend process to be mistreated, and the question that every fault test ends with: `still_works`."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.faults.stand_in_worker import packet_of

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE_S = 180.0  # how long a test waits before it fails; nothing is measured with it

QUICK = {
    "backend.guard.READ_TIMEOUT_S": 1.0, "backend.guard.WRITE_TIMEOUT_S": 1.0, "backend.jobs.KEEP_ALIVE_S": 0.2,
    "backend.supervisor.CANCEL_TIMEOUT_S": 0.5, "backend.supervisor.STOP_TIMEOUT_S": 0.5,
    "backend.jobs.LAST_LEASE_S": 0.5,
}  # fmt: skip


def until(claim: Callable[[], Any], what: str = "") -> Any:
    """The first true answer of `claim`."""
    end = time.monotonic() + PATIENCE_S
    while not (found := claim()):
        assert time.monotonic() < end, what or "it never came true"
        time.sleep(0.02)
    return found


def new_id() -> str:
    return uuid.uuid4().hex


class Backend:
    """The server in its own process. `command` replaces the stand-in server."""

    def __init__(
        self, home: Path, stay: bool = True, constants: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None, command: list[str] | None = None,
    ) -> None:  # fmt: skip
        self.home = home
        script = Path(__file__).with_name("stand_in_server.py")
        stand_in = [str(script), str(REPOSITORY), json.dumps(constants or QUICK)]
        self.process = subprocess.Popen(
            [sys.executable, *(command or stand_in), *(["--stay"] if stay else [])],
            env={**os.environ, "POPULACE_HOME": str(home), **(environment or {})}, cwd=REPOSITORY,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.said: dict[str, Any] = {}

    def wait_ready(self) -> Backend:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            assert self.process.stderr is not None
            raise AssertionError(self.process.stderr.read().decode())
        self.said = json.loads(line)
        address = json.loads(Path(self.said["runtime_file"]).read_text())
        self.port, self.token = address["port"], address["token"]
        return self

    def stop(self) -> str:
        """End it for good; returns what it wrote to stderr."""
        if self.process.poll() is None:
            self.process.terminate()
        _, errors = self.process.communicate(timeout=PATIENCE_S)
        return errors.decode()

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}", "Host": f"127.0.0.1:{self.port}"}

    @property
    def server(self) -> psutil.Process:
        return psutil.Process(self.process.pid)

    def worker(self) -> psutil.Process:
        """The worker process, as soon as there is one that is ready."""
        until(lambda: self.get("/v1/health")["worker"] in ("ready", "busy"), "no worker")
        return until(lambda: next(iter(self.server.children()), None))

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """One request with the token; `headers` replaces all."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            said = self.headers if headers is None else headers
            if data is not None:
                said = {"Content-Type": "application/json", **said}
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in said.items():
                connection.putheader(name, value)
            if data is not None:
                connection.putheader("Content-Length", str(len(data)))
            connection.endheaders(data)
            reply = connection.getresponse()
            return reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read()
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        status, _, body = self.call("GET", path)
        assert status == 200, body
        return json.loads(body)

    def error(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, str]:
        """Status and code of a request that must fail, after a look at the form of the answer."""
        status, got, data = self.call(method, path, body, headers)
        said = json.loads(data) if data or method != "HEAD" else {"code": "", "message": "-", "hint": ""}
        assert set(said) == {"code", "message", "hint"}
        assert said["message"]
        assert got["content-type"] == "application/json"
        assert not [name for name in got if name.startswith("access-control")]
        return status, said["code"]

    @contextlib.contextmanager
    def raw(self, data: bytes = b"") -> Iterator[socket.socket]:
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S) as sock:
            sock.sendall(data)
            yield sock

    def submit(self, seed: int, client: str = "test", job_id: str = "", **request: Any) -> str:
        job_id = job_id or new_id()
        body = {"id": job_id, "client": client, "request": {"family": "capsule", "seed": seed, **request}}
        status, _, data = self.call("POST", "/v1/jobs", body)
        assert status == 200, data
        return job_id

    def wait(self, job_id: str, *states: str) -> dict[str, Any]:
        states = states or ("done", "failed", "cancelled")
        return until(lambda: (job := self.get(f"/v1/jobs/{job_id}"))["state"] in states and job, f"never {states}")

    def result(self, job_id: str) -> bytes:
        status, _, data = self.call("GET", f"/v1/jobs/{job_id}/result")
        assert status == 200, data
        return data

    def still_works(self, seed: int = 7) -> None:
        """Does a normal job still work now? Its packet is exactly the expected one."""
        job_id = self.submit(seed)
        assert self.wait(job_id) | {"created": 0} == {
            "id": job_id, "client": "test", "state": "done", "stage": "", "fraction": 1.0, "eta_s": None, "error": None,
            "created": 0, "seed": seed, "family": "capsule",
        }  # fmt: skip
        assert self.result(job_id) == packet_of(seed)

    @contextlib.contextmanager
    def events(self, client: str) -> Iterator[Iterator[dict[str, Any]]]:
        """An open event stream: the job states it sends."""
        head = "".join(f"{k}: {v}\r\n" for k, v in self.headers.items())
        ask = f"GET /v1/events?client={client} HTTP/1.1\r\n{head}\r\n".encode()
        with self.raw(ask) as sock, sock.makefile("rb") as lines:
            assert lines.readline() == b"HTTP/1.1 200 OK\r\n"
            yield (json.loads(line[6:]) for line in lines if line.startswith(b"data: "))
