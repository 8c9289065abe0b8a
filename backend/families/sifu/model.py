# SPDX-License-Identifier: GPL-3.0-or-later
"""The families `sifu` and `gta` at work: a photo -> crop, body, pose -> latents; latents -> normals, planes -> a field.

Latents are what cannot be computed again: the crop of the photo, and the body's shape, pose and place. Normals and
planes follow from these and are kept for the last few people.
"""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from backend import poses
from backend.families.base import AttributeValue, Encoded, Latents, PersonPhoto, Step, no_step
from backend.families.sifu.config import Kind
from backend.families.sifu.fit import BodyFit, fit_body
from backend.families.sifu.person import SifuField
from backend.families.sifu.pose import first_guess
from backend.families.sifu.prior import Placed, SkinnedBody, people_body, rest_placed, smplx_body
from backend.families.sifu.query import Answers, BodySpeaker, Query
from backend.families.sifu.stages import Stages
from backend.families.sifu.surface import Scheme
from backend.families.sifu.views import normal_views
from backend.protocol import PopulaceError
from backend.settings import Settings
from backend.weights import Weights

log = logging.getLogger(__name__)

CROP = 512  # pixels per side of the crop that is kept
ROOM = 1.11  # side of the crop over the longer side of the person's box
FOV = math.radians(10)  # of the camera that is told: far away, for the networks look in parallel
REMEMBERED = 2  # people whose planes are kept
KNOWN = 0.5  # the code of a body whose table the weights do not know


class SifuModel:
    """See `families.base.FamilyModel`. `body` makes the body prior when it is first needed."""

    def __init__(
        self, stages: Stages, body: Callable[[], SkinnedBody], device: torch.device, sha256: str | None,
        regressor: Callable[[], Any] | None = None,
    ) -> None:  # fmt: skip
        self.name: Kind = stages.config.kind
        self.stages, self.device, self.weights_sha256 = stages, device, sha256
        self._make_body, self._body, self._regressor = body, None, regressor
        self._known: OrderedDict[bytes, Answers] = OrderedDict()

    @property
    def body(self) -> SkinnedBody:
        if self._body is None:
            self._body = self._make_body()
        return self._body

    def sample(self, seed: int, truncation_psi: float, parameters: Mapping[str, Any] | None = None) -> Latents:
        """The mean body in rest, whatever the seed: codes to be replaced. Without a photo `decode` refuses them."""
        return Latents(self.name, self.latents(rest_placed(self.body), None).codes)

    # -------------------------------------------------------------------------------------------------------- a photo

    @torch.no_grad()
    def encode(self, photos: Sequence[PersonPhoto], options: Any, step: Step = no_step) -> Encoded:
        """The person of the first photo; the networks look at one. `options` is `protocol.Inversion`: `steps` of the
        body's fit (0: as first guessed), `seconds` its time box. Raises `no_person_found`."""
        if not photos:
            raise PopulaceError("invalid_request", "There is no photo.", "Give one photo of one person.")
        until = None if options.seconds is None else time.monotonic() + options.seconds
        step("encode", 0.0)
        photo = photos[0]
        square, corner, side = crop(photo)
        rgba = _resized(square, CROP)
        image, mask = self._image(rgba), _mask(rgba, BodyFit.size)
        if float(mask.mean()) < 1e-3:
            raise PopulaceError("no_person_found", "The mask of the photo is empty.", "Give a mask or another photo.")
        found = self._regressor() if self._regressor else None
        start = first_guess(self.body, photo, (corner, side), mask, found, step)
        step("encode", 1.0)
        figures: dict[str, float] = {}
        if options.steps:
            left = None if until is None else max(until - time.monotonic(), 0.1)
            settings = BodyFit(steps=options.steps, rate=4e-3, keep=0.05, seconds=left)
            start, figures = fit_body(self.body, start, mask, self._predictor(image), settings, step)
        latents = self.latents(start, rgba)
        quaternions = poses.to_quaternions(start.rotations.numpy())
        rotations = {name: tuple(map(float, q)) for name, q in zip(self.body.bones, quaternions)}
        scores = {**{f"fit_{name}": value for name, value in figures.items()}, "mask_iou": self._iou(start, mask)}
        camera = self._camera(start, photo, corner, side)
        return Encoded(latents, rotations, camera, scores)  # pyright: ignore[reportArgumentType]

    def latents(self, placed: Placed, rgba: UInt8[Tensor, "H W 4"] | None) -> Latents:
        """The latents of a body in the cube and the crop that it stands in."""
        quaternions = torch.from_numpy(poses.to_quaternions(placed.rotations.numpy())).float()
        row = torch.cat([placed.shape, quaternions.flatten(), placed.scale.reshape(1), placed.shift])[None]
        maps = {} if rgba is None else {"body/photo": rgba}
        return Latents(self.name, {"body/shape": row, "body/tex": torch.ones(1, 3)}, maps)

    def placed(self, row: Float[Tensor, " C"]) -> Placed:
        """The other way round. Raises `invalid_latents` where they are of another body."""
        shapes, bones = self.body.dimensions, len(self.body.bones)
        if row.shape != (shapes + 4 * bones + 4,) or not torch.isfinite(row).all() or float(row[-4]) <= 0:
            raise PopulaceError(
                "invalid_latents", f"body/shape has {row.numel()} numbers; the body {self.body.name!r} has "
                f"{shapes + 4 * bones + 4}.", "Use latents of a person made with the same body and weights."
            )  # fmt: skip
        quaternions = row[shapes : shapes + 4 * bones].reshape(bones, 4)
        turns = torch.from_numpy(poses.to_matrices(quaternions.double().numpy())).float()
        return Placed(row[:shapes], turns, row[-4], row[-3:])

    def _image(self, rgba: UInt8[Tensor, "H W 4"]) -> Float[Tensor, "1 3 S S"]:
        """What the networks see: -1..1, 0 where the matte is less than one half."""
        scaled = _resized(rgba.numpy(), self.stages.config.image).float().movedim(2, 0) / 255
        return ((scaled[:3] * 2 - 1) * (scaled[3:] > 0.5))[None].to(self.device)

    def _views(self, placed: Placed, legacy: bool) -> dict[str, Float[Tensor, "1 3 S S"]]:
        size = self.stages.config.image
        views = normal_views(placed.vertices(self.body), self.body.faces, size, legacy_side_normals=legacy)
        return {side: view[None, :3].to(self.device) for side, view in views.items()}

    def _predictor(self, image: Float[Tensor, "1 3 S S"]):
        def predict(views: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            size, own = views["F"].shape[-1], image.shape[-1]
            small = {side: _scaled(view[None], own).to(self.device) for side, view in views.items()}
            front, back = self.stages.normals(image, small)
            return _scaled(front.cpu(), size)[0], _scaled(back.cpu(), size)[0]

        return predict

    def _iou(self, placed: Placed, mask: Float[Tensor, "S S"]) -> float:
        view = normal_views(placed.vertices(self.body), self.body.faces, mask.shape[-1], ("F",))["F"][3] > 0.5
        return float((view & (mask > 0.5)).sum() / (view | (mask > 0.5)).sum())

    def _camera(self, placed: Placed, photo: PersonPhoto, corner: tuple[float, float], side: float) -> dict[str, Any]:
        """A far camera that sees the body where the photo shows it; in the body's metres, pelvis as in rest."""
        height, width = photo.rgba.shape[:2]
        per_metre = float(placed.scale) * side / 2  # pixels
        middle = np.array([width / 2 - corner[0], height / 2 - corner[1]]) * 2 / side - 1  # network, of the photo
        eye_x = (middle[0] - float(placed.shift[0])) / float(placed.scale)
        eye_y = (-middle[1] - float(placed.shift[1])) / float(placed.scale)
        distance = height / 2 / math.tan(FOV / 2) / per_metre
        rows = np.eye(4)
        rows[:3, 3] = eye_x, eye_y, distance
        return {"c2w": rows.tolist(), "fov_y_rad": FOV, "width": width, "height": height}

    # ---------------------------------------------------------------------------------------------------- a field

    @torch.no_grad()
    def decode(
        self,
        latents: Latents,
        separate: bool = False,
        surface: Scheme = "full",
        legacy_visibility: bool = False,
        legacy_side_normals: bool = False,
    ) -> Sequence[SifuField]:
        """One field, "human". Runs the networks unless this person was among the last few. Raises `invalid_latents`,
        and `invalid_request` where there is no photo."""
        if set(latents.codes) != {"body/shape", "body/tex"}:
            raise PopulaceError("invalid_latents", f"A person of {self.name.upper()} has the codes body/shape and "
                                "body/tex.", "Send both, and the map body/photo.")  # fmt: skip
        if "body/photo" not in latents.maps:
            raise PopulaceError(
                "invalid_request",
                f"{self.name.upper()} makes people from photos, not from seeds.",
                "Give a photo (populace invert PHOTO), or choose another family.",
            )
        row = latents.codes["body/shape"].detach().cpu().float()
        gain, photo = latents.codes["body/tex"].detach().cpu().float(), latents.maps["body/photo"].cpu()
        if len(row) != 1 or gain.shape != (1, 3) or photo.ndim != 3 or photo.shape[2] != 4:
            raise PopulaceError("invalid_latents", "Latents have one row of codes, three gains and an RGBA photo.")
        placed = self.placed(row[0])
        switches = bytes([legacy_visibility, legacy_side_normals])
        key = row.numpy().tobytes() + photo.numpy().tobytes() + switches
        if key not in self._known:
            while len(self._known) >= REMEMBERED:
                self._known.popitem(last=False)
            self._known[key] = self._answers(placed, photo, legacy_visibility, legacy_side_normals)
        self._known.move_to_end(key)
        pixels = photo.float().movedim(2, 0) / 255
        return [SifuField(self._known[key], self.body, placed, pixels, gain[0], surface)]

    def _answers(self, placed: Placed, photo: UInt8[Tensor, "H W 4"], visibility: bool, sides: bool) -> Answers:
        image, body = self._image(photo), self._views(placed, sides)
        front, back = self.stages.normals(image, body)
        planes = self.stages.planes(image, front, back, body)
        speaker = BodySpeaker(placed.mesh(self.body), visibility)
        return Answers(Query(planes, speaker, self.name), self.stages.decoders, self.device)

    def describe(self, latents: Latents) -> dict[str, AttributeValue]:
        """Nothing is known of these people but what the photo shows."""
        return {}

    def edit(self, latents: Latents, values: Mapping[str, AttributeValue]) -> Latents:
        if not values:
            return latents
        raise PopulaceError("invalid_request", f"{self.name.upper()} people have no attribute {min(values)!r}.",
                            "Invert the photo with the people family to edit the person.")  # fmt: skip


def crop(photo: PersonPhoto) -> tuple[UInt8[np.ndarray, "S S 4"], tuple[float, float], float]:
    """The square about the person's box, transparent beyond the photo; its corner and side in the photo's pixels."""
    left, top, right, bottom = photo.box
    side = max(2, round(ROOM * max(right - left, bottom - top)))
    x, y = round((left + right) / 2 - side / 2), round((top + bottom) / 2 - side / 2)
    out = np.zeros((side, side, 4), np.uint8)
    height, width = photo.rgba.shape[:2]
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + side, width), min(y + side, height)
    if x1 > x0 and y1 > y0:
        out[y0 - y : y1 - y, x0 - x : x1 - x] = photo.rgba[y0:y1, x0:x1]
    return out, (float(x), float(y)), float(side)


def _resized(rgba: np.ndarray, size: int) -> UInt8[Tensor, "S S 4"]:
    """Bicubic; colours weighted by the matte, so that no background bleeds in."""
    if rgba.shape[0] == size:
        return torch.from_numpy(np.ascontiguousarray(rgba))
    bands = Image.fromarray(rgba).split()
    alpha = bands[3].resize((size, size), Image.Resampling.BICUBIC)
    held = np.asarray(bands[3], np.float32) / 255
    share = np.asarray(Image.fromarray(held).resize((size, size), Image.Resampling.BICUBIC)).clip(1e-3, 1)
    out = []
    for band in bands[:3]:
        weighted = Image.fromarray(np.asarray(band, np.float32) * held).resize((size, size), Image.Resampling.BICUBIC)
        out.append((np.asarray(weighted) / share).clip(0, 255))
    colors = (np.stack(out, 2) + 0.5).astype(np.uint8)
    return torch.from_numpy(np.concatenate([colors, np.asarray(alpha)[..., None]], 2))


def _mask(rgba: UInt8[Tensor, "H W 4"], size: int) -> Float[Tensor, "S S"]:
    return _scaled(rgba[..., 3].float()[None, None] / 255, size)[0, 0].clamp(0, 1)


def _scaled(picture: Float[Tensor, "B C H W"], size: int) -> Float[Tensor, "B C S S"]:
    if picture.shape[-1] == size:
        return picture
    return torch.nn.functional.interpolate(picture, (size, size), mode="bilinear", antialias=True)


def load(device: torch.device, weights: Weights | None) -> SifuModel:
    """The model of verified weights, the body that they were trained with if it is here. Raises `weights_corrupt`,
    `weights_missing`."""
    assert weights is not None, "the registry hands over weights to families that name some"
    stages = Stages.of_files(weights, device)
    settings = Settings.load()

    def people() -> Any:
        from backend import families

        return families.load("people", "cpu", settings)

    def body() -> SkinnedBody:
        model = people()
        if stages.config.body != "smplx":
            return people_body(model)
        path = settings.data_dir / "bodies" / "smplx.npz"
        if path.is_file():
            table = path.with_name("smplx_cmap.npy")
            return smplx_body(path, table if table.is_file() else None)
        log.warning("%s was trained with SMPL-X, which is not at %s; the default model's body stands in, with a "
                    "loss. %s", stages.config.kind.upper(), path, "See backend/families/sifu/README.md.")  # fmt: skip
        own = people_body(model)
        return SkinnedBody(**{**vars(own), "codes": torch.full_like(own.codes, KNOWN)})

    return SifuModel(stages, body, device, weights.sha256, people)
