# SPDX-License-Identifier: GPL-3.0-or-later
"""Keeps workers busy with the people of a plan, through any `concurrent.futures.Executor`.

Processes of this machine and the machines of a Dask cluster are the same to it. What fails is tried again; a worker
that dies takes nobody along but the person it worked on; errors that would meet everybody end the run.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from backend.batch import item as work
from backend.batch.plan import Item
from backend.protocol import Error, PopulaceError

FATAL: Final = frozenset({"no_gpu", "weights_missing", "weights_corrupt", "out_of_disk", "unknown_family"})
HOPELESS: Final = frozenset({"empty_surface", "invalid_request", "invalid_latents", "image_unreadable", "image_missing",
                             "no_person_found", "mask_needed", "too_large"})  # fmt: skip
"""The same again every time."""
BYTES_PER_WORKER: Final = 1_200_000_000  # a process with torch and one person at default settings
_LOOK_S: Final = 0.5  # how often a request to stop is noticed


@dataclass(frozen=True)
class Shard:
    """Every `count`-th person from the `index`-th on, so that shards are alike in work. Counted from 1."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From "2/3". Raises ValueError."""
        index, found, count = text.partition("/")
        if not (found and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count) <= 100_000):
            raise ValueError("must look like 2/3: the number of this shard, from 1 on, and how many there are")
        return cls(int(index), int(count))

    def of(self, items: Sequence[Item]) -> list[Item]:
        return list(items[self.index - 1 :: self.count])

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


class Log:
    """A JSON object per event, to a file and to whoever listens. Each run has a file of its own."""

    def __init__(self, out: Path, shard: Shard, hear: Callable[[dict[str, Any]], None]) -> None:
        machine = "".join(c if c.isalnum() else "_" for c in socket.gethostname())[:40]
        self._path = out / "logs" / f"{shard.index}-of-{shard.count}.{machine}.{os.getpid()}.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._shard, self._hear = str(shard), hear

    def write(self, event: str, **facts: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "event": event, "shard": self._shard, **facts}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._hear(line)


@dataclass
class Outcome:
    """How a run ended."""

    made: int = 0
    failed: dict[str, Error] = field(default_factory=dict)  # by id
    fatal: PopulaceError | None = None
    interrupted: int = 0  # the signal that ended it


class Stop:
    """Set by SIGINT or SIGTERM: people being made are finished, no more are begun. A second signal ends at once."""

    def __init__(self) -> None:
        self.signal = 0

    def _heard(self, number: int, _: Any) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._heard) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass
class _Try:
    item: Item
    failures: int = 0
    is_suspect: bool = False  # it was under way when a worker died


def run(items: Sequence[Item], out: Path, device: str, start: Callable[[], Executor], width: int, retries: int,
        log: Log, stop: Stop) -> Outcome:  # fmt: skip
    """Make all items with at most `width` under way. `start` makes an executor, anew if one breaks."""
    waiting = deque(_Try(item) for item in items)
    suspects: deque[_Try] = deque()  # one of them made a worker die, so each is tried alone
    running: dict[Future[dict[str, Any]], _Try] = {}
    outcome, executor = Outcome(), start()

    def failed(one: _Try, error: Error) -> None:
        if error.code in FATAL:
            outcome.fatal = PopulaceError(error.code, error.message, error.hint)
        one.failures += 1
        again = one.failures <= retries and error.code not in FATAL | HOPELESS
        log.write("retry" if again else "failed", id=one.item.id, error=error.model_dump())
        if again:
            (suspects if one.is_suspect else waiting).append(one)
        else:
            outcome.failed[one.item.id] = error

    try:
        while running or ((waiting or suspects) and not (stop.signal or outcome.fatal)):
            is_broken = False
            while not (is_broken or stop.signal or outcome.fatal):
                queue = suspects or waiting
                is_alone = bool(suspects) or any(one.is_suspect for one in running.values())
                if not queue or len(running) >= (1 if is_alone else width):
                    break
                task = {"item": queue[0].item.to_json(), "out": str(out), "device": device}
                try:
                    running[executor.submit(work.make, task)] = queue[0]
                    queue.popleft()
                except BrokenExecutor:
                    is_broken = True
            lost = []
            for future in wait(running, timeout=_LOOK_S, return_when=FIRST_COMPLETED).done:
                one = running.pop(future)
                try:
                    answer = future.result()
                except BrokenExecutor:
                    lost.append(one)
                except Exception as error:  # of the executor: `make` itself answers
                    failed(one, Error(code="worker_crashed", message=f"The worker failed: {type(error).__name__}."))
                else:
                    if "error" in answer:
                        failed(one, Error.model_validate(answer["error"]))
                    else:
                        outcome.made += 1
                        log.write("done", **answer)
            if lost or is_broken:
                lost += running.values()
                running.clear()
                executor.shutdown(wait=False)
                executor = start()
            for one in lost:
                if len(lost) == 1:
                    failed(one, Error(code="worker_crashed", message="The worker process died in this person.",
                                      hint="Try a smaller grid or texture."))  # fmt: skip
                else:
                    one.is_suspect = True
                    suspects.append(one)
    finally:
        for future in running:  # only when something was raised here
            future.cancel()
        executor.shutdown(wait=False)
    outcome.interrupted = stop.signal
    return outcome


def local(processes: int) -> Callable[[], Executor]:
    """Worker processes of this machine, each with one thread."""
    context = multiprocessing.get_context("spawn")

    def start() -> Executor:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
            os.environ[name] = "1"  # read by the libraries when the workers import them
        return ProcessPoolExecutor(processes, context, initializer=work.begin_worker)

    return start


def local_width(device: str) -> int:
    """Worker processes that suit this machine: one on a GPU, else one per core for which there is memory."""
    import psutil

    from backend import families

    if families.resolve_device(device) != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(cores, psutil.cpu_count(logical=False) or cores)
    return max(1, min(cores, psutil.virtual_memory().available // BYTES_PER_WORKER))


@contextmanager
def dask(address: str) -> Iterator[tuple[Callable[[], Executor], int]]:
    """The machines of a Dask cluster, which must see the output folder under the same path. Raises `invalid_request`
    for an address that others could listen in on."""
    kind, _, rest = address.partition("://")
    host = rest.rpartition(":")[0].strip("[]")
    if kind != "tls" and (kind != "tcp" or host not in ("127.0.0.1", "localhost", "::1")):
        raise PopulaceError(
            "invalid_request", f"{address} is not a scheduler on this machine, and not encrypted.",
            "Use tls://HOST:PORT with certificates in Dask's configuration, or tcp://127.0.0.1:PORT."
        )  # fmt: skip
    try:
        distributed: Any = importlib.import_module("distributed")
    except ImportError:
        raise PopulaceError("invalid_request", "Dask is not installed here.", 'pip install ".[farm]"') from None
    try:
        client = distributed.Client(address, timeout=20, set_as_default=False)
    except OSError as error:
        raise PopulaceError("invalid_request", f"No Dask scheduler answers at {address} ({type(error).__name__}).",
                            "Start one with: dask scheduler") from None  # fmt: skip
    with client:
        threads = sum(client.nthreads().values())
        if not threads:
            raise PopulaceError("invalid_request", f"The Dask cluster at {address} has no workers.",
                                f"Start some with: dask worker --nthreads 1 {address}")  # fmt: skip
        yield lambda: client.get_executor(pure=False), threads


