# SPDX-License-Identifier: GPL-3.0-or-later
"""`populace bench --family get3dhuman`: what each network costs at the published widths, and the quick ways against the
plain ones. Without imported weights it takes random ones of the published sizes: the time is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from backend.bench import steps_timed
from backend.families.get3dhuman import colors
from backend.families.get3dhuman.config import CENTRE_CM, DEPTH_UNITS, DISTANCE, INVERSE, Config, to_ndc
from backend.families.get3dhuman.model import CM, Get3DHumanModel
from backend.families.get3dhuman.networks import (
    Get3DHuman,
    PointDecoder,
    RefineNet,
    decode_shape,
    decode_texture,
)
from backend.families.get3dhuman.tracer import trace, trace_quickly
from backend.geometry import reference
from backend.geometry.tetgrid import extract_surface

PUBLISHED = Config()
GRID = 90
POINTS = 100_000
SMALL = 128  # pixels of the views that both ways of tracing draw: all rays take all steps in the published one
STEEPNESS = 2 / DISTANCE
FIGURE = ((0.0, 1.6, 0.0, 1.68, 0.11), (0.0, 1.0, 0.0, 1.4, 0.16), (0.2, 1.4, 0.6, 1.05, 0.045),
          (0.1, 0.06, 0.1, 0.95, 0.075))  # capsules x, y, x, y, radius in metres; of its left half


def stand_in(device: torch.device, config: Config = PUBLISHED) -> Get3DHumanModel:
    """Random weights of the published sizes, but all people are the same figure: what a surface or a view costs depends
    on how much there is of it."""
    torch.manual_seed(0)
    networks = Get3DHuman(config)
    _decode_thickness(networks.mlp_shape)
    networks.filter_shape = _Figure(networks.filter_shape, networks.config.volume_size)  # pyright: ignore
    return Get3DHumanModel(networks, RefineNet(config.refine_width), device, None)


class _Figure(nn.Module):
    """The shape's filter, in whose first channel is half the thickness of a figure, ndc, negative beside it."""

    def __init__(self, inner: nn.Module, size: int) -> None:
        super().__init__()
        self.inner = inner
        line = torch.linspace(-1, 1, size) * INVERSE / CM
        y, x = torch.meshgrid(CENTRE_CM / CM - line, line, indexing="ij")
        at, found = torch.stack([x.abs(), y], -1), torch.full((size, size), -1.0)
        for *ends, radius in FIGURE:
            a, b = torch.tensor(ends).split(2)
            along = (((at - a) @ (b - a)) / (b - a).square().sum()).clamp(0, 1)
            away = (at - a - along[..., None] * (b - a)).norm(dim=-1)
            found = found.maximum(torch.where(away < radius, (radius**2 - away**2).clamp(min=0).sqrt(), radius - away))
        self.register_buffer("thickness", found * CM / INVERSE)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B V h w"]:
        volume = self.inner(x)
        thickness = self.get_buffer("thickness").expand(len(x), 1, -1, -1)
        return torch.cat([thickness, volume[:, 1:]], 1)


@torch.no_grad()
def _decode_thickness(decoder: PointDecoder) -> None:
    """sigmoid(STEEPNESS (|z| - thickness)), by leaky units: as steep as the tracer's distances are long."""
    layers = list(decoder.filters)
    for layer in layers:
        layer.weight.zero_()
        layer.bias.zero_()
    layers[0].weight[0, -1], layers[0].weight[1, -1] = 1 / DEPTH_UNITS, -1 / DEPTH_UNITS
    layers[0].weight[2, 0], layers[0].bias[2] = -1.0, 1.0  # positive, so that it passes
    layers[1].weight[0, :3], layers[1].bias[0] = 1.0, 1.0
    for layer in layers[2:-1]:
        layer.weight[0, 0] = 1.0
    layers[-1].weight[0, 0], layers[-1].bias[0] = STEEPNESS, -2 * STEEPNESS


@torch.no_grad()
def run(model: Get3DHumanModel, repeat: int) -> list[dict[str, Any]]:
    """A row per step, see `bench.steps_timed`; then ratios."""
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
        (f"front view at {size} traced", lambda: trace_quickly(shape.occupancy, size, 0.0, like), repeat),
        (f"front view at {SMALL} traced", lambda: trace_quickly(shape.occupancy, SMALL, 0.0, like), repeat),
        (f"front view at {SMALL} as published", lambda: trace(shape.occupancy, SMALL, 0.0, like), 1),
    ]  # fmt: skip
    if model.refine is not None:
        view = trace_quickly(shape.occupancy, size, 0.0, like)
        seen, refine = colors.paint(view, texture.own).movedim(2, 0)[None], model.refine
        steps.append(("view refined", lambda: refine(seen), repeat))
    rows = steps_timed(steps, device)
    by_name = {row["step"]: row["seconds"] for row in rows}
    pairs = {"plain occupancy": "occupancy of 100 000 points", "plain colour": "colour of 100 000 points",
             f"plain marching at {GRID}": f"surface at {GRID}",
             f"front view at {SMALL} as published": f"front view at {SMALL} traced"}  # fmt: skip
    for plain, ours in pairs.items():
        rows.append({"step": f"{plain} / {ours}", "ratio": round(by_name[plain] / by_name[ours], 1)})
    return rows
