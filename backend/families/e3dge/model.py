# SPDX-License-Identifier: GPL-3.0-or-later
"""The family at work: seeds or photos of faces -> codes -> a head in metres.

Field space is the generator's world times `METRES`: +Y up, the face looks along +Z. What the front camera cannot see at
the sides of its picture does not exist, so the head is cut by the camera's frustum; its back is what the generator made
of places that it was never shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from backend.families.base import AttributeValue, Encoded, Latents, PersonPhoto, Step, no_step, seeded_normal
from backend.families.e3dge import DIRECTIONS, face, looks
from backend.families.e3dge.config import HALF_ANGLE_DEG, HALF_SIDE, Config, from_metadata
from backend.families.e3dge.inversion import Codes, E3dge, Seen
from backend.protocol import PopulaceError
from backend.weights import Weights, check_tensors

if TYPE_CHECKING:
    from backend.protocol import Inversion

METRES = 1.4  # per unit of the generator's world: a head that fills its picture as faces do is 23 cm high
ROUGHNESS = 0.55  # nothing is known of the material
EDGE = 0.005  # of the world's units, that a cut surface keeps from the box
MAP = "body/photo"
BLOCK = 2048  # points at a time

Directions = Mapping[str, Mapping[str, Tensor]]
"""By attribute: a vector for the renderer's rows and one for the decoder's, in standard deviations of people."""


class E3dgeModel:
    """See `families.base.FamilyModel`. Without the encoder's weights there are seeds but no photos."""

    name = "e3dge"

    def __init__(self, net: E3dge, device: torch.device, sha256: str | None, directions: Directions) -> None:
        self.device = device
        self.weights_sha256 = sha256
        self.net = net.to(device).eval().requires_grad_(False)
        self.directions = directions

    @property
    def config(self) -> Config:
        return self.net.config

    @torch.no_grad()
    def sample(self, seed: int, truncation_psi: float, parameters: Mapping[str, Any] | None = None) -> Latents:
        """The same w in all rows, as the generator was trained."""
        z = torch.from_numpy(seeded_normal(seed, "e3dge", (1, self.config.style_dim))).to(self.device)
        return self._latents(self.net.sample(z, truncation_psi), torch.zeros(1, 2, device=self.device))

    @torch.no_grad()
    def encode(self, photos: Sequence[PersonPhoto], options: Inversion | None = None, step: Step = no_step) -> Encoded:
        """One pass, as published: nothing is fitted, so `options.steps` plays no role. Codes of several photos are
        averaged; the detail is the first one's. Raises `weights_missing` and `no_person_found`."""
        self._check_reading("camera")
        net = self.net
        frames = [face.frame(photo) for photo in photos]
        cuts = [self._tensor(frame.cut(photo.rgba, self.config.picture)) for frame, photo in zip(frames, photos)]
        small = [self._for_networks(cut) for cut in cuts]
        each = []
        for i, picture in enumerate(small):
            step("encode", i / len(small))
            each.append(net.encode(picture))
        codes = Codes(torch.stack([c.renderer for c in each]).mean(0), torch.stack([c.decoder for c in each]).mean(0))
        angles = net.pose(small[0])
        cameras = net.cameras(angles)
        view = net.render(codes, cameras)
        target = functional.interpolate(small[0], view.thumb.shape[2:], mode="area")
        scores = {"psnr_codes": _psnr(view.thumb, target)}
        maps = {}
        if options is None or options.texture:
            step("project", 0.0)
            detailed, _ = net.render_detail(codes, cameras, net.see(small[0], view, cameras))
            scores["psnr"] = _psnr(detailed.thumb, target)
            maps[MAP] = _panels(cuts[0], view.thumb, view.depth)
        pose = torch.cat([cameras.c2w[0], angles.new_tensor([[0.0, 0, 0, 1]])])
        pose[:3, 3] *= METRES
        camera = {"c2w": pose.tolist(), "fov_y_rad": math.radians(2 * HALF_ANGLE_DEG), "width": self.config.picture,
                  "height": self.config.picture, "crop": frames[0].box}  # fmt: skip
        return Encoded(Latents(self.name, self._latents(codes, angles).codes, maps), {}, camera, scores)

    def decode(self, latents: Latents, separate: bool = False) -> Sequence[Head]:
        """One field, "head". Raises `invalid_latents`."""
        codes, angles = self._codes(latents)
        return [Head(self, codes, angles, latents.maps.get(MAP))]

    def describe(self, latents: Latents) -> dict[str, AttributeValue]:
        return dict(zip(DIRECTIONS, latents.codes["body/edits"][0].tolist(), strict=True))

    def edit(self, latents: Latents, values: Mapping[str, AttributeValue]) -> Latents:
        """Strengths of editing directions. Raises `invalid_request` where the weights know no such direction."""
        edits = latents.codes["body/edits"].clone()
        for name, value in values.items():
            if name not in self.directions:
                raise PopulaceError(
                    "invalid_request",
                    f"No direction for {name!r} is here.",
                    "Import E3DGE's directions: see `populace weights list`, e3dge_directions.",
                )
            edits[0, list(DIRECTIONS).index(name)] = float(value)  # type: ignore[arg-type]
        return Latents(self.name, {**latents.codes, "body/edits": edits}, latents.maps)

    def _check_reading(self, *more: str) -> None:
        """Raise `weights_missing` unless these networks and those of local detail are here."""
        files = {"encoder": "E3DGE_Full_Runner.pt", "camera": "ffhq_vol_renderer.pt"}
        for name in ("encoder", *more):
            if not hasattr(self.net, name):
                raise PopulaceError(
                    "weights_missing", f"For photos {files[name]} of E3DGE's authors is needed as well.",
                    f"Fetch it as `populace weights list` says, then: populace weights import e3dge {files[name]}"
                )  # fmt: skip

    # ------------------------------------------------------------------------------------------------ codes and maps

    def _latents(self, codes: Codes, angles: Float[Tensor, "1 2"]) -> Latents:
        shape, last = codes.renderer[0, :-1], codes.renderer[0, -1:]
        tex = torch.cat([last, codes.decoder[0].reshape(-1, self.config.style_dim)])
        edits = torch.zeros(1, len(DIRECTIONS), device=self.device)
        return Latents(self.name, {"body/shape": shape.clone(), "body/tex": tex, "body/edits": edits,
                                   "body/pose": angles.clone()})  # fmt: skip

    def _codes(self, latents: Latents) -> tuple[Codes, Float[Tensor, "1 2"]]:
        """The codes with all edits in them, and the photo's pose."""
        c = self.config
        wanted = {"body/shape": (c.layers, c.style_dim), "body/tex": (c.tex_rows, c.style_dim),
                  "body/edits": (1, len(DIRECTIONS)), "body/pose": (1, 2)}  # fmt: skip
        for name in {**wanted, **latents.codes}:
            found = tuple(latents.codes[name].shape) if name in latents.codes else None
            if found != wanted.get(name):
                raise PopulaceError(
                    "invalid_latents",
                    f"Latents {name!r} have shape {found}; these weights take {wanted.get(name)}.",
                    "Send latents that were made with the same weights.",
                )
        rows = {name: code.to(self.device, torch.float32) for name, code in latents.codes.items()}
        tex = rows["body/tex"]
        codes = Codes(torch.cat([rows["body/shape"], tex[:1]])[None], tex[1:].reshape(1, c.decoder_rows, c.decoder_dim))
        for name, strength in zip(DIRECTIONS, rows["body/edits"][0].tolist(), strict=True):
            if strength and name in self.directions:
                codes = codes.moved(self.directions[name], strength)
        return codes, rows["body/pose"]

    def seen(self, panels: Tensor, angles: Float[Tensor, "1 2"]) -> tuple[Seen, Float[Tensor, "1 4 S S"]]:
        """What a photo showed, as it was when it was encoded: edits since then do not change the residual. With the
        photo, 0..1. Raises `invalid_latents`."""
        self._check_reading()
        side = panels.shape[0]
        if panels.ndim != 3 or panels.shape[1:] != (3 * side, 4) or side % self.config.photo:
            raise PopulaceError(
                "invalid_latents",
                f"The map {MAP!r} is {panels.shape[1]} x {side} pixels and not three squares of a sensible size.",
                "Send the map of a person of the same weights.",
            )
        photo, thumb, deep = panels.to(self.device).split(side, 1)
        thumb, deep = (self._thumb(panel) for panel in (thumb, deep))
        depth = (256 * deep[:, :1] + deep[:, 1:2]) / 65535 * 2
        rgba = self._tensor(photo.cpu().numpy())
        residual = self._for_networks(rgba) - self.net.enlarged(thumb[:, :3] / 127.5 - 1)
        return Seen(self.net.cameras(angles), residual, self.net.local.feature_map(residual, depth)), rgba

    def _thumb(self, panel: Tensor) -> Float[Tensor, "1 4 h w"]:
        step = len(panel) // self.config.thumb
        return panel[step // 2 :: step, step // 2 :: step].permute(2, 0, 1)[None].float()

    def _tensor(self, rgba: np.ndarray) -> Float[Tensor, "1 4 H W"]:
        return torch.from_numpy(rgba).to(self.device).permute(2, 0, 1)[None].float() / 255

    def _for_networks(self, rgba: Float[Tensor, "1 4 S S"]) -> Float[Tensor, "1 3 P P"]:
        return functional.interpolate(rgba[:, :3], 2 * [self.config.photo], mode="area") * 2 - 1


def _panels(rgba: Float[Tensor, "1 4 S S"], thumb: Tensor, depth: Tensor) -> Tensor:
    """The map of a photo, uint8 [S, 3 S, 4]: the photo with its matte, the codes' picture, its depth in 16 bits (red
    and green, up to 2). The network of detail wants all three as they were, whatever edits come after."""
    size = rgba.shape[2:]
    fine = (depth / 2 * 65535).round().clamp(0, 65535)
    deep = torch.cat([fine.div(256, rounding_mode="floor"), fine % 256, torch.zeros_like(fine)], 1)
    small = [(thumb + 1) * 127.5, deep]
    opaque = torch.full_like(rgba[:, :1], 255)
    rest = [
        torch.cat([functional.interpolate(p.clamp(0, 255).round(), size, mode="nearest"), opaque], 1) for p in small
    ]
    return torch.cat([(rgba * 255).round(), *rest], 3)[0].permute(1, 2, 0).to(torch.uint8).cpu().contiguous()


def _psnr(found: Tensor, target: Tensor) -> float:
    """dB of pictures in -1..1."""
    return float(-10 * torch.log10((found.clamp(-1, 1) - target).square().mean() / 4 + 1e-12))


class Head:
    """See `families.base.HumanField`; field space is person space, metres."""

    name = "head"
    rig = None
    focus = None
    region_density = None

    def __init__(self, model: E3dgeModel, codes: Codes, angles: Tensor, panels: Tensor | None) -> None:
        self.model, self.codes, self.angles, self.panels = model, codes, angles, panels
        self.field = model.net.generator.field
        half = HALF_SIDE * METRES
        self.bounds = torch.tensor([[-half] * 3, [half] * 3], device=model.device)

    def sdf(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        """Cut by the front camera's frustum and by the box, so that the surface is closed."""
        x = points / METRES
        # matrix products give the same bits for the same shape only, so all blocks are alike
        blocks = functional.pad(x, (0, 0, 0, -len(x) % BLOCK)).split(BLOCK)
        parts = [self.field.sdf(block[None], self.codes.renderer)[0] for block in blocks]
        found = (torch.cat(parts) if parts else x[:, 0])[: len(x)]
        slope = math.radians(HALF_ANGLE_DEG)
        side = (x[:, :2].abs().amax(1) - math.tan(slope) * (1 - x[:, 2])) * math.cos(slope)
        ends = torch.maximum(side, x.abs().amax(1) - HALF_SIDE) + EDGE
        return torch.maximum(found, ends) * METRES

    @cached_property
    def _looks(self) -> looks.Looks:
        with torch.no_grad():
            seen, photo = (None, None) if self.panels is None else self.model.seen(self.panels, self.angles)
        return looks.Looks(self.model.net, self.codes, seen, photo)

    def color(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        return self._looks.color(points / METRES)

    def shown(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        """How far colours are the photo's, see `photo.hidden`."""
        return self._looks.shown(points / METRES)

    def material(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 2"]:
        return points.new_tensor([ROUGHNESS, 0.0]).expand(len(points), 2)

    def offset(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        return torch.zeros_like(points)

    def counterpart(self, points: Float[Tensor, "N 3"], other: Head) -> Float[Tensor, "N 3"]:
        return points

    def region(self, points: Float[Tensor, "N 3"]) -> Int[Tensor, " N"]:
        return torch.zeros(len(points), dtype=torch.int64, device=points.device)

    def skin(self, points: Float[Tensor, "N 3"]) -> tuple[Int[Tensor, "N 4"], Float[Tensor, "N 4"]]:
        raise NotImplementedError("heads have no rig")


def load(device: torch.device, weights: Weights | None) -> E3dgeModel:
    """The model of verified weights, with whatever of the encoder, the pose estimator and the directions is there.
    Raises `weights_corrupt`."""
    assert weights is not None, "the registry hands over weights to families that name some"
    arrays, metadata = weights.read()
    marked = {name: array for name, array in arrays.items() if name.startswith("direction.")}
    arrays = {name: array for name, array in arrays.items() if name not in marked}
    config = from_metadata(metadata)
    with torch.device("meta"):
        net = E3dge(
            config, any(name.startswith("encoder.") for name in arrays), "camera.final_conv.conv.bias" in arrays
        )
    state = net.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if tensor.is_floating_point()}
    check_tensors(weights.name, arrays, shapes)
    values = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    counters = {name: torch.zeros_like(state[name], device="cpu") for name in state.keys() - shapes.keys()}
    net.load_state_dict(values | counters, assign=True)
    directions: dict[str, dict[str, Tensor]] = {}
    sizes = {"renderer": config.style_dim, "decoder": config.decoder_dim}
    wanted = {f"direction.{name.split('.')[1]}.{space}": (n,) for name in marked for space, n in sizes.items()}
    check_tensors(weights.name, marked, wanted)
    for name in marked:
        _, attribute, space = name.split(".")
        directions.setdefault(attribute, {})[space] = torch.from_numpy(marked[name].copy()).to(device)
    return E3dgeModel(net, device, weights.sha256, directions)
