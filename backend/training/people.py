# SPDX-License-Identifier: GPL-3.0-or-later
"""The fit of the `people` family: from the training set on disk to networks and weights, in closed form where it can.

Volumes and planes are what the training set holds (they are a basis, not something to search for); the mapping
networks are trained by transport. Adversarial stages start from the file that this writes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from backend.families.people import storage
from backend.families.people.config import (
    BROW,
    CLOTH,
    CODE_DIM,
    IRIS,
    LOOSE,
    MAX_ITEMS,
    ORDER,
    OWN,
    PARTS,
    PATTERN,
    PLAIN,
    SCALE,
    SKIN,
    SKIN_DIM,
    THICK,
    TRIM,
    WORN,
)
from backend.families.people.cut import OPEN, PATTERNS
from backend.families.people.model import PeopleNetworks
from backend.families.people.networks import BAND
from backend.training.canonical import open_kit
from backend.training.casting import CUT, Casting, Garment, cast
from backend.training.mapping import fit_body, fit_choices
from backend.training.materials import materials
from backend.training.people_data import ATTRIBUTES, build

log = logging.getLogger(__name__)


def fit(
    kit_folder: Path, run: Path, size: str = "small", seed: int = 0, people: int | None = None, steps: int | None = None
) -> Path:
    """Make the training set in `run`/data if it is not there, fit, and write `run`/people.safetensors. Mappings take
    `steps` steps each. By default 4000 people and 3000 steps, 200 of each at size tiny."""
    people, steps = people or (200 if size == "tiny" else 4000), steps or (200 if size == "tiny" else 3000)
    data = run / f"data-{size}"
    if not (data / "items.json").exists():
        build(kit_folder, data, size, people)
    torch.manual_seed(seed)
    items, body, skin = _load(data)
    facts = _facts(size, items, body, skin, np.load(data / "field.npz"))
    networks = PeopleNetworks(facts).requires_grad_(False)
    kit = open_kit(kit_folder)
    _fill(networks, data, items, body, skin)
    for part in PARTS:
        networks.shapes[part].materials.copy_(torch.from_numpy(materials(facts["items"], kit, part)))
    castings = [cast(kit, int(s)) for s in body["seeds"]]
    codes, condition = encode(networks, facts, castings, body["coefficients"], items, skin)
    _fit_mappings(networks, body["coefficients"], codes, condition, steps)
    out = run / "people.safetensors"
    save(networks, facts, out)
    log.info("wrote %s, %.1f MB", out, out.stat().st_size / 1e6)
    return out


def save(networks: PeopleNetworks, facts: Mapping[str, Any], path: Path) -> None:
    """The weights file of the family; `model.load` reads it."""
    state = {k: v.detach().cpu().numpy() for k, v in networks.state_dict().items()}
    volumes = {k: BAND if ".base." in k else 0.1 for k in state if k.startswith("shapes.") and k.endswith(".basis")}
    planes = frozenset(k for k in state if ".planes." in k) | {"body_shape.basis"}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(storage.pack(state, volumes, planes), temporary,
              metadata={"people": json.dumps(facts)})  # fmt: skip
    temporary.replace(path)


def _load(data: Path) -> tuple[dict[str, list[dict[str, Any]]], dict[str, np.ndarray], dict[str, np.ndarray]]:
    listing = json.loads((data / "items.json").read_text(encoding="utf-8"))
    items: dict[str, list[dict[str, Any]]] = {p: [] for p in PARTS}
    for entry in listing:
        items[entry["part"]].append({"name": entry["name"], "arrays": dict(np.load(data / entry["file"]))})
    return items, dict(np.load(data / "body.npz")), dict(np.load(data / "skin.npz"))


def _facts(size: str, items: Mapping[str, list], body: Mapping, skin: Mapping, field: Mapping) -> dict[str, Any]:
    """What the sizes of the networks depend on, and the names of things. Raises ValueError for too many items."""
    for part in PARTS:
        if len(items[part]) + (part in CLOTH) > MAX_ITEMS:  # their weights would run into the trims of the code
            raise ValueError(f"{len(items[part])} items of {part} are too many: a code holds {MAX_ITEMS}.")
    for what, at in (("skin", SKIN), ("brow", BROW), ("iris", IRIS)):
        if len(skin[f"{what}_names"]) > at.stop - at.start:
            raise ValueError(f"{len(skin[f'{what}_names'])} kinds of {what} are too many: a code holds "
                             f"{at.stop - at.start}.")  # fmt: skip
    raw = body["attributes"]
    low, high = field["bounds_low"], field["bounds_high"]
    order = np.argsort(-skin["skin_palettes"].mean(1))
    return {
        "size": size, "anchors": len(body["rest"]) - 2 * len(body["names"]), "controls": len(body["controls"]),
        "body_anchors": int(body["body_anchors"]),
        "bones": [str(n) for n in body["names"]], "parents": body["parents"].tolist(),
        "attributes": list(ATTRIBUTES), "attribute_mean": raw.mean(0).tolist(), "attribute_std": raw.std(0).tolist(),
        "items": {p: [{"name": i["name"]} for i in items[p]] for p in PARTS},
        "skins": [str(n) for n in skin["skin_names"]], "brows": [str(n) for n in skin["brow_names"]],
        "irises": [str(n).removesuffix("_eye") for n in skin["iris_names"]],
        "skin_curve": skin["skin_palettes"][order].round(4).tolist(),  # light to dark
        # soles, ponytails, hats, coats
        "bounds": (np.stack([low, high]) + np.array([[-0.05, -0.06, -0.17], [0.05, 0.11, 0.05]])).tolist(),
    }  # fmt: skip


@torch.no_grad()
def _fill(networks: PeopleNetworks, data: Path, items: Mapping, body: Mapping, skin: Mapping) -> None:
    """Everything that is not a mapping."""
    decoder = networks.body_shape
    for name, key in (("basis", "basis"), ("rest", "rest"), ("control_index", "controls")):
        getattr(decoder, name).copy_(torch.from_numpy(body[key]))
    networks.control_skin_indices.copy_(torch.from_numpy(body["skin_indices"]))
    networks.control_skin_weights.copy_(torch.from_numpy(body["skin_weights"]))
    field = np.load(data / "field.npz")
    networks.body_field.load_state_dict({k: torch.from_numpy(field[k]) for k in networks.body_field.state_dict()})
    at = 0
    for box in networks.body_tex.skin.boxes:
        for plane in box.planes:
            plane.copy_(torch.from_numpy(skin[f"skin_{at}"]))
            at += 1
    for name in ("brow", "eye", "iris", "lash", "gloss"):
        getattr(networks.body_tex, name).planes[0].copy_(torch.from_numpy(skin[f"{name}_0"]))
    for part in PARTS:
        shape, texture = networks.shapes[part], networks.textures[part]
        for j, item in enumerate(items[part]):
            for kind, banks in (("base", shape.base), ("edge", shape.edge)):
                for i, bank in enumerate(banks):
                    bank.basis[j] = torch.from_numpy(item["arrays"][f"{kind}_{i}"])
            texture.palettes[j] = torch.from_numpy(item["arrays"]["palette"])
            for kind, colors in (("tone", texture.tone), ("hue", texture.hue)):
                planes = [plane for box in colors.boxes for plane in box.planes]
                for i, plane in enumerate(planes):
                    plane[j] = torch.from_numpy(item["arrays"][f"{kind}_{i}"])
    raw = body["attributes"]
    standard = (raw - raw.mean(0)) / raw.std(0)
    coefficients = body["coefficients"]
    known = np.c_[coefficients, np.ones(len(coefficients))]
    solution = np.linalg.lstsq(known, standard, rcond=None)[0]
    left = ((known @ solution - standard) ** 2).mean(0)
    log.info("attributes explained: %s", dict(zip(ATTRIBUTES, (1 - left).round(3).tolist(), strict=True)))
    networks.attributes.weight.copy_(torch.from_numpy(solution[:-1].T.copy()))
    networks.attributes.bias.copy_(torch.from_numpy(solution[-1].copy()))


# --- castings as codes ------------------------------------------------------------------------------------------------


def encode(
    networks: PeopleNetworks, facts: Mapping[str, Any], castings: list[Casting], coefficients: np.ndarray,
    items: Mapping[str, list], skin: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], np.ndarray]:  # fmt: skip
    """Codes of sampled people {mapping name: [N, ...]} and the conditions [N, C] they were drawn under."""
    count = len(castings)
    codes = {"body_tex": np.stack([skin_code(c, skin) for c in castings])}
    for part in PARTS:
        shape, tex = np.zeros((count, CODE_DIM), np.float32), np.zeros((count, CODE_DIM), np.float32)
        shape[:, WORN] = -1
        for i, c in enumerate(castings):
            if part in c.parts:
                shape[i], tex[i] = garment_codes(part, c.parts[part], items[part])
        codes[f"{part}_shape"], codes[f"{part}_tex"] = shape, tex
        worn = shape[:, WORN] > 0  # what is not worn may have any texture
        if worn.any() and not worn.all():
            tex[~worn] = tex[worn][np.arange((~worn).sum()) % worn.sum()]
    with torch.no_grad():
        attributes = networks.attributes(torch.from_numpy(coefficients.astype(np.float32))).numpy()
    top = np.where(codes["top_shape"][:, WORN:] > 0, codes["top_tex"][:, :3], 0)
    return codes, np.concatenate([attributes, codes["body_tex"][:, :6], top], 1)


def skin_code(casting: Casting, skin: Mapping[str, np.ndarray]) -> np.ndarray:
    """body/tex [SKIN_DIM]."""
    out = np.zeros(SKIN_DIM, np.float32)
    at = list(skin["skin_names"]).index(casting.skin)
    out[:3] = skin["skin_palettes"][at] * casting.skin_gain
    out[3:6] = 0.75 * casting.hair_color
    out[SKIN.start + at] = 1
    out[BROW.start + list(skin["brow_names"]).index(casting.brow)] = 1
    out[IRIS.start + list(skin["iris_names"]).index(casting.iris)] = 1
    return out


def garment_codes(part: str, garment: Garment, items: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """part/shape and part/tex [CODE_DIM] of something worn."""
    shape, tex = np.zeros(CODE_DIM, np.float32), np.zeros(CODE_DIM, np.float32)
    shape[WORN] = 1
    names = [i["name"] for i in items]
    if garment.item == CUT:
        shape[len(items)] = 1
    else:
        shape[names.index(garment.item)] = 1
    trims = garment.trims or OPEN.get(part, ())
    shape[TRIM.start : TRIM.start + len(trims)] = trims
    if part in CLOTH and garment.item == CUT:
        shape[THICK], shape[LOOSE] = garment.thickness * 100, garment.loose / 0.05
    tex[:6] = garment.palette
    if garment.pattern == "original":
        tex[:6] = items[names.index(garment.item)]["arrays"]["palette"]
        tex[OWN] = 1
    elif garment.pattern == "plain":
        tex[PLAIN] = 1
    else:
        tex[PATTERN.start + PATTERNS.index(garment.pattern)] = 1
    tex[SCALE] = garment.scale
    return shape, tex


def _fit_mappings(
    networks: PeopleNetworks, coefficients: np.ndarray, codes: Mapping[str, np.ndarray], condition: np.ndarray,
    steps: int,
) -> None:  # fmt: skip
    networks.mappings.requires_grad_(True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small that threads would only wait for each other
    attributes = condition.shape[1] - 9
    error = fit_body(networks.mappings["body_shape"], coefficients.astype(np.float64), steps=steps * 5 // 6)
    log.info("mapping body_shape: %.3f", error)
    order = ["body_tex", *(f"{p}_{k}" for p in ORDER for k in ("shape", "tex"))]
    for name in order:
        known = condition[:, :attributes] if name == "body_tex" else condition.copy()
        if name.startswith("top"):  # its colour is not known yet, nor that of what comes before
            known[:, -3:] = 0
        if name.startswith("hair"):
            known[:, -3:] = 0
        error = fit_choices(networks.mappings[name], codes[name], known.astype(np.float64), steps)
        log.info("mapping %s: %.3f", name, error)
    networks.mappings.requires_grad_(False)
    torch.set_num_threads(threads)
