# SPDX-License-Identifier: GPL-3.0-or-later
"""The backend's HTTP/1.1 API over asyncio streams. Pure Python: no bpy, no threads, no proxies, only 127.0.0.1.

One connection per call: on loopback it costs 0.2 ms and no call can be mixed up with another. Everything that arrives
has a limit, because whatever listens on that port need not be our backend.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final

from .families import Family, parse
from .messages import (
    PROTOCOL_VERSION,
    BackendError,
    BadReply,
    Health,
    Status,
    error_from_json,
    image_pieces,
    is_image_id,
)

HOST: Final = "127.0.0.1"
MAX_HEAD_BYTES: Final = 16 << 10
MAX_JSON_BYTES: Final = 4 << 20
MAX_RESULT_BYTES: Final = 512 << 20
MAX_EVENT_BYTES: Final = 64 << 10
CALL_TIMEOUT_S: Final = 10.0
SEND_TIMEOUT_S: Final = 60.0
STALL_TIMEOUT_S: Final = 25.0  # the event stream says something every 10 s at least
_CHUNK_BYTES: Final = 1 << 18


class Unreachable(BackendError):
    """Nobody answers, or the connection broke."""

    def __init__(self, why: str) -> None:
        super().__init__("unreachable", f"The generator does not answer ({why}).", "Restart the generator.")


@dataclass(frozen=True)
class Address:
    """Where a backend listens and the secret it wants to hear; from its runtime file."""

    port: int
    token: str
    protocol: int = PROTOCOL_VERSION
    version: str = ""

    def __repr__(self) -> str:  # the token must not reach a log
        return f"Address(port={self.port})"


class Api:
    """The calls of one backend. Every method raises `BackendError` and nothing else."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.sent: dict[str, tuple[str, float]] = {}  # `inline` images that it has: their ids, and when they went

    async def health(self) -> Health:
        return Health.from_json(await self._json("GET", "/v1/health"))

    async def families(self) -> tuple[Family, ...]:
        """What can be made, with the hashes of the weights that would make it, as far as they are told."""
        told = await self._json("GET", "/v1/families")
        try:
            weights = await self._json("GET", "/v1/weights")
        except Unreachable:
            raise
        except BackendError:  # a manifest that cannot be read must not keep anybody from making people
            weights = ()
        return parse(told, weights if isinstance(weights, list) else ())

    async def submit(self, job_id: str, client: str, request: dict[str, Any]) -> Status:
        """Submitting the same job twice is one job."""
        body = {"id": job_id, "client": client, "request": request}
        return Status.from_json(await self._json("POST", "/v1/jobs", body))

    async def send_image(self, image: str) -> str:
        """Send the image of a file or of an `inline` text ahead of a request; returns the id that names it there."""
        pieces = image_pieces(image)
        size = int(next(pieces))
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S), _translated(), self._call(
                    "POST", "/v1/images", pieces, size) as reply:  # fmt: skip
                told = json.loads(await reply.body(MAX_JSON_BYTES))
        except TimeoutError:
            raise Unreachable(f"a photo was not taken in {SEND_TIMEOUT_S:.0f} s") from None
        except (ValueError, RecursionError):
            raise BadReply("a reply that is not JSON") from None
        found = told.get("id") if isinstance(told, dict) else None
        if not isinstance(found, str) or not is_image_id(found):
            raise BadReply("an image without an id")
        return found

    async def cancel(self, job_id: str) -> None:
        await self._json("DELETE", f"/v1/jobs/{job_id}")

    async def restart_worker(self) -> Health:
        """Let the backend try again to start its worker, after it gave up."""
        return Health.from_json(await self._json("POST", "/v1/worker/restart", {}))

    async def shutdown(self) -> None:
        await self._json("POST", "/v1/shutdown", {})

    async def result(self, job_id: str, form: str = "safetensors") -> bytearray:
        """What a job that is done made: the packet, or a file of another format that the backend can send ("glb")."""
        path = f"/v1/jobs/{job_id}/result?format={form}"
        async with _translated(), self._call("GET", path) as reply:
            return await reply.body(MAX_RESULT_BYTES)

    async def follow(self, client: str, opened: Callable[[], None], heard: Callable[[Status], None]) -> None:
        """Call `heard` with what happens to this client's jobs; first with the state of each. Holding this open is the
        lease: the backend ends itself a few seconds after the last one closes. Calls `opened` when the stream stands,
        returns when the backend closes it, raises `Unreachable` when it breaks or falls silent."""
        buffer, data = b"", b""
        async with _translated(), self._call("GET", f"/v1/events?client={client}") as reply:
            opened()
            while piece := await reply.piece():
                *lines, buffer = (buffer + piece).replace(b"\r\n", b"\n").split(b"\n")
                for line in lines:
                    if line.startswith(b"data:"):
                        data += line[5:].strip()
                    elif not line and data:
                        heard(_event(data))
                        data = b""
                if len(buffer) + len(data) > MAX_EVENT_BYTES:
                    raise BadReply("an event without end")

    async def _json(self, method: str, path: str, body: Any = None) -> Any:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S), _translated(), self._call(method, path, body) as reply:
                data = await reply.body(MAX_JSON_BYTES)
        except TimeoutError:
            raise Unreachable(f"no reply in {CALL_TIMEOUT_S:.0f} s") from None
        try:
            return json.loads(data) if data else None
        except (ValueError, RecursionError):
            raise BadReply("a reply that is not JSON") from None

    @contextlib.asynccontextmanager
    async def _call(self, method: str, path: str, body: Any = None, size: int | None = None) -> AsyncIterator[_Reply]:
        """`body` is sent as JSON, or, with its `size`, is an iterator over the pieces of a file."""
        payload = b"" if body is None or size is not None else json.dumps(body, allow_nan=False).encode()
        head = [
            f"{method} {path} HTTP/1.1", f"Host: {HOST}:{self.address.port}", "Connection: close",
            f"Authorization: Bearer {self.address.token}",
        ]  # fmt: skip
        if size is not None:
            head += ["Content-Type: application/octet-stream", f"Content-Length: {size}"]
        elif body is not None:
            head += ["Content-Type: application/json", f"Content-Length: {len(payload)}"]
        reader, writer = await asyncio.wait_for(
            asyncio.open_connection(HOST, self.address.port, limit=_CHUNK_BYTES), CALL_TIMEOUT_S)  # fmt: skip
        try:
            writer.write("\r\n".join([*head, "", ""]).encode() + payload)
            with contextlib.suppress(ConnectionError):  # refused before it was whole: the reply says why
                await writer.drain()
                for piece in (body or ()) if size is not None else ():
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
            reply = await _Reply.start(reader)
            if not 200 <= reply.status < 300:
                raise await _failure(reply)
            yield reply
        finally:
            writer.close()


class _Reply:
    """A reply whose head was read: status, and the body piece by piece."""

    def __init__(self, reader: asyncio.StreamReader, status: int, length: int | None, is_chunked: bool) -> None:
        self.status = status
        self._reader = reader
        self._left = length  # None: until the connection closes
        self._is_chunked = is_chunked

    @classmethod
    async def start(cls, reader: asyncio.StreamReader) -> _Reply:
        async with asyncio.timeout(STALL_TIMEOUT_S):
            head = await reader.readuntil(b"\r\n\r\n")
        if len(head) > MAX_HEAD_BYTES:
            raise BadReply("a reply with a huge head")
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        if version not in ("HTTP/1.1", "HTTP/1.0") or not rest[:3].isdecimal():
            raise BadReply("a reply that is not HTTP")
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = fields.get("content-length")
        if length is not None and not (length.isascii() and length.isdecimal() and len(length) < 16):
            raise BadReply("a reply with a strange length")
        is_chunked = fields.get("transfer-encoding", "").lower() == "chunked"
        return cls(reader, int(rest[:3]), None if length is None else int(length), is_chunked)

    async def piece(self) -> bytes:
        """The next bytes of the body, b"" at its end. Raises IncompleteReadError when it ends before it should."""
        async with asyncio.timeout(STALL_TIMEOUT_S):
            return await (self._chunk() if self._is_chunked else self._raw())

    async def body(self, limit: int) -> bytearray:
        if self._left is not None and self._left > limit:
            raise BadReply(f"{self._left} bytes, more than the {limit} allowed")
        filled = 0  # of a buffer as long as was told: one that grows is moved again and again
        data = bytearray(0 if self._is_chunked else self._left or 0)
        while piece := await self.piece():
            data[filled : filled + len(piece)] = piece
            filled += len(piece)
            if filled > limit:
                raise BadReply(f"more than the {limit} bytes allowed")
        return data

    async def _raw(self) -> bytes:
        if self._left == 0:
            return b""
        piece = await self._reader.read(_CHUNK_BYTES if self._left is None else min(self._left, _CHUNK_BYTES))
        if self._left is not None:
            if not piece:
                raise asyncio.IncompleteReadError(piece, self._left)
            self._left -= len(piece)
        return piece

    async def _chunk(self) -> bytes:
        if not self._left:  # at the start of a chunk
            size = (await self._reader.readuntil(b"\r\n")).partition(b";")[0].strip()
            if not 1 <= len(size) <= 8 or not all(c in b"0123456789abcdefABCDEF" for c in size):
                raise BadReply("a chunk without a size")
            self._left = int(size, 16)
            if self._left == 0:
                return b""
        piece = await self._raw()
        if self._left == 0:
            await self._reader.readexactly(2)
        return piece


async def _failure(reply: _Reply) -> BackendError:
    try:
        return error_from_json(json.loads(await reply.body(MAX_EVENT_BYTES)))
    except (ValueError, RecursionError, BadReply):
        return BadReply(f"HTTP status {reply.status}")


def _event(data: bytes) -> Status:
    try:
        return Status.from_json(json.loads(data))
    except (ValueError, RecursionError):
        raise BadReply("an event that is not JSON") from None


@contextlib.asynccontextmanager
async def _translated() -> AsyncIterator[None]:
    """Socket troubles become `Unreachable`."""
    try:
        yield
    except asyncio.LimitOverrunError:
        raise BadReply("a line without end") from None
    except asyncio.IncompleteReadError:
        raise Unreachable("the connection broke") from None
    except TimeoutError:
        raise Unreachable("it fell silent") from None
    except OSError as error:
        raise Unreachable(error.strerror or type(error).__name__) from None


def parse_address(raw: Any) -> Address:
    """An `Address` from the JSON of a runtime file. Raises ValueError."""
    if not isinstance(raw, dict):
        raise ValueError("not an object")
    port, token, protocol = raw.get("port"), raw.get("token"), raw.get("protocol")
    if type(port) is not int or not 0 < port < 65536 or type(protocol) is not int:
        raise ValueError("no port or protocol")
    if not isinstance(token, str) or not 16 <= len(token) <= 512 or not token.isascii() or not token.isprintable():
        raise ValueError("no token")
    return Address(port, token, protocol, str(raw.get("version", ""))[:40])
