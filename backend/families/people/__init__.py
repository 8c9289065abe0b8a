# SPDX-License-Identifier: GPL-3.0-or-later
"""The embedded default family: part-composed people around one canonical, skeleton-anchored body."""

from __future__ import annotations

from backend.families.base import Attribute, Code, FamilyInfo
from backend.families.people.wardrobe import CHOICES, EYES

_PARTS = ("hair", "top", "bottom", "shoes", "accessory")

INFO = FamilyInfo(
    name="people",
    title="People",
    description="Clothed, haired, rigged adults, composed of parts, from seeds or photos. Weights are embedded.",
    inputs=("seed", "image"),
    weights="people",
    readers=("people_encoder",),
    licence="CC0-1.0",
    attributes=(
        Attribute("sex", "Female to male", "number"),
        Attribute("age_years", "Age", "number", 25, 90, "years"),
        Attribute("height_m", "Height", "number", 1.45, 2.05, "m"),
        Attribute("weight", "Weight", "number"),
        Attribute("muscle", "Muscle", "number"),
        Attribute("skin_tone", "Skin tone", "number", shape=False),
        Attribute("hair_color", "Hair colour", "color"),
        Attribute("eye_color", "Eye colour", "choice", choices=tuple(EYES.values())),
        *(Attribute(f"{part}_color", f"{part.title()} colour", "color") for part in _PARTS[1:]),
        *(Attribute(part, part.title(), "choice", choices=CHOICES[part]) for part in _PARTS),
    ),
    codes={"body/shape": Code(64, normal=True), "body/tex": Code(74)}
    | {
        f"{part}/{kind}": Code(32)
        for part in ("shoes", "bottom", "top", "hair", "accessory")
        for kind in ("shape", "tex")
    },
)
