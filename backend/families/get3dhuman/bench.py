# SPDX-License-Identifier: GPL-3.0-or-later
"""`populace bench --family get3dhuman`: what each network costs at the published widths, and the quick ways against the
plain ones. Without imported weights it takes random ones of the published sizes: the time is the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psutil
import torch

from backend.families.get3dhuman import colors
from backend.families.get3dhuman.config import Config, to_ndc
from backend.families.get3dhuman.model import CM, Get3DHumanModel
from backend.families.get3dhuman.networks import Get3DHuman, RefineNet, decode_shape, decode_texture
from backend.families.get3dhuman.tracer import trace, trace_quickly
from backend.geometry import reference
from backend.geometry.tetgrid import extract_surface

GRID = 90
POINTS = 100_000


def stand_in(device: torch.device) -> Get3DHumanModel:
    """Random weights of the published sizes, whose people have a surface."""
    torch.manual_seed(0)
    networks = Get3DHuman(Config())
    with torch.no_grad():
        networks.mlp_shape.filters[-1].weight *= 40
    return Get3DHumanModel(networks, RefineNet(), device, None)


@torch.no_grad()
def run(model: Get3DHumanModel, repeat: int) -> list[dict[str, Any]]:
    """A row per step: seconds (median of warm runs; plain ways once), resident memory afterwards; then ratios."""
    networks, device = model.networks, model.device
    latents = model.sample(0, 1.0, {})
    (field,) = model.decode(latents)
    shape, texture = field.shape, field.texture
    rows_of = {name: code.expand(2 * networks.backbone_shape.blocks, -1)[None] for name, code in latents.codes.items()}
    picture, _ = networks.shape_features(rows_of["body/shape"])
    low, high = field.bounds
    ndc = to_ndc(CM * (low + torch.rand(POINTS, 3, device=device) * (high - low))).clamp(-0.999, 0.999)
    size, like = networks.config.resolution, shape.volume
    steps: list[tuple[str, Callable[[], object], int]] = [
        ("both mappings", lambda: [b.mapping(latents.codes[n]) for n, b in (
            ("body/shape", networks.backbone_shape), ("body/tex", networks.backbone_texture))], repeat),
        ("shape's volume", lambda: networks.shape_features(rows_of["body/shape"]), repeat),
        ("texture's volume", lambda: networks.texture_features(rows_of["body/tex"], picture), repeat),
        ("occupancy of 100 000 points", lambda: shape.occupancy(ndc), repeat),
        ("plain occupancy", lambda: decode_shape(networks.mlp_shape, shape.volume, ndc[None]), 1),
        ("colour of 100 000 points", lambda: texture.own(ndc), repeat),
        ("plain colour", lambda: decode_texture(networks.mlp_texture, shape.volume, texture.volume, ndc[None]), 1),
        (f"surface at {GRID}", lambda: extract_surface(field, GRID), repeat),
        (f"plain marching at {GRID}", lambda: reference.extract_dense(field, GRID), 1),
        ("front view traced", lambda: trace_quickly(shape.occupancy, size, 0.0, like), repeat),
        ("front view as published", lambda: trace(shape.occupancy, size, 0.0, like), 1),
    ]  # fmt: skip
    if model.refine is not None:
        view = trace_quickly(shape.occupancy, size, 0.0, like)
        seen, refine = colors.paint(view, texture.own).movedim(2, 0)[None], model.refine
        steps.append(("view refined", lambda: refine(seen), repeat))
    rows = []
    for name, work, times in steps:
        if times > 1:
            work()
        seconds = sorted(_timed(work, device) for _ in range(times))
        rows.append({"step": name, "seconds": round(seconds[len(seconds) // 2], 4),
                     "rss_mib": round(psutil.Process().memory_info().rss / 2**20)})  # fmt: skip
    by_name = {row["step"]: row["seconds"] for row in rows}
    pairs = {"plain occupancy": "occupancy of 100 000 points", "plain colour": "colour of 100 000 points",
             f"plain marching at {GRID}": f"surface at {GRID}",
             "front view as published": "front view traced"}  # fmt: skip
    for plain, ours in pairs.items():
        rows.append({"step": f"{plain} / {ours}", "ratio": round(by_name[plain] / by_name[ours], 1)})
    return rows


def _timed(work: Callable[[], object], device: torch.device) -> float:
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin
