# SPDX-License-Identifier: GPL-3.0-or-later
"""From photos to a capsule person, the worked example of `encode`: no learning, everything is measured.

The silhouette tells how the person leans and how wide it is at each height; a search over the shape codes makes the
capsules' own silhouette like it. Colours are means of what is seen of a region. A photo does not tell the height.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from backend.families.base import Encoded, Latents, PersonPhoto, Step
from backend.protocol import Inversion

if TYPE_CHECKING:
    from backend.families.capsule.model import CapsuleField, CapsuleModel

ROWS = 48  # of the silhouettes that are compared
FOV = math.radians(45)  # along the longer side of a photo
MAP_SIZE = (256, 256)  # of the photo's map: the person's height upwards, as much sideways
_FIRST_STEP = 0.8  # of the search, in codes
_ROOT = "pelvis"


def encode(model: CapsuleModel, photos: Sequence[PersonPhoto], options: Inversion, step: Step) -> Encoded:
    """See `photo.people_in.PhotoModel`."""
    step("encode", 0.0)
    leans = [_lean(photo) for photo in photos]
    upright = [_upright(photo, lean) for photo, lean in zip(photos, leans, strict=True)]
    masks = [_silhouette(cut) for cut in upright]
    shape = np.zeros(_codes(model))
    begin, delta, axis, is_better = time.monotonic(), _FIRST_STEP, 0, False
    best = _likeness(model, shape, masks)
    for i in range(options.steps):
        step("fit", i / options.steps)
        if options.seconds is not None and time.monotonic() - begin > options.seconds:
            break
        tries = []
        for sign in (1, -1):
            moved = shape.copy()
            moved[1 + axis] += sign * delta  # the first one is the height
            tries.append((_likeness(model, moved, masks), moved))
        found, moved = max(tries, key=lambda pair: pair[0])
        if found > best:
            best, shape, is_better = found, moved, True
        axis = (axis + 1) % (len(shape) - 1)
        if axis == 0:
            delta, is_better = delta * (1.0 if is_better else 0.5), False
    step("project", 0.0)
    field = _field(model, shape)
    height = float(field.ends[..., 1].max() + field.radii.max())
    tex = np.mean([_colors(cut, field) for cut in upright], 0)
    codes = {"body/shape": shape[None], "body/tex": tex.reshape(1, -1)}
    maps = {"body/photo": torch.from_numpy(_map(upright[0]))} if options.texture else {}
    latents = Latents("capsule", {n: torch.tensor(c, dtype=torch.float32, device=model.device)
                                  for n, c in codes.items()}, maps)  # fmt: skip
    half = leans[0] / 2
    rotations = {_ROOT: (math.cos(half), 0.0, 0.0, math.sin(half))}
    return Encoded(latents, rotations, _camera(photos[0], height), {"mask_iou": best})


def _codes(model: CapsuleModel) -> int:
    return model.sample(0, 0.0, {}).codes["body/shape"].shape[1]


def _field(model: CapsuleModel, shape: Float[np.ndarray, " S"]) -> CapsuleField:
    sample = model.sample(0, 0.0, {})
    codes = {**sample.codes, "body/shape": torch.from_numpy(shape[None]).float().to(model.device)}
    return model.decode(Latents("capsule", codes))[0]


def _lean(photo: PersonPhoto) -> float:
    """Radians to the left, as the picture has it, of the silhouette's long axis; at most half a radian."""
    y, x = np.nonzero(photo.rgba[::4, ::4, 3] > 127)
    if len(x) < 10:
        return 0.0
    spread = np.linalg.eigh(np.cov(np.stack([x, y])))[1][:, -1]
    angle = math.atan2(-spread[0], -spread[1]) if spread[1] < 0 else math.atan2(spread[0], spread[1])
    return angle if abs(angle) < 0.5 else 0.0


def _upright(photo: PersonPhoto, lean: float) -> UInt8[np.ndarray, "h w 4"]:
    """The person alone, turned upright, cut out."""
    left, top, right, bottom = photo.box
    cut = Image.fromarray(photo.rgba[top:bottom, left:right])
    cut.thumbnail((1024, 1024))
    turned = np.array(cut.rotate(-math.degrees(lean), Image.Resampling.BILINEAR, expand=True))
    rows, columns = (np.flatnonzero((turned[:, :, 3] > 127).any(axis)) for axis in (1, 0))
    return turned[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _silhouette(cut: UInt8[np.ndarray, "h w 4"]) -> Bool[np.ndarray, "R C"]:
    """ROWS high, as wide as it comes."""
    columns = max(3, round(ROWS * cut.shape[1] / cut.shape[0]))
    return np.asarray(Image.fromarray(cut[:, :, 3]).resize((columns, ROWS), Image.Resampling.BOX)) > 127


def flattened(field: CapsuleField) -> CapsuleField:
    """Pressed onto the plane z = 0, where it is its own silhouette: that of a rounded cone is one of the same radii."""
    from backend.families.capsule.model import CapsuleField

    flat = (field.ends * torch.tensor([1.0, 1.0, 0.0]).to(field.ends)).cpu().numpy()
    return CapsuleField(flat, field.radii.cpu().numpy(), field.regions.cpu().numpy(), None, field.palette)


def _likeness(model: CapsuleModel, shape: Float[np.ndarray, " S"], masks: Sequence[np.ndarray]) -> float:
    """Mean intersection over union of the capsules' silhouette, seen from far in front, with the photos'."""
    field = flattened(_field(model, shape))
    high = field.bounds[1].cpu() - 0.03
    height = float(high[1])
    half = max(*(mask.shape[1] / 2 for mask in masks), ROWS * float(high[0]) / height)
    count = 2 * math.ceil(half) + 1
    x = (torch.arange(count) - count // 2) * height / ROWS
    y = height * (1 - (torch.arange(ROWS) + 0.5) / ROWS)
    points = torch.stack([x.expand(ROWS, -1), y[:, None].expand(-1, count), torch.zeros(ROWS, count)], -1)
    mine = (field.sdf(points.reshape(-1, 3).to(model.device)) < 0).reshape(ROWS, count).cpu().numpy()
    scores = []
    for mask in masks:
        whole = np.zeros((ROWS, count), bool)
        begin = (count - mask.shape[1]) // 2
        whole[:, begin : begin + mask.shape[1]] = mask[:, :count]
        scores.append((whole & mine).sum() / (whole | mine).sum())
    return float(np.mean(scores))


def _colors(cut: UInt8[np.ndarray, "h w 4"], field: CapsuleField) -> Float[np.ndarray, "R 2 3"]:
    """Codes of plain colours: means over the pixels where each region is nearest; the head's where it is not seen."""
    from backend.families.capsule.model import REGIONS, color_code

    height = float(field.bounds[1, 1]) - 0.03
    y, x = np.nonzero(cut[:, :, 3] > 200)
    y, x = y[::7], x[::7]
    scale = height / cut.shape[0]
    points = torch.tensor(np.stack([(x + 0.5 - cut.shape[1] / 2) * scale, height - (y + 0.5) * scale, 0 * x], 1))
    region = field.region(points.float().to(field.ends.device)).cpu().numpy()
    seen = cut[y, x, :3] / 255
    means = [seen[region == r].mean(0) if (region == r).any() else seen.mean(0) for r in range(len(REGIONS))]
    return np.repeat(np.stack([color_code(mean) for mean in means])[:, None], 2, 1)


def _map(cut: UInt8[np.ndarray, "h w 4"]) -> UInt8[np.ndarray, "H W 4"]:
    """The person's picture, from the soles to the crown, in the middle of a square as wide as high."""
    height, width = MAP_SIZE
    image = Image.fromarray(cut)
    image = image.resize((max(1, round(height * cut.shape[1] / cut.shape[0])), height), Image.Resampling.BOX)
    square = Image.new("RGBA", (width, height))
    square.paste(image, ((width - image.width) // 2, 0))
    return np.array(square)


def _camera(photo: PersonPhoto, height: float) -> dict[str, object]:
    """Level and straight in front, as far away as makes the person as tall as in the photo."""
    rows, columns = photo.rgba.shape[:2]
    left, top, right, bottom = photo.box
    slope = math.tan(FOV / 2) * rows / max(rows, columns)  # of the picture's upper edge
    metres = height / (bottom - top)  # of a pixel, where the person is
    c2w = np.eye(4)
    c2w[:3, 3] = [(columns - left - right) / 2 * metres, height / 2 + ((top + bottom) - rows) / 2 * metres,
                  rows / 2 * metres / slope]  # fmt: skip
    return {"c2w": c2w.tolist(), "fov_y_rad": 2 * math.atan(slope), "width": columns, "height": rows}
