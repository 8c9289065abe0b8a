# SPDX-License-Identifier: GPL-3.0-or-later
"""One backend per user: the runtime file that says where it listens, and the lock that decides who may write it.

The file is JSON {"protocol", "version", "pid", "port", "token", "started"} with mode 0600. What it says is believed
only if somebody answers at that port to that token; the pid is for people to read, never to end a process with.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock

from backend import __version__
from backend.packet import write_file
from backend.protocol import PROTOCOL_VERSION, PopulaceError, parse_json
from backend.settings import private_folder

log = logging.getLogger(__name__)

RUNTIME_FILE = "backend.json"
CLAIM_TIMEOUT_S = 30.0  # for another one that starts or ends right now
_ASK_TIMEOUT_S = 3.0
_MAX_FILE_BYTES = 64 << 10


@dataclass(frozen=True)
class Address:
    """The content of the runtime file."""

    protocol: int
    version: str
    pid: int
    port: int
    token: str
    started: float  # seconds since the epoch

    def __repr__(self) -> str:  # the token must not reach a log
        return f"Address(pid={self.pid}, port={self.port})"

    @classmethod
    def new(cls, port: int) -> Address:
        """Of this process, with a fresh 256-bit token."""
        return cls(PROTOCOL_VERSION, __version__, os.getpid(), port, secrets.token_urlsafe(32), time.time())


@contextmanager
def claim(folder: Path) -> Iterator[Address | None]:
    """The right to be the backend, held inside: yields None. If there is a live one already: its address.

    Raises `conflict` if somebody holds the right without answering, `internal_error` if the folder cannot be used.
    """
    try:
        private_folder(folder)
    except OSError as error:
        raise PopulaceError("internal_error", f"The folder {folder} cannot be used: {error}.",
                            "Set POPULACE_HOME to a folder of your own.") from None  # fmt: skip
    lock = filelock.FileLock(folder / "backend.lock", mode=0o600)
    end = time.monotonic() + CLAIM_TIMEOUT_S
    while not _acquired(lock):
        if (live := find_live(folder)) is not None:
            yield live
            return
        if time.monotonic() > end:
            raise PopulaceError("conflict", "Another backend is running but does not answer.",
                                "End it, or restart the computer.")  # fmt: skip
        time.sleep(0.05)
    try:
        yield find_live(folder)  # where the file system has no locks, this decides
    finally:
        lock.release()


def _acquired(lock: filelock.BaseFileLock) -> bool:
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        return False
    except (NotImplementedError, OSError) as error:
        log.warning("no lock on this file system: %s", error)
    return True


def find_live(folder: Path) -> Address | None:
    """The backend of the runtime file, if it answers. Anything wrong with the file means there is none."""
    try:
        address = _read(folder / RUNTIME_FILE)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, PopulaceError) as error:
        log.warning("the runtime file is ignored: %s", error)
        return None
    connection = http.client.HTTPConnection("127.0.0.1", address.port, timeout=_ASK_TIMEOUT_S)
    try:
        connection.request("GET", "/v1/health", headers={"Authorization": f"Bearer {address.token}"})
        reply = connection.getresponse()
        said = parse_json(reply.read(_MAX_FILE_BYTES))
    except (OSError, http.client.HTTPException, PopulaceError):
        return None
    finally:
        connection.close()
    return address if reply.status == 200 and isinstance(said, dict) and "protocol" in said else None


def publish(folder: Path, address: Address) -> Path:
    """Write the runtime file; readers see the old one or the new one, and nobody else sees either."""
    path = folder / RUNTIME_FILE
    previous = os.umask(0o077)
    try:
        write_file(path, json.dumps(asdict(address)).encode())
    finally:
        os.umask(previous)
    return path


def withdraw(folder: Path, address: Address) -> None:
    """Remove the runtime file, unless it has become somebody else's."""
    with contextlib.suppress(OSError, ValueError, TypeError, PopulaceError):
        if _read(folder / RUNTIME_FILE).token == address.token:
            (folder / RUNTIME_FILE).unlink()


def _read(path: Path) -> Address:
    """Raises OSError, ValueError, TypeError or PopulaceError."""
    with open(path, "rb") as file:
        about = os.fstat(file.fileno())
        if os.name == "posix" and (about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o077):
            raise ValueError("it is open to other users")
        raw = parse_json(file.read(_MAX_FILE_BYTES))
    if not isinstance(raw, dict):
        raise TypeError("not an object")
    address = Address(**raw)
    token = address.token
    if type(address.port) is not int or not 0 < address.port < 65536 or not isinstance(token, str):
        raise ValueError("no port or token")
    if not token.isascii() or not token.isprintable():
        raise ValueError("the token is not text")
    return address
