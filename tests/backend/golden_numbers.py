# SPDX-License-Identifier: GPL-3.0-or-later
"""Access to the golden numbers: outputs of the authors' networks for weights and inputs that are made from names.

They lie in GOLDEN_NUMBERS or in ../shared/data/golden beside the repository; without them the tests skip.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

FOLDER = Path(os.environ.get("GOLDEN_NUMBERS", Path(__file__).parents[3] / "shared/data/golden"))


def detweights() -> ModuleType:
    path = FOLDER / "detweights.py"
    if not path.is_file():
        pytest.skip(f"no golden numbers at {FOLDER}; set GOLDEN_NUMBERS")
    spec = importlib.util.spec_from_file_location("detweights", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def normal(name: str, *shape: int) -> Tensor:
    """The input called NAME."""
    return torch.from_numpy(detweights().normal(f"input/{name}", shape))


class Golden:
    """One case: what its state dict holds, and what came out."""

    def __init__(self, case: str) -> None:
        detweights()
        self.facts: dict[str, Any] = json.loads((FOLDER / f"{case}-small.json").read_text("utf-8"))
        self.arrays: Mapping[str, np.ndarray] = np.load(FOLDER / f"{case}-small.npz", allow_pickle=False)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(shape) for name, shape in self.facts["state_dict"].items()}

    def fill(self, module: nn.Module, equalised: Callable[[str], bool] = lambda name: True) -> None:
        """Its weights into a module whose names and shapes are exactly those of the case."""
        state = module.state_dict()
        assert {name: tuple(tensor.shape) for name, tensor in state.items()} == self.shapes
        detweights().fill_state_dict(state, equalised)

    def error(self, name: str, found: Tensor) -> float:
        """Largest difference to the golden array, of its root mean square."""
        note, golden = self.facts["arrays"][name], self.arrays[name].astype(np.float64).ravel()
        assert list(found.shape) == note["shape"]
        values = found.detach().double().cpu().numpy().ravel()[:: note["every"] or 1]
        return float(np.abs(values - golden).max() / np.sqrt((golden**2).mean()))
