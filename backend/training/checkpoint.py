# SPDX-License-Identifier: GPL-3.0-or-later
"""Checkpoints of training: one safetensors file, the facts as JSON in its header, replaced as a whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from backend.protocol import PopulaceError

FACTS = "populace"  # key of the header


def save(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write `path`, or leave what was there. Raises PopulaceError("out_of_disk") when the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    plain = {k: v.detach().cpu().contiguous() for k, v in sorted(tensors.items())}
    try:
        save_file(plain, temporary, metadata={FACTS: json.dumps(facts, sort_keys=True)})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if is_disk_full(error):
            raise disk_full(path) from None
        raise


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors on the CPU and facts. Raises PopulaceError("weights_corrupt") if `path` is no checkpoint."""
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})[FACTS])
            return {k: file.get_tensor(k) for k in file.keys()}, facts  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise PopulaceError(
            "weights_corrupt", f"{path} is not a checkpoint of this training: {error}.", "Delete it to start anew."
        ) from None


def is_disk_full(error: BaseException) -> bool:
    """Whether this is "no space left", also as safetensors words it."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, SafetensorError) and "No space left" in str(error)


def disk_full(path: Path) -> PopulaceError:
    return PopulaceError(
        "out_of_disk", f"The disk is full: {path} could not be written.",
        "Free space and run the same command again; training goes on from the last checkpoint.",
    )  # fmt: skip


def pack_optimiser(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors as "<parameter index>/<name>"; its settings are code and not saved."""
    state = optimiser.state_dict()["state"]
    return {f"{i}/{key}": torch.as_tensor(value) for i, entry in state.items() for key, value in entry.items()}


def unpack_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Undo `pack_optimiser` on an optimiser of the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{k}": v for k, v in tensors.items()}


def under_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix + "/"): v for k, v in tensors.items() if k.startswith(prefix + "/")}


class MovingAverage:
    """Exponential moving average of some parameters, the weights that are shown and exported."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], half_life: float) -> None:
        """`half_life` in samples seen."""
        self.parameters, self.half_life = dict(parameters), half_life
        self.values = {k: v.detach().clone() for k, v in self.parameters.items()}

    @torch.no_grad()
    def update(self, batch: int, seen: int) -> None:
        """After a step of `batch` samples, `seen` so far. Young averages forget faster: half-life at most 5 % of
        what was seen."""
        half_life = min(self.half_life, max(0.05 * seen, 1e-8))
        keep = 0.5 ** (batch / half_life)
        for name, value in self.values.items():
            value.lerp_(self.parameters[name].detach(), 1 - keep)

    @contextlib.contextmanager
    def in_place(self):
        """Within, the parameters have their averages."""
        with torch.no_grad():
            own = {k: v.detach().clone() for k, v in self.parameters.items()}
            for k, v in self.parameters.items():
                v.copy_(self.values[k])
        try:
            yield
        finally:
            with torch.no_grad():
                for k, v in self.parameters.items():
                    v.copy_(own[k])

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for k, v in self.values.items():
            v.copy_(tensors[k])
