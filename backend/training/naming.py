# SPDX-License-Identifier: GPL-3.0-or-later
"""What can be said of a sampled person in plain numbers and words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from backend.families.people.wardrobe import EYES, word_of
from backend.training.casting import Casting, Garment
from backend.training.makehuman import BODY
from backend.training.person import LUMINANCE, Layer

YEARS = (25.0, 90.0)  # of the age slider's 0.5 and 1
LIGHT, DARK = 0.72, 0.24  # mean luminance of the lightest and the darkest skin

COLORS = {
    "black": (0.06, 0.06, 0.07), "white": (0.93, 0.93, 0.92), "grey": (0.5, 0.5, 0.5), "red": (0.75, 0.12, 0.12),
    "orange": (0.9, 0.5, 0.15), "yellow": (0.9, 0.82, 0.25), "green": (0.22, 0.5, 0.22), "olive": (0.35, 0.36, 0.2),
    "teal": (0.15, 0.5, 0.5), "blue": (0.2, 0.35, 0.75), "navy": (0.1, 0.13, 0.28), "light blue": (0.6, 0.73, 0.88),
    "purple": (0.45, 0.2, 0.6), "pink": (0.9, 0.6, 0.7), "brown": (0.35, 0.22, 0.13), "beige": (0.8, 0.72, 0.58),
}  # fmt: skip


def color_name(rgb: np.ndarray) -> str:
    """The nearest of COLORS in CIELAB."""
    names = list(COLORS)
    distance = np.linalg.norm(_lab(np.array([COLORS[n] for n in names])) - _lab(np.asarray(rgb)[None, :3]), axis=1)
    return names[int(distance.argmin())]


def _lab(srgb: np.ndarray) -> np.ndarray:
    """sRGB [N, 3] to CIELAB (D65)."""
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    m = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
                  [0.0193339, 0.1191920, 0.9503041]])  # fmt: skip
    xyz = linear @ m.T / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


def item_name(part: str, garment: Garment) -> str:
    """A plain name of a garment or hair style."""
    return word_of(part, garment.item, garment.trims)


def attributes(casting: Casting, body: np.ndarray, skin: Layer, layers: Mapping[str, Layer]) -> dict[str, Any]:
    """Sex 0 female .. 1 male, age, height, build, skin tone 0 light .. 1 dark, and per worn part its name, sRGB colour
    and the colour's name. `body` is [19158, 3] in metres."""
    assert skin.paint is not None
    s = casting.sliders
    texture = skin.paint(skin.uvs[skin.face_uvs[::17, 0]])[:, :3]
    tone = (LIGHT - float(np.mean(texture @ LUMINANCE))) / (LIGHT - DARK)
    out: dict[str, Any] = {
        "sex": s["gender"], "age_years": YEARS[0] + (s["age"] - 0.5) * 2 * (YEARS[1] - YEARS[0]),
        "height_m": float(np.ptp(body[BODY, 1])), "weight": s["weight"], "muscle": s["muscle"],
        "skin_tone": float(np.clip(tone, 0, 1)), "eye_color": EYES.get(casting.iris.removesuffix("_eye"), casting.iris),
    }  # fmt: skip
    for part in ("hair", "top", "bottom", "shoes", "accessory"):
        garment = casting.parts.get(part)
        if garment is None or part not in layers:
            out[part] = "none"
            continue
        color = np.asarray(garment.palette[:3])
        paint = layers[part].paint
        if paint is not None and paint.tint is None:  # the kit's own colours
            corners = layers[part].uvs[layers[part].face_uvs[::7, 0]]
            color = np.median(paint(corners)[:, :3], 0)
        out |= {part: item_name(part, garment), f"{part}_item": garment.item, f"{part}_color": color.tolist(),
                f"{part}_color_name": color_name(color), f"{part}_pattern": garment.pattern}  # fmt: skip
    return out
