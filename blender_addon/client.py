# SPDX-License-Identifier: GPL-3.0-or-later
"""The blocking door to the backend, for scripts, `blender -b` and farms, where Blender's timers never fire. No bpy.

    from .client import Client
    human = Client().generate(seed=7)
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Generator, Iterable
from typing import Any, Final

from .messages import Request, Status
from .packet import Human
from .session import Job, Session

AHEAD: Final = 2  # jobs queued at once: the backend never waits, memory stays small


class Client:
    """Makes people, one after the other. Starts the backend if none runs; it ends soon after the last call.

    `python` is the interpreter that has the backend installed; by default it is looked for. `heard` is called with the
    status of the job that is waited for, whenever it changes.
    """

    def __init__(self, python: str = "", heard: Callable[[Status], None] | None = None) -> None:
        self._python = python
        self._heard = heard

    def generate(self, seed: int = 0, **settings: Any) -> Human:
        """One person; `settings` are the other fields of `Request`. Raises `BackendError`."""
        with contextlib.closing(self.generate_all([Request(seed=seed, **settings)])) as humans:
            return next(humans)

    def generate_all(self, requests: Iterable[Request]) -> Generator[Human]:
        """A person per request, in order, over one connection. Raises `BackendError` at the first that fails."""
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            session = Session(runner.get_loop(), lambda: self._python)
            waiting: list[Job] = []
            left = iter(requests)
            try:
                while True:
                    while len(waiting) < AHEAD and (request := next(left, None)) is not None:
                        waiting.append(Job(request))
                        session.submit(waiting[-1])
                    if not waiting:
                        return
                    job = waiting.pop(0)
                    yield runner.run(session.result(job.id, self._heard))
                    del session.jobs[job.id]
            finally:
                runner.run(session.close())
