# SPDX-License-Identifier: GPL-3.0-or-later
"""Who stands there: everything random about one sampled person, as plain names and numbers.

This is the one distribution: the sampler builds meshes from a `Casting`, the model is fitted to codes of castings, and
the evaluation compares both. A seed is one person, whatever else is drawn before or after.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from backend.families.people.wardrobe import CUT, OPEN, PATTERNS, SKIRT
from backend.training.makehuman import Kit

SHORT_HAIR = ("short01", "short03", "short04")
DENIM = ((0.20, 0.29, 0.42), (0.12, 0.16, 0.28), (0.42, 0.50, 0.60), (0.10, 0.10, 0.12))
NEUTRALS = ((0.07, 0.07, 0.08), (0.90, 0.90, 0.88), (0.45, 0.45, 0.47), (0.12, 0.15, 0.27), (0.70, 0.63, 0.51),
            (0.36, 0.27, 0.19), (0.32, 0.35, 0.25), (0.68, 0.69, 0.71), (0.30, 0.10, 0.13))  # fmt: skip
RELAXED = {"eyebrows-angle-up": 0.45, "mouth-angles-up": 0.25}  # the base mesh frowns
LEATHER = ((0.05, 0.05, 0.05), (0.22, 0.13, 0.08), (0.36, 0.24, 0.15), (0.85, 0.85, 0.83), (0.18, 0.19, 0.22))


@dataclass(frozen=True)
class Garment:
    """One worn thing: clothes, shoes, a hat or a hair style."""

    item: str  # "male_casualsuit01/top", "bob01", CUT or SKIRT
    palette: np.ndarray  # f32 [6]: primary and secondary sRGB
    pattern: str = "plain"  # "original": the kit's own colours, "plain", or one of PATTERNS
    scale: float = 0.0  # of the pattern: its period doubles per unit
    trims: tuple[float, ...] = ()  # see `cut.borders`
    thickness: float = 0.010  # metres, of cut garments
    loose: float = 0.0  # metres that a cut garment stands off more at its lower end


@dataclass(frozen=True)
class Casting:
    """One person before any geometry."""

    seed: int
    sliders: Mapping[str, float]  # MakeHuman's macro sliders
    details: np.ndarray  # f32 [D] in -1..1, as `Kit.details`
    skin: str  # stem of the material
    skin_gain: np.ndarray  # f32 [3], factor on the skin's colours
    iris: str
    brow: str
    hair_color: np.ndarray  # f32 [3] sRGB
    parts: Mapping[str, Garment]  # of hair, top, bottom, shoes, accessory: those worn


def cast(kit: Kit, seed: int) -> Casting:
    """The person of this seed, an adult."""
    rng = np.random.default_rng([seed, 0x9E3779B9])
    sliders = _sliders(rng)
    details = _details(kit, rng)
    race = ("african", "asian", "caucasian")[int(np.argmax([sliders[r] for r in ("african", "asian", "caucasian")]))]
    female, age = sliders["gender"] < 0.5, sliders["age"]
    hair = _hair_color(rng, age, race != "caucasian")
    skins = [p.stem for p in sorted((kit.root / "skins").rglob("*.mhmat"))]
    irises = [p.stem for p in sorted((kit.root / "eyes" / "materials").glob("*.mhmat"))]
    brows = sorted(p.name for p in (kit.root / "eyebrows").iterdir() if p.is_dir())
    dark_eyes = [i for i in irises if "brown" in i] or irises
    return Casting(
        seed, sliders, details,
        skin=_skin(rng, skins, race, female, age),
        skin_gain=(rng.uniform(0.88, 1.10) * rng.uniform(0.985, 1.015, 3)).astype(np.float32),
        iris=str(rng.choice(dark_eyes if race != "caucasian" or rng.random() < 0.3 else irises)),
        brow=str(rng.choice(brows)), hair_color=hair,
        parts=_outfit(kit, rng, female, age, race, hair),
    )  # fmt: skip


def _sliders(rng: np.random.Generator) -> dict[str, float]:
    gender = rng.beta(1.5, 9) if rng.random() < 0.5 else rng.beta(9, 1.5)
    races = rng.dirichlet((0.5, 0.5, 0.5))
    return {k: float(v) for k, v in {
        "gender": gender,
        "age": 0.5 + 0.5 * rng.beta(1.0, 1.6),
        "muscle": np.clip(rng.normal(0.5 + 0.15 * (gender - 0.5), 0.17), 0.05, 0.95),
        "weight": np.clip(rng.normal(0.5, 0.17), 0.05, 0.98),
        "height": np.clip(rng.normal(0.5, 0.06), 0.36, 0.64),
        "proportions": rng.uniform(0.35, 0.95),
        "cup": rng.beta(2, 2),
        "firmness": rng.uniform(0.3, 0.9),
        "african": races[0], "asian": races[1], "caucasian": races[2],
    }.items()}  # fmt: skip


def _details(kit: Kit, rng: np.random.Generator) -> np.ndarray:
    """Symmetric noise on the detail sliders; larger looks angry or deformed."""
    names = [high.split("/")[-1] for _, high in kit.details]
    column = {name: i for i, name in enumerate(names)}
    out = np.zeros(len(names), np.float32)
    for i, name in enumerate(names):
        coarse = any(word in name for word in ("scale", "trans", "measure", "head-"))
        noise = rng.normal(0, 0.12 if coarse else 0.24)
        lopsided = name.startswith("asym") or name in ("head-trans-in", "head-trans-out", "neck-trans-in",
            "neck-trans-out", "torso-trans-in", "torso-trans-out", "hip-trans-in", "hip-trans-out")  # fmt: skip
        out[i] = 0 if lopsided else np.clip(noise + RELAXED.get(name, 0), 0 if kit.details[i][0] is None else -1, 1)
    for i, name in enumerate(names):
        if name.startswith("r-") and "l-" + name[2:] in column:
            out[i] = out[column["l-" + name[2:]]]
    return out


def _hair_color(rng: np.random.Generator, age: float, dark: bool) -> np.ndarray:
    """Greyer with age; mostly black or brown where the hair of the region is."""
    color = np.array(colorsys.hsv_to_rgb(rng.uniform(0.04, 0.1), rng.uniform(0.35, 0.65), rng.uniform(0.05, 0.25)))
    if not dark and rng.random() < 0.5:
        color = np.array(colorsys.hsv_to_rgb(rng.uniform(0.05, 0.12), rng.uniform(0.35, 0.6), rng.uniform(0.3, 0.75)))
    grey = np.clip((age - 0.68) * 4 + rng.normal(0, 0.25), 0, 1)
    return (color * (1 - grey) + grey * rng.uniform(0.45, 0.8)).astype(np.float32)


def _skin(rng: np.random.Generator, names: list[str], race: str, female: bool, age: float) -> str:
    sex = "female" if female else "male"
    stage = "young" if age < 0.66 else "middleage" if age < 0.82 else "old"
    for s in (stage, "middleage", "young", "old"):
        fits = [n for n in names if n.startswith(f"{s}_{race}_{sex}")]
        if fits:
            return str(rng.choice(fits))
    return str(rng.choice(names))


def _pick(rng: np.random.Generator, colors: tuple) -> np.ndarray:
    return np.clip(np.array(colors[rng.integers(len(colors))]) * rng.uniform(0.85, 1.15), 0.02, 0.95)


def _hued(rng: np.random.Generator, hue: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.25, 0.75), rng.uniform(0.25, 0.85)))


def _colors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Palettes that go together: one accent hue, the rest neutral, leather or denim."""
    accent = rng.random()
    top = _hued(rng, accent) if rng.random() < 0.6 else _pick(rng, NEUTRALS)
    bottom = _pick(rng, DENIM if rng.random() < 0.4 else NEUTRALS) if rng.random() < 0.85 else _hued(rng, accent + 0.5)
    shoes = _pick(rng, LEATHER) if rng.random() < 0.85 else _hued(rng, accent)
    hat = _pick(rng, NEUTRALS) if rng.random() < 0.7 else _hued(rng, accent)

    def with_second(first: np.ndarray) -> np.ndarray:
        light = first.mean()
        second = _pick(rng, ((0.92, 0.92, 0.9),) if light < 0.45 else ((0.1, 0.1, 0.14), (0.25, 0.2, 0.2)))
        if rng.random() < 0.4:
            second = np.clip(first * (0.55 if light > 0.3 else 1.8), 0.03, 0.95)
        return np.concatenate([first, second]).astype(np.float32)

    return {k: with_second(v) for k, v in (("top", top), ("bottom", bottom), ("shoes", shoes), ("accessory", hat))}


def garments_of(kit: Kit) -> dict[str, list[tuple[str, str]]]:
    """Kit items per part as (name, gender)."""
    out: dict[str, list[tuple[str, str]]] = {p: [] for p in ("top", "bottom", "shoes", "accessory")}
    for asset, entry in kit.garments().items():
        for piece in entry["parts"]:
            if (asset, piece["label"]) == ("male_casualsuit05", "top"):
                continue  # only a shirt front: taken together with its jacket
            if (asset, piece["label"]) == ("male_worksuit01", "top"):
                continue  # braces are painted on it: fit for its own overalls alone
            part = {"hat": "accessory", "outer": "top", "onepiece": "bottom"}.get(piece["label"], piece["label"])
            out[part].append((f"{asset}/{piece['label']}", entry["gender"]))
    return out


def _outfit(
    kit: Kit, rng: np.random.Generator, female: bool, age: float, race: str, hair: np.ndarray
) -> dict[str, Garment]:
    items, colors = garments_of(kit), _colors(rng)
    parts: dict[str, Garment] = {}
    if (style := _hair_style(kit, rng, female, age, race)) is not None:
        parts["hair"] = Garment(style, np.concatenate([hair, 0.8 * hair]).astype(np.float32))
    for part in ("top", "bottom", "shoes", "accessory"):
        own = "female" if female else "male"
        cross = 0.45 if female else 0.02  # women wear men's shirts and jeans more often than the other way round
        fits = [n for n, g in items[part] if g in (own, "any") or rng.random() < cross]
        if (part == "accessory" and rng.random() > 0.06) or (not fits and part in ("shoes", "accessory")):
            continue
        if part in OPEN and (not fits or rng.random() < 0.4):
            parts[part] = _cut(rng, part, female, colors[part])
            continue
        item = str(rng.choice(fits))
        pattern = "original" if rng.random() < 0.4 else "plain"
        if part == "top" and rng.random() < 0.15:
            pattern = str(rng.choice(PATTERNS))
        parts[part] = Garment(
            item, colors[part], pattern, float(rng.uniform(-0.5, 0.5)), _trims(rng, part) if part in OPEN else ()
        )
    return parts


def _hair_style(kit: Kit, rng: np.random.Generator, female: bool, age: float, race: str) -> str | None:
    styles = sorted(p.name for p in (kit.root / "hair").iterdir() if p.is_dir())
    if not styles or rng.random() < (0.02 if female else 0.08 + 0.25 * (age > 0.8)):
        return None
    if "afro01" in styles and race == "african" and rng.random() < 0.35:
        return "afro01"
    short = rng.random() < (0.12 if female else 0.96)
    fits = [s for s in styles if (s in SHORT_HAIR) == short and s != "afro01"]
    return str(rng.choice(fits or styles))


def _trims(rng: np.random.Generator, part: str) -> tuple[float, ...]:
    """Now and then a kit garment is cut shorter: rolled sleeves, shorts."""
    trims = list(OPEN[part])
    if rng.random() < (0.25 if part == "top" else 0.2):
        trims[0] = float(rng.uniform(-0.5, 0.5) if part == "top" else rng.choice([rng.uniform(-0.6, -0.4), 0.5]))
    return tuple(trims)


def _cut(rng: np.random.Generator, part: str, female: bool, palette: np.ndarray) -> Garment:
    pattern = "plain" if rng.random() < 0.6 else str(rng.choice(PATTERNS if part == "top" else PATTERNS[:4]))
    scale, thickness = float(rng.uniform(-0.5, 0.5)), float(rng.uniform(0.006, 0.014))
    if part == "top":
        sleeve = rng.choice(
            [rng.uniform(-0.75, -0.35), rng.uniform(0.7, 1.0), rng.uniform(-0.2, 0.5)], p=(0.5, 0.35, 0.15)
        )
        trims = (float(sleeve), float(rng.uniform(-1, 0.1)), float(rng.uniform(0.05, 1)), float(rng.uniform(-1, 1)))
        return Garment(CUT, palette, pattern, scale, trims, thickness, float(rng.uniform(0, 0.045)))
    waist = float(rng.uniform(-1, -0.82))
    if female and rng.random() < 0.6:
        return Garment(SKIRT, palette, pattern, scale, (float(rng.uniform(-0.8, 0.8)), waist), thickness)
    hem = rng.choice([rng.uniform(-1, -0.85), rng.uniform(-0.6, -0.3), rng.uniform(0.3, 0.8)], p=(0.65, 0.1, 0.25))
    return Garment(CUT, palette, pattern, scale, (float(hem), waist), thickness, float(rng.uniform(0, 0.04)))
