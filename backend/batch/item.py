# SPDX-License-Identifier: GPL-3.0-or-later
"""One person of a plan, made in a worker process and written down. What executors run, here or on other machines.

Tasks and answers are JSON objects, so that any executor can carry them. One thread computes a person, whatever the
machine: the number of threads changes sums in their last digit, and files of all machines shall be equal.
"""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import signal
import threading
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from backend.batch import results
from backend.batch.plan import Item
from backend.photo.album import Album
from backend.protocol import Error, PopulaceError
from backend.settings import Settings
from backend.worker import as_problem, free_memory

PAUSES_S: Final = (1.0, 2.0, 4.0, 8.0, 16.0)  # before writing again; a network folder may be away for half a minute
_FINAL_ERRNOS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES})
_one_at_a_time = threading.Lock()  # the model, numba and Blender are not made for two threads


def begin_worker() -> None:
    """In a new worker process: Ctrl-C is the parent's business, and without a parent there is nothing to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, name="parent", daemon=True).start()


def make(task: dict[str, Any]) -> dict[str, Any]:
    """Make the person of `task`: {"item": ..., "out": folder, "device": ...}. Never raises for what can be told.

    Returns {"id", "seconds"} and either "files" or "error" with code, message and hint.
    """
    begin = time.perf_counter()
    with _one_at_a_time:
        try:
            facts = _make(Item.from_json(task["item"]), Path(task["out"]), task["device"])
            found: dict[str, Any] = {"files": sorted(facts["files"]), "packet_sha256": facts["packet_sha256"]}
        except Exception as error:
            found = {"error": Error.of(as_problem(error)).model_dump()}
        finally:
            free_memory()
    return {"id": task["item"]["id"], "seconds": round(time.perf_counter() - begin, 3), **found}


def _make(item: Item, out: Path, device: str) -> dict[str, Any]:
    from backend import interchange, packet, pipeline

    settings = Settings.load(device=device)
    deadline = time.monotonic() + settings.job_deadline_s

    def step(stage: str, fraction: float) -> None:
        if time.monotonic() > deadline:
            raise PopulaceError("deadline_exceeded", f"It took longer than {settings.job_deadline_s:.0f} s.",
                                "Set POPULACE_JOB_DEADLINE_S, or make it smaller.")  # fmt: skip

    model = _model(item.request.family, settings)
    asset, _ = pipeline.generate(item.request, model, step, Album(item.images))
    facts = {"packet_sha256": hashlib.sha256(packet.dumps(asset)).hexdigest(), "seed": item.request.seed,
             "family": model.name, "attributes": asset.meta["attributes"], "stats": asset.meta["stats"]}  # fmt: skip
    for pause in (*PAUSES_S, None):
        try:
            with results.making(out, item, facts) as folder:
                for form in item.formats:
                    interchange.write(asset, folder, item.id, form, item.preset)
            break
        except OSError as error:
            if pause is None or error.errno in _FINAL_ERRNOS:
                raise
            time.sleep(pause)
    found = results.done(out, item)
    if found is None:
        raise PopulaceError("internal_error", f"{item.id} was written and is not there.", "Is the folder shared well?")
    return found


@lru_cache(maxsize=1)
def _model(family: str, settings: Settings) -> Any:
    import numba
    import torch

    from backend import families

    torch.set_num_threads(1)
    numba.set_num_threads(1)
    return families.load(family, settings.device, settings)
