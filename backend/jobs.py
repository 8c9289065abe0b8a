# SPDX-License-Identifier: GPL-3.0-or-later
"""The queue: who is next, what became of each job, who is listening. Runs on the server's event loop; no torch.

A job is `queued`, then `running` (perhaps `cancelling`), then `done`, `failed` or `cancelled`, and is reported only
after the disk knows it. Clients take turns. If the worker dies under a job, the job runs once more, then fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from backend.photo.album import ImageStore
from backend.protocol import ENDED, Cancelled, Error, JobRequest, JobState, JobStatus, PopulaceError, StoredImage
from backend.settings import Settings, private_folder
from backend.store import RESULT, STATS, JobStore, Stored, digest_of, writing_to
from backend.supervisor import Worker, WorkerDied

log = logging.getLogger(__name__)

ATTEMPTS = 2  # of a job whose worker dies
MAX_KEPT_JOBS = 2000  # that have ended
KEEP_ALIVE_S = 10.0
FIRST_LEASE_S = 60.0  # for the first client to open its event stream
LAST_LEASE_S = 4.0  # after the last one closed; with the time to end it stays below 5 s
_EVICT_INTERVAL_S = 600.0
_PIECE_BYTES = 1 << 20  # of an image that arrives, written at once
_ETA_FROM = 0.02  # before that fraction there is nothing to extrapolate from


@dataclass
class Job:
    """One job in memory. Its request stays on disk."""

    id: str
    client: str
    seed: int
    family: str
    created: float
    digest: str
    state: JobState = "queued"
    stage: str = ""
    fraction: float = 0.0
    error: Error | None = None
    started: float = 0.0  # time.monotonic()
    ended: float = 0.0  # seconds since the epoch
    bytes: int = 0
    attempts: int = 0
    images: tuple[str, ...] = ()  # that it needs until it has ended
    saved: asyncio.Future[None] | None = None  # until the disk has accepted it

    def status(self) -> JobStatus:
        eta_s = None
        if self.state == "running" and self.fraction > _ETA_FROM:
            eta_s = round((time.monotonic() - self.started) * (1 - self.fraction) / self.fraction, 2)
        return JobStatus(
            id=self.id, client=self.client, state=self.state, stage=self.stage, fraction=self.fraction, eta_s=eta_s,
            error=self.error, created=self.created, seed=self.seed, family=self.family,
        )  # fmt: skip


@dataclass(eq=False)
class _Listener:
    """An open event stream. Only the latest status of each job waits, so a slow reader costs nothing."""

    client: str
    pending: dict[str, Job] = field(default_factory=dict)
    news: asyncio.Event = field(default_factory=asyncio.Event)


class FairQueue:
    """First in, first out for each client; the clients take turns."""

    def __init__(self) -> None:
        self._clients: dict[str, deque[Job]] = {}  # in the order of their turns
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, job: Job, first: bool = False) -> None:
        jobs = self._clients.setdefault(job.client, deque())
        (jobs.appendleft if first else jobs.append)(job)
        self._size += 1

    def pop(self) -> Job | None:
        if not self._size:
            return None
        client = next(iter(self._clients))
        jobs = self._clients.pop(client)
        job = jobs.popleft()
        if jobs:
            self._clients[client] = jobs  # now the last
        self._size -= 1
        return job

    def remove(self, job: Job) -> None:
        jobs = self._clients.get(job.client, deque())
        if job in jobs:
            jobs.remove(job)
            self._size -= 1
            if not jobs:
                del self._clients[job.client]


class Jobs:
    """All jobs, their worker and their listeners. Everything runs on one event loop; `start` and `close` frame it."""

    def __init__(self, settings: Settings, command: Sequence[str]) -> None:
        self.store = JobStore(settings.jobs_dir)
        self.images = ImageStore(settings.images_dir)
        self._wake = asyncio.Event()
        self.worker = Worker(command, settings.worker_restarts, self._wake.set)
        self._settings = settings
        self._jobs: dict[str, Job] = {}
        self._queue = FairQueue()
        self._listeners: set[_Listener] = set()
        self._leases_changed = asyncio.Event()
        self._closing = False
        self._thread = ThreadPoolExecutor(1, "disk")  # one, so that writes keep their order
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Take up what an earlier server left, then begin to work."""
        oldest = time.time() - self._settings.max_results_age_s
        for stored in await self._on_disk(self.store.load):
            if stored.status is None and stored.created < oldest:  # nobody waits for it any more
                await self._on_disk(self.store.remove, stored.id)
                continue
            job = self._jobs[stored.id] = _job_from(stored)
            if job.state == "queued":
                self._queue.push(job)
        await self._on_disk(self.images.open, self._needed())
        self._tasks = [asyncio.create_task(self._work()), asyncio.create_task(self._keep_evicting())]

    async def close(self) -> None:
        """End the worker. What runs is taken up by the next server."""
        self.end_streams()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.worker.close()
        await self._on_disk(self.images.close)
        self._thread.shutdown()

    # -------------------------------------------------------------------------------------------------- for clients

    async def submit(self, request: JobRequest) -> JobStatus:
        """Queue a job. The same id with the same content is the same job; with other content it is a `conflict`."""
        digest = digest_of(request)
        if (known := self._jobs.get(request.id)) is not None:
            if known.digest != digest:
                raise PopulaceError("conflict", "This job id was used for another request.", "Use a new id.")
            if known.saved is not None:
                await asyncio.shield(known.saved)
            return known.status()
        if self._closing:
            raise PopulaceError("shutting_down", "The generator is stopping.", "Start it again.")
        if len(self._queue) >= self._settings.max_queued_jobs:
            raise PopulaceError("queue_full", f"{len(self._queue)} jobs are waiting already.",
                                "Wait for some to end, or cancel some.")  # fmt: skip
        images = tuple(request.request.images())
        self.images.need(images)
        job = Job(request.id, request.client, request.request.seed, request.request.family, time.time(), digest,
                  images=images)  # fmt: skip
        self._jobs[job.id] = job
        job.saved = asyncio.ensure_future(self._on_disk(self.store.create, request, job.created))
        try:
            await asyncio.shield(job.saved)
        except PopulaceError:
            del self._jobs[job.id]
            raise
        job.saved = None
        self._queue.push(job)
        self._publish(job)
        self._wake.set()
        return job.status()

    async def add_image(self, pieces: AsyncIterator[bytes]) -> StoredImage:
        """Keep an image for requests to come. Raises `image_unreadable`, `too_large`, `out_of_disk`."""
        with writing_to(self.images.folder):
            await self._on_disk(private_folder, self.images.folder)
            incoming = await self._on_disk(self.images.incoming)
            try:
                waiting = bytearray()
                async for piece in pieces:
                    waiting += piece
                    if len(waiting) >= _PIECE_BYTES:
                        await self._on_disk(incoming.write, bytes(waiting))
                        waiting.clear()
                await self._on_disk(incoming.write, bytes(waiting))
                found = await self._on_disk(incoming.measure)
                self.images.accept(found.id, incoming.size)
                await self._on_disk(incoming.keep)
            finally:
                await asyncio.shield(self._on_disk(incoming.discard))
        await self._forget_images()
        return found

    def find(self, job_id: str) -> Job:
        """Raises `not_found`."""
        job = self._jobs.get(job_id)
        if job is None:
            raise PopulaceError("not_found", "There is no job with this id.", "It may have been too old to keep.")
        return job

    def all(self, client: str | None = None) -> list[JobStatus]:
        """Oldest first."""
        return [job.status() for job in self._jobs.values() if client is None or job.client == client]

    async def cancel(self, job_id: str) -> JobStatus:
        """What waits is cancelled at once, what runs soon; a job that has ended stays as it is."""
        job = self.find(job_id)
        if job.saved is not None:
            await asyncio.shield(job.saved)
        if job.state == "queued":
            self._queue.remove(job)
            await self._finish(job, "cancelled")
        elif job.state == "running":
            job.state = "cancelling"
            self.worker.cancel(job.id)
            self._publish(job)
        return job.status()

    def result(self, job_id: str, name: str = RESULT) -> Path:
        """The file of a job that is done. Raises `not_found`, or `conflict` while there is none."""
        job = self.find(job_id)
        if job.state != "done":
            why = f": {job.error.message}" if job.error else "."
            raise PopulaceError("conflict", f"The job is {job.state}{why}", "There is a result when it is done.")
        path = self.store.path(job_id, name)
        if not path.is_file():
            raise PopulaceError("not_found", "The result is not there any more.", "Generate the person again.")
        return path

    def stats(self, job_id: str) -> Path:
        return self.result(job_id, STATS)

    # ---------------------------------------------------------------------------------------------------- listening

    async def listen(self, client: str) -> AsyncIterator[JobStatus | None]:
        """The state of every job of this client, then every change; None when there was none for a while.

        As long as somebody listens, the backend lives. The newest status of a job replaces older ones not yet taken.
        """
        listener = _Listener(client, {job.id: job for job in self._jobs.values() if job.client == client})
        self._listeners.add(listener)
        self._leases_changed.set()
        try:
            while not self._closing:
                while listener.pending:
                    yield listener.pending.pop(next(iter(listener.pending))).status()
                listener.news.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(KEEP_ALIVE_S):
                        await listener.news.wait()
                if not listener.pending:
                    yield None
        finally:
            self._listeners.discard(listener)
            self._leases_changed.set()

    async def abandoned(self) -> None:
        """Returns when nobody listened for long enough."""
        limit = FIRST_LEASE_S
        while True:
            self._leases_changed.clear()
            try:
                async with asyncio.timeout(None if self._listeners else limit):
                    await self._leases_changed.wait()
            except TimeoutError:
                return
            limit = LAST_LEASE_S

    def end_streams(self) -> None:
        self._closing = True
        for listener in self._listeners:
            listener.news.set()

    def _publish(self, job: Job) -> None:
        for listener in self._listeners:
            if listener.client == job.client:
                listener.pending[job.id] = job
                listener.news.set()

    # ------------------------------------------------------------------------------------------------------ working

    async def _work(self) -> None:
        """One job after the other, for ever. The worker is started ahead of the first job."""
        while True:
            self._wake.clear()
            broken = await self.worker.ensure()
            job = self._queue.pop()
            if job is None:
                await self._wake.wait()
                continue
            try:
                if broken is not None:
                    await self._finish(job, "failed", broken)
                else:
                    await self._perform(job)
            except Exception:
                log.exception("job %s", job.id)
                bug = PopulaceError("internal_error", "The generator stumbled over this job.", "See the log.")
                await self._finish(job, "failed", bug)

    async def _perform(self, job: Job) -> None:
        try:
            request = await self._on_disk(self.store.read_request, job.id)
        except PopulaceError as error:
            await self._finish(job, "failed", error)
            return
        if job.state != "queued":  # cancelled meanwhile
            return
        job.state, job.stage, job.fraction, job.started = "running", "starting", 0.0, time.monotonic()
        job.attempts += 1
        self._publish(job)

        def heard(stage: str, fraction: float) -> None:
            if job.state == "running":
                job.stage, job.fraction = stage, max(fraction, job.fraction)
                self._publish(job)

        try:
            job.bytes = await self.worker.perform(
                job.id, request, self.store.path(job.id), self._settings.job_deadline_s, heard
            )
            problem = None
        except Cancelled as error:
            problem = error
        except WorkerDied:
            if job.attempts < ATTEMPTS and job.state == "running":
                log.warning("job %s is tried again", job.id)
                job.state, job.stage, job.fraction = "queued", "", 0.0
                self._queue.push(job, first=True)
                self._publish(job)
                return
            problem = PopulaceError("worker_crashed", f"The worker process died {job.attempts} times in this job.",
                                    "Try a smaller grid or texture; the log says more.")  # fmt: skip
        except PopulaceError as error:
            problem = error
        if job.state == "cancelling" or isinstance(problem, Cancelled):
            await self._cancelled(job)
        elif problem is not None:
            await self._finish(job, "failed", problem)
        else:
            await self._finish(job, "done")
            await self._evict()

    async def _finish(self, job: Job, state: JobState, problem: PopulaceError | None = None) -> None:
        """Write the end down, then tell. If it cannot be written, a later server would only run the job again."""
        error, fraction = Error.of(problem) if problem else None, 1.0 if state == "done" else job.fraction
        ended = replace(job, state=state, stage="", error=error, fraction=fraction, ended=time.time())
        if state == "cancelled":
            job.state = "cancelling"  # so that nobody starts or ends it while the disk writes
        try:
            await self._on_disk(self.store.finish, ended.status(), ended.ended)
        except PopulaceError as trouble:
            log.error("the end of job %s could not be written: %s", job.id, trouble)
        if job.state == "cancelling" and state != "cancelled":  # accepted while the disk wrote
            await self._cancelled(job)
            return
        job.state, job.stage, job.error, job.fraction, job.ended = state, "", error, fraction, ended.ended
        self.images.touch(job.images)
        self._publish(job)

    async def _cancelled(self, job: Job) -> None:
        """An accepted cancel wins over a late result."""
        job.bytes = 0
        await self._on_disk(self.store.drop_result, job.id)
        await self._finish(job, "cancelled")

    # ----------------------------------------------------------------------------------------------------- old ones

    async def _keep_evicting(self) -> None:
        while True:
            await self._evict()
            await asyncio.sleep(_EVICT_INTERVAL_S)

    async def _evict(self) -> None:
        """Forget what is too old or too much, oldest first; never the newest result."""
        over = sorted((job for job in self._jobs.values() if job.state in ENDED), key=lambda job: job.ended)
        size, count = sum(job.bytes for job in over), len(over)
        oldest = time.time() - self._settings.max_results_age_s
        gone = []
        for job in over[:-1]:
            if job.ended >= oldest and size <= self._settings.max_results_bytes and count <= MAX_KEPT_JOBS:
                break
            size, count = size - job.bytes, count - 1
            gone.append(self._jobs.pop(job.id).id)
        for job_id in gone:
            await self._on_disk(self.store.remove, job_id)
        await self._forget_images()

    async def _forget_images(self) -> None:
        for path in self.images.stale(self._needed()):
            await self._on_disk(path.unlink, True)

    def _needed(self) -> set[str]:
        """Images of jobs that have not ended."""
        return {image for job in self._jobs.values() if job.state not in ENDED for image in job.images}

    async def _on_disk(self, call: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *args)


def _job_from(stored: Stored) -> Job:
    job = Job(stored.id, stored.client, stored.seed, stored.family, stored.created, stored.digest,
              images=stored.images)  # fmt: skip
    if stored.status is not None:
        job.state, job.error, job.fraction = stored.status.state, stored.status.error, stored.status.fraction
        job.ended, job.bytes = stored.ended, stored.bytes
    return job
