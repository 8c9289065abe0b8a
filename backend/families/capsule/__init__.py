# SPDX-License-Identifier: GPL-3.0-or-later
"""A person built of rounded cones: no weights, exact answers. The worked example of a family, and what tests run on."""

from __future__ import annotations

from backend.families.base import Attribute, Code, FamilyInfo

INFO = FamilyInfo(
    name="capsule",
    title="Capsule person",
    description="A striped manikin of rounded cones, for tests and for trying things out",
    inputs=("seed", "image"),
    weights=None,
    licence="GPL-3.0-or-later",
    parameters={
        "single": {
            "type": "boolean",
            "default": False,
            "title": "Single capsule",
            "description": "One upright capsule in place of the person; its volume and area have closed forms",
        }
    },
    attributes=(
        Attribute("height_m", "Height", "number", 1.5, 1.95, "m"),
        Attribute("weight", "Weight", "number"),
        Attribute("top_color", "Top colour", "color"),
        Attribute("bottom_color", "Bottom colour", "color"),
        Attribute("pattern", "Pattern", "choice", choices=("stripes", "plain")),
    ),
    codes={
        "body/shape": Code(8, normal=True),
        "body/tex": Code(36, normal=True),
        "single/shape": Code(2, normal=True),
        "single/tex": Code(36, normal=True),
    },
)
