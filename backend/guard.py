# SPDX-License-Identifier: GPL-3.0-or-later
"""Who may talk to the server, and how much and how slowly. Stands before the routes and knows none of them.

Against web pages (they can send requests to 127.0.0.1 and rebind names to it): a bearer token, the exact Host, and no
request that a browser marked with Origin or Sec-Fetch-Site. Against endless or stalled input: limits on heads, bodies,
connections and times.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from backend.protocol import HTTP_STATUS, MAX_JSON_BYTES, Error, PopulaceError, parse_json

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 16 << 10
MAX_CONNECTIONS = 64
READ_TIMEOUT_S = 30.0  # for a whole request to arrive
WRITE_TIMEOUT_S = 30.0  # for a reader to take what lies ready

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


IMAGE_TYPES = frozenset({b"image/png", b"image/jpeg", b"image/webp", b"application/octet-stream"})


class Guard:
    """ASGI middleware: answers what must not pass, hands on the rest with its whole body.

    Bodies are JSON, but for `uploads`: paths to which images of so many bytes may be sent. Those are handed on as they
    come.
    """

    def __init__(self, app: App, token: str, port: int, uploads: Mapping[str, int] | None = None) -> None:
        self._app = app
        self._uploads = dict(uploads or {})
        self._bearer = f"Bearer {token}".encode()
        self._host = f"127.0.0.1:{port}".encode()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        try:
            self._check_size(scope)
            self._check_head(scope["headers"])
            limit = self._uploads.get(scope["path"]) if scope["method"] == "POST" else None
            if limit is not None:
                stream = _limited(scope["headers"], receive, limit)
                await self._app(scope, stream, send)
                return
            body = await self._read_body(scope["headers"], receive)
        except PopulaceError as error:
            await _answer(error, send)
            return
        except ConnectionResetError:  # gone before it had said all
            return
        pending: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def replay() -> Message:
            nonlocal pending
            message, pending = pending, None
            return message if message is not None else await receive()

        await self._app(scope, replay, send)

    def _check_size(self, scope: MutableMapping[str, Any]) -> None:
        """uvicorn counts only heads that come in pieces."""
        size = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(k) + len(v) for k, v in scope["headers"])
        if size > MAX_HEAD_BYTES:
            raise PopulaceError("too_large", f"The head is larger than {MAX_HEAD_BYTES} bytes.", "Send less.")

    def _check_head(self, headers: list[tuple[bytes, bytes]]) -> None:
        named: dict[bytes, list[bytes]] = {}
        for name, value in headers:
            named.setdefault(name.lower(), []).append(value)
        if named.get(b"host") != [self._host]:
            raise PopulaceError("forbidden", "The Host header is not this server's.", f"Use {self._host.decode()}.")
        if b"origin" in named or b"sec-fetch-site" in named:
            raise PopulaceError("forbidden", "Web pages may not talk to this server.", "Use a program.")
        authorization = named.get(b"authorization", [])
        said = authorization[0] if len(authorization) == 1 else b""
        if not hmac.compare_digest(said, self._bearer):
            raise PopulaceError("unauthorized", "The bearer token is missing or wrong.", "It is in the runtime file.")

    async def _read_body(self, headers: list[tuple[bytes, bytes]], receive: Receive) -> bytes:
        """At most `MAX_JSON_BYTES`, strict JSON if there is anything. A length that says more is not even read."""
        lengths = [int(value) for name, value in headers if name == b"content-length"]  # h11 saw that they are digits
        body, more = bytearray(), True
        while more:
            if max(len(body), *lengths, 0) > MAX_JSON_BYTES:
                raise PopulaceError("too_large", f"The body is larger than {MAX_JSON_BYTES} bytes.", "Send less.")
            message = await receive()
            if message["type"] != "http.request":
                raise ConnectionResetError
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if len(body) > MAX_JSON_BYTES:
            raise PopulaceError("too_large", f"The body is larger than {MAX_JSON_BYTES} bytes.", "Send less.")
        if body:
            kinds = [value.partition(b";")[0].strip().lower() for name, value in headers if name == b"content-type"]
            if kinds != [b"application/json"]:
                raise PopulaceError("invalid_request", "The body is not declared as application/json.", "Send JSON.")
            parse_json(bytes(body))
        return bytes(body)


def _limited(headers: list[tuple[bytes, bytes]], receive: Receive, limit: int) -> Receive:
    """The body in pieces. Raises `too_large`, and `invalid_request` for another type, before or while it comes."""
    too_large = PopulaceError("too_large", f"The file is larger than {limit >> 20} MiB.", "Make it smaller.")
    kinds = [value.partition(b";")[0].strip().lower() for name, value in headers if name == b"content-type"]
    if len(kinds) != 1 or kinds[0] not in IMAGE_TYPES:
        raise PopulaceError("invalid_request", "The body is not declared as image/png, image/jpeg or image/webp.",
                            "Send an image.")  # fmt: skip
    if any(int(value) > limit for name, value in headers if name == b"content-length"):
        raise too_large
    size = 0

    async def limited() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > limit:
            raise too_large
        return message

    return limited


async def _answer(error: PopulaceError, send: Send) -> None:
    """The connection ends with it: there may be more of the request that nobody wants to read."""
    body = Error.of(error).model_dump_json().encode()
    await send({"type": "http.response.start", "status": HTTP_STATUS[error.code], "headers": _headers(body)})
    await send({"type": "http.response.body", "body": body})


def _headers(body: bytes) -> list[tuple[bytes, bytes]]:
    return [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
            (b"connection", b"close")]  # fmt: skip


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 connection with a limit on their number and on the time they may waste."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.since = self.loop.time()
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._watch_reading()
        alive = [c for c in self.connections if isinstance(c, Connection) and not c.transport.is_closing()]
        if len(alive) > MAX_CONNECTIONS:  # the one that idled longest makes room; this one at least is idle
            min((c for c in alive if c.is_idle), key=lambda c: c.since).transport.abort()

    @property
    def is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(WRITE_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state is not h11.IDLE:  # an answer is under way already
            self.transport.close()
            return
        error = PopulaceError("invalid_request", "That is not HTTP/1.1 as this server takes it.", "Correct it.")
        body = Error.of(error).model_dump_json().encode()
        for event in (h11.Response(status_code=400, headers=_headers(body)), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch_reading(self) -> None:
        """A timer runs while a request has begun and is not whole. Idle ones are uvicorn's to close."""
        is_waiting = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if is_waiting and self._reading is None:
            self._reading = self.loop.call_later(READ_TIMEOUT_S, self.transport.abort)
        elif not is_waiting and self._reading is not None:
            self._reading.cancel()
            self._reading = None
