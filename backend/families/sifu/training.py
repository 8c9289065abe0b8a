# SPDX-License-Identifier: GPL-3.0-or-later
"""Training on the default model's own people: posed, lit, seen in parallel from the front, with the body known.

Losses and sampling are those of the papers (section 12 of SIFU's supplement as far as it is told): binary cross-entropy
of occupancy near the surface, L1 of colours about it, jointly; smooth L1 of the normal maps. The body that the networks
are told of is disturbed, because a fitted one is never exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from backend import families, poses
from backend.families.sifu.config import Config, Kind, to_metadata
from backend.families.sifu.networks import Reconstructor
from backend.families.sifu.prior import Placed, SkinnedBody, people_body
from backend.families.sifu.query import About, BodySpeaker, features, read_planes
from backend.families.sifu.stages import distinct, whole
from backend.families.sifu.views import clip_of, normal_views
from backend.geometry.body import BodyMesh
from backend.geometry.mesh import vertex_normals
from backend.render.rasterize import rasterize, sample, to_image
from backend.render.shade import to_linear, to_srgb
from backend.settings import Settings as AppSettings
from backend.training.checkpoint import pack_optimiser, under_prefix, unpack_optimiser, with_prefix
from backend.training.loop import Box, Outcome, Phase, World, run
from backend.training.photos import (
    Figure,
    lit,
    make_figure,
    random_light,
    random_person,
    random_rotations,
    stand,
)

NEAR = ((0.5, 0.05), (0.3, 0.015))  # shares of points and how far from the surface they are, metres; the rest anywhere
ABOUT_COLORS = 0.01  # metres along the normal
NOISE_DEGREES, NOISE_SHIFT, NOISE_SCALE = 1.8, 0.006, 0.006  # of the body that the networks are told of
GEOMETRY, COLORS = 3000, 1000  # points of an item
FILL = 1 / 1.11
BODY_SLOPE = 50.0  # of the logit of occupancy over signed distance, at first

Item = Mapping[str, Tensor]


@dataclass(frozen=True)
class Scan:
    """A clothed person in the network's frame, and the body in it."""

    vertices: Float[Tensor, "V 3"]
    faces: Tensor
    colors: Float[Tensor, "V 3"]  # sRGB
    placed: Placed


def figure_scan(figure: Figure, body: SkinnedBody, rng: np.random.Generator, yaw: float | None = None) -> Scan:
    """A sampled person in a random pose, turned by `yaw` (random, mostly to the viewer, if None)."""
    if yaw is None:
        yaw = rng.normal(0, 0.5) if rng.random() < 0.75 else rng.uniform(-math.pi, math.pi)
    rotations = random_rotations(rng, figure.bones)
    half = poses.to_matrices(np.array([[math.cos(yaw / 2), 0, math.sin(yaw / 2), 0]]))[0]
    turns = poses.to_matrices(rotations)
    turns[0] = half @ turns[0]
    rotations = poses.to_quaternions(turns)
    clothed = torch.from_numpy(stand(figure, rotations))
    shape = torch.from_numpy(figure.codes["body/shape"][0, : body.dimensions])
    drop = (body.rig(shape).heads - torch.from_numpy(figure.bones.heads)).mean(0)
    clothed = clothed + drop * torch.tensor([0.0, 1.0, 0.0])
    matrices = torch.from_numpy(turns).float()
    bare = body.posed(shape, matrices)
    low, high = clothed.amin(0), clothed.amax(0)
    scale = 2 * FILL / (high - low)[:2].max() * rng.uniform(0.96, 1.03)
    middle = torch.cat([(low + high)[:2] / 2, (bare.amin(0) + bare.amax(0))[2:] / 2])
    shift = -scale * middle + torch.cat([torch.from_numpy(rng.normal(0, 0.01, 2)).float(), torch.zeros(1)])
    placed = Placed(shape, matrices, scale, shift)
    colors = torch.from_numpy(figure.colors).float() / 255
    return Scan(placed.to_network(clothed), torch.from_numpy(figure.faces).long(), colors, placed)


def disturbed(placed: Placed, rng: np.random.Generator, amount: float = 1.0) -> Placed:
    """The body as a fit would find it."""
    turns = placed.rotations.numpy().astype(np.float64)
    angle = rng.normal(0, math.radians(NOISE_DEGREES) * amount, (len(turns), 3)) / 2
    twist = poses.to_matrices(np.concatenate([np.ones((len(turns), 1)), angle], 1))
    twist[0] = np.eye(3)
    shift = torch.from_numpy(rng.normal(0, NOISE_SHIFT * amount, 3)).float()
    scale = placed.scale * (1 + NOISE_SCALE * amount * rng.normal())
    shape = placed.shape + 0.1 * amount * torch.from_numpy(rng.normal(0, 1, len(placed.shape))).float()
    return Placed(shape, torch.from_numpy(turns @ twist).float(), scale, placed.shift + shift)


def photo_of(scan: Scan, size: int, rng: np.random.Generator | None) -> Float[Tensor, "4 S S"]:
    """sRGB with coverage, lit at random, in flat colours without `rng`."""
    viewer = scan.vertices * scan.vertices.new_tensor([1.0, -1.0, 1.0])
    side = 2 * size
    raster = rasterize(clip_of(viewer, "F", side)[None], scan.faces, (side, side))
    linear = to_linear(sample(scan.colors, raster, scan.faces))
    if rng is not None:
        normal = functional.normalize(sample(vertex_normals(viewer, scan.faces), raster, scan.faces), dim=1)
        linear = lit(linear, normal, random_light(rng)).float()
    image = to_image(torch.cat([linear, torch.ones(len(linear), 1)], 1), raster)[0].movedim(2, 0)
    image = functional.avg_pool2d(image[None], 2)[0]
    return torch.cat([to_srgb(image[:3] / image[3:].clamp(min=1e-6)), image[3:]])


def network_image(rgba: Float[Tensor, "4 S S"]) -> Float[Tensor, "3 S S"]:
    """What the networks see: -1..1, background exactly 0."""
    return (rgba[:3] * 2 - 1) * (rgba[3:] > 0.5)


@torch.no_grad()
def make_item(
    scan: Scan, body: SkinnedBody, size: int, rng: np.random.Generator, noise: float = 1.0
) -> dict[str, Tensor]:
    """One sample: pictures, points with their answers, and what the disturbed body says of the points."""
    speaker = BodySpeaker(disturbed(scan.placed, rng, noise).mesh(body))
    truth = BodyMesh(scan.vertices, scan.faces, scan.vertices)
    views = normal_views(speaker.body.vertices, body.faces, size)
    clothed = normal_views(scan.vertices, scan.faces, size, ("F", "B"))
    scale, points = float(scan.placed.scale), []
    at = surface_points(scan, GEOMETRY + COLORS, rng)
    begin = 0
    for share, sigma in NEAR:
        count = int(share * GEOMETRY)
        points.append(at[0][begin : begin + count] + scale * sigma * _normal(rng, count))
        begin += count
    low, high = scan.vertices.amin(0) - 0.1, scan.vertices.amax(0) + 0.1
    points.append(low + (high - low) * torch.from_numpy(rng.random((GEOMETRY - begin, 3))).float())
    geometry = torch.cat(points).clamp(-0.999, 0.999)
    flat = functional.normalize(at[2][GEOMETRY:], dim=1)
    about = at[0][GEOMETRY:] + scale * ABOUT_COLORS * _normal(rng, COLORS)[:, :1] * flat
    item = {
        "photo": _bytes(photo_of(scan, size, rng)), "front": _signed(clothed["F"][:3]),
        "back": _signed(clothed["B"][:3]),
        **{f"body_{side}": _signed(view[:3]) for side, view in views.items()},
        "vertices": speaker.body.vertices, "points": geometry, "occupied": truth.inside(geometry),
        "color_points": about, "colors": _bytes(at[1][GEOMETRY:]),
    }  # fmt: skip
    for name, where in (("points", geometry), ("color_points", about)):
        said = speaker.about(where)
        item |= {f"{name}/corners": said.corners.int(), f"{name}/weights": said.weights, f"{name}/values": said.values}
    return item


def surface_points(scan: Scan, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Even over the area: places, colours and normals (as wound)."""
    a, b, c = scan.vertices[scan.faces].unbind(1)
    cross = torch.linalg.cross(b - a, c - a, dim=1)
    area = cross.norm(dim=1).double().numpy()
    face = torch.from_numpy(rng.choice(len(area), count, p=area / area.sum()))
    u = torch.from_numpy(np.sort(rng.random((count, 2)), 1)).float()
    weights = torch.stack([u[:, 0], u[:, 1] - u[:, 0], 1 - u[:, 1]], 1)[..., None]
    corners = scan.faces[face]
    return (weights * scan.vertices[corners]).sum(1), (weights * scan.colors[corners]).sum(1), cross[face]


def _normal(rng: np.random.Generator, count: int) -> Tensor:
    return torch.from_numpy(rng.normal(0, 1, (count, 3))).float()


def _bytes(unit: Tensor) -> Tensor:
    return (unit.clamp(0, 1) * 255 + 0.5).to(torch.uint8)


def _signed(vectors: Tensor) -> Tensor:
    """-1..1 in a byte, 0 exactly 0."""
    return (vectors.clamp(-1, 1) * 127).round().to(torch.int8)


def make_items(
    figures: Sequence[Path], body: SkinnedBody, config: Config, count: int, seed: int, folder: Path
) -> list[Path]:
    """A pool of samples on disk; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:06d}.safetensors" for i in range(count)]
    for i, path in enumerate(paths):
        if not path.exists():
            rng = np.random.default_rng([seed, i])
            scan = figure_scan(Figure.load(figures[i % len(figures)]), body, rng)
            part = path.with_suffix(".part")
            item = make_item(scan, body, config.image, rng)
            save_file({name: tensor.contiguous() for name, tensor in item.items()}, part)
            part.replace(path)
    return paths


@dataclass(frozen=True)
class Settings:
    batch: int = 4
    rate: float = 1e-3
    steps: int = 2000  # over which the rate falls to nothing
    clip: float = 1.0
    geometry: int = 2000  # points of a step and item, of those that the item has
    colors: int = 700


class SifuStage:
    """See `training.loop.Stage`: two phases per step, normals and then the field on the normals as predicted."""

    name = "sifu"

    def __init__(
        self, config: Config, items: Sequence[Path] | Sequence[Item], settings: Settings, seed: int,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        self.config, self.items, self.settings, self.seed = config, items, settings, seed
        self.batch, self.device = settings.batch, torch.device(device)
        self.network = Reconstructor(config).to(self.device)
        _begin_with_the_body(self.network)
        normals, rest = [], []
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                (normals if name.startswith("normal_filter.") else rest).append(parameter)
        self.optimisers = {name: torch.optim.Adam(parameters, settings.rate) for name, parameters in
                           (("normals", normals), ("field", rest))}  # fmt: skip

    def before(self) -> dict[str, float]:
        return {}

    def phases(self, step: int, samples: range) -> Iterator[Phase]:
        progress = min(step / self.settings.steps, 1)
        rate = self.settings.rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))) * min(1, (step + 1) / 50)
        for optimiser in self.optimisers.values():
            for group in optimiser.param_groups:
                group["lr"] = rate
        self.network.train()
        rng = np.random.default_rng([self.seed, step])
        order = rng.integers(len(self.items), size=self.batch)
        loaded = [self.items[int(order[i])] for i in samples]
        items = [load_file(item) if isinstance(item, Path) else item for item in loaded]
        geometry = torch.from_numpy(rng.integers(GEOMETRY, size=self.settings.geometry))
        colors = torch.from_numpy(rng.integers(COLORS, size=self.settings.colors))
        items = [_some(item, geometry, colors) for item in items]
        pictures = {name: torch.stack([item[name] for item in items]).to(self.device).float() for name in PICTURES}
        image = network_image_batch(pictures["photo"] / 255)
        views = {name: pictures[name] / 127 for name in PICTURES[1:]}
        body = {side: views[f"body_{side}"] for side in "FBRL"}
        predicted: list[Tensor] = []

        def normals() -> tuple[Tensor, dict[str, float]]:
            front, back = self.network.normals(image, body)
            predicted[:] = front.detach(), back.detach()
            mask = (image != 0).any(1, keepdim=True)
            loss = sum(5 * functional.smooth_l1_loss(p, t * mask, beta=0.2) for p, t in
                       ((front, views["front"]), (back, views["back"])))  # fmt: skip
            assert isinstance(loss, Tensor)
            return loss, {"normals": float(loss.detach())}

        def field() -> tuple[Tensor, dict[str, float]]:
            return self.field_loss(image, predicted[0], predicted[1], body, items)

        yield Phase("normals", self.optimisers["normals"], normals, self.settings.clip)
        yield Phase("field", self.optimisers["field"], field, self.settings.clip)

    def field_loss(
        self, image: Tensor, front: Tensor, back: Tensor, body: Mapping[str, Tensor], items: Sequence[Item]
    ) -> tuple[Tensor, dict[str, float]]:
        planes = self.network.planes(image, front, back, body)
        geometry, colors = [], []
        for i, item in enumerate(items):
            own = {name: plane[i] for name, plane in planes.items()}
            carried = read_planes(own, item["vertices"].to(self.device), self.config.kind, 1)
            for name, found in (("points", geometry), ("color_points", colors)):
                about = About(*(item[f"{name}/{k}"].to(self.device) for k in ("corners", "weights", "values")))
                about = about._replace(corners=about.corners.long())
                found.append(features(own, carried, item[name].to(self.device), about, self.config.kind).T)
        occupied = torch.stack([item["occupied"] for item in items]).to(self.device).float()
        wanted = torch.stack([item["colors"] for item in items]).to(self.device).float() / 255
        logits = self.network.decoders.geo_mlp(torch.stack(geometry))[:, 0]
        geo = functional.binary_cross_entropy_with_logits(logits, occupied)
        color = functional.l1_loss(self.network.decoders.color(torch.stack(colors)), wanted)
        right = ((logits > 0) == (occupied > 0.5)).float().mean()
        return geo + color, {"occupancy": float(geo.detach()), "color": float(color.detach()), "right": float(right)}

    def after(self, step: int) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Tensor]:
        packed = {f"optimiser_{name}": pack_optimiser(o) for name, o in self.optimisers.items()}
        out = with_prefix("network", distinct(self.network.state_dict()))
        for name, values in packed.items():
            out |= with_prefix(name, values)
        return out

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.network.load_state_dict(whole(under_prefix("network", state), self.network, self.config))
        for name, optimiser in self.optimisers.items():
            unpack_optimiser(optimiser, under_prefix(f"optimiser_{name}", state))

    def sheet(self) -> np.ndarray | None:
        return None


@torch.no_grad()
def _begin_with_the_body(network: Reconstructor) -> None:
    """A network that knows nothing says the body that it was told: its last layer reads the signed distance, which is
    among the features that are appended there. So little training is spent on finding that out. Ours, not published."""
    last = network.decoders.geo_mlp.filters[-1]
    assert isinstance(last, torch.nn.Conv1d)
    distance = last.weight.shape[1] - 8
    last.weight *= 0.3
    last.weight[0, distance] = BODY_SLOPE
    assert last.bias is not None
    last.bias.zero_()


def _some(item: Item, geometry: Tensor, colors: Tensor) -> Item:
    """The item with these of its points."""
    of = {"points": geometry, "occupied": geometry, "color_points": colors, "colors": colors}
    return {name: tensor[of[name.partition("/")[0]]] if name.partition("/")[0] in of else tensor
            for name, tensor in item.items()}  # fmt: skip


PICTURES = ("photo", "front", "back", "body_F", "body_B", "body_R", "body_L")


def network_image_batch(rgba: Float[Tensor, "B 4 S S"]) -> Float[Tensor, "B 3 S S"]:
    """`network_image` of a batch."""
    return (rgba[:, :3] * 2 - 1) * (rgba[:, 3:] > 0.5)


def export(network: Reconstructor, path: Path, half: bool = True) -> None:
    """A weights file of the family, float16 by default. Position tables are left out: they follow from the sizes."""
    state = {name: tensor.detach().cpu() for name, tensor in distinct(network.state_dict()).items()}
    state = {name: (tensor.half() if half else tensor).contiguous() for name, tensor in state.items()}
    save_file(state, path, {**to_metadata(network.config), "title": f"{network.config.kind.upper()}, small"})


def train(
    kind: Kind, folder: Path, size: str, people: int, minutes: float, max_steps: float, seed: int,
    device: torch.device, world: World,
) -> tuple[Path | None, Outcome]:  # fmt: skip
    """`populace train --family sifu`: sample people, take two pictures of each, train; all of it goes on where it was.
    Returns the weights file (None on processes but the first, and if interrupted) and how it ended."""
    configs = {"tiny": Config.tiny(kind), "small": Config.small(kind),
               "base": replace(Config.published(kind), body="people")}  # fmt: skip
    config = configs[size]
    model: Any = families.load("people", "cpu", AppSettings.load())
    pool = folder / f"items_{config.image}"
    if world.rank == 0:
        figures = make_figures(model, people, seed, folder / "figures")
        make_items(figures, people_body(model), config, 2 * people, seed, pool)
    world.total([0], device)  # the others wait here
    items = [pool / f"{i:06d}.safetensors" for i in range(2 * people)]
    steps = int(max_steps) if math.isfinite(max_steps) else Settings.steps
    stage = SifuStage(config, items, Settings(batch=Settings.batch * world.size, steps=steps), seed, device)
    facts = {"kind": kind, "size": size, "seed": seed, "people": people, "steps": steps}
    outcome = run(stage, folder / kind, Box(minutes=minutes, max_steps=steps), world, facts)
    if world.rank or outcome.stopped == "interrupted":
        return None, outcome
    path = folder / f"{kind}.safetensors"
    export(stage.network, path)
    return path, outcome


def make_figures(model: Any, count: int, seed: int, folder: Path) -> list[Path]:
    """Sampled people on disk; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:06d}.safetensors" for i in range(count)]
    for i, path in enumerate(paths):
        if not path.exists():
            part = path.with_suffix(".part")
            make_figure(model, random_person(model, (seed << 32) + i)).save(part)
            part.replace(path)
    return paths
