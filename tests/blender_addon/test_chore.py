# SPDX-License-Identifier: GPL-3.0-or-later
"""A long job outside: what it says is shown, what it hides is found out, and nothing of it is left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blender_addon import chore
from blender_addon.chore import Chore, Phase
from blender_addon.messages import BackendError

FAKE = Path(__file__).with_name("fake_installer.py")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and process groups")


@pytest.fixture
def begin() -> Iterator[Callable[[str], Chore]]:
    made = []

    def start(mode: str) -> Chore:
        made.append(Chore("Set-up", [sys.executable, str(FAKE), mode]))
        return made[-1]

    yield start
    for one in made:
        one.close()


def until(job: Chore, phase: Phase, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while job.phase is not phase:
        assert time.monotonic() < end, f"still {job.phase}"
        assert not job.ended, (job.phase, job.error)
        began = time.perf_counter()
        job.poll()
        assert time.perf_counter() - began < 5  # it never waits for the process
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pid: int) -> bool:
    end = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_alive(pid)


def test_what_it_says_is_known(begin: Callable[[str], Chore]) -> None:
    job = begin("good")
    until(job, Phase.DONE)
    assert (job.stage, job.text, job.fraction, job.error) == ("Downloading", "torch 50 of 200 MB", 1.0, None)
    assert job.result == {"version": "1.2.3", "bytes": 5}
    assert not job.poll()
    assert not job._folder.exists()


def test_time_left_is_at_the_pace_of_the_stage(
    begin: Callable[[str], Chore], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, now = begin("good"), 1000.0
    monkeypatch.setattr(chore.time, "monotonic", lambda: now)
    for at, stage, fraction, left in (
        (1000, "Making the environment", 0.01, None),
        (1300, "Downloading", 0.05, None), (1301, "Downloading", 0.08, None), (1304, "Downloading", 0.25, 15.0),
        (1310, "Unpacking", 0.5, None), (1330, "Unpacking", 0.55, 180.0),
    ):  # fmt: skip
        now = float(at)
        job._take({"event": "progress", "stage": stage, "fraction": fraction})
        assert job.eta_s == (left if left is None else pytest.approx(left))
    monkeypatch.undo()


def test_a_failure_speaks(begin: Callable[[str], Chore]) -> None:
    job = begin("failing")
    until(job, Phase.FAILED)
    assert job.error == BackendError("out_of_disk", "The disk is full.", "Free some space.")


def test_a_program_that_is_not_there_is_an_error() -> None:
    with pytest.raises(BackendError, match="could not be started"):
        Chore("Set-up", ["/nowhere/python"])


def test_death_is_noticed_and_its_children_go_too(begin: Callable[[str], Chore]) -> None:
    job = begin("dying")
    until(job, Phase.FAILED)
    assert job.error is not None
    assert "code -9" in job.error.message
    assert job.error.hint == "Killed by a test"
    assert gone(int(job.text))


def test_lies_are_not_believed(begin: Callable[[str], Chore]) -> None:
    job = begin("lying")
    until(job, Phase.FAILED)
    assert job.fraction == 1.0  # clamped
    assert job.result == {}
    assert job.error is not None
    assert "code 9" in job.error.message


def test_cancel_is_obeyed(begin: Callable[[str], Chore]) -> None:
    job = begin("slow")
    while not job.stage:
        job.poll()
    job.cancel()
    assert job.phase is Phase.CANCELLING
    until(job, Phase.CANCELLED)
    assert gone(job._process.pid)


def test_one_that_does_not_obey_is_ended_by_force(
    begin: Callable[[str], Chore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chore, "CANCEL_PATIENCE_S", 0.2)
    job = begin("stubborn")
    while job.stage != "Unpacking":
        job.poll()
    job.cancel()
    until(job, Phase.CANCELLED)
    assert gone(job._process.pid)
    assert gone(int(job.text))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_f30_it_does_not_outlive_whoever_started_it() -> None:
    """Blender is killed: nobody cancels, the pipe just closes."""
    code = (f"import sys, time; sys.path.insert(0, {str(FAKE.parents[2])!r})\n"
            "from blender_addon.chore import Chore\n"
            f"job = Chore('x', [sys.executable, {str(FAKE)!r}, 'slow'])\n"
            "while not job.stage: job.poll()\n"
            "print(job._process.pid, job._folder, flush=True); time.sleep(60)")  # fmt: skip
    blender = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with blender:
        assert blender.stdout is not None
        pid, folder = blender.stdout.readline().split()
        assert is_alive(int(pid))
        blender.kill()
    assert gone(int(pid))
    shutil.rmtree(folder)
