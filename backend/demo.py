# SPDX-License-Identifier: GPL-3.0-or-later
"""`populace demo`: three people through the whole road, as a user of Blender would have them, each in another pose.

The backend is started by the add-on's own code and spoken to over its real socket; the add-on inserts the people into a
headless Blender. No torch in this process. This is the one module of the backend that uses the add-on's.
"""

from __future__ import annotations

import http.client
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from backend import __version__, packet, poses, studio
from backend.progress import Progress
from backend.protocol import PopulaceError
from blender_addon import process
from blender_addon.client import Client
from blender_addon.messages import BackendError, Request, Status
from blender_addon.packet import Human

POSES = ("standing_4", "contrapposto", "walking")  # of the people in the scene, one each
PICTURE_SIZE = (1280, 720)
_STARTED, _MADE, _INSERTED = 0.04, 0.5, 0.52  # of the whole; the rest is rendering


def run(out: Path, seed: int, family: str) -> None:
    """Write people.blend, people.png, people/*.glb and report.json into `out`. Raises `PopulaceError`."""
    begin = time.perf_counter()
    (out / "people").mkdir(parents=True, exist_ok=True)
    with Progress(plain=True) as progress:
        progress.show("starting Blender", 0)
        bpy = studio.start()
        requests = [Request(seed=seed + i, family=family) for i in range(len(POSES))]
        people = _make(requests, out, progress)
        seconds, objects = {"people": time.perf_counter() - begin}, []
        progress.show("inserting into the scene", _MADE)
        for i, ((human, facts), name) in enumerate(zip(people, POSES)):
            facts["insert_s"], found = studio.insert(bpy, in_pose(human, name), i, len(people))
            facts["pose"] = name
            objects += found
        studio.light(bpy, max(human.height_m for human, _ in people))
        progress.show("rendering", _INSERTED)
        start = time.perf_counter()
        studio.photograph(bpy, objects, out / "people.png", PICTURE_SIZE,
                          lambda f: progress.show("rendering", _INSERTED + (1 - _INSERTED) * f))  # fmt: skip
        seconds["render"] = time.perf_counter() - start
        studio.save(bpy, out / "people.blend")
    seconds["total"] = time.perf_counter() - begin
    report = {
        "people": [facts for _, facts in people],
        "seconds": {name: round(s, 3) for name, s in seconds.items()},
        "versions": {"populace": __version__, "python": platform.python_version(), "blender": bpy.app.version_string,
                     "platform": platform.platform()},
    }  # fmt: skip
    packet.write_file(out / "report.json", json.dumps(report, indent=2).encode())
    print(f"{len(people)} people in {seconds['total']:.0f} s: {out / 'people.png'}, {out / 'people.blend'}")


def in_pose(human: Human, name: str) -> Human:
    """A person in rest pose, posed; without a skeleton it stays as it is."""
    if human.rig is None:
        return human
    full = [part for part in human.parts if part.lod == 0]
    rotations, translation = poses.place(name, human.rig, full)
    return replace(human, rig=replace(human.rig, rotations=rotations, translation=translation))


def _make(requests: Sequence[Request], out: Path, progress: Progress) -> list[tuple[Human, dict[str, Any]]]:
    """Every person with the facts for the report; GLBs written as the backend sends them, in rest pose."""
    people: list[tuple[Human, dict[str, Any]]] = []
    job = ""

    def heard(status: Status) -> None:
        nonlocal job
        job = status.id
        done = len(people) + (status.fraction if status.state == "running" else status.state == "done")
        whole = _STARTED + (_MADE - _STARTED) * done / len(requests)
        progress.show(f"person {len(people) + 1} of {len(requests)}: {status.stage or status.state}", whole)

    progress.show("starting the backend", _STARTED / 2)
    try:
        for request, human in zip(requests, Client(sys.executable, heard).generate_all(requests)):
            facts = {"seed": request.seed, "family": request.family, "height_m": human.height_m,
                     "parts": human.asset["parts"], "stats": json.loads(_get(f"/v1/jobs/{job}/stats"))}  # fmt: skip
            path = out / "people" / f"person_{request.seed:06d}.glb"
            packet.write_file(path, _get(f"/v1/jobs/{job}/result?format=glb"))
            people.append((human, facts | {"glb": f"people/{path.name}"}))
    except BackendError as error:
        code: Any = error.code if error.code in ("weights_missing", "weights_corrupt", "out_of_disk", "unknown_family",
                                                 "no_gpu", "out_of_gpu_memory") else "internal_error"  # fmt: skip
        raise PopulaceError(code, error.message, error.hint) from None
    return people


def _get(path: str) -> bytes:
    """One more question to the running backend, over the same socket."""
    address = process.find_running()
    if address is None:
        raise PopulaceError("worker_crashed", "The backend has gone in mid-demo.", "Run it again.")
    connection = http.client.HTTPConnection("127.0.0.1", address.port, timeout=60)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {address.token}"})
        reply = connection.getresponse()
        body = reply.read()
    finally:
        connection.close()
    if reply.status != 200:
        raise PopulaceError("internal_error", f"The backend answered {reply.status} to {path.partition('?')[0]}.")
    return body
