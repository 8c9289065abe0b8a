# SPDX-License-Identifier: GPL-3.0-or-later
"""The server process: routes, event stream, start and end. No torch here; the worker process has it.

settings -> claim the right to be the backend -> socket -> runtime file -> serve -> withdraw, end the worker
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import logging.handlers
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from backend import __version__, checks, families, interchange, packet, poses, runtime, weights
from backend.guard import MAX_HEAD_BYTES, Connection, Guard
from backend.jobs import Jobs
from backend.protocol import (
    HTTP_STATUS,
    MAX_IMAGE_BYTES,
    MAX_LODS,
    PROTOCOL_VERSION,
    ClientName,
    Error,
    Health,
    JobId,
    JobRequest,
    JobStatus,
    PopulaceError,
    StoredImage,
    invalid,
)
from backend.settings import Settings, private_folder
from backend.supervisor import worker_command

log = logging.getLogger(__name__)

LOG_FILES, LOG_BYTES = 5, 5 << 20
IMAGES = "/v1/images"
_SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGBREAK] if sys.platform == "win32" else [])]


def serve(settings: Settings, json_line: bool = False, worker: Sequence[str] | None = None) -> int:
    """Run the backend until its last client has left, it is told to stop, or a signal comes. Returns 0.

    If one runs already for this user, say where and return 0. With `json_line` one JSON line on stdout says that it is
    ready: port, pid, runtime_file. `worker` replaces the command of the worker process. Raises `PopulaceError` when the
    port is taken or a folder cannot be used.
    """
    with runtime.claim(settings.runtime_dir) as live:
        if live is not None:
            _announce(live, settings.runtime_dir / runtime.RUNTIME_FILE, json_line)
            return 0
        with _logging_to(settings.logs_dir), _listening_socket(settings.port) as sock:
            address = runtime.Address.new(sock.getsockname()[1])

            def ready() -> None:
                path = runtime.publish(settings.runtime_dir, address)
                _announce(address, path, json_line)

            asyncio.run(_serve(settings, address, sock, worker or worker_command(settings), ready))
    return 0


async def _serve(
    settings: Settings, address: runtime.Address, sock: socket.socket, worker: Sequence[str], ready: Callable[[], None]
) -> None:
    jobs = Jobs(settings, worker)
    app = make_app(settings, jobs, lambda: setattr(server, "should_exit", True))
    config = uvicorn.Config(
        Guard(app, address.token, address.port, {IMAGES: MAX_IMAGE_BYTES}), http=Connection, ws="none", lifespan="off",
        loop="asyncio",
        log_config=None, access_log=False, server_header=False, date_header=False, proxy_headers=False,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES, timeout_keep_alive=30, timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = _Server(config, jobs, ready, lambda: runtime.withdraw(settings.runtime_dir, address), settings.stay)
    await jobs.start()
    try:
        await server.serve(sockets=[sock])
    finally:
        runtime.withdraw(settings.runtime_dir, address)
        interchange.end_all()
        await jobs.close()
    log.info("the backend has ended")


class _Server(uvicorn.Server):
    """uvicorn with our beginning and end: ready when it listens, nobody finds it once it stops."""

    def __init__(
        self, config: uvicorn.Config, jobs: Jobs, ready: Callable[[], None], leave: Callable[[], None], stay: bool
    ) -> None:
        super().__init__(config)
        self._jobs, self._ready, self._leave, self._stay = jobs, ready, leave, stay
        self._watch: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()
        if not self._stay:
            self._watch = asyncio.create_task(self._end_when_abandoned())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._watch is not None:
            self._watch.cancel()
        self._leave()
        self._jobs.end_streams()
        await super().shutdown(sockets)

    async def _end_when_abandoned(self) -> None:
        await self._jobs.abandoned()
        log.info("the last client has left")
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's, this does not raise the signal again: after it there is still something to tidy up."""
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


# -------------------------------------------------------------------------------------------------------------- routes


class _Packet(FileResponse):
    chunk_size = 1 << 20  # every chunk is a trip to a thread


def make_app(settings: Settings, jobs: Jobs, stop: Callable[[], None]) -> FastAPI:
    """The routes. Everything in front of them (token, host, limits) is `Guard`'s."""
    app = FastAPI(
        title="Populace", version=__version__, openapi_url="/v1/openapi.json", docs_url=None, redoc_url=None,
        redirect_slashes=False, responses={"4XX": {"model": Error}, "5XX": {"model": Error}},
    )  # fmt: skip
    app.add_exception_handler(PopulaceError, _answer_problem)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_bug)
    converting, writing = asyncio.Lock(), asyncio.Lock()  # one at a time in memory; one Blender at a time

    @app.get("/v1/health")
    async def health() -> Health:
        broken = jobs.worker.error
        return Health(
            protocol=PROTOCOL_VERSION, version=__version__, pid=os.getpid(), worker=jobs.worker.state,
            device=jobs.worker.device or settings.device, worker_error=Error.of(broken) if broken else None,
        )  # fmt: skip

    @app.get("/v1/families")
    async def list_families() -> list[dict[str, Any]]:
        return [{**dataclasses.asdict(info), "parts": info.parts, "poses": poses.pose_names()}
                for info in families.infos()]  # fmt: skip

    @app.get("/v1/weights")
    def list_weights() -> list[dict[str, Any]]:
        return [
            {"name": found.name, "title": found.title, "licence": found.licence, "provenance": found.provenance,
             "sha256": found.sha256, "size": sum(file.size for file in found.files),
             "here": found.is_here(settings.data_dir)}
            for found in weights.manifests(data_dir=settings.data_dir)
        ]  # fmt: skip

    binary = {"schema": {"type": "string", "format": "binary"}}
    body = {"required": True, "content": {f"image/{kind}": binary for kind in ("png", "jpeg", "webp")}}

    @app.post(IMAGES, response_model=StoredImage, openapi_extra={"requestBody": body})
    async def add_image(request: Request) -> Any:
        try:
            return await jobs.add_image(request.stream())
        except ClientDisconnect:
            return Response(status_code=400)

    @app.post("/v1/jobs")
    async def submit(job: JobRequest) -> JobStatus:
        checks.check(job.request)
        return await jobs.submit(job)

    @app.get("/v1/jobs")
    async def list_jobs(client: Annotated[ClientName | None, Query()] = None) -> list[JobStatus]:
        return jobs.all(client)

    @app.get("/v1/jobs/{job_id}")
    async def job(job_id: JobId) -> JobStatus:
        return jobs.find(job_id).status()

    @app.delete("/v1/jobs/{job_id}")
    async def cancel(job_id: JobId) -> JobStatus:
        return await jobs.cancel(job_id)

    @app.get("/v1/jobs/{job_id}/result", response_class=Response, responses={200: {"content": {
        "application/octet-stream": {}, "model/gltf-binary": {}, "application/zip": {}}}})  # fmt: skip
    async def result(
        job_id: JobId,
        format: Annotated[
            Literal["safetensors", "glb", "obj", "usd", "fbx", "blend"],
            Query(description="obj, usd and fbx are zips; usd, fbx and blend need Blender's module in the backend"),
        ] = "safetensors",
        lod: Annotated[int, Query(ge=0, lt=MAX_LODS, description="of glb and obj: level of detail")] = 0,
        preset: Annotated[
            interchange.PresetName, Query(description="units, axes and bone names; not of safetensors")
        ] = "none",
    ) -> Response:
        path = jobs.result(job_id)
        if format == "safetensors":
            return _Packet(path, media_type="application/octet-stream")
        async with writing if format in interchange.BLENDERS else converting:
            data, media, ending = await asyncio.to_thread(
                lambda: interchange.packed(packet.read(path), format, preset, lod)
            )
        name = f'attachment; filename="person-{job_id[:8]}{ending}"'
        return Response(data, media_type=media, headers={"Content-Disposition": name})

    @app.get("/v1/jobs/{job_id}/stats", response_class=Response, responses={200: {"content": {"application/json": {}}}})
    async def stats(job_id: JobId) -> Response:
        return FileResponse(jobs.stats(job_id), media_type="application/json")

    @app.get("/v1/events", response_class=Response, responses={200: {"content": {"text/event-stream": {}}}})
    async def events(client: ClientName) -> Response:
        async def lines() -> AsyncIterator[bytes]:
            yield b": populace\n\n"
            async for status in jobs.listen(client):
                yield b": alive\n\n" if status is None else b"event: job\ndata: %s\n\n" % (
                    status.model_dump_json().encode())  # fmt: skip

        return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @app.post("/v1/worker/restart")
    async def restart_worker() -> Health:
        jobs.worker.restart()
        return await health()

    @app.post("/v1/shutdown")
    async def shutdown() -> dict[str, bool]:
        stop()
        return {"stopping": True}

    return app


def _problem(error: PopulaceError) -> JSONResponse:
    return JSONResponse(Error.of(error).model_dump(), HTTP_STATUS.get(error.code, 500))


async def _answer_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, PopulaceError)
    answer = _problem(error)
    if error.code == "too_large":  # there may be more of the request that nobody wants to read
        answer.headers["Connection"] = "close"
    return answer


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _problem(invalid(list(error.errors())))


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        return _problem(PopulaceError("method_not_allowed", "That method does not go with this path.", _SEE))
    if error.status_code == 404:
        return _problem(PopulaceError("not_found", "There is nothing at this path.", _SEE))
    return _problem(PopulaceError("invalid_request", "The request cannot be read.", _SEE))


async def _answer_bug(request: Request, error: Exception) -> Response:
    return _problem(PopulaceError("internal_error", "The generator stumbled over this request.", "See the log."))


_SEE = "See /v1/openapi.json."


# ------------------------------------------------------------------------------------------------------- the process


def _announce(address: runtime.Address, path: Path, json_line: bool) -> None:
    said = {"port": address.port, "pid": address.pid, "runtime_file": str(path)}
    text = json.dumps(said) if json_line else f"Populace on 127.0.0.1:{address.port}; its token is in {path}"
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@contextmanager
def _listening_socket(port: int) -> Iterator[socket.socket]:
    """IPPROTO_TCP is said so that asyncio sets TCP_NODELAY on what is accepted; else a request may wait 40 ms."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as sock:
        if sys.platform == "win32":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError as error:
            raise PopulaceError(
                "conflict", f"Port {port} on 127.0.0.1 cannot be used: {error.strerror or error}.",
                "Leave out --port, then the system chooses a free one."
            ) from None  # fmt: skip
        yield sock


class _MaskHome(logging.Formatter):
    """Users post logs; their home folder need not be in them."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace(str(Path.home()), "~")


@contextmanager
def _logging_to(folder: Path) -> Iterator[None]:
    """Everything of ours from INFO on into <folder>/backend.log, rotated. Without the folder, stderr must do."""
    try:
        private_folder(folder)
        handler = logging.handlers.RotatingFileHandler(
            folder / "backend.log", maxBytes=LOG_BYTES, backupCount=LOG_FILES - 1, encoding="utf-8"
        )
    except OSError as error:
        log.warning("no log file: %s", error)
        yield
        return
    handler.setFormatter(_MaskHome("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root, ours = logging.getLogger(), logging.getLogger("backend")
    level = ours.level
    root.addHandler(handler)
    ours.setLevel(min(level, logging.INFO) or logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
        ours.setLevel(level)
