# SPDX-License-Identifier: GPL-3.0-or-later
"""From trained networks to the shipped weights: sampled wardrobes, mapping networks, quantisation."""

from __future__ import annotations

import colorsys
import json
import logging
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy import ndimage
from scipy.cluster.vq import kmeans2
from scipy.spatial import cKDTree
from torch import Tensor

from backend.families.people.config import PARTS, SMALL
from backend.families.people.model import GRIDS, SCALE, PeopleNetworks
from backend.families.people.networks import Mapping
from backend.training.people import CUT_PARAMS, PATTERNS, SkinData, make_nets
from backend.training.people_data import ATTRIBUTES, load_grids

log = logging.getLogger(__name__)

GRID_STEP = {"whole": 0.008, "head": 0.0025, "hand_l": 0.0026, "hand_r": 0.0026}  # metres, as shipped
NEUTRALS = ((0.06, 0.06, 0.07), (0.92, 0.92, 0.90), (0.45, 0.45, 0.47), (0.12, 0.16, 0.30), (0.20, 0.29, 0.42),
            (0.72, 0.64, 0.50), (0.36, 0.26, 0.18), (0.33, 0.36, 0.24), (0.70, 0.71, 0.73))  # fmt: skip
BODY_ACTIVE = 12  # leading directions of the body that are not Gaussian: sex, age, build
SHORT_HAIR = ("short01", "short03", "short04")


def cloth_color(rng: np.random.Generator) -> np.ndarray:
    """Half neutrals, half hues of moderate saturation: what people wear."""
    if rng.random() < 0.5:
        return np.clip(np.array(NEUTRALS[rng.integers(len(NEUTRALS))]) * rng.uniform(0.8, 1.2), 0.02, 0.98)
    return np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.25, 0.85), rng.uniform(0.2, 0.9)))


def hair_color(rng: np.random.Generator, age: float, dark: bool) -> np.ndarray:
    """Greyer with age, mostly black or brown where the hair of the region is."""
    color = np.array(colorsys.hsv_to_rgb(rng.uniform(0.04, 0.1), rng.uniform(0.35, 0.65), rng.uniform(0.06, 0.25)))
    if not dark and rng.random() < 0.45:
        color = np.array(colorsys.hsv_to_rgb(rng.uniform(0.05, 0.12), rng.uniform(0.35, 0.6), rng.uniform(0.3, 0.75)))
    grey = np.clip((age - 0.62) * 3 + rng.normal(0, 0.25), 0, 1)
    return color * (1 - grey) + grey * rng.uniform(0.45, 0.8)


class Wardrobe:
    """Draws what a sampled body looks like and wears, as inputs of the encoders."""

    def __init__(self, data: Path) -> None:
        listing = json.loads((data / "items.json").read_text(encoding="utf-8"))
        self.items = {p: [e for e in listing if e["part"] == p] for p in PARTS}
        self.palettes = {
            e["file"]: np.concatenate([np.median(c, 0), np.quantile(c, 0.2, axis=0)]).astype(np.float32)
            for e in listing
            for c in [np.load(data / e["file"])["color"].astype(np.float32) / 255]
        }
        self.skin = SkinData(data)

    def body(self, rng, gender: float, age: float, race: int, brow_color: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Encoder input and palette of the skin."""
        names = list(self.skin.skin["skin_names"])
        sex = "female" if gender < 0.5 else "male"
        tribe = ("african", "asian", "caucasian")[race]
        stage = "young" if age < 0.66 else "middleage" if age < 0.82 else "old"
        stages = [stage, *(x for x in ("middleage", "young", "old") if x != stage)]
        fits = next(
            f for st in stages if (f := [i for i, n in enumerate(names) if n.startswith(f"{st}_{tribe}_{sex}")])
        )
        skin = int(rng.choice(fits))
        irises = list(self.skin.skin["iris_names"])
        brown = [i for i, n in enumerate(irises) if "brown" in n]
        iris = int(rng.choice(brown)) if race < 2 or rng.random() < 0.3 else int(rng.integers(len(irises)))
        brow = int(rng.integers(len(self.skin.skin["brows"])))
        palette = np.concatenate([self.skin.mean[skin] * rng.uniform(0.88, 1.1), 0.75 * brow_color]).astype(np.float32)
        return self.skin.describe(skin, iris, brow), palette

    def part(self, rng, part: str, gender: float, age: float, race: int, hair: np.ndarray):
        """(described shape, described texture, palette), or None if the part is not worn."""
        items = self.items[part]
        female = gender < 0.5
        described = np.zeros(len(items) + 2 + CUT_PARAMS, np.float32)
        tex = np.zeros(len(PATTERNS), np.float32)
        palette = np.concatenate([cloth_color(rng), cloth_color(rng)]).astype(np.float32)
        pattern = 1
        if part == "accessory" and rng.random() > 0.06:
            return None
        if part == "hair":
            if rng.random() < (0.02 if female else 0.08 + 0.2 * (age > 0.8)):
                return None
            short = rng.random() < (0.12 if female else 0.95)
            styles = [i for i, e in enumerate(items) if (e["name"] in SHORT_HAIR) == short and e["name"] != "afro01"]
            afro = [i for i, e in enumerate(items) if e["name"] == "afro01"]
            choice = int(rng.choice(afro if race == 0 and rng.random() < 0.3 else styles))
            palette = np.concatenate([hair, 0.8 * hair]).astype(np.float32)
        elif part in ("top", "bottom") and rng.random() < 0.4:  # cut from the body's own field
            skirt = part == "bottom" and female and rng.random() < 0.6
            described[len(items) + int(skirt)] = 1
            described[len(items) + 2 :] = rng.uniform(-1, 1, CUT_PARAMS)
            pattern = 1 if rng.random() < 0.55 else int(rng.integers(2, len(PATTERNS) if part == "top" else 6))
            tex[pattern] = 1
            return described, tex, palette
        else:
            sex = "female" if female else "male"
            fits = [i for i, e in enumerate(items) if e["gender"] in (sex, "any") or rng.random() < 0.08]
            choice = int(rng.choice(fits))
            pattern = 0 if rng.random() < 0.5 else 1
            if part == "top" and rng.random() < 0.15:
                pattern = int(rng.integers(2, len(PATTERNS)))
            if pattern == 0:
                palette = self.palettes[items[choice]["file"]]
        described[choice] = 1
        tex[pattern] = 1
        return described, tex, palette


def transport(w: np.ndarray, condition: np.ndarray, z: np.ndarray, rng, rounds: int = 150) -> np.ndarray:
    """Move Gaussian z [N, D] onto the distribution of w [N, D] given condition [N, C], by sliced optimal transport
    (Bonneel et al. 2015): along random directions, particles move to the target's quantiles. Standardised inputs."""
    x = z.copy()
    d, c = w.shape[1], condition.shape[1]
    target = np.concatenate([w, condition], 1)
    for _ in range(rounds):
        frame, _ = np.linalg.qr(rng.normal(size=(d + c, d + c)))
        now = np.concatenate([x, condition], 1) @ frame
        goal = np.sort(target @ frame, 0)
        rank = np.argsort(np.argsort(now, 0), 0)
        x += ((np.take_along_axis(goal, rank, 0) - now) @ frame.T)[:, :d] * (1 if c == 0 else 0.7)
    return x


def fit_mapping(mapping: Mapping, w: np.ndarray, condition: np.ndarray, steps: int = 2500) -> float:
    """Regress the mapping on transported pairs; returns the mean distance to the nearest code, in standard units.

    Codes of garments form clusters: their main directions are matched with z, then each particle takes the nearest
    real code, so that nothing lies between a shirt and a coat. Bodies (no condition) are matched directly.
    """
    rng = np.random.default_rng(0)
    n = len(w)
    mean, std = w.mean(0), w.std(0)
    std = std + 0.05 * std.max()  # numbers that hardly vary must not rule the distances
    goal = (w - mean) / std
    z = rng.normal(size=(n, mapping.skip.in_features)).astype(np.float32)
    with torch.no_grad():
        mapping.skip.weight.zero_()
        if condition.shape[1] == 0:
            x = z.astype(np.float64)
            x[:, :BODY_ACTIVE] = transport(goal[:, :BODY_ACTIVE], condition, x[:, :BODY_ACTIVE], rng)
            mapping.skip.weight.copy_(torch.diag(torch.from_numpy(std)))
        else:
            _, spread, axes = np.linalg.svd(goal[:: max(1, n // 2000)], full_matrices=False)
            active = z.shape[1]
            main = goal @ axes[:active].T / (spread[:active] / np.sqrt(min(n, 2000)) + 0.1)
            moved = transport(main, 2 * condition, z.astype(np.float64), rng)
            tree = cKDTree(np.concatenate([main, 1.5 * condition], 1))
            x = goal[tree.query(np.concatenate([moved, 1.5 * condition], 1), workers=2)[1]]
    zt, ct = torch.from_numpy(z), torch.from_numpy(condition.astype(np.float32))
    xt, scale = torch.from_numpy(x.astype(np.float32)), torch.from_numpy(std.astype(np.float32))
    bias = torch.from_numpy(mean.astype(np.float32))
    optimiser = torch.optim.Adam(mapping.net.parameters(), 4e-3)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 4e-3 * 0.5 * (1 + np.cos(np.pi * step / steps))
        at = torch.from_numpy(rng.integers(n, size=512))
        w_hat = mapping.skip(zt[at]) + mapping.net(torch.cat([zt[at], ct[at]], 1))
        loss = (((w_hat - bias) / scale - xt[at]) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    centres, radii = find_clusters(w, goal, len(mapping.centres), rng)
    mapping.centres.copy_(torch.from_numpy(centres.astype(np.float32)))
    mapping.radii.copy_(torch.from_numpy(radii.astype(np.float32)))
    with torch.no_grad():
        out = mapping.skip(zt) + mapping.net(torch.cat([zt, ct], 1))
    return float(cKDTree(goal).query(((out - bias) / scale).numpy()[:500])[0].mean() / np.sqrt(w.shape[1]))


def find_clusters(w: np.ndarray, goal: np.ndarray, count: int, rng: np.random.Generator):
    """Centres [count, W] that are real codes, and how far their codes lie around them [count]. Codes that occur often
    (a garment of the kit) are clusters without spread. One centre stands for the mean and everything around it."""
    if count == 1:
        return np.zeros((1, w.shape[1])), np.full(1, 1e4)
    _, first, index, often = np.unique(
        np.round(w, 3), axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    discrete = np.flatnonzero(often >= max(4, len(w) // 1000))[: count // 2]
    centres, radii = list(w[first[discrete]]), [0.0] * len(discrete)
    rest = np.flatnonzero(~np.isin(index.reshape(-1), discrete))
    left = count - len(centres)
    if len(rest) > left:
        start = rest[rng.permutation(len(rest))[:2000]]
        means, _ = kmeans2(goal[start], goal[start[:left]], minit="matrix", missing="warn")
        tree = cKDTree(means)
        owner = tree.query(goal[rest])[1]
        for c in np.unique(owner):
            members = w[rest[owner == c]]
            centre = members[np.linalg.norm(members - members.mean(0), axis=1).argmin()]
            centres.append(centre)
            radii.append(float(np.quantile(np.linalg.norm(members - centre, axis=1), 0.8)))
    while len(centres) < count:  # unused slots repeat the first cluster
        centres.append(centres[0])
        radii.append(radii[0])
    return np.stack(centres), np.array(radii)


def export(data: Path, run: Path, out: Path, people: int = 4000, seed: int = 0) -> None:
    """Write the weights file `out` from the networks in `run`."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    body = dict(np.load(data / "body.npz"))
    grids = {}
    for name, grid in load_grids(data).items():
        factor = grid.step / GRID_STEP[name]
        shape = [round((s - 1) * factor) + 1 for s in grid.values.shape]
        axes = [np.linspace(0, s - 1, t) for s, t in zip(grid.values.shape, shape, strict=True)]
        at = np.stack(np.meshgrid(*axes, indexing="ij"))
        values = ndimage.map_coordinates(grid.values, at, order=1) if factor < 0.99 else grid.values
        hi = grid.lo + grid.step * (np.array(grid.values.shape) - 1)
        grids[name] = (values, np.stack([grid.lo, hi]))
    raw = body["attributes"]
    standard = (raw - raw.mean(0)) / raw.std(0)
    whole = grids["whole"][1]
    facts = {
        "anchors": len(body["rest"]) - 2 * len(body["names"]), "controls": len(body["controls"]),
        "bones": [str(n) for n in body["names"]], "parents": body["parents"].tolist(),
        "attributes": list(ATTRIBUTES), "attribute_mean": raw.mean(0).tolist(), "attribute_std": raw.std(0).tolist(),
        "grids": {n: list(grids[n][0].shape) for n in GRIDS},
        "bounds": np.add(whole, [[0, -0.01, -0.12], [0, 0.06, 0]]).tolist(),  # soles, ponytails, hats
    }  # fmt: skip
    networks = PeopleNetworks(facts)
    decoder = networks.body_shape
    decoder.basis.copy_(torch.from_numpy(body["basis"]))
    decoder.rest.copy_(torch.from_numpy(body["rest"]))
    decoder.control_index.copy_(torch.from_numpy(body["controls"]))
    networks.control_skin_indices.copy_(torch.from_numpy(body["skin_indices"]))
    networks.control_skin_weights.copy_(torch.from_numpy(body["skin_weights"]))
    for name in GRIDS:
        getattr(networks, f"grid_{name}").copy_(torch.from_numpy(grids[name][0]))
        getattr(networks, f"grid_{name}_box").copy_(torch.from_numpy(grids[name][1].astype(np.float32)))
    coefficients = body["coefficients"]
    solution = np.linalg.lstsq(np.c_[coefficients, np.ones(len(coefficients))], standard, rcond=None)[0]
    with torch.no_grad():
        networks.attributes.weight.copy_(torch.from_numpy(solution[:-1].T.copy()))
        networks.attributes.bias.copy_(torch.from_numpy(solution[-1].copy()))

    encoders = {}
    for part in SMALL:
        _, shape_encoder, tex_encoder = make_nets(data, part)
        for kind, encoder in (("shape", shape_encoder), ("tex", tex_encoder)):
            if encoder is not None:
                _load(getattr(networks.parts[part], kind), encoder, run / f"{part}.{kind}.safetensors")
                encoders[part, kind] = encoder
    codes, conditions = _sample_codes(data, encoders, coefficients, raw, body["races"], networks, people, rng)

    nothing = np.zeros((len(coefficients), 0))
    log.info("mapping body_shape: %.3f", fit_mapping(networks.mappings["body_shape"], coefficients, nothing))
    for name, w in codes.items():
        condition = conditions[:, :5] if name == "body_tex" else conditions
        log.info("mapping %s: %.3f", name, fit_mapping(networks.mappings[name], w, condition))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(quantise(networks), out, metadata={"people": json.dumps(facts)})
    log.info("wrote %s, %.1f MB", out, out.stat().st_size / 1e6)


def _load(net: torch.nn.Module, encoder: torch.nn.Module, path: Path) -> None:
    state = load_file(path)
    net.load_state_dict({k.removeprefix("net."): v for k, v in state.items() if k.startswith("net.")})
    encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")})
    encoder.eval()


@torch.no_grad()
def _sample_codes(data, encoders, coefficients, raw, races, networks, people, rng):
    """Codes of sampled people {mapping name: [N, W]} and the conditions [N, attributes + 3] they were drawn under."""
    wardrobe = Wardrobe(data)
    rows: dict[str, list] = {f"{p}_{k}": [] for p in PARTS for k in ("shape", "tex")} | {"body_tex": []}
    conditions = []
    for _ in range(people):
        i = int(rng.integers(len(coefficients)))
        w = torch.from_numpy(coefficients[i : i + 1])
        gender, age, race = float(raw[i, 0]), float(raw[i, 1]), int(races[i].argmax())
        hair = hair_color(rng, age, dark=race < 2)
        described, palette = wardrobe.body(rng, gender, age, race, hair)
        rows["body_tex"].append((palette, described))
        conditions.append(np.concatenate([networks.attributes(w)[0].numpy(), palette[:3]]))
        for part in PARTS:
            drawn = wardrobe.part(rng, part, gender, age, race, hair)
            rows[f"{part}_shape"].append(None if drawn is None else drawn[0])
            rows[f"{part}_tex"].append(None if drawn is None else (drawn[2], drawn[1]))
    codes = {}
    for name, values in rows.items():
        part, kind = name.split("_")
        worn = [v for v in values if v is not None]
        if kind == "shape":
            w = encoders[part, kind](torch.from_numpy(np.stack(worn)))
        else:
            w = encoders[part, kind](*(torch.from_numpy(np.stack([v[i] for v in worn])) for i in range(2)))
        full = np.zeros((people, w.shape[1]), np.float32)
        full[:, -1] = -1 if kind == "shape" else 0  # absent
        at = np.array([v is not None for v in values])
        full[at] = w.numpy()
        if kind == "tex":  # what is not worn may have any texture
            full[~at] = w.numpy()[rng.integers(len(worn), size=int((~at).sum()))]
        codes[name] = full
    return codes, np.stack(conditions).astype(np.float32)


def quantise(networks: PeopleNetworks) -> dict[str, Tensor]:
    """Planes as int8 with one scale per basis vector, plane and channel; the rest as fp16."""
    out: dict[str, Tensor] = {}
    for key, value in networks.state_dict().items():
        if key.endswith(".basis") and "banks" in key:
            scale = value.abs().amax((-1, -2), keepdim=True).clamp(min=1e-8) / 127
            out[key] = (value / scale).round().to(torch.int8)
            out[key + SCALE] = scale.half()
        elif value.dtype == torch.float32 and not key.endswith("_box"):
            out[key] = value.half()
        else:
            out[key] = value
    return {k: v.contiguous() for k, v in out.items()}
