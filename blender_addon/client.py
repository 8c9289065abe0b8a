# SPDX-License-Identifier: GPL-3.0-or-later
"""The blocking door to the backend: for scripts in and outside Blender, `blender -b` and farms. No bpy, no packages
but numpy.

    from blender_addon.client import Client, Request           # in Blender: from bl_ext.user_default.populace.client

    with Client() as client:                                   # one connection; starts the backend if none runs
        human = client.generate(seed=7, prompt="tall woman, red shirt")
        vertices = human.parts[0].vertices                     # numpy: metres, Y up, facing +Z
        for human in client.generate_all(Request(seed=seed, pose="walking") for seed in range(20)):
            ...
        glb = client.export("glb", seed=7, lods=2)             # the bytes of a file

Without `with`, each call has a connection of its own, and the backend ends a few seconds after the last one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Final, Literal, Self, Unpack

from .messages import BackendError, Request, RequestFields, Status
from .packet import Human
from .session import Job, Session

__all__ = ["BackendError", "Client", "Human", "Request", "Status"]

AHEAD: Final = 2  # jobs queued at once: the backend never waits, memory stays small


class Client:
    """Makes people, one after the other. All calls raise `BackendError`.

    `python` is the interpreter that has the backend installed; by default it is looked for. `heard` is called with the
    status of the job that is waited for, whenever it changes.
    """

    def __init__(self, python: str = "", heard: Callable[[Status], None] | None = None) -> None:
        self._python = python
        self._heard = heard
        self._open = contextlib.ExitStack()
        self._line: tuple[asyncio.Runner, Session] | None = None  # between `with` and its end

    def __enter__(self) -> Self:
        self._line = self._open.enter_context(self._connection())
        return self

    def __exit__(self, *_: object) -> None:
        self._line = None
        self._open.close()

    def generate(self, **settings: Unpack[RequestFields]) -> Human:
        """One person; `settings` are the fields of `Request`."""
        with contextlib.closing(self.generate_all([Request(**settings)])) as humans:
            return next(humans)

    def generate_all(self, requests: Iterable[Request]) -> Generator[Human]:
        """A person per request, in order, over one connection. Ends at the first that fails."""
        with self._connection() as (runner, session):
            waiting: list[Job] = []
            left = iter(requests)
            try:
                while True:
                    while len(waiting) < AHEAD and (request := next(left, None)) is not None:
                        waiting.append(Job(request))
                        session.submit(waiting[-1])
                    if not waiting:
                        return
                    yield runner.run(session.result(waiting[0].id, self._heard))
                    del session.jobs[waiting.pop(0).id]
            finally:
                for job in waiting:  # nobody will take them
                    session.cancel(job.id)

    def export(self, form: Literal["glb"] = "glb", **settings: Unpack[RequestFields]) -> bytes:
        """One person as a file. The backend sends GLB; `populace generate --format` writes the other formats."""
        job = Job(Request(**settings))
        with self._connection() as (runner, session):
            session.submit(job)
            runner.run(session.result(job.id, self._heard))
            return runner.run(session.export(job.id, form))

    @contextlib.contextmanager
    def _connection(self) -> Iterator[tuple[asyncio.Runner, Session]]:
        if self._line is not None:
            yield self._line
            return
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            session = Session(runner.get_loop(), lambda: self._python)
            try:
                yield runner, session
            finally:
                runner.run(session.close())
