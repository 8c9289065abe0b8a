# SPDX-License-Identifier: GPL-3.0-or-later
"""A scripted backend for tests of the add-on: good, slow, dying, lying. Standard library only.

In a test: `async with FakeBackend(home) as fake`. As a program (`python fake_backend.py serve --json`) its behaviour is
the word in the environment variable FAKE_MODE.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

IDLE_S = 1.0  # without a lease, then it ends
TOKEN = "0123456789abcdef0123456789abcdef"
FAMILY: dict[str, Any] = {
    "name": "ball", "title": "Ball", "weights": "balls", "parts": ["body", "top"], "poses": ["rest", "sitting"],
    "news": "a field of the future", "attributes": [
        {"name": "height_m", "title": "Height", "kind": "number", "low": 1.5, "high": 2.0, "unit": "m"},
        {"name": "top_color", "title": "Top colour", "kind": "color"},
        {"name": "top", "title": "Top", "kind": "choice", "choices": ["none", "shirt"]},
    ],
}  # fmt: skip


class FakeBackend:
    """Answers like the real one, unless told otherwise.

    `result`: the packet's bytes. `raw`: path prefix -> bytes sent as they are instead of an answer. `stages`: progress
    told before a job is done. `hold`: jobs stay running until it is cleared. `protocol`, `version`: for the greeting.
    """

    def __init__(self, home: Path, result: bytes = b"") -> None:
        self.home = home
        self.result = result
        self.raw: dict[str, bytes] = {}
        self.stages = [("field", 0.1), ("surface", 0.5), ("bake", 0.9)]
        self.hold = False
        self.mute = False  # accept connections, never answer
        self.error: dict[str, str] | None = None  # jobs fail with this
        self.protocol, self.version = 1, "9.9.9"
        self.families: Any = [FAMILY]
        self.jobs: dict[str, dict[str, Any]] = {}
        self.requests: list[dict[str, Any]] = []
        self.images: dict[str, bytes] = {}
        self.bad_image: dict[str, str] | None = None  # images are refused with this
        self.seen: list[str] = []  # "METHOD path" of every request
        self.leases = 0
        self.stopped = asyncio.Event()
        self._streams: list[tuple[str, asyncio.StreamWriter]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> FakeBackend:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self.write_runtime_file()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def write_runtime_file(self) -> Path:
        path = self.home / "run" / "backend.json"
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(json.dumps({"protocol": self.protocol, "version": self.version, "pid": os.getpid(),
                                    "port": self.port, "token": TOKEN, "started": time.time()}))  # fmt: skip
        return path

    def kill_streams(self) -> None:
        for _, writer in self._streams:
            writer.transport.abort()

    # --------------------------------------------------------------------------------------------------------- http

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._one(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        body = await reader.readexactly(int(fields.get("content-length", "0")))
        self.seen.append(f"{method} {path}")
        assert fields["host"] == f"127.0.0.1:{self.port}"
        assert "origin" not in fields
        if self.mute:
            await asyncio.sleep(3600)
        for prefix, raw in self.raw.items():
            if path.startswith(prefix):
                writer.write(raw)
                await writer.drain()
                return
        if fields.get("authorization") != f"Bearer {TOKEN}":
            return await self._reply(writer, 401, {"code": "unauthorized", "message": "No.", "hint": ""})
        route = path.partition("?")[0].removeprefix("/v1")
        if route == "/health":
            await self._reply(writer, 200, {"protocol": self.protocol, "version": self.version, "pid": 1,
                                            "device": "cpu", "worker": "ready"})  # fmt: skip
        elif route == "/families":
            await self._reply(writer, 200, self.families)
        elif route == "/weights":
            await self._reply(writer, 200, [{"name": "balls", "sha256": "ab" * 32}])
        elif route == "/events":
            await self._events(reader, writer, path.partition("client=")[2])
        elif route == "/images" and method == "POST":
            if self.bad_image is not None:
                return await self._reply(writer, 422, self.bad_image)
            image = hashlib.sha256(body).hexdigest()
            self.images[image] = body
            await self._reply(writer, 200, {"id": image, "width": 1, "height": 1})
        elif route == "/jobs" and method == "POST":
            await self._submit(writer, json.loads(body))
        elif route == "/shutdown":
            await self._reply(writer, 200, {})
            self.kill_streams()
            self.stopped.set()
        elif route.startswith("/jobs/"):
            await self._job(writer, method, route.split("/")[2], route.endswith("/result"))
        else:
            await self._reply(writer, 404, {"code": "not_found", "message": "Nothing here.", "hint": ""})

    async def _reply(self, writer: asyncio.StreamWriter, status: int, body: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()

    # --------------------------------------------------------------------------------------------------------- jobs

    async def _submit(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        job = self.jobs.get(body["id"])
        self.requests.append(body["request"])
        if job is None:
            job = self.jobs[body["id"]] = {"id": body["id"], "client": body["client"], "state": "queued", "stage": "",
                                           "fraction": 0.0, "eta_s": None, "error": None}  # fmt: skip
            job["task"] = asyncio.get_running_loop().create_task(self._work(job))
            self._tasks.add(job["task"])
        await self._reply(writer, 200, self._status(job))

    async def _work(self, job: dict[str, Any]) -> None:
        for stage, fraction in self.stages:
            await asyncio.sleep(0.01)
            self._tell(job, state="running", stage=stage, fraction=fraction, eta_s=1.0)
        while self.hold:
            await asyncio.sleep(0.01)
        if self.error is not None:
            self._tell(job, state="failed", error=self.error)
        else:
            self._tell(job, state="done", fraction=1.0)

    async def _job(self, writer: asyncio.StreamWriter, method: str, job_id: str, wants_result: bool) -> None:
        job = self.jobs.get(job_id)
        if job is None:
            await self._reply(writer, 404, {"code": "not_found", "message": "No such job.", "hint": ""})
        elif method == "DELETE":
            job["task"].cancel()
            self._tell(job, state="cancelled")
            await self._reply(writer, 200, self._status(job))
        elif wants_result:
            await self._reply(writer, 200, self.result)
        else:
            await self._reply(writer, 200, self._status(job))

    def _status(self, job: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in job.items() if name != "task"} | {"news": "a field of the future"}

    def _tell(self, job: dict[str, Any], **changed: Any) -> None:
        job.update(changed)
        for client, writer in self._streams:
            if client == job["client"]:
                writer.write(self._event(job))

    def _event(self, job: dict[str, Any]) -> bytes:
        data = f"event: job\ndata: {json.dumps(self._status(job))}\n\n".encode()
        return f"{len(data):x}\r\n".encode() + data + b"\r\n"

    async def _events(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, client: str) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"d\r\n: keep-alive\n\r\n")
        for job in self.jobs.values():
            if job["client"] == client:
                writer.write(self._event(job))
        self._streams.append((client, writer))
        self.leases += 1
        try:
            await reader.read()
        finally:
            self.leases -= 1
            self._streams.remove((client, writer))


async def _main(mode: str) -> None:
    home = Path(os.environ["POPULACE_HOME"])
    async with FakeBackend(home, Path(os.environ.get("FAKE_RESULT", os.devnull)).read_bytes()) as fake:
        if mode == "newer":
            fake.protocol = 99
        runtime_file = fake.write_runtime_file()
        with open(home / "starts", "a") as file:
            file.write(f"{os.getpid()} {json.dumps(sorted(os.environ))}\n")
        if mode == "noisy":
            print("Loading... 10 %\nnull\n{not json\n", end="", flush=True)
        print(json.dumps({"port": fake.port, "pid": os.getpid(), "runtime_file": str(runtime_file)}), flush=True)
        if mode == "dies_at_work":
            fake.stages = [("field", 0.1)]
            fake.hold = True
            while not fake.jobs:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            os._exit(9)
        idle = 0.0
        while not fake.stopped.is_set() and idle < IDLE_S:
            await asyncio.sleep(0.05)
            idle = 0.0 if fake.leases else idle + 0.05


if __name__ == "__main__":
    word = os.environ.get("FAKE_MODE", "good")
    if word == "never_ready":
        time.sleep(600)
    if word == "garbage":
        sys.exit("Traceback\nValueError: the disk is made of cheese")
    if word == "no_module":
        sys.exit("/usr/bin/python: No module named backend")
    if word == "exits_0":
        sys.exit(0)
    asyncio.run(_main(word))
