# SPDX-License-Identifier: GPL-3.0-or-later
"""The embedded default family: part-composed people around one canonical, skeleton-anchored body."""

from __future__ import annotations

from backend.families.base import Code, FamilyInfo

INFO = FamilyInfo(
    name="people",
    title="People",
    description="Clothed, haired, rigged adults, composed of parts. Weights are embedded.",
    inputs=("seed",),
    weights="people",
    licence="CC0-1.0",
    codes={"body/shape": Code(64, normal=True), "body/tex": Code(32)}
    | {f"{part}/{kind}": Code(32) for part in ("shoes", "bottom", "top", "hair", "accessory")
       for kind in ("shape", "tex")},
)  # fmt: skip
