# SPDX-License-Identifier: GPL-3.0-or-later
"""One training loop for every stage: boxed by time and steps, resumable, on one or several processes.

A stage says what a step is (`Phase`s: one optimiser, one loss) and what its state is; the loop does the rest. A step's
randomness comes from (seed, step, sample) alone, never from a running generator, so

- a run stopped and resumed ends with the same bytes as one that was not, when boxed by steps (on the CPU; CUDA sums in
  any order), and
- several processes that share a batch take the same steps as one process that has it all, to float rounding.

A phase with a loss or gradient that is not finite changes nothing and ends its step; three such steps in a row end the
run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from backend.protocol import PopulaceError
from backend.training import checkpoint

log = logging.getLogger(__name__)

BAD_STEPS = 3  # with losses that are not finite, in a row
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Phase:
    """Part of a step: one loss, one optimiser. `loss` returns the mean over this process's samples, and figures."""

    name: str
    optimiser: torch.optim.Optimizer
    loss: Callable[[], tuple[Tensor, dict[str, float]]]
    clip: float = math.inf  # largest norm of the gradient


class Stage(Protocol):
    """What the loop trains."""

    name: str
    batch: int  # samples of a step, over all processes

    def before(self) -> dict[str, float]:
        """Figures of a run that has not begun, asked of the process that writes: where its curves start."""
        ...

    def phases(self, step: int, samples: range) -> Iterator[Phase]:
        """The phases of one step on this process's share of the batch. Each is asked for after the one before it."""
        ...

    def after(self, step: int) -> dict[str, float]:
        """After all phases of a step that was taken (moving averages and the like), the same on all processes."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None: ...

    def sheet(self) -> np.ndarray | None:
        """A picture u8 [H, W, 3] of where training is, None if there is nothing to see."""
        ...


@dataclass
class Box:
    """When to stop, and how often to look."""

    minutes: float = math.inf
    max_steps: float = math.inf
    save_every: float = 120  # seconds
    sheet_every: float = 300  # seconds; one more at the end
    log_every: int = 10  # steps


@dataclass
class Outcome:
    steps: int  # of the whole run, earlier sessions included
    stopped: str  # "steps", "time", or "interrupted"
    figures: dict[str, float] = field(default_factory=dict)  # of the last logged step


@dataclass(frozen=True)
class World:
    """The processes of a run (torchrun sets RANK, WORLD_SIZE and the rest); alone, nothing is communicated."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def join(device: torch.device) -> World:
        """The world that torchrun started, over nccl on CUDA and gloo elsewhere."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return World(dist.get_rank(), size) if size > 1 else World()

    def share(self, batch: int) -> range:
        """This process's samples: consecutive, so that minibatch groups stay together. Raises ValueError."""
        if batch % self.size:
            raise ValueError(f"a batch of {batch} cannot be shared by {self.size} processes")
        count = batch // self.size
        return range(self.rank * count, (self.rank + 1) * count)

    def total(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Sums over all processes."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Mean gradient over all processes. A parameter that no process touched keeps none; one that some touched
        counts as zero on the others."""
        if self.size == 1:
            return
        some = parameters[0]
        flags = torch.tensor([float(p.grad is not None) for p in parameters], device=some.device)
        dist.all_reduce(flags)
        touched = [p for p, flag in zip(parameters, flags.tolist(), strict=True) if flag]
        if not touched:
            return
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in touched])
        dist.all_reduce(flat)
        for p, piece in zip(touched, (flat / self.size).split([p.numel() for p in touched]), strict=True):
            p.grad = piece.view_as(p).clone()


def run(
    stage: Stage, folder: Path, box: Box, world: World | None = None, facts: Mapping[str, Any] | None = None
) -> Outcome:
    """Train `stage` until the box is full, from the checkpoint in `folder` if there is one.

    `facts` name the run (seed, size, ...): a checkpoint with others is refused. Ctrl-C and SIGTERM end the run after
    the step, with a checkpoint. Raises PopulaceError: "out_of_disk", "invalid_request" (another run's folder) or
    "internal_error" when the losses stay not finite; the last good checkpoint is always on disk.
    """
    world, facts = world or World(), dict(facts or {})
    path = folder / CHECKPOINT
    steps = 0
    if path.exists():
        tensors, found = checkpoint.load(path)
        steps = int(found.pop("steps"))
        if found != json.loads(json.dumps(facts)):
            raise PopulaceError(
                "invalid_request", f"{folder} holds another run: {found} and not {facts}.",
                "Choose another folder with --resume, or the settings of that run.",
            )  # fmt: skip
        stage.restore(tensors)
    writer = Log(folder, steps) if world.rank == 0 else None

    def save() -> None:
        if world.rank == 0:
            checkpoint.save(path, stage.state(), {**facts, "steps": steps})

    def look() -> None:
        picture = stage.sheet() if writer else None
        if picture is not None:
            writer.picture(steps, picture)

    start = saved = seen = time.monotonic()
    outcome, bad, figures = Outcome(steps, "steps"), 0, {}
    first = steps
    with _interrupts() as interrupted, contextlib.closing(writer) if writer else contextlib.nullcontext():
        if writer and steps == 0 and (begun := stage.before()):
            writer.figures(0, begun)
        while steps < box.max_steps:
            now = time.monotonic()
            late, stop = world.total([now - start >= box.minutes * 60, interrupted.is_set()], _device(stage))
            if late or stop:
                outcome.stopped = "interrupted" if stop else "time"
                break
            good, figures = _step(stage, steps, world)
            steps += 1
            bad = 0 if good else bad + 1
            if not good:
                log.warning("%s step %d: a loss or gradient was not finite; skipped", stage.name, steps)
                if writer:
                    writer.figures(steps, {"skipped": 1.0})
            if bad == BAD_STEPS:
                raise PopulaceError(
                    "internal_error", f"Training stopped at step {steps}: the loss was not a number {BAD_STEPS} times.",
                    f"The last good checkpoint is {path}. Try a lower learning rate or another seed." if path.exists()
                    else "There is no checkpoint yet. Try a lower learning rate or another seed.",
                )  # fmt: skip
            if writer and good and (steps % box.log_every == 0 or steps == first + 1):
                speed = (steps - first) / max(time.monotonic() - start, 1e-9)
                writer.figures(steps, {**figures, "steps_per_second": speed})
            if bad == 0 and time.monotonic() - saved > box.save_every:
                save()
                saved = time.monotonic()
            if time.monotonic() - seen > box.sheet_every:
                look()
                seen = time.monotonic()
        save()
        look()
        if writer and figures and writer.last < steps:
            writer.figures(steps, figures)
    outcome.steps, outcome.figures = steps, figures
    if outcome.stopped == "interrupted":
        log.warning("interrupted at step %d; %s is up to date", steps, path)
    return outcome


def _step(stage: Stage, step: int, world: World) -> tuple[bool, dict[str, float]]:
    """One step; False if it was given up because something was not finite."""
    figures: dict[str, float] = {}
    for phase in stage.phases(step, world.share(stage.batch)):
        parameters = [p for group in phase.optimiser.param_groups for p in group["params"]]
        for p in parameters:
            p.grad = None
        loss, found = phase.loss()
        finite = bool(torch.isfinite(loss.detach()))
        if finite:
            loss.backward()
            finite = all(bool(torch.isfinite(p.grad).all()) for p in parameters if p.grad is not None)
        if world.total([float(not finite)], _device(stage))[0]:
            return False, figures
        world.average_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, phase.clip)
        phase.optimiser.step()
        figures |= {f"{phase.name}/{k}": v for k, v in found.items()}
        figures |= {f"{phase.name}/loss": float(loss.detach()), f"{phase.name}/gradient": float(norm)}
    return True, figures | stage.after(step)


def _device(stage: Stage) -> torch.device:
    return getattr(stage, "device", torch.device("cpu"))


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; the second one has its usual effect."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    usual = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: Any) -> None:
        event.set()
        signal.signal(number, usual[signal.Signals(number)])

    for number in usual:
        signal.signal(number, note)
    try:
        yield event
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


class Log:
    """`log.jsonl`, one line per logged step, TensorBoard events where TensorBoard is installed, and sample sheets."""

    def __init__(self, folder: Path, steps: int) -> None:
        """Lines after step `steps`, left by a session that died before its next checkpoint, are dropped."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path, self.last = folder, folder / "log.jsonl", steps
        if self.path.exists():
            lines = self.path.read_text("utf-8").splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= steps]
            if len(kept) < len(lines):
                temporary = self.path.with_suffix(".tmp")
                temporary.write_text("".join(kept), "utf-8")
                temporary.replace(self.path)
        self.board = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard.writer import SummaryWriter

            self.board = SummaryWriter(str(folder / "events"))

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        line = json.dumps({"step": step, "time": round(time.time(), 1)} | {k: _short(v) for k, v in figures.items()})
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            if checkpoint.is_disk_full(error):
                raise checkpoint.disk_full(self.path) from None
            raise
        self.last = step
        log.info("%s", line)
        if self.board:
            for name, value in figures.items():
                self.board.add_scalar(name, value, step)

    def picture(self, step: int, picture: np.ndarray) -> None:
        folder = self.folder / "sheets"
        folder.mkdir(exist_ok=True)
        path = folder / f"{step:07d}.png"
        temporary = path.with_suffix(".tmp")
        try:
            Image.fromarray(picture).save(temporary, "PNG")
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if checkpoint.is_disk_full(error):
                raise checkpoint.disk_full(path) from None
            raise

    def close(self) -> None:
        if self.board:
            self.board.close()


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 60  # a torn line goes


def _short(value: float) -> float:
    return float(f"{value:.6g}")
