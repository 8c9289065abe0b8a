# SPDX-License-Identifier: GPL-3.0-or-later
"""The training loop: resuming, several processes, what happens when numbers, disks or patience run out."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from backend.protocol import PopulaceError
from backend.training import checkpoint
from backend.training.loop import Box, Phase, World, run


class Regression:
    """Fits y = W x with W known, from noise that depends on (seed, step, sample) only."""

    name = "toy"
    batch = 4

    def __init__(self, seed: int = 0, bad: range = range(0)) -> None:
        torch.manual_seed(seed)
        self.seed, self.bad = seed, bad
        self.net = nn.Linear(3, 2)
        self.spare = nn.Linear(3, 2)  # touched by odd samples only
        self.optimiser = torch.optim.Adam([*self.net.parameters(), *self.spare.parameters()], 0.05)
        self.average = checkpoint.MovingAverage(dict(self.net.named_parameters()), 20)
        self.after_step = None
        self.tells = False

    def before(self) -> dict[str, float]:
        return {"start": float(self.net.weight.detach().sum())} if self.tells else {}

    def phases(self, step: int, samples: range) -> Iterator[Phase]:
        def loss() -> tuple[Tensor, dict[str, float]]:
            total = torch.zeros(())
            for i in samples:
                x = torch.from_numpy(np.random.default_rng([self.seed, step, i]).normal(size=3).astype(np.float32))
                y = torch.stack([x.sum(), x[0] - 2 * x[1]])
                total = total + ((self.net(x) + (self.spare(x) if i % 2 else 0) - y) ** 2).mean()
            if step in self.bad:
                total = total * math_nan
            return total / len(samples), {"seen": float(len(samples))}

        yield Phase("fit", self.optimiser, loss, clip=10)

    def after(self, step: int) -> dict[str, float]:
        self.average.update(self.batch, (step + 1) * self.batch)
        if self.after_step:
            self.after_step(step)
        return {}

    def state(self) -> dict[str, Tensor]:
        return (checkpoint.with_prefix("net", self.net.state_dict())
                | checkpoint.with_prefix("spare", self.spare.state_dict())
                | checkpoint.with_prefix("average", self.average.values)
                | checkpoint.with_prefix("optimiser", checkpoint.pack_optimiser(self.optimiser)))  # fmt: skip

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.net.load_state_dict(checkpoint.under_prefix("net", state))
        self.spare.load_state_dict(checkpoint.under_prefix("spare", state))
        self.average.load(checkpoint.under_prefix("average", state))
        checkpoint.unpack_optimiser(self.optimiser, checkpoint.under_prefix("optimiser", state))

    def sheet(self) -> np.ndarray:
        return np.full((4, 6, 3), 200, np.uint8)


math_nan = float("nan")


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_it_learns_and_leaves_a_log_a_sheet_and_a_checkpoint(tmp_path: Path) -> None:
    outcome = run(Regression(), tmp_path, Box(max_steps=300, log_every=50), facts={"seed": 0})
    assert (outcome.steps, outcome.stopped) == (300, "steps")
    assert outcome.figures["fit/loss"] < 0.01
    assert [line["step"] for line in lines(tmp_path)] == [1, 50, 100, 150, 200, 250, 300]
    with Image.open(tmp_path / "sheets" / "0000300.png") as picture:
        assert picture.size == (6, 4)
    tensors, facts = checkpoint.load(tmp_path / "checkpoint.safetensors")
    assert facts == {"seed": 0, "steps": 300}
    assert tensors["net/weight"].numpy() + tensors["spare/weight"].numpy() / 2 == pytest.approx(
        np.array([[1, 1, 1], [1, -2, 0]]), abs=0.2
    )
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_curve_starts_before_the_first_step(tmp_path: Path) -> None:
    stage = Regression()
    stage.tells, start = True, float(stage.net.weight.detach().sum())
    run(stage, tmp_path, Box(max_steps=2))
    stage = Regression()
    stage.tells = True
    run(stage, tmp_path, Box(max_steps=4))
    told = lines(tmp_path)
    assert told[0]["step"] == 0
    assert told[0]["start"] == pytest.approx(start, rel=1e-4)
    assert ["start" in line for line in told].count(True) == 1


def test_a_run_in_pieces_is_the_run_in_one_go(tmp_path: Path) -> None:
    run(Regression(), tmp_path / "whole", Box(max_steps=30), facts={"seed": 0})
    for end in (7, 8, 30):
        run(Regression(), tmp_path / "pieces", Box(max_steps=end), facts={"seed": 0})
    whole, pieces = ((tmp_path / k / "checkpoint.safetensors").read_bytes() for k in ("whole", "pieces"))
    assert whole == pieces
    other, _ = checkpoint.load(tmp_path / "whole" / "checkpoint.safetensors")
    assert not torch.equal(other["average/weight"], other["net/weight"])


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    run(Regression(), tmp_path, Box(max_steps=2), facts={"seed": 0})
    with pytest.raises(PopulaceError, match="holds another run"):
        run(Regression(1), tmp_path, Box(max_steps=4), facts={"seed": 1})


def test_it_is_boxed_in_time(tmp_path: Path) -> None:
    outcome = run(Regression(), tmp_path, Box(minutes=0.005))
    assert outcome.stopped == "time"
    assert 1 <= outcome.steps < 10**5
    assert checkpoint.load(tmp_path / "checkpoint.safetensors")[1]["steps"] == outcome.steps


def test_a_step_that_is_not_finite_is_skipped_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stage = Regression(bad=range(5, 7))
    before: dict[int, Tensor] = {}
    stage.after_step = lambda step: before.setdefault(step, stage.net.weight.detach().clone())
    outcome = run(stage, tmp_path, Box(max_steps=10, log_every=1))
    assert outcome.steps == 10
    assert sorted(before) == [0, 1, 2, 3, 4, 7, 8, 9]
    assert torch.isfinite(stage.net.weight).all()
    assert [line["step"] for line in lines(tmp_path) if "skipped" in line] == [6, 7]
    assert "not finite" in caplog.text


def test_three_in_a_row_end_the_run_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    run(Regression(), tmp_path, Box(max_steps=5))
    good = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(PopulaceError, match="loss was not a number") as caught:
        run(Regression(bad=range(6, 9)), tmp_path, Box(max_steps=50))
    assert str(tmp_path / "checkpoint.safetensors") in caught.value.hint
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == good


def test_a_full_disk_costs_nothing_that_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(Regression(), tmp_path, Box(max_steps=5))
    good = (tmp_path / "checkpoint.safetensors").read_bytes()

    def full(tensors: object, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"torn")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(PopulaceError) as caught:
        run(Regression(), tmp_path, Box(max_steps=9))
    assert caught.value.code == "out_of_disk"
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == good
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    run(Regression(), tmp_path, Box(max_steps=9))
    run(Regression(), tmp_path / "whole", Box(max_steps=9))
    assert [line["step"] for line in lines(tmp_path)] == [1, 5, 6, 9]  # the lines of the lost steps went
    assert (tmp_path / "whole" / "checkpoint.safetensors").read_bytes() == (
        tmp_path / "checkpoint.safetensors"
    ).read_bytes()


def test_an_interrupt_ends_the_run_after_the_step(tmp_path: Path) -> None:
    stage = Regression()
    stage.after_step = lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 11 else None
    usual = signal.getsignal(signal.SIGINT)
    outcome = run(stage, tmp_path, Box(max_steps=1000))
    assert (outcome.steps, outcome.stopped) == (12, "interrupted")
    assert signal.getsignal(signal.SIGINT) is usual
    run(Regression(), tmp_path, Box(max_steps=20))
    run(Regression(), tmp_path / "whole", Box(max_steps=20))
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == (
        tmp_path / "whole" / "checkpoint.safetensors"
    ).read_bytes()


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(b"torn")
    with pytest.raises(PopulaceError, match="not a checkpoint"):
        run(Regression(), tmp_path, Box(max_steps=1))


def test_moving_averages_in_closed_form() -> None:
    """Parameters that jump from 0 to 1 and stay: after k batches of b the average is 1 - 2^(-k b / half-life)."""
    p = nn.Parameter(torch.zeros(2))
    average = checkpoint.MovingAverage({"p": p}, 100)
    with torch.no_grad():
        p.fill_(1)
    for _ in range(5):
        average.update(batch=10, seen=10**6)
    assert average.values["p"].tolist() == pytest.approx([1 - 2 ** (-0.5)] * 2)
    with average.in_place():
        assert p.tolist() == pytest.approx([1 - 2 ** (-0.5)] * 2)
    assert p.tolist() == [1, 1]
    young = checkpoint.MovingAverage({"p": nn.Parameter(torch.zeros(1))}, 100)
    young.parameters["p"].data.fill_(1)
    young.update(batch=10, seen=200)  # half-life 10
    assert young.values["p"].item() == pytest.approx(0.5)


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    assert [list(World(r, 2).share(6)) for r in (0, 1)] == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="cannot be shared"):
        World(0, 4).share(6)


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    run(Regression(), tmp_path / "one", Box(max_steps=12))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = (
        "import sys, torch; sys.path[:0] = sys.argv[2:]; from pathlib import Path; from test_loop import *;"
        "w = World.join(torch.device('cpu')); run(Regression(), Path(sys.argv[1]), Box(max_steps=12), w)"
    )
    places = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "two"), *places], stderr=subprocess.PIPE, text=True,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for process in processes:
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 0, errors
    one, two = (checkpoint.load(tmp_path / k / "checkpoint.safetensors")[0] for k in ("one", "two"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.allclose(two[key], value, rtol=1e-4, atol=1e-6), key
