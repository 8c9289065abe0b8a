# SPDX-License-Identifier: GPL-3.0-or-later
"""A generator led by words (GET3D's appendix; the scheme of StyleGAN-NADA, Gal et al. 2022).

A copy of the generator learns while the original stays. Both make the same codes' shapes, seen by the same cameras; the
way from the original's pictures to the copy's, in CLIP's space, shall point as the way from one text to the other:

    loss = 1 - cos(E(copy) - E(original), E(text) - E(from)) + the training's regularisers of surfaces

The mappings stay, so codes keep their meaning. Surfaces of both are extracted on a coarse lattice.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from backend.families.base import Step, no_step, seeded_normal
from backend.families.get3d.networks import Generator
from backend.families.get3d.surfaces import Surfacer, c2w_of, projection, see
from backend.networks.clip import Clip
from backend.protocol import PopulaceError
from backend.render.camera import Camera

Part = Literal["texture", "geometry", "both"]
TEXTURE = ("totex", "mlp_synthesis_tex", "to_rgb", "to_material", "geometry_synthesis_tex")
POLAR = (math.radians(60), math.radians(90))  # of the training's cameras
SOFT = 1e-3  # below this length a way in CLIP's space has less and less of a direction
LEAST_WAY = 1e-4  # of two texts in CLIP's space; the same text has no direction


@dataclass(frozen=True)
class Settings:
    """Defaults as published, as far as they were; `steps` and `batch` suit one GPU for some minutes."""

    part: Part = "both"
    steps: int = 300
    batch: int = 2  # shapes of a step
    views: int = 8
    size: int = 224  # of pictures, pixels
    cells: int = 64  # of the lattice
    rate: float = 0.002
    psi: float = 0.7  # codes are truncated as for display
    surface: float = 1.0  # weight of the regularisers
    seed: int = 0


@dataclass(frozen=True)
class Adapted:
    generator: Generator
    losses: list[float]
    directions: list[float]  # cosine of the pictures' way with the texts', per step


def adapt(
    generator: Generator, clip: Clip, tokens: tuple[Int[Tensor, "1 N"], Int[Tensor, "1 M"]],
    settings: Settings = Settings(), step: Step = no_step,
) -> Adapted:  # fmt: skip
    """A generator whose shapes look less like the first text and more like the second. Raises `invalid_request` if the
    texts mean the same."""
    s, device = settings, generator.mapping.w_avg.device
    with torch.no_grad():
        source, target = (clip.of_texts(t.to(device)) for t in tokens)
    way = target - source
    if float(way.norm()) < LEAST_WAY:
        raise PopulaceError("invalid_request", "Both texts mean the same to CLIP: no way leads from one to the other.",
                            "Say in --from what the weights make now, and in --text what they shall make.")  # fmt: skip
    learner = copy.deepcopy(generator).eval().requires_grad_(False)
    learned = trainable(learner, s.part)
    for parameter in learned.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(learned.values(), s.rate, (0.0, 0.99), 1e-8)
    surfacer = Surfacer(generator.config, s.cells, device)
    losses: list[float] = []
    directions: list[float] = []
    for i in range(s.steps):
        ws_geo, ws_tex, mvp = _drawn(generator, s, i, device)
        with torch.no_grad():
            before = clip.of_pictures(pictures(generator, surfacer, ws_geo, ws_tex, mvp, s.size)[0])
        seen, regulariser = pictures(learner, surfacer, ws_geo, ws_tex, mvp, s.size)
        moved = clip.of_pictures(seen) - before
        length = (moved.square().sum(1) + SOFT**2).sqrt() * way.norm()  # at first nothing has moved, and it must begin
        cosine = ((moved * way).sum(1) / length).mean()
        loss = 1 - cosine + s.surface * regulariser
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        directions.append(float(cosine.detach()))
        step("adapt", (i + 1) / s.steps)
    return Adapted(learner.requires_grad_(False), losses, directions)


def trainable(generator: Generator, part: Part) -> dict[str, nn.Parameter]:
    """Weights of the synthesis that belong to the part, by name. The unified generator's convolutions are geometry's,
    though colours come of them as well."""
    found = {}
    for name, parameter in generator.synthesis.named_parameters():
        texture = any(word in name.split(".") for word in TEXTURE)
        if part == "both" or texture == (part == "texture"):
            found[name] = parameter
    return found


def pictures(
    generator: Generator,
    surfacer: Surfacer,
    ws_geo: Float[Tensor, "B L W"],
    ws_tex: Float[Tensor, "B M W"],
    mvp: Float[Tensor, "B V 4 4"],
    size: int,
) -> tuple[Float[Tensor, "BV 3 S S"], Tensor]:
    """sRGB pictures 0..1 on white, and the surfaces' regulariser."""
    decoded = generator.synthesis(ws_geo, ws_tex)
    shapes = surfacer(decoded)
    colors, mask = see(decoded, shapes, mvp, size)
    shown = (colors.clamp(-1, 1) + 1) / 2 * mask + 1 - mask
    return shown.flatten(0, 1), shapes.regulariser()


def _drawn(
    generator: Generator, s: Settings, i: int, device: torch.device
) -> tuple[Float[Tensor, "B L W"], Float[Tensor, "B M W"], Float[Tensor, "B V 4 4"]]:
    """Codes and cameras of a step, a function of the seed."""
    z = [torch.from_numpy(seeded_normal(s.seed, f"adapt/{i}/{k}", (s.batch, generator.config.z_dim))).to(device)
         for k in ("geo", "tex")]  # fmt: skip
    with torch.no_grad():
        ws_geo, ws_tex = generator.mapping_geo(z[0], s.psi), generator.mapping(z[1], s.psi)
    turn = torch.from_numpy(seeded_normal(s.seed, f"adapt/{i}/camera", (2, s.views)))
    share = torch.special.ndtr(turn).to(device)  # even in 0..1
    evenly = torch.arange(s.views, device=device) / s.views + share[0, :1]
    c2w = c2w_of(2 * math.pi * evenly, POLAR[0] + (POLAR[1] - POLAR[0]) * share[1])
    mvp = Camera(c2w, projection(device).expand(s.views, 4, 4)).mvp
    return ws_geo, ws_tex, mvp.expand(s.batch, -1, -1, -1)
