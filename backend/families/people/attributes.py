# SPDX-License-Identifier: GPL-3.0-or-later
"""What can be said of a person and set: numbers, colours and names for directions and places in the codes.

Body numbers are linear in w_shape; one is set by the smallest step that changes it and none of the others. Colours are
numbers of the codes themselves. Garments are looked up by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from backend.families.base import AttributeValue, Latents, seeded_normal
from backend.families.people.config import (
    CLOTH,
    IRIS,
    LOOSE,
    OWN,
    PATTERN,
    PLAIN,
    SKIN,
    THICK,
    TRIM,
    WORN,
    Z_DIM,
)
from backend.families.people.cut import OPEN
from backend.families.people.wardrobe import CUT, EYES, SKIRT, styles, word_of
from backend.protocol import PopulaceError

if TYPE_CHECKING:
    from backend.families.people.model import PeopleModel

NUMBERS = {"sex": "gender", "age_years": "age", "height_m": "height_m", "weight": "weight", "muscle": "muscle"}
STAGES = {"young": 0.57, "middleage": 0.74, "old": 0.92}  # age at which a skin of this name is as it is
YOUNG_YEARS, YEARS = 25.0, 130.0  # MakeHuman's age slider: 0.5 is 25 years, 1 is 90
COLORS = {"hair_color": "hair", "top_color": "top", "bottom_color": "bottom", "shoes_color": "shoes",
          "accessory_color": "accessory"}  # fmt: skip


def stature(model: PeopleModel, w: Tensor) -> Tensor:
    """Height of the naked body, metres."""
    decoder = model.networks.body_shape
    n = model.facts["body_anchors"]
    y = decoder.rest[:n, 1] + w[0] @ decoder.basis[:, :n, 1]
    return y.max() - y.min()


@torch.no_grad()
def describe(model: PeopleModel, latents: Latents) -> dict[str, AttributeValue]:
    """All attributes of the family's `INFO`, measured on the codes."""
    codes, facts = latents.codes, model.facts
    raw = _attributes(model, codes["body/shape"])
    out: dict[str, AttributeValue] = {
        "sex": round(min(max(raw["gender"], 0.0), 1.0), 3),
        "age_years": round(YOUNG_YEARS + YEARS * (min(max(raw["age"], 0.5), 1.0) - 0.5), 1),
        "height_m": round(float(stature(model, codes["body/shape"])), 4),
        "weight": round(min(max(raw["weight"], 0.0), 1.0), 3),
        "muscle": round(min(max(raw["muscle"], 0.0), 1.0), 3),
        "skin_tone": round(_skin_tone(model, codes["body/tex"][0, :3]), 3),
        "eye_color": _eye_names(model)[int(codes["body/tex"][0, IRIS][: len(facts["irises"])].argmax())],
    }
    for name, part in COLORS.items():
        if f"{part}/tex" in codes:
            out[name] = [round(float(c), 4) for c in codes[f"{part}/tex"][0, :3].clamp(0, 1)]
    for part in ("hair", "top", "bottom", "shoes", "accessory"):
        if f"{part}/shape" not in codes:
            out[part] = "none"
            continue
        out[part] = word_for(model, part, codes[f"{part}/shape"][0])
    return out


def word_for(model: PeopleModel, part: str, w: Tensor) -> str:
    """The word for what w_shape [W] of a part mostly is."""
    names = _items(model, part)
    return word_of(part, names[int(w[: len(names)].argmax())], w[TRIM].tolist() if part in CLOTH else ())


def _eye_names(model: PeopleModel) -> list[str]:
    return [EYES.get(name, name) for name in model.facts["irises"]]


def _items(model: PeopleModel, part: str) -> list[str]:
    return [i["name"] for i in model.facts["items"][part]] + ([CUT] if part in CLOTH else [])


@torch.no_grad()
def edit(model: PeopleModel, latents: Latents, values: Mapping[str, AttributeValue]) -> Latents:
    """See `FamilyModel`; names and bounds have been checked against the family's `INFO`."""
    codes = {k: v.clone() for k, v in latents.codes.items()}
    numbers = {k: float(v) for k, v in values.items() if k in NUMBERS}  # type: ignore[arg-type]
    if numbers:
        _set_numbers(model, codes, numbers)
    if "skin_tone" in values:
        codes["body/tex"][0, :3] = _skin_of(model, float(values["skin_tone"]))  # type: ignore[arg-type]
    if "eye_color" in values:
        if values["eye_color"] not in (names := _eye_names(model)):
            raise PopulaceError("invalid_request", f"These weights know no {values['eye_color']} eyes.",
                                f"Choose one of: {', '.join(names)}.")  # fmt: skip
        codes["body/tex"][0, IRIS] = 0
        codes["body/tex"][0, IRIS.start + names.index(str(values["eye_color"]))] = 1
    for part in ("hair", "top", "bottom", "shoes", "accessory"):
        if part in values:
            _set_garment(model, codes, part, str(values[part]))
    for name, part in COLORS.items():
        if name in values:
            if f"{part}/tex" not in codes:
                raise PopulaceError("invalid_request", f"{name}: this person has no {part}.",
                                    f"Set {part} to one of its choices as well.")  # fmt: skip
            _set_color(codes, part, torch.tensor([float(c) for c in values[name]]))  # type: ignore[union-attr]
    return Latents(latents.family, codes)


def _attributes(model: PeopleModel, w: Tensor) -> dict[str, float]:
    """Raw attributes of w_shape."""
    facts = model.facts
    standard = model.networks.attributes(w)[0].tolist()
    return {
        name: mean + std * s
        for name, s, mean, std in zip(
            facts["attributes"], standard, facts["attribute_mean"], facts["attribute_std"], strict=True
        )
    }


def _set_numbers(model: PeopleModel, codes: dict[str, Tensor], numbers: Mapping[str, float]) -> None:
    facts, w = model.facts, codes["body/shape"]
    names = facts["attributes"]
    std = dict(zip(names, facts["attribute_std"], strict=True))
    inverse = torch.linalg.pinv(model.networks.attributes.weight)  # [W, A]
    before = _attributes(model, w)
    height = float(stature(model, w))
    step = torch.zeros(len(names), device=w.device)
    for name, value in numbers.items():
        raw = 0.5 + (value - YOUNG_YEARS) / YEARS if name == "age_years" else value
        if name != "height_m":
            step[names.index(NUMBERS[name])] = (raw - before[NUMBERS[name]]) / std[NUMBERS[name]]
    goal = numbers.get("height_m", height)
    moved = w + (inverse @ step)[None]
    for _ in range(6):  # the crown's height is not quite linear: another vertex may be the highest
        lack = (goal - float(stature(model, moved))) / std["height_m"]
        step = torch.zeros_like(step)
        step[names.index("height_m")] = lack
        moved = moved + (inverse @ step)[None]
    codes["body/shape"] = moved
    if "age_years" in numbers and "body/tex" in codes:
        shares = codes["body/tex"][0, SKIN]
        at = np.array([0.5 + (numbers["age_years"] - YOUNG_YEARS) / YEARS, before["age"]])
        if abs(at[0] - at[1]) > 1e-4:
            shares[: len(facts["skins"])] = torch.tensor(aged(facts["skins"], shares.tolist(), at[0]))


def aged(skins: Sequence[str], shares: Sequence[float], age: float) -> list[float]:
    """Shares of skins named STAGE_REGION_SEX for somebody of this age (MakeHuman's slider): each share goes to the
    skins of its region and sex whose stages are next to the age; skins of other names keep theirs."""
    out = list(shares[: len(skins)])
    parsed = [re.fullmatch(r"(young|middleage|old)_([a-z]+_(?:fe)?male)(.*)", name) for name in skins]
    kin: dict[str, dict[float, int]] = {}
    for i, match in enumerate(parsed):
        if match:
            stages, stage = kin.setdefault(match[2], {}), STAGES[match[1]]
            if stage not in stages or shares[i] > shares[stages[stage]]:
                stages[stage] = i
    for group, stages in kin.items():
        own = [i for i, match in enumerate(parsed) if match and match[2] == group]
        whole = sum(shares[i] for i in own)
        for i in own:
            out[i] = 0.0
        known = sorted(stages)
        for stage in known:
            tent = [float(s == stage) for s in known]
            out[stages[stage]] = whole * float(np.interp(age, known, tent))
    return out


def _skin_tone(model: PeopleModel, color: Tensor) -> float:
    curve = np.array(model.facts["skin_curve"]).mean(1)
    at = np.linspace(0, 1, len(curve))
    return float(np.interp(-float(color.mean()), -curve, at))


def _skin_of(model: PeopleModel, tone: float) -> Tensor:
    curve = np.array(model.facts["skin_curve"])
    at = np.linspace(0, 1, len(curve))
    return torch.tensor([np.interp(tone, at, curve[:, c]) for c in range(3)], dtype=torch.float32)


def _set_color(codes: dict[str, Tensor], part: str, color: Tensor) -> None:
    tex = codes[f"{part}/tex"]
    if part == "hair":
        tex[0, 3:6] = 0.8 * color
        codes["body/tex"][0, 3:6] = 0.75 * color.to(tex)  # brows go with the hair
    elif float(tex[0, OWN]) > 0.5:  # the kit's own colours would shine through
        tex[0, OWN], tex[0, PLAIN] = 0, 1
    tex[0, :3] = color


def _set_garment(model: PeopleModel, codes: dict[str, Tensor], part: str, word: str) -> None:
    if word == "none":
        codes.pop(f"{part}/shape", None)
        codes.pop(f"{part}/tex", None)
        return
    names = _items(model, part)
    fits = [s for s in styles(part, word) if s.item in names]
    if not fits:
        raise PopulaceError("invalid_request", f"These weights know no {word} ({part}).",
                            "Choose another one, or other weights.")  # fmt: skip
    if f"{part}/shape" in codes:
        w = codes[f"{part}/shape"]
        if word_for(model, part, w[0]) == word:
            return
    else:
        z = {f"{part}/{k}": torch.from_numpy(seeded_normal(0, f"{part}/{k}", (1, Z_DIM))).to(model.device)
             for k in ("shape", "tex")}  # fmt: skip
        codes |= {k: v.clone() for k, v in model.mapped_part(part, codes, z, 0.7, must=True).items()}
    style = fits[0]
    w = codes[f"{part}/shape"]
    w[0, : TRIM.start] = 0
    w[0, names.index(style.item)] = 1
    w[0, WORN] = 1
    if part in CLOTH:
        trims = style.trims or OPEN[part]
        w[0, TRIM] = 0
        w[0, TRIM.start : TRIM.start + len(trims)] = torch.tensor(trims)
        w[0, THICK], w[0, LOOSE] = (1.0, 0.3) if style.item == CUT else (0.0, 0.0)
        tex = codes[f"{part}/tex"]
        if style.item in (CUT, SKIRT) and float(tex[0, OWN]) > 0.5:
            tex[0, OWN], tex[0, PLAIN] = 0, 1
        if float(tex[0, PATTERN].abs().sum() + tex[0, OWN]) == 0:
            tex[0, PLAIN] = 1
