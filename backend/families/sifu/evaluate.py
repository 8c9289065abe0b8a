# SPDX-License-Identifier: GPL-3.0-or-later
"""How good weights of SIFU or GTA are, on sampled people that they have not seen: `python -m
backend.families.sifu.evaluate WEIGHTS --people 20 --sheet sheet.png`.

The body is given as a fit would find it (disturbed as in training), so that the figures are of the networks. What they
have to beat is that body alone. Lengths are millimetres of a person's own size.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional

from backend import families, weights
from backend.evaluation.shapes import chamfer
from backend.families.sifu.model import SifuModel
from backend.families.sifu.prior import Placed, people_body
from backend.families.sifu.stages import Stages
from backend.families.sifu.training import Scan, disturbed, figure_scan, photo_of, surface_points
from backend.families.sifu.views import clip_of, normal_views
from backend.geometry.clean import clean
from backend.geometry.tetgrid import extract_surface
from backend.render.rasterize import rasterize, sample, to_image
from backend.settings import Settings
from backend.training.photos import Figure, make_figure, random_person

UNSEEN = 1 << 44  # seeds from here on are not trained with
POINTS = 20000
SIZE = 256


@torch.no_grad()
def judge(model: SifuModel, scan: Scan, told: Placed, rng: np.random.Generator, cells: int = 128) -> dict[str, Any]:
    """Figures of one person and its pictures."""
    rgba = (photo_of(scan, 512, rng) * 255).round().to(torch.uint8).movedim(0, 2)
    field = model.decode(model.latents(told, rgba))[0]
    mesh = clean(extract_surface(field, cells))  # pyright: ignore[reportArgumentType]
    network = told.to_network(mesh.points)
    colors = field.color(mesh.points)
    made = Scan(network, mesh.faces, colors, told)
    body = model.body
    bare = Scan(told.vertices(body), body.faces, body.codes, told)
    scale = 1000 / float(told.scale)
    points = {name: surface_points(s, POINTS, rng)[0].numpy() for name, s in
              (("truth", scan), ("made", made), ("body", bare))}  # fmt: skip
    pictures = {name: {side: colored(s, side) for side in "FB"} for name, s in (("truth", scan), ("made", made))}
    normals = {name: normal_views(s.vertices, s.faces, SIZE, ("F", "B")) for name, s in
               (("truth", scan), ("made", made), ("body", bare))}  # fmt: skip

    def off(name: str) -> float:
        errors = []
        for side in "FB":
            one, other = normals["truth"][side], normals[name][side]
            both = (one[3] > 0.5) & (other[3] > 0.5)
            cosine = functional.cosine_similarity(one[:3], other[:3], dim=0)[both].clamp(-1, 1)
            errors.append(float(torch.rad2deg(torch.acos(cosine)).mean()))
        return float(np.mean(errors))

    def psnr(side: str) -> float:
        one, other = pictures["truth"][side], pictures["made"][side]
        mask = (one[3:] > 0.5) & (other[3:] > 0.5)
        error = ((one[:3] - other[:3]).square() * mask).sum() / (3 * mask.sum())
        return float(-10 * torch.log10(error.clamp(min=1e-8)))

    return {
        "chamfer_mm": scale * chamfer(points["truth"], points["made"]),
        "chamfer_body_mm": scale * chamfer(points["truth"], points["body"]),
        "normals_deg": off("made"), "normals_body_deg": off("body"),
        "psnr_front": psnr("F"), "psnr_back": psnr("B"),
        "pictures": [rgba.movedim(2, 0)[:3].float() / 255 * (rgba[..., 3] > 127), pictures["truth"]["F"][:3],
                     pictures["made"]["F"][:3], pictures["truth"]["B"][:3], pictures["made"]["B"][:3],
                     *(normals[name][side][:3] / 2 + 0.5 for side in "FB" for name in ("truth", "made", "body"))],
    }  # fmt: skip


def colored(scan: Scan, side: str) -> Float[Tensor, "4 S S"]:
    """Flat colours seen from the front, or from behind with the front's columns."""
    viewer = scan.vertices * scan.vertices.new_tensor([1.0, -1.0, 1.0])
    raster = rasterize(clip_of(viewer, side, SIZE)[None], scan.faces, (SIZE, SIZE))
    rows = sample(scan.colors, raster, scan.faces)
    return to_image(torch.cat([rows, torch.ones_like(rows[:, :1])], 1), raster)[0].movedim(2, 0)


def sheet(rows: Sequence[Sequence[Float[Tensor, "3 h w"]]]) -> Image.Image:
    """One person per row: photo; truth and result from the front; from behind; normals of truth, result and body."""
    lines = []
    for pictures in rows:
        same = [functional.interpolate(p[None], (SIZE, SIZE), mode="area")[0] for p in pictures]
        lines.append(torch.cat([p[:, :, SIZE // 6 : -SIZE // 6] for p in same], 2))
    pixels = (torch.cat(lines, 1).clamp(0, 1) * 255).byte().movedim(0, 2).numpy()
    return Image.fromarray(pixels)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m backend.families.sifu.evaluate", description=__doc__)
    parser.add_argument("weights", type=Path, help="a safetensors file of sifu or gta")
    parser.add_argument("--people", type=int, default=20)
    parser.add_argument("--noise", type=float, default=0.5, help="of the body, 1 as in training (default: 0.5)")
    parser.add_argument("--sheet", type=Path, help="write pictures of the first six")
    args = parser.parse_args(arguments)
    people: Any = families.load("people", "cpu", Settings.load())
    body = people_body(people)
    file = weights.Weights(args.weights.stem, weights.sha256_of(args.weights), (args.weights,))
    model = SifuModel(Stages.of_files(file, torch.device("cpu")), lambda: body, torch.device("cpu"), file.sha256)
    found, rows = [], []
    for i in range(args.people):
        rng = np.random.default_rng([UNSEEN, i])
        figure: Figure = make_figure(people, random_person(people, UNSEEN + i))
        scan = figure_scan(figure, body, rng)
        told = disturbed(scan.placed, rng, args.noise)
        figures = judge(model, scan, told, rng)
        pictures = figures.pop("pictures")
        found.append(figures)
        if len(rows) < 6:
            rows.append(pictures)
    print(json.dumps({name: round(float(np.mean([f[name] for f in found])), 3) for name in found[0]}))
    if args.sheet:
        sheet(rows).save(args.sheet)
    return 0


if __name__ == "__main__":
    sys.exit(main())
