# SPDX-License-Identifier: GPL-3.0-or-later
"""The family at work: seed -> z -> w per branch -> volumes -> one field in metres, its colours refined by two views.

Codes are w, not z: straight lines in w are what interpolation wants, and truncation is a line to the mean w. The
occupancy of the network becomes a signed distance at this door: (2 value - 1) * 25/128 in ndc, negative inside.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from backend.families.base import AttributeValue, Encoded, Latents, PersonPhoto, Step, no_step, seeded_normal
from backend.families.get3dhuman import colors, inversion
from backend.families.get3dhuman.config import DISTANCE, INVERSE, from_metadata, to_ndc
from backend.families.get3dhuman.networks import Get3DHuman, RefineNet, decode_shape, decode_texture
from backend.families.get3dhuman.reading import Reader
from backend.protocol import Inversion, PopulaceError
from backend.weights import Weights, check_tensors

CM = 100.0  # per metre
BOUNDS = ((-1.05, -0.11, -0.75), (1.05, 2.0, 0.75))  # metres; within what the feature pictures span
REMEMBERED = 2  # shapes and textures whose volumes are kept: re-texturing and interpolation come back to them
EDGE = 0.01  # metres that a cut surface keeps from the box
HEIGHT = 1.8  # metres of a person in a photo
FAR = 50.0  # metres to a camera that sees in parallel, nearly
ROUGHNESS = 0.8  # nothing is known of the material

Look = Literal["blend", "published", "field"]
T = TypeVar("T")


class Get3DHumanModel:
    """See `families.base.FamilyModel`. `refine` may be missing: then colours are the field's own."""

    name = "get3dhuman"

    def __init__(
        self, networks: Get3DHuman, refine: RefineNet | None, device: torch.device, sha256: str | None
    ) -> None:
        self.device = device
        self.weights_sha256 = sha256
        self.networks = networks.to(device).eval().requires_grad_(False)
        self.refine = None if refine is None else refine.to(device).eval().requires_grad_(False)
        self._shapes: OrderedDict[bytes, Shape] = OrderedDict()
        self._textures: OrderedDict[bytes, Texture] = OrderedDict()

    @torch.no_grad()
    def sample(self, seed: int, truncation_psi: float, parameters: Mapping[str, Any] | None = None) -> Latents:
        """One w [1, W] per branch. The published run does not truncate: psi 1."""
        branches = {"body/shape": self.networks.backbone_shape, "body/tex": self.networks.backbone_texture}
        codes = {}
        for name, branch in branches.items():
            z = torch.from_numpy(seeded_normal(seed, name, (1, self.networks.config.z_dim))).to(self.device)
            codes[name] = branch.mapping(z, truncation_psi)[:, 0].clone()
        return Latents(self.name, codes)

    @torch.enable_grad()
    def encode(
        self, photos: Sequence[PersonPhoto], options: Inversion | None = None, step: Step = no_step
    ) -> Encoded:
        """Codes of the person in the first photo, by optimisation (see `inversion`): the shape, then its colours. The
        person is taken to stand upright, to face the camera and to be 180 cm tall, as in training; 0 steps give the
        mean one. The camera is that far away (`FAR`) which the parallel one stands for."""
        options = options or Inversion()
        pixels = torch.from_numpy(photos[0].rgba.copy()).to(self.device, torch.float32).permute(2, 0, 1) / 255
        target = inversion.place(pixels, self.networks.config.resolution // 4)
        assert target.color is not None
        count = options.steps
        if options.seconds is not None and count:  # so many as the time is enough for, by the first ones of each kind
            begin = time.monotonic()
            trial, _ = inversion.fit_shape(self.networks, target, steps=1)
            inversion.fit_texture(self.networks, trial, target, steps=1)
            count = max(1, min(count, int(options.seconds / (time.monotonic() - begin)) - 1))
        shape, _ = inversion.fit_shape(self.networks, target, steps=count, step=_part(step, 0.0, 0.6))
        texture, _ = inversion.fit_texture(self.networks, shape, target, steps=count, step=_part(step, 0.6, 0.4))
        shown = inversion.show(self.networks, shape, texture, len(target.mask))
        assert shown.color is not None
        both, either = (target.mask & shown.mask).sum(), (target.mask | shown.mask).sum()
        error = (shown.color - target.color)[target.mask].square().mean()
        scores = {"mask_iou": float(both / either.clamp(min=1)), "psnr": float(-10 * error.clamp(min=1e-10).log10())}
        codes = {"body/shape": shape, "body/tex": texture}
        return Encoded(Latents(self.name, codes), {}, _camera(photos[0]), scores)

    def decode(self, latents: Latents, separate: bool = False, look: Look = "blend") -> Sequence[HumanVolume]:
        """One field, "human": this family knows no garments as objects. Raises `invalid_latents`."""
        width = self.networks.config.w_dim
        if set(latents.codes) != {"body/shape", "body/tex"}:
            raise PopulaceError("invalid_latents", f"A Get3DHuman person has the codes body/shape and body/tex, not "
                                f"{', '.join(latents.codes) or 'none'}.", "Send both.")  # fmt: skip
        rows = {}
        for name, code in latents.codes.items():
            if tuple(code.shape) not in ((1, width), (2 * self.networks.backbone_shape.blocks, width)):
                raise PopulaceError(
                    "invalid_latents", f"{name} must have shape [1, {width}], or a row per layer of the network, not "
                    f"{list(code.shape)}.", "Send latents of a person of the same weights."
                )  # fmt: skip
            rows[name] = code.to(self.device, torch.float32)
        one, two = (rows[name].cpu().numpy().tobytes() for name in ("body/shape", "body/tex"))
        shape = _remembered(self._shapes, one, lambda: Shape(self.networks, rows["body/shape"]))
        texture = _remembered(
            self._textures, one + two, lambda: Texture(self.networks, self.refine, shape, rows["body/tex"])
        )
        return [HumanVolume(shape, texture, look)]

    def describe(self, latents: Latents) -> dict[str, AttributeValue]:
        """Nothing is known of these people but their codes."""
        return {}

    def edit(self, latents: Latents, values: Mapping[str, AttributeValue]) -> Latents:
        if not values:
            return latents
        raise PopulaceError("invalid_request", f"Get3DHuman people have no attribute {min(values)!r}.",
                            "Mix, vary or re-texture them instead.")  # fmt: skip


class Shape:
    """What follows from a shape's code alone, so that another texture leaves the surface as it is, bit for bit."""

    @torch.no_grad()
    def __init__(self, networks: Get3DHuman, rows: Float[Tensor, "L W"]) -> None:
        self.networks = networks
        self.picture, self.volume = networks.shape_features(_all_rows(networks, rows))
        self.read = Reader(networks.mlp_shape, self.volume[0])

    def occupancy(self, ndc: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        """0 inside, 1 outside, at points of the picture."""
        if torch.is_grad_enabled() and ndc.requires_grad:
            return decode_shape(self.networks.mlp_shape, self.volume, ndc[None])[0]
        return self.read(ndc)[:, 0]


class Texture:
    """What a texture's code adds to a shape. The views are traced when a colour is first asked for."""

    @torch.no_grad()
    def __init__(self, networks: Get3DHuman, refine: RefineNet | None, shape: Shape, rows: Tensor) -> None:
        self.networks, self.refine, self.shape = networks, refine, shape
        self.volume = networks.texture_features(_all_rows(networks, rows), shape.picture)[1]

    @cached_property
    def read(self) -> Reader:
        return Reader(self.networks.mlp_texture, torch.cat([self.shape.volume[0], self.volume[0]]))

    def own(self, ndc: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        """The field's colours."""
        if torch.is_grad_enabled() and ndc.requires_grad:
            return decode_texture(self.networks.mlp_texture, self.shape.volume, self.volume, ndc[None])[0]
        return self.read(ndc)

    @cached_property
    def pictures(self) -> list[colors.Picture]:
        """Back and front view, refined."""
        assert self.refine is not None, "without a refine net there are no refined views"
        size, like = self.networks.config.resolution, self.shape.volume  # 512, as the refine net was trained
        return [colors.look(self.shape.occupancy, self.own, self.refine, size, a, like) for a in colors.ANGLES]

    @cached_property
    def blend(self) -> colors.BlendedColors:
        return colors.BlendedColors(self.own, self.pictures)

    @cached_property
    def published(self) -> colors.NearestColors:
        return colors.NearestColors(self.pictures)


class HumanVolume:
    """See `families.base.HumanField`; field space is person space, metres."""

    name = "human"
    rig = None
    focus = None
    region_density = None

    def __init__(self, shape: Shape, texture: Texture, look: Look) -> None:
        self.shape, self.texture = shape, texture
        self.look: Look = look if texture.refine is not None else "field"
        self.bounds = torch.tensor(BOUNDS, device=shape.volume.device)

    def sdf(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        """What reaches the box is cut there, so that the surface is closed even where a person leaves the picture."""
        distance = (2 * self.shape.occupancy(to_ndc(CM * points)) - 1) * (DISTANCE * INVERSE / CM)
        low, high = self.bounds.to(points)
        return torch.maximum(distance, torch.maximum(low - points, points - high).amax(1) + EDGE)

    def color(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        ndc = to_ndc(CM * points)
        match self.look:
            case "blend":
                return self.texture.blend(ndc)
            case "published":
                return self.texture.published(ndc)
            case _:
                return self.texture.own(ndc)

    def material(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 2"]:
        return points.new_tensor([ROUGHNESS, 0.0]).expand(len(points), 2)

    def offset(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        return torch.zeros_like(points)

    def counterpart(self, points: Float[Tensor, "N 3"], other: HumanVolume) -> Float[Tensor, "N 3"]:
        return points

    def region(self, points: Float[Tensor, "N 3"]) -> Int[Tensor, " N"]:
        return torch.zeros(len(points), dtype=torch.int64, device=points.device)

    def skin(self, points: Float[Tensor, "N 3"]) -> tuple[Int[Tensor, "N 4"], Float[Tensor, "N 4"]]:
        """They have no rig: all of a person would hang on one bone."""
        indices = torch.zeros(len(points), 4, dtype=torch.int64, device=points.device)
        return indices, points.new_tensor([1.0, 0.0, 0.0, 0.0]).expand(len(points), 4)



def _part(step: Step, begin: float, share: float) -> Step:
    return lambda stage, fraction: step("fit", begin + share * fraction)


def _camera(photo: PersonPhoto) -> dict[str, Any]:
    """In person space, of a photo whose matte is a person of HEIGHT metres on the floor, in the middle."""
    rows, columns = np.nonzero(photo.rgba[..., 3] > 127)
    height, width = photo.rgba.shape[:2]
    metres = HEIGHT / (rows.max() + 1 - rows.min())  # per pixel
    c2w = np.eye(4)
    c2w[:3, 3] = ((width - columns.min() - columns.max() - 1) / 2 * metres,
                  (rows.max() + 1 - height / 2) * metres, FAR)  # fmt: skip
    return {"c2w": c2w.tolist(), "fov_y_rad": 2 * math.atan(height * metres / 2 / FAR), "width": width,
            "height": height}  # fmt: skip


def _all_rows(networks: Get3DHuman, rows: Float[Tensor, "L W"]) -> Float[Tensor, "1 R W"]:
    """One w for all layers unless there is one for each."""
    return rows.expand(2 * networks.backbone_shape.blocks, -1)[None]


def _remembered(store: OrderedDict[bytes, T], key: bytes, make: Callable[[], T]) -> T:
    """The last few, by use."""
    if key not in store:
        while len(store) >= REMEMBERED:
            store.popitem(last=False)
        store[key] = make()
    store.move_to_end(key)
    return store[key]


def load(device: torch.device, weights: Weights | None) -> Get3DHumanModel:
    """The model of verified weights, with the refine net if its file was imported too. Raises `weights_corrupt`."""
    assert weights is not None, "the registry hands over weights to families that name some"
    arrays, metadata = weights.read()
    config = from_metadata(metadata)
    networks = Get3DHuman(config)
    first = arrays.get("rnet.Conv0.conv.0.bias")
    refine = None if first is None else RefineNet(len(first))
    states = [part.state_dict() for part in (networks, refine) if part is not None]
    floats = {name: tensor for state in states for name, tensor in state.items() if tensor.is_floating_point()}
    check_tensors(weights.name, arrays, {name: tuple(tensor.shape) for name, tensor in floats.items()})
    for name, tensor in floats.items():
        tensor.copy_(torch.from_numpy(arrays[name].copy()))
    return Get3DHumanModel(networks, refine, device, weights.sha256)
