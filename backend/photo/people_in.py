# SPDX-License-Identifier: GPL-3.0-or-later
"""Photos of one person -> what a model family makes of them: the first stations of the road where there are photos."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, cast

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from backend.families.base import Encoded, FamilyModel, Latents, PersonPhoto, Step
from backend.packet import HumanAsset
from backend.photo.album import Images
from backend.photo.matting import Found
from backend.photo.read import decode_map, load
from backend.poses import REST, place
from backend.protocol import PHOTO_POSE, GenerateRequest, Inversion, PopulaceError

# Begin and share of each stage in the whole inversion; it only shapes the progress bar.
STAGES: Final = {"encode": (0.0, 0.1), "fit": (0.1, 0.75), "project": (0.85, 0.15)}


class PhotoModel(FamilyModel, Protocol):
    """A family that says `inputs=("seed", "image")`."""

    def encode(self, photos: Sequence[PersonPhoto], options: Inversion, step: Step) -> Encoded:
        """The person that these photos show; `step` hears the stages "encode", "fit" and "project".

        Rotations and camera are those of the first photo. The camera is in person space, with the person turned as the
        rotations say about where the bones are, and not moved.
        """
        ...


@dataclass(frozen=True)
class Seen:
    """The photos of a request, and the person in them."""

    photos: tuple[Found, ...]
    encoded: Encoded

    def facts(self, asset: HumanAsset, floor: float) -> dict[str, Any]:
        """What the packet tells of the first photo. Its camera moves with the person, who in the packet stands on
        y = 0 instead of `floor`, and is lifted so that the lowest vertex of the photo's pose does, too."""
        first, camera = self.photos[0], dict(self.encoded.camera)
        if camera:
            c2w = np.array(camera["c2w"], np.float64)
            c2w[1, 3] -= floor
            if asset.skeleton is not None:
                posed = [asset.parts[i] for i in asset.at_lod(0)]
                c2w[:3, 3] += place(REST, asset.skeleton, posed, self.encoded.rotations)[1][0]
            camera = {"c2w": c2w.round(6).tolist(), "fov_y_rad": float(camera["fov_y_rad"]),
                      "width": int(camera["width"]), "height": int(camera["height"])}  # fmt: skip
        return {
            "camera": camera,
            "rotations": {bone: [float(x) for x in turn] for bone, turn in self.encoded.rotations.items()},
            "box": list(first.box),
            "scores": {name: round(float(score), 5) for name, score in self.encoded.scores.items()
                       if math.isfinite(score)},
            "matte": first.matte, "people": first.people, "cut_off": list(first.cut_off), "notes": list(first.notes),
        }  # fmt: skip


def read(request: GenerateRequest, images: Images | None, step: Step) -> tuple[Found, ...]:
    """The person in each photo of the request. Raises what `load` raises, with the number of the photo where there are
    several, and `image_missing`."""
    found = []
    for i, photo in enumerate(request.photos):
        step("photo", i / len(request.photos))
        try:
            data, mask = (None if name is None else _bytes(images, name) for name in (photo.image, photo.mask))
            assert data is not None
            found.append(load(data, mask, photo.person))
        except PopulaceError as error:
            if len(request.photos) == 1 or error.code == "cancelled":
                raise
            raise PopulaceError(error.code, f"Photo {i + 1} of {len(request.photos)}: {error.message}",
                                error.hint) from None  # fmt: skip
    return tuple(found)


def encode(photos: tuple[Found, ...], request: GenerateRequest, model: FamilyModel, step: Step) -> Seen:
    """What the family sees in them."""

    def told(stage: str, fraction: float) -> None:
        begin, share = STAGES.get(stage, (0.0, 1.0))
        step(stage, begin + share * min(max(fraction, 0.0), 1.0))

    with torch.enable_grad():
        made = cast(PhotoModel, model).encode(photos, request.inversion, told)
    latents = Latents(made.latents.family, *({name: x.detach() for name, x in named.items()}
                                             for named in (made.latents.codes, made.latents.maps)))  # fmt: skip
    return Seen(photos, Encoded(latents, made.rotations, made.camera, made.scores))


def maps_of(request: GenerateRequest, images: Images | None) -> dict[str, UInt8[Tensor, "H W 4"]]:
    """Pixels of all latent maps that a request names, by id. Raises `image_missing` and `invalid_latents`."""
    of_photos = {name for photo in request.photos for name in (photo.image, photo.mask)}
    return {name: torch.from_numpy(decode_map(_bytes(images, name))) for name in request.images()
            if name not in of_photos}  # fmt: skip


def pose_of(request: GenerateRequest, seen: Seen | None) -> tuple[str, dict[str, Sequence[float]]]:
    """The named pose, and the rotations that go over it: the photo's, then those of one's own."""
    own: Mapping[str, Sequence[float]] = request.joint_rotations or {}
    if request.pose == PHOTO_POSE and seen is not None:
        return REST, {**seen.encoded.rotations, **own}
    return request.pose, dict(own)


def _bytes(images: Images | None, name: str) -> bytes:
    if images is None:
        raise PopulaceError("image_missing", "The request names photos, but there are none with it.", "Add them.")
    return images.read(name)
