# SPDX-License-Identifier: GPL-3.0-or-later
"""How E3DGE learns: only from what the frozen generator makes, without one real photo (Lan et al. 2023, sec. 3, 4.1).

    stage 1    E0: codes, and with them thumbnails, normals and distances on, near and off the surface
    stage 2.1  feature maps and aligner: a photo's residual, in its own view and warped into another one
    stage 2.2  feature maps and fusion: the same head from two poses, each rebuilt from the other's residual

`pairs` draws heads with two views, `losses` has one stage's losses of them, `Learner` does the steps. Perceptual and
identity losses need networks that are not here: both are callables of two pictures in -1..1 where they are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from backend.families.e3dge.camera import Cameras
from backend.families.e3dge.config import AZIMUTH_STD, ELEVATION_STD, HALF_SIDE
from backend.families.e3dge.generator import View
from backend.families.e3dge.inversion import Codes, E3dge, Seen

Stage = Literal["1", "2.1", "2.2"]
Compare = Callable[[Float[Tensor, "B 3 H W"], Float[Tensor, "B 3 H W"]], Tensor]

RATE = 5e-5
MODULATION_RATE = 0.2  # of RATE, for the layer that modulates
NEAR_SURFACE = 0.03  # standard deviation of points about the surface, units of the world
POINTS = 2048  # uniform ones in the cube; as many of the surface's
WEIGHTS: Mapping[Stage, Mapping[str, float]] = {
    "1": {"picture": 1, "perceptual": 0.8, "identity": 0.1, "normals": 1, "surface": 1, "volume": 0.2, "near": 0.2,
          "eikonal": 0.1, "codes": 1},
    "2.1": {"picture": 1, "perceptual": 0.8, "identity": 0.1, "aligned": 1, "aligned_thumb": 0.1},
    "2.2": {"picture": 1, "perceptual": 1, "identity": 0.1, "aligned": 1, "aligned_thumb": 0.1},
}  # fmt: skip
LEARNING: Mapping[Stage, tuple[str, ...]] = {
    "1": ("encoder",),
    "2.1": ("generator.renderer.network.netLocal", "grid_align"),
    "2.2": ("generator.renderer.network.netLocal", "fuse"),
}


@dataclass(frozen=True)
class Side:
    """A head as the generator shows it from one pose: what a photo and what the truth is."""

    cameras: Cameras
    view: View  # thumbnail, depth, surface
    picture: Float[Tensor, "B 3 R R"]  # the decoder's
    photo: Float[Tensor, "B 3 P P"]  # the same, of the size that encoder and hourglass see


@dataclass(frozen=True)
class Pair:
    """Heads with their true codes, seen from two poses."""

    codes: Codes
    sides: tuple[Side, Side]

    def swapped(self) -> Pair:
        return Pair(self.codes, (self.sides[1], self.sides[0]))


@torch.no_grad()
def pairs(net: E3dge, count: int, random: torch.Generator, spread: float = 1.0, samples: int | None = None) -> Pair:
    """Draw heads. The second pose leaves the first by `spread` of the way to another draw: 2.1 lets it grow."""
    device = net.w_avg.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device)

    codes = net.sample(normal(count, net.config.style_dim))
    scale = torch.tensor([AZIMUTH_STD, ELEVATION_STD], device=device)
    first = normal(count, 2) * scale
    second = first + spread * (normal(count, 2) * scale - first)
    sides = []
    for angles in (first, second):
        cameras = net.cameras(angles)
        view = net.render(codes, cameras, samples)
        picture = net.picture(view, codes)
        photo = functional.interpolate(picture.clamp(-1, 1), 2 * [net.config.photo], mode="area")
        sides.append(Side(cameras, view, picture, photo))
    return Pair(codes, (sides[0], sides[1]))


def losses(
    net: E3dge, stage: Stage, pair: Pair, random: torch.Generator, samples: int | None = None,
    perceptual: Compare | None = None, identity: Compare | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """By name, not weighted."""
    if stage == "1":
        found = _global(net, pair, random, samples)
        made, true = found.pop("_made"), pair.sides[0].view.thumb
        return found | _compared(made, true, perceptual, identity)
    if stage == "2.1":
        return _detail(net, pair, samples, False, perceptual, identity)
    ways = [_detail(net, way, samples, True, perceptual, identity) for way in (pair, pair.swapped())]
    return {name: (ways[0][name] + ways[1][name]) / 2 for name in ways[0]}


def _compared(made: Tensor, true: Tensor, perceptual: Compare | None, identity: Compare | None) -> dict[str, Tensor]:
    found = {"picture": functional.mse_loss(made, true)}
    if perceptual is not None:
        found["perceptual"] = perceptual(made, true).mean()
    if identity is not None:
        found["identity"] = identity(made, true).mean()
    return found


def _global(net: E3dge, pair: Pair, random: torch.Generator, samples: int | None) -> dict[str, Tensor]:
    """Stage 1: the first side is the photo. Distances are compared on its surface, near it and anywhere."""
    side, true = pair.sides[0], pair.codes
    guess = net.encode(side.photo)
    view = net.render(guess, side.cameras, samples)
    count, device = len(side.photo), side.photo.device
    surface = side.view.xyz.flatten(2).transpose(1, 2)
    chosen = torch.randint(surface.shape[1], (POINTS,), generator=random).to(device)
    surface = surface[:, chosen]
    near = surface + NEAR_SURFACE * torch.randn(surface.shape, generator=random).to(device)
    volume = (2 * torch.rand((count, POINTS, 3), generator=random).to(device) - 1) * HALF_SIDE
    field = net.generator.field
    every = torch.cat([surface, near, volume], 1)
    with torch.enable_grad():
        distance, slope = _with_slope(net, every, guess)
    with torch.no_grad():
        expected = field.sdf(every, true.renderer)
    with torch.enable_grad():
        true_slope = _with_slope(net, surface, true)[1].detach()
    met = side.view.foreground.flatten(1)[:, chosen, None].to(slope)
    n = POINTS
    normals = functional.normalize(slope[:, :n], dim=-1), functional.normalize(true_slope, dim=-1)
    return {
        "_made": view.thumb,
        "normals": (functional.smooth_l1_loss(*normals, reduction="none") * met).sum() / met.sum().clamp(min=1),
        "surface": (functional.smooth_l1_loss(distance[:, :n, None], torch.zeros_like(met), reduction="none")
                    * met).sum() / met.sum().clamp(min=1),
        "near": functional.smooth_l1_loss(distance[:, n : 2 * n], expected[:, n : 2 * n]),
        "volume": functional.smooth_l1_loss(distance[:, 2 * n :], expected[:, 2 * n :]),
        "eikonal": (slope.norm(dim=-1) - 1).square().mean(),
        "codes": functional.mse_loss(guess.renderer, true.renderer) + functional.mse_loss(guess.decoder, true.decoder),
    }  # fmt: skip


def _with_slope(net: E3dge, points: Float[Tensor, "B N 3"], codes: Codes) -> tuple[Tensor, Tensor]:
    """Distances and their gradients at points, both differentiable in the codes."""
    points = points.detach().requires_grad_()
    distance = net.generator.field.sdf(points, codes.renderer)
    return distance, torch.autograd.grad(distance.sum(), points, create_graph=True)[0]


def _detail(
    net: E3dge, pair: Pair, samples: int | None, fuse: bool, perceptual: Compare | None, identity: Compare | None
) -> dict[str, Tensor]:
    """Stage 2: the second side is rebuilt from the first one's photo. Without fusion the photo's own features alone
    modulate, and the photo's own view is rebuilt."""
    shown, wanted = pair.sides
    with torch.no_grad():  # E0 is frozen
        codes = net.encode(shown.photo)
        first = net.render(codes, shown.cameras, samples)
        second = net.render(codes, wanted.cameras, samples)
    seen = net.see(shown.photo, first, shown.cameras)
    residual = wanted.photo - net.enlarged(second.thumb)
    aligned = net.align(seen, second)
    if fuse:
        made, _ = net.render_detail(codes, wanted.cameras, seen, samples)
        target = wanted
    else:
        made, target = _own_detail(net, codes, seen, first, samples), shown
    small = [functional.interpolate(r, first.thumb.shape[2:], mode="area") for r in (aligned, residual)]
    picture = net.picture(made, codes)
    found = _compared(picture, target.picture, perceptual, identity)
    return found | {"aligned": functional.l1_loss(aligned, residual), "aligned_thumb": functional.l1_loss(*small)}


def _own_detail(net: E3dge, codes: Codes, seen: Seen, view: View, samples: int | None) -> View:
    """The photo's view with what its own feature map says."""
    from backend.families.e3dge.local import read_map

    points = view.points.flatten(1, 3)
    own, _ = read_map(seen.features, seen.cameras.project(points))
    modulation = net.local.modulation(own, points).unflatten(1, view.points.shape[1:4])
    return net.generator.renderer(codes.renderer, seen.cameras, samples or net.config.samples, modulation)


@dataclass
class Learner:
    """The networks and the optimiser of one stage; whatever does not learn in it is frozen."""

    net: E3dge
    stage: Stage
    rate: float = RATE
    samples: int | None = None
    perceptual: Compare | None = None
    identity: Compare | None = None
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.net.eval().requires_grad_(False)
        slow, usual = [], []
        for name in LEARNING[self.stage]:
            module: nn.Module = self.net.get_submodule(name)
            module.train().requires_grad_(True)
            for parameter_name, parameter in module.named_parameters():
                (slow if "modulations" in parameter_name else usual).append(parameter)
        groups = [{"params": usual, "lr": self.rate}, {"params": slow, "lr": MODULATION_RATE * self.rate}]
        self.optimizer = torch.optim.Adam([group for group in groups if group["params"]])

    def step(self, pair: Pair, random: torch.Generator) -> dict[str, float]:
        """One step on these heads. Returns the losses by name, with their weighted "sum"."""
        found = losses(self.net, self.stage, pair, random, self.samples, self.perceptual, self.identity)
        total = torch.stack([WEIGHTS[self.stage][name] * loss for name, loss in found.items()]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.optimizer.step()
        return {name: float(loss.detach()) for name, loss in found.items()} | {"sum": float(total.detach())}
