# SPDX-License-Identifier: GPL-3.0-or-later
"""The real add-on in Blender against the real backend process over the real socket, with the family `capsule`."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from tests.blender_addon.conftest import PACKAGE, REPOSITORY
from tests.blender_addon.test_blender import people, pump_until
from tests.blender_addon.test_scene import read

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals")

GONE_S = 20  # it takes 5 s on a machine with nothing else to do; this is for those that have
SMALL = {"family": "capsule", "grid_resolution": 48, "faces": 2000, "texture_size": 512}


@pytest.fixture
def real(addon: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The add-on with the backend of this repository to start, in a home of its own."""
    home = tmp_path / "höme 中"
    home.mkdir()
    monkeypatch.setenv("POPULACE_HOME", str(home))
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    addon.bpy.context.preferences.addons[PACKAGE].preferences.python = sys.executable
    addon.home = home
    yield addon
    addon.bpy.context.preferences.addons[PACKAGE].preferences.python = ""
    state = addon.tasks.session()
    if state is not None and state.link is addon.session.Link.READY:
        state.shutdown()
        pump_until(addon, lambda: state.link is addon.session.Link.OFF)
    wait_for(lambda: all(child.poll() is not None for child in addon.process._left_alone), 10)
    addon.process._left_alone.clear()


def wait_for(condition: Any, timeout_s: float) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s
        time.sleep(0.02)


def backend(home: Path) -> psutil.Process:
    return psutil.Process(json.loads((home / "run" / "backend.json").read_text())["pid"])


def family_of(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def submit(addon: SimpleNamespace, count: int, **settings: Any) -> list[Any]:
    batch = addon.scene.Batch("Humans", count, (0.0, 0.0, 0.0))
    addon.tasks.submit([addon.messages.Request(seed=i, **SMALL | settings) for i in range(count)], batch)
    return list(addon.tasks.session().jobs.values())[-count:]


def test_generate_kill_restart_close(real: SimpleNamespace) -> None:
    """One backend for the whole story, since its start is what takes long."""
    bpy, link = real.bpy, real.session.Link
    seen: set[tuple[str, str]] = set()
    jobs = submit(real, 2)
    assert people(bpy) == []

    def finished() -> bool:
        seen.update((job.status.state, job.status.stage) for job in jobs)
        return all(job.taken for job in jobs)

    pump_until(real, finished, 180)
    assert [job.status.state for job in jobs] == ["done", "done"]
    assert len({stage for state, stage in seen if state == "running"}) > 1, "progress by stage was heard"
    state = real.tasks.session()
    assert state.link is link.READY

    roots = people(bpy)
    assert len(roots) == 2
    assert {root.populace.family for root in roots} == {"capsule"}
    assert sorted(root.populace.seed for root in roots) == ["0", "1"]
    for root in roots:
        meshes = [o for o in (root, *root.children) if o.type == "MESH"]
        assert meshes
        heights = []
        for mesh in meshes:
            faces = read(mesh.data.loops, "vertex_index", 1, np.int32).reshape(-1, 3)
            edges = Counter(tuple(sorted(edge)) for a, b, c in faces.tolist() for edge in ((a, b), (b, c), (c, a)))
            assert set(edges.values()) == {2}, "closed"
            assert not mesh.data.validate(verbose=False)
            image = mesh.data.materials[0].node_tree.nodes["Base Color"].image
            assert tuple(image.size) == (512, 512)
            assert np.ptp(np.array(image.pixels).reshape(-1, 4)[:, :3]) > 0.1, "striped, not blank"
            heights.append(read(mesh.data.vertices, "co", 3)[:, 2])
        assert min(z.min() for z in heights) == pytest.approx(0, abs=1e-5)
        assert 1.2 < max(z.max() for z in heights) < 2.3
        assert max(z.max() for z in heights) == pytest.approx(root.populace.height_m, abs=1e-4)

    # A wrong request is refused with a sentence, and nothing else breaks.
    wrong = submit(real, 1, family="nobody")[0]
    pump_until(real, lambda: wrong.status.ended, 180)
    assert wrong.status.state == "failed"
    assert "nobody" in str(wrong.status.error)

    # Cancel, long before the job would be done.
    slow = submit(real, 1, grid_resolution=256)[0]
    pump_until(real, lambda: slow.status.state == "running", 180)
    state.cancel(slow.id)
    pump_until(real, lambda: slow.status.ended, 180)
    assert slow.status.state == "cancelled"

    # Another Blender (here a script) finds this backend, and when it goes, this one's goes on.
    process = backend(real.home)
    assert real.client.Client(sys.executable).generate(seed=5, **SMALL).recipe["seed"] == 5
    assert backend(real.home) == process
    assert state.link is link.READY

    # kill -9 while idle: the panel says so and offers a restart; then the next job works.
    before = family_of(backend(real.home))
    before[0].send_signal(signal.SIGKILL)
    pump_until(real, lambda: state.link is link.LOST, 180)
    assert "stopped unexpectedly" in state.error.message
    wait_for(lambda: not any(is_alive(process) for process in before), 15)
    bpy.ops.populace.start_backend()
    assert state.error is None
    pump_until(real, lambda: state.link is link.READY, 180)
    again = submit(real, 1)[0]
    pump_until(real, lambda: again.taken, 180)
    assert len(people(bpy)) == 3
    first, last = (root for root in people(bpy) if root.populace.seed == "0")
    assert first.populace.recipe == last.populace.recipe, "the same person, by the same recipe"

    # kill -9 in mid-job: it is started again and the job is finished.
    slow = submit(real, 1, grid_resolution=96)[0]
    pump_until(real, lambda: slow.status.state == "running", 180)
    backend(real.home).send_signal(signal.SIGKILL)
    pump_until(real, lambda: slow.taken, 180)
    assert slow.status.state == "done"

    # The add-on goes (Blender quits): the backend ends by itself, with its worker.
    left = family_of(backend(real.home))
    assert len(left) >= 2
    real.tasks.unregister()
    wait_for(lambda: not any(is_alive(process) for process in left), GONE_S)
    real.tasks.register()
    assert not (real.home / "run" / "backend.json").exists()


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_two_blenders_share_one_generator_and_one_quits(real: SimpleNamespace) -> None:
    """The second Blender is a process of its own with the add-on's session; it goes on when the first one leaves."""
    code = (
        "import asyncio, sys\n"
        "from blender_addon.session import Job, Session\n"
        "from blender_addon.messages import Request\n"
        "async def main():\n"
        "    session = Session(asyncio.get_running_loop(), lambda: '/nowhere')\n"
        "    for seed in (1, 2):\n"
        "        job = Job(Request(family='capsule', seed=seed, grid_resolution=32, texture_size=512))\n"
        "        session.submit(job)\n"
        "        human = await session.result(job.id)\n"
        "        print(human.asset['recipe']['seed'], flush=True)\n"
        "        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)\n"
        "    await session.close()\n"
        "asyncio.run(main())\n"
    )
    job = submit(real, 1)[0]
    pump_until(real, lambda: job.taken, 180)
    left = family_of(backend(real.home))
    second = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert second.stdin is not None
    assert second.stdout is not None
    with second:
        assert second.stdout.readline() == "1\n", "by the generator that runs: it could start none"
        real.tasks.unregister()
        time.sleep(7)  # longer than the generator outlives its last Blender
        assert all(is_alive(process) for process in left[:1])
        second.stdin.write("\n")
        second.stdin.flush()
        assert second.stdout.readline() == "2\n"
        second.stdin.write("\n")
        second.stdin.flush()
    assert second.returncode == 0
    real.tasks.register()
    wait_for(lambda: not any(is_alive(process) for process in left), GONE_S)


def test_the_bench_measures_ticks_and_cycles(real: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    command = importlib.import_module(f"{PACKAGE}.command_line")
    asked = ["bench", "--people", "2", "--cycles", "5"]
    for name, value in SMALL.items():
        asked += [f"--{name.replace('_', '-')}", str(value)]
    assert command.main(asked) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ticks_inserting"]["count"] == 2
    assert found["ticks_working"]["count"] > 2
    for name in ("ticks_working", "ticks_inserting"):
        row = found[name]
        assert 0 < row["p50_ms"] <= row["p99_ms"] <= row["max_ms"]
    assert found["cycles"]["leaked"] == {}
    assert found["cycles"]["undo"]["count"] == 5
    assert command.main(["bench", "--family", "unicorn", "--people", "1"]) == 1
    assert "unicorn" in capsys.readouterr().err


def test_blender_killed_in_mid_job_leaves_no_process(real: SimpleNamespace) -> None:
    """A second process plays the Blender that is killed; it holds the lease through the add-on's own session."""
    code = (
        "import asyncio, sys\n"
        "from blender_addon.session import Job, Session\n"
        "from blender_addon.messages import Request\n"
        "async def main():\n"
        "    session = Session(asyncio.get_running_loop(), lambda: sys.executable)\n"
        "    session.submit(Job(Request(family='capsule', grid_resolution=256)))\n"
        "    while session.open_jobs and next(iter(session.jobs.values())).status.state != 'running':\n"
        "        await asyncio.sleep(0.02)\n"
        "    print('running', flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    blender = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert blender.stdout is not None
    with blender:
        assert blender.stdout.readline() == "running\n"
        left = family_of(backend(real.home))
        blender.kill()
    wait_for(lambda: not any(is_alive(process) for process in left), GONE_S)
