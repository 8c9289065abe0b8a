# SPDX-License-Identifier: GPL-3.0-or-later
"""Training on CUDA: the same pictures as on the CPU, steps in bf16 that stay finite. Skipped without a CUDA device."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from backend import weights
from backend.families.people.model import load
from backend.training import loop
from backend.training.adversarial import SIZES, AdversarialStage, superres
from backend.training.views import make_reals

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MINI = dataclasses.replace(SIZES["tiny"], height=32, warm_up=0, batch=2)


def stage_on(device: str, data: Path, settings=MINI, **options) -> AdversarialStage:
    def shot(seed: int, views: object, size: tuple[int, int]) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, 256, (2, *size, 4), dtype=np.uint8)

    reals = make_reals(shot, 4, (settings.height, settings.height * 3 // 4), 0)
    model = load(torch.device(device), weights.locate("people", data))
    return AdversarialStage(model, reals, settings, 0, **options)


@torch.no_grad()
def test_pictures_are_the_same_on_cuda(tmp_path: Path) -> None:
    on_cpu, on_cuda = (stage_on(device, tmp_path).fakes(0, range(2)) for device in ("cpu", "cuda"))
    assert (on_cuda.pictures.cpu() - on_cpu.pictures).abs().mean() < 1e-3
    assert (on_cuda.volumes.cpu() - on_cpu.volumes).abs().mean() < 1e-3


@pytest.mark.parametrize("name", ["adversarial", "superres"])
def test_steps_in_bf16_stay_finite_and_resume(name: str, tmp_path: Path) -> None:
    settings = superres(MINI) if name == "superres" else MINI
    settings = dataclasses.replace(settings, warm_up=1)
    for end in (2, 4):
        stage = stage_on("cuda", tmp_path, settings, name=name)
        outcome = loop.run(stage, tmp_path / name, loop.Box(max_steps=end, log_every=1))
        assert outcome.steps == end
        assert all(np.isfinite(list(outcome.figures.values())))
    assert "skipped" not in (tmp_path / name / "log.jsonl").read_text()
    assert all(p.device.type == "cuda" for p in stage.critics.parameters())
