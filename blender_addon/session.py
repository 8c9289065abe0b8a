# SPDX-License-Identifier: GPL-3.0-or-later
"""One Blender's dealings with the backend: the connection, the jobs, what to do when either breaks. No bpy.

A `Session` lives on an asyncio loop that somebody else runs: `tasks.py` pumps it from Blender's timer, `client.py` runs
it to the end. All its methods are called on that loop's thread; none of them blocks. The panel reads its attributes.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Final

from . import process
from .api import Address, Api, Unreachable
from .families import Family
from .messages import CLIENT_PREFIX, BackendError, Health, Request, Status, image_slots, is_image_id, is_inline
from .packet import Human, read

log = logging.getLogger(__name__)

WATCH_INTERVAL_S: Final = 2.0
CLOSE_INTERVAL_S: Final = 0.2
SHUTDOWN_TIMEOUT_S: Final = 5.0
SENT_LIFE_S: Final = 1200.0  # how long an image is taken to be there still; the backend keeps unused ones for an hour
MAX_CALLS: Final = 8  # at once; the backend refuses connections beyond 64, from all Blenders together


class Link(Enum):
    """State of the connection."""

    OFF = "off"
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    LOST = "lost"  # it worked, then broke
    FAILED = "failed"  # it never came up


@dataclass
class Job:
    """One person on the way. `tag` is whatever the caller wants to find again (where to put the person)."""

    request: Request
    tag: Any = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    human: Human | None = None  # the result, until somebody takes it
    taken: bool = False
    is_fetching: bool = False
    note: str = ""  # for the panel
    status: Status = field(init=False)

    def __post_init__(self) -> None:
        self.status = Status(self.id, "queued", "Waiting")

    @property
    def is_open(self) -> bool:
        """Whether something is still to come from the backend."""
        return not self.status.ended or (self.status.state == "done" and self.human is None and not self.taken)

    def fail(self, error: BackendError) -> None:
        self.status = replace(self.status, state="failed", error=error)


class Session:
    """The connection and all jobs of this Blender. `revision` grows whenever something visible changes."""

    def __init__(self, loop: asyncio.AbstractEventLoop, python: Callable[[], str]) -> None:
        self.client = f"{CLIENT_PREFIX}-{uuid.uuid4().hex[:12]}"
        self.link = Link.OFF
        self.stage = ""  # while starting
        self.error: BackendError | None = None  # why it is lost or failed
        self.details = ""  # the long text for the clipboard
        self.health: Health | None = None
        self.families: tuple[Family, ...] = ()  # of the last backend that was connected
        self.jobs: dict[str, Job] = {}
        self.revision = 0
        self._loop = loop
        self._python = python
        self._api: Api | None = None
        self._child: process.Child | None = None
        self._budget = process.RestartBudget()
        self._life: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._download = asyncio.Lock()  # one result at a time in memory
        self._calls = asyncio.Semaphore(MAX_CALLS)
        self._news = asyncio.Event()

    # ---------------------------------------------------------------------------------------------- what callers ask

    @property
    def open_jobs(self) -> list[Job]:
        return [job for job in self.jobs.values() if job.is_open]

    @property
    def arrived(self) -> list[Job]:
        """Results that nobody took yet, oldest first."""
        return [job for job in self.jobs.values() if job.human is not None and not job.taken]

    def family(self, name: str) -> Family | None:
        return next((family for family in self.families if family.name == name), None)

    def connect(self) -> None:
        """Find the backend or start it. Does nothing while that is under way or done."""
        if self._life is None or self._life.done():
            self.error, self.details = None, ""
            self._set(Link.STARTING, "Looking for the generator")
            self._life = self._loop.create_task(self._live())

    @property
    def trouble(self) -> BackendError | None:
        """What a person has to look at: the connection's error, or that the backend's worker keeps failing."""
        return self.error or (self.health.worker_error if self.health is not None else None)

    def restart(self) -> None:
        """After trouble: connect again, or let the backend start its worker again."""
        if self._api is None:
            self.connect()
        elif self.trouble is not None:
            self._spawn(self._restart_worker(self._api))

    def submit(self, job: Job) -> None:
        self.jobs[job.id] = job
        if self._api is not None:
            self._spawn(self._send(self._api, job))
        else:
            self.connect()
        self.touch()

    def cancel(self, job_id: str) -> None:
        job = self.jobs.get(job_id)
        if job is None or job.status.ended:
            return
        if self._api is None:
            job.status = replace(job.status, state="cancelled")
        else:
            job.status = replace(job.status, state="cancelling")
            self._spawn(self._cancel(self._api, job))
        self.touch()

    def fetch(self, job: Job) -> None:
        """Get the result of a job that is done once more."""
        job.taken, job.human = False, None
        if self._api is not None:
            self._spawn(self._fetch(self._api, job))
        else:
            self.connect()
        self.touch()

    def clear(self) -> int:
        """Forget the jobs that are over. Returns how many."""
        over = [job.id for job in self.jobs.values() if job.status.ended and not job.is_open and not self._waits(job)]
        for job_id in over:
            del self.jobs[job_id]
        self.touch()
        return len(over)

    def shutdown(self, start_again: bool = False) -> None:
        """Ask the backend to end, for every Blender that uses it. Open jobs are cancelled. With `start_again` the one
        that is installed now is started after it."""
        cancelled = self.open_jobs
        for job in cancelled:
            job.status = replace(job.status, state="cancelled")
        if self._life is not None and not self._life.done():
            self._set(Link.STOPPING, "Stopping")
            self._spawn(self._stop(self._api, cancelled, start_again))
        else:
            self._set(Link.OFF)
            if start_again:
                self.connect()

    async def result(self, job_id: str, heard: Callable[[Status], None] | None = None) -> Human:
        """Wait for a person; `heard` is told every status. Raises `BackendError` if job or backend fail for good."""
        job, told = self.jobs[job_id], None
        while True:
            if heard is not None and job.status != told:
                told = job.status
                heard(told)
            if job.human is not None:
                job.taken, human, job.human = True, job.human, None
                return human
            if job.status.state == "failed" and job.status.error is not None:
                raise job.status.error
            if job.status.state == "cancelled":
                raise BackendError("cancelled", "The job was cancelled.")
            if self.link in (Link.LOST, Link.FAILED) and self.error is not None:
                raise self.error
            await self._news.wait()

    async def export(self, job_id: str, form: str) -> bytes:
        """The result of a job that is done as a file of another format. Raises `BackendError`."""
        if self._api is None:
            raise Unreachable("it has gone")
        return bytes(await self._api.result(job_id, form))

    async def close(self) -> None:
        """Let go of the backend; it ends itself if nobody else holds it. Nothing of ours is left on the loop."""
        await _ended(lambda: [self._life, *self._tasks])
        self._drop_child()
        self._set(Link.OFF)

    def touch(self) -> None:
        """Something visible changed."""
        self.revision += 1
        self._news.set()
        self._news = asyncio.Event()

    # ------------------------------------------------------------------------------------------------ the connection

    async def _live(self) -> None:
        """From nothing to a standing connection, and until it is over."""
        while True:
            was_ready = False
            error = BackendError("internal_error", "The connection ended.")
            try:
                api = await self._reach()
                was_ready = True
                await self._hold(api)
            except* BackendError as group:
                error = _first(group)
            except* Exception as group:  # a bug of ours must not leave the panel grey for ever
                log.exception("session")
                error = BackendError("internal_error", f"The add-on stumbled ({type(_first(group)).__name__}).",
                                     "Restart the generator and report this.")  # fmt: skip
            self._api, self.health = None, None
            if self.link is Link.STOPPING:
                return  # `_stop` does the rest
            self.details = self._child.log_tail() if self._child else ""
            self._drop_child(terminate=not was_ready)
            still_runs = was_ready and isinstance(error, Unreachable) and await self._still_runs()
            if was_ready and (self.open_jobs or still_runs) and self._budget.take():
                self._set(Link.STARTING, "Connecting again" if still_runs else "It stopped unexpectedly, restarting")
                continue
            self.error = error
            if was_ready and isinstance(error, Unreachable):
                self.error = BackendError("backend_lost", "The generator stopped unexpectedly.")
            self._set(Link.LOST if was_ready else Link.FAILED)
            return

    async def _still_runs(self) -> bool:
        """Whether the backend is there after all: a Blender that was busy for long finds its connections timed out."""
        address = process.find_running()
        try:
            return address is not None and (await Api(address).health()).protocol > 0
        except BackendError:
            return False

    async def _reach(self) -> Api:
        """The API of a backend that answered and speaks our protocol; started if none runs."""
        address = process.find_running()
        if address is not None:
            try:
                return await self._greet(address)
            except Unreachable:
                log.info("the backend of the runtime file is gone")
        command = process.find_command(self._python())
        if command is None:
            raise BackendError("not_installed", "The generator was not found on this computer.", process.INSTALL_HINT)
        address = await process.start(command, self._set_child, lambda stage: self._set(Link.STARTING, stage))
        self._set(Link.STARTING, "Connecting")
        return await self._greet(address)

    async def _greet(self, address: Address) -> Api:
        api = Api(address)
        health = await api.health()
        health.check()
        self.health, self.families = health, await api.families()
        return api

    async def _hold(self, api: Api) -> None:
        """Listen until the connection breaks; then raise."""

        def opened() -> None:
            self._api = api
            self._set(Link.READY)
            for job in self.open_jobs:
                self._spawn((self._cancel if job.status.state == "cancelling" else self._send)(api, job))

        async def listen() -> None:
            await api.follow(self.client, opened, lambda status: self._heard(api, status))
            raise Unreachable("it ended")

        async def watch() -> None:
            while True:
                await asyncio.sleep(WATCH_INTERVAL_S)
                health = await api.health()
                if health != self.health:
                    self.health = health
                    self.touch()
                if self._child is not None and self._child.ended() is not None:
                    self._drop_child()  # it found another Blender's backend and ended

        async with asyncio.TaskGroup() as group:
            group.create_task(listen())
            group.create_task(watch())

    async def _restart_worker(self, api: Api) -> None:
        try:
            self.health = await api.restart_worker()
        except BackendError as error:
            log.warning("worker restart: %s", error)
        self.touch()

    async def _stop(self, api: Api | None, cancelled: list[Job], start_again: bool) -> None:
        if api is not None and self._life is not None:
            try:
                async with asyncio.timeout(SHUTDOWN_TIMEOUT_S):
                    for job in cancelled:  # else the next backend would take them up again
                        await self._cancel(api, job)
                    await api.shutdown()
                    await asyncio.wait([self._life])
                    while self._child is not None and self._child.ended() is None:
                        await asyncio.sleep(process.POLL_S)
            except (BackendError, TimeoutError) as error:
                log.warning("shutdown: %s", error)
        await _ended(lambda: [self._life])
        self._api, self.health = None, None
        self._drop_child(terminate=True)
        self._set(Link.OFF)
        if start_again:
            self.connect()

    # ------------------------------------------------------------------------------------------------------ the jobs

    async def _send(self, api: Api, job: Job) -> None:
        try:
            async with self._calls:
                status = await api.submit(job.id, self.client, await _with_images(api, job.request))
            if job.status.state == "queued" or status.ended:  # the event stream may have told newer things meanwhile
                self._heard(api, status)
        except Unreachable:
            pass  # sent again with the next connection
        except BackendError as error:
            job.fail(error)
            self.touch()

    async def _cancel(self, api: Api, job: Job) -> None:
        try:
            async with self._calls:
                await api.cancel(job.id)
        except Unreachable:
            pass
        except BackendError as error:  # unknown there: nothing to wait for
            log.info("cancel %s: %s", job.id, error)
            job.status = replace(job.status, state="cancelled")
            self.touch()

    async def _fetch(self, api: Api, job: Job) -> None:
        if job.is_fetching or job.human is not None or job.taken:
            return
        job.is_fetching = True
        try:
            async with self._download:
                data = await api.result(job.id)
                await asyncio.sleep(0)  # reading takes milliseconds: after a full tick, in the next one
                job.human = read(data)
        except Unreachable:
            pass  # the next connection reports the job as done again
        except BackendError as error:
            job.fail(error)
        finally:
            job.is_fetching = False
        self.touch()

    def _heard(self, api: Api, status: Status) -> None:
        job = self.jobs.get(status.id)
        if job is None or not job.is_open or (job.status.state == "cancelling" and not status.ended):
            return
        if status != job.status:
            job.status = status
            self.touch()
        if status.state == "done":
            self._spawn(self._fetch(api, job))

    # ----------------------------------------------------------------------------------------------------- household

    def _waits(self, job: Job) -> bool:
        return job.human is not None and not job.taken

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _set(self, link: Link, stage: str = "") -> None:
        if (link, stage) != (self.link, self.stage) and not (self.link is Link.STOPPING and link is Link.STARTING):
            self.link, self.stage = link, stage
            self.touch()

    def _set_child(self, child: process.Child) -> None:
        self._child = child

    def _drop_child(self, terminate: bool = False) -> None:
        if self._child is not None:
            if terminate:
                self._child.terminate()
            self._child.forget()
            self._child = None


async def _with_images(api: Api, request: Request) -> dict[str, Any]:
    """The request as the backend wants it, once it has the images that the request names."""
    raw, ids, now = request.to_json(), {}, time.monotonic()
    for holder, key in image_slots(raw):
        image = holder[key]
        if is_image_id(image):
            continue
        known, at = api.sent.get(image, ("", 0.0))
        if image not in ids:
            ids[image] = known if known and now - at < SENT_LIFE_S else await api.send_image(image)
            if is_inline(image):  # a file may have changed
                api.sent[image] = ids[image], now
        holder[key] = ids[image]
    return raw


async def _ended(running: Callable[[], Sequence[asyncio.Task[Any] | None]]) -> None:
    """Cancel them until they have ended. Once is not enough: a task group forgets that it was cancelled if one of its
    tasks fails just then, and what was to end connects again."""
    while tasks := [task for task in running() if task is not None and not task.done()]:
        for task in tasks:
            task.cancel()
        for task in (await asyncio.wait(tasks, timeout=CLOSE_INTERVAL_S))[0]:
            if not task.cancelled():
                task.exception()  # looked at, or the loop complains


def _first(group: BaseExceptionGroup[Any]) -> Any:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
