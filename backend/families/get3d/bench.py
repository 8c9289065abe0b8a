# SPDX-License-Identifier: GPL-3.0-or-later
"""`populace bench --family get3d`: what each network costs at the published widths, and extraction against the plain
way. Without imported weights it takes random ones of the published sizes: the time is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from backend.bench import steps_timed
from backend.families.get3d.config import Config
from backend.families.get3d.fast import FastSynthesis, error
from backend.families.get3d.model import Get3dModel
from backend.families.get3d.networks import Generator
from backend.geometry import flexicubes, reference
from backend.geometry.tetgrid import extract_surface

GRIDS = (90, 128)


def stand_in(device: torch.device) -> Get3dModel:
    """Random weights of the published sizes, whose shapes have a surface."""
    torch.manual_seed(0)
    return Get3dModel(Generator(Config()), device)


@torch.no_grad()
def run(model: Get3dModel, repeat: int) -> list[dict[str, Any]]:
    """A row per step: seconds (median of warm runs; plain ways once), resident memory afterwards; then ratios. On CUDA
    also the synthesis in bfloat16 as a graph, and how far it is from float32."""
    codes = model.sample(0, 0.7, {}).codes
    field = model.decode(model.sample(0, 0.7, {}))[0]
    points = torch.rand(1, 100_000, 3, device=model.device) - 0.5
    z = torch.randn(1, model.config.z_dim, device=model.device)
    steps: list[tuple[str, Callable[[], object], int]] = [
        ("both mappings", lambda: (model.generator.mapping(z), model.generator.mapping_geo(z)), repeat),
        ("synthesis", lambda: model.generator.synthesis(codes["body/shape"][None], codes["body/tex"][None]), repeat),
        ("sdf at 100 000 points", lambda: field.decoded.sdf(points), repeat),
        ("colour at 100 000 points", lambda: field.decoded.color(points), repeat),
    ]
    fast = FastSynthesis(model.generator.synthesis)
    if model.device.type == "cuda":
        steps.insert(2, ("synthesis in bfloat16, as a graph",
                         lambda: fast(codes["body/shape"][None], codes["body/tex"][None]), repeat))  # fmt: skip
    ways = (
        ("surface", extract_surface, repeat),
        ("plain marching", reference.extract_dense, 1),
        ("flexicubes", flexicubes.extract_surface, repeat),
        ("plain flexicubes", reference.extract_dual_dense, 1),
    )
    for grid in GRIDS:
        steps += [(f"{name} at {grid}", lambda way=way, grid=grid: way(field, grid), times)
                  for name, way, times in ways]  # fmt: skip
    rows = steps_timed(steps, model.device)
    by_name = {row["step"]: row["seconds"] for row in rows}
    for grid in GRIDS:
        for plain, ours in (("plain marching", "surface"), ("plain flexicubes", "flexicubes")):
            ratio = by_name[f"{plain} at {grid}"] / by_name[f"{ours} at {grid}"]
            rows.append({"step": f"{plain} / {ours} at {grid}", "ratio": round(ratio, 1)})
    if model.device.type == "cuda":
        exact = model.generator.synthesis(codes["body/shape"][None], codes["body/tex"][None])
        found = error(fast(codes["body/shape"][None], codes["body/tex"][None]), exact, points)
        rows += [{"step": f"error of bfloat16, {name}", "text": f"{x:.2%} rms"} for name, x in found.items()]
        rows.append({"step": "most GPU memory", "text": f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"})
    return rows
