# SPDX-License-Identifier: GPL-3.0-or-later
"""Training of the `people` family: distillation of the local generators from sampled garments, hair and skins.

Each network is trained on its own (`net` = "top.shape", "body.tex", ...), time-boxed and resumable: its state is one
safetensors file in the run folder. `export` joins them, fits the mapping networks and writes the shipped weights.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from backend.families.people.config import SHAPE_DIM, SMALL, TEX_DIM
from backend.families.people.networks import PartGenerator, mlp
from backend.networks.triplane import Volume
from backend.training.canonical import Grid
from backend.training.people_data import load_grids

log = logging.getLogger(__name__)

TRUNCATION = 0.025  # metres
PATTERNS = ("original", "plain", "wide stripes", "narrow stripes", "vertical stripes", "checks", "block")
SHOULDER, ELBOW, WRIST = (np.array(p) for p in ((0.176, 1.33, 0.023), (0.338, 1.153, 0.03), (0.458, 1.033, 0.192)))
CUT_PARAMS = 6  # of garments cut from the body's own field


# --- what a garment is, as numbers ------------------------------------------------------------------------------------


class ShapeEncoder(nn.Module):
    """Item (one-hot), kind of cut garment and its parameters -> w_shape [B, SHAPE_DIM]; the last number is presence."""

    def __init__(self, items: int) -> None:
        super().__init__()
        self.net = mlp(items + 2 + CUT_PARAMS, 64, SHAPE_DIM - 1)

    def forward(self, described: Tensor) -> Tensor:
        w = nn.functional.layer_norm(self.net(described), (SHAPE_DIM - 1,))
        return torch.cat([w, torch.ones_like(w[:, :1])], 1)


class TexEncoder(nn.Module):
    """Palette [B, 6] and one-hot description -> w_tex [B, TEX_DIM]."""

    def __init__(self, described: int) -> None:
        super().__init__()
        self.net = mlp(described, 64, TEX_DIM - 6)

    def forward(self, palette: Tensor, described: Tensor) -> Tensor:
        return torch.cat([palette, nn.functional.layer_norm(self.net(described), (TEX_DIM - 6,))], 1)


@dataclass
class Draw:
    """One training person for one part."""

    described: np.ndarray  # input of ShapeEncoder
    points: np.ndarray
    sdf: np.ndarray
    body: np.ndarray


def arm_distance(p: np.ndarray) -> np.ndarray:
    """Metres along the arm from the shoulder to the point nearest to p; both arms alike."""
    p = np.concatenate([np.abs(p[:, :1]), p[:, 1:]], 1)
    best, along, start = np.full(len(p), np.inf), np.zeros(len(p)), 0.0
    for a, b in ((SHOULDER, ELBOW), (ELBOW, WRIST + 1.2 * (WRIST - ELBOW))):
        length = np.linalg.norm(b - a)
        t = np.clip((p - a) @ (b - a) / length, 0, length)
        d = np.linalg.norm(p - a - t[:, None] * (b - a) / length, axis=1)
        along = np.where(d < best, start + t, along)
        best = np.minimum(best, d)
        start += length
    return along


def body_distance(grids: dict[str, Grid], points: np.ndarray) -> np.ndarray:
    """Distance to the canonical body; the grid of the head is left out, garments do not need it."""
    out = grids["whole"](points)
    for name in ("hand_l", "hand_r"):
        grid = grids[name]
        inside = ((points > grid.lo) & (points < grid.lo + grid.step * (np.array(grid.values.shape) - 1))).all(1)
        out[inside] = grid(points[inside])
    return out.astype(np.float32)


def fill_volumes(volumes: list[Volume], count: int, rng: np.random.Generator) -> np.ndarray:
    """Uniform points f32 [about count, 3] in the volumes, on either side of mirrored ones."""
    out = []
    for volume in volumes:
        local = rng.uniform(-1, 1, (count // len(volumes), 3)) * np.array(volume.half_size)
        points = local @ np.array(volume.axes) + np.array(volume.centre)
        if volume.mirror:
            points[:, 0] *= rng.choice([-1, 1], len(points))
        out.append(points)
    return np.concatenate(out).astype(np.float32)


class CutGarments:
    """Garments cut from the body's field and the skirt helper: any sleeve, hem, neckline, waist or skirt length."""

    def __init__(self, data: Path) -> None:
        self.skin = np.load(data / "pool.npz")["skin"]
        self.grids = load_grids(data)
        skirt = np.load(data / "skirt.npz")
        self.skirt = Grid(skirt["lo"], float(skirt["step"]), skirt["values"])
        torso = (np.abs(self.skin[:, 0]) < 0.53) & (self.skin[:, 1] > 0.74) & (self.skin[:, 1] < 1.50)
        legs = (np.abs(self.skin[:, 0]) < 0.30) & (self.skin[:, 1] < 1.06)
        self.pools = {"top": self.skin[torso], "bottom": self.skin[legs]}

    def params(self, part: str, rng: np.random.Generator) -> tuple[int, np.ndarray]:
        """Kind (0 top or trousers, 1 skirt) and six numbers in about [-1, 1]."""
        kind = int(part == "bottom" and rng.random() < 0.6)
        return kind, rng.uniform(-1, 1, CUT_PARAMS)

    def sdf(self, part: str, kind: int, q: np.ndarray, p: np.ndarray, body: np.ndarray) -> np.ndarray:
        unit = (q + 1) / 2
        thickness = 0.006 + 0.010 * unit[0]
        if part == "top":
            sleeve = 0.03 + 0.46 * unit[1]
            hem = 0.80 + 0.17 * unit[2]
            tilt = 0.25 + 0.75 * unit[3]
            width = 0.075 + 0.04 * unit[4]
            loose = thickness + 0.05 * unit[5] * np.clip(1.15 - p[:, 1], 0, 0.4)
            neck = np.minimum(p[:, 1] - 1.43 + tilt * (p[:, 2] + 0.03), width - np.abs(p[:, 0]))
            return np.maximum.reduce([body - loose, arm_distance(p) - sleeve, hem - p[:, 1], neck])
        waist = 0.95 + 0.06 * unit[1]
        if kind == 1:
            hem = 0.14 + 0.52 * unit[2]
            return np.maximum.reduce(
                [np.minimum(self.skirt(p), body) - 0.6 * thickness, hem - p[:, 1], p[:, 1] - waist]
            )
        hem = 0.08 + 0.62 * unit[2]
        loose = thickness + 0.04 * unit[3] * np.clip(0.7 - p[:, 1], 0, 0.7)
        return np.maximum.reduce([body - loose, hem - p[:, 1], p[:, 1] - waist, np.abs(p[:, 0]) - 0.29])

    def draw(self, part: str, items: int, count: int, rng: np.random.Generator) -> Draw:
        kind, q = self.params(part, rng)
        pool = self.pools[part]
        p = pool[rng.integers(len(pool), size=count)] + rng.normal(0, 1, (count, 3)) * rng.choice(
            [0.006, 0.02, 0.06], (count, 1), p=(0.6, 0.25, 0.15)
        )
        if kind == 1:
            half = count // 2
            p[:half] = rng.uniform(
                self.skirt.lo, self.skirt.lo + self.skirt.step * np.array(self.skirt.values.shape), (half, 3)
            )
        volumes = [b.volume for b in SMALL[part].shape]
        p = np.concatenate([p.astype(np.float32), fill_volumes(volumes, count // 6, rng)])
        body = body_distance(self.grids, p)
        described = np.zeros(items + 2 + CUT_PARAMS, np.float32)
        described[items + kind] = 1
        described[items + 2 :] = q
        return Draw(described, p, self.sdf(part, kind, q, p, body).astype(np.float32), body)


def pattern_mask(name: str, p: np.ndarray) -> np.ndarray:
    """How much of the secondary colour, 0..1, at canonical points [N, 3]."""

    def wave(x: np.ndarray, period: float) -> np.ndarray:
        return np.clip(0.5 + 3 * np.sin(2 * np.pi * x / period), 0, 1)

    match name:
        case "wide stripes":
            return wave(p[:, 1], 0.10)
        case "narrow stripes":
            return wave(p[:, 1], 0.05)
        case "vertical stripes":
            return wave(np.abs(p[:, 0]) + 0.5 * np.abs(p[:, 2]), 0.06)
        case "checks":
            return 0.5 * wave(p[:, 1], 0.08) + 0.5 * wave(np.abs(p[:, 0]) + 0.5 * np.abs(p[:, 2]), 0.08)
        case "block":
            return np.clip((1.17 - p[:, 1]) / 0.02, 0, 1)
    return np.zeros(len(p))


# --- data of one part -------------------------------------------------------------------------------------------------


class PartData:
    """Items of one part and random draws of their fields and colours."""

    def __init__(self, data: Path, part: str) -> None:
        listing = json.loads((data / "items.json").read_text(encoding="utf-8"))
        self.part = part
        self.entries = [e for e in listing if e["part"] == part]
        self.items = [dict(np.load(data / e["file"])) for e in self.entries]
        for item in self.items:
            item["rgb"] = item.pop("color").astype(np.float32) / 255
            lum = item["rgb"] @ np.array([0.3, 0.59, 0.11], np.float32)
            item["shade"] = np.clip(lum / max(float(np.median(lum)), 0.03), 0.15, 1.8)
            item["palette"] = np.concatenate([np.median(item["rgb"], 0), np.quantile(item["rgb"], 0.2, axis=0)])
        self.grids = load_grids(data)
        self.volumes = [b.volume for b in SMALL[part].shape]
        skin = np.load(data / "pool.npz")["skin"]
        held = [(v.local(torch.from_numpy(skin)).abs() < 1).all(-1).numpy() for v in self.volumes]
        self.pool = skin[np.any(held, axis=0)]
        self.cut = CutGarments(data) if part in ("top", "bottom") else None
        self.cut_share = 0.4 if self.cut else 0.0
        self.patterns = len(PATTERNS) if part in ("top", "bottom") else 2

    def describe(self, index: int) -> np.ndarray:
        out = np.zeros(len(self.items) + 2 + CUT_PARAMS, np.float32)
        out[index] = 1
        return out

    def field(self, count: int, rng: np.random.Generator) -> Draw:
        if rng.random() < self.cut_share:
            return self.cut.draw(self.part, len(self.items), count, rng)
        i = int(rng.integers(len(self.items)))
        item = self.items[i]
        at = rng.integers(len(item["points"]), size=count)
        points, sdf, body = item["points"][at], item["sdf"][at], item["body"][at]
        # the volumes are larger than the item: out there it must stay away, too
        lo, hi = item["points"].min(0), item["points"].max(0)
        far = np.concatenate([fill_volumes(self.volumes, count // 8, rng), self._near_skin(count // 6, rng)])
        far = far[((far < lo) | (far > hi)).any(1)]
        return Draw(
            self.describe(i),
            np.concatenate([points, far]),
            np.concatenate([sdf, np.full(len(far), TRUNCATION, np.float32)]),
            np.concatenate([body, body_distance(self.grids, far)]),
        )

    def _near_skin(self, count: int, rng: np.random.Generator) -> np.ndarray:
        at = rng.integers(len(self.pool), size=count)
        return (self.pool[at] + rng.normal(0, 0.008, (count, 3))).astype(np.float32)

    def color(
        self, count: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """described shape, described texture, palette, points, colours."""
        pattern = int(rng.integers(self.patterns)) if rng.random() < 0.7 else int(rng.integers(2))
        palette = rng.uniform(0.02, 0.98, 6).astype(np.float32)
        if rng.random() < self.cut_share:
            draw = self.cut.draw(self.part, len(self.items), 3 * count, rng)
            near = np.argsort(np.abs(draw.sdf))[:count]
            described, points, shade = draw.described, draw.points[near], np.ones(len(near), np.float32)
            pattern = max(pattern, 1)
            color = None
        else:
            i = int(rng.integers(len(self.items)))
            item = self.items[i]
            at = rng.integers(len(item["surface"]), size=count)
            described = self.describe(i)
            points = item["surface"][at] + rng.normal(0, 0.002, (count, 3)).astype(np.float32)
            shade, color = item["shade"][at], item["rgb"][at]
            if self.part == "hair":
                shade = shade**0.8
        tex = np.zeros(len(PATTERNS), np.float32)
        tex[pattern] = 1
        if pattern == 0:
            palette = item["palette"].astype(np.float32)
        else:
            m = pattern_mask(PATTERNS[pattern], points)[:, None]
            color = np.clip(shade[:, None] * ((1 - m) * palette[:3] + m * palette[3:]), 0, 1)
        return described, tex, palette, points.astype(np.float32), color.astype(np.float32)


class SkinData:
    """Random skins: skin, irises and brows of the kit combined freely, brows in any hair colour."""

    def __init__(self, data: Path) -> None:
        self.skin = dict(np.load(data / "skin.npz"))
        points, eye = self.skin["points"], self.skin["is_eye"]
        face = (points[:, 1] > 1.40) & (points[:, 2] > 0.0) & (np.abs(points[:, 0]) < 0.12)
        rims = face & (points[:, 1] > 1.545) & (points[:, 1] < 1.60) & (points[:, 2] > 0.07)  # lids and brows
        self.pools = [np.flatnonzero(which) for which in (eye, rims, face & ~rims & ~eye, ~face & ~eye)]
        self.mean = [s[~self.skin["is_eye"]].mean(0) / 255 for s in self.skin["skins"]]
        self.described = sum(len(self.skin[k]) for k in ("skins", "irises", "brows"))

    def describe(self, skin: int, iris: int, brow: int) -> np.ndarray:
        out = np.zeros(self.described, np.float32)
        out[[skin, len(self.skin["skins"]) + iris, len(self.skin["skins"]) + len(self.skin["irises"]) + brow]] = 1
        return out

    def color(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        s, i, b = (int(rng.integers(len(self.skin[k]))) for k in ("skins", "irises", "brows"))
        shares = (0.15, 0.2, 0.3, 0.35)  # of eyes, lids, face, rest: what people look at counts most
        at = np.concatenate(
            [p[rng.integers(len(p), size=int(s * count))] for p, s in zip(self.pools, shares, strict=True)]
        )
        points = self.skin["points"][at]
        rgb = self.skin["skins"][s, at].astype(np.float32) / 255
        gain = rng.uniform(0.8, 1.15) * rng.uniform(0.96, 1.04, 3)
        brow_color = rng.uniform(0.02, 0.6) * np.array([1, rng.uniform(0.6, 0.95), rng.uniform(0.3, 0.9)])
        alpha = self.skin["brows"][b, at].astype(np.float32)[:, None] / 255
        rgb = rgb * gain * (1 - 0.9 * alpha) + 0.9 * alpha * brow_color
        eye = self.skin["is_eye"][at]
        rgb[eye] = self.skin["irises"][i, at[eye]].astype(np.float32) / 255
        palette = np.concatenate([self.mean[s] * gain, brow_color]).astype(np.float32)
        points = points + rng.normal(0, 0.0012, points.shape).astype(np.float32)
        return self.describe(s, i, b), palette, points.astype(np.float32), np.clip(rgb, 0, 1).astype(np.float32)


# --- networks with their encoders -------------------------------------------------------------------------------------


def make_nets(data: Path, part: str) -> tuple[PartGenerator, ShapeEncoder | None, TexEncoder]:
    """The generator of one part with the encoders that are used in training only."""
    if part == "body":
        return PartGenerator(SMALL[part]), None, TexEncoder(SkinData(data).described)
    listing = json.loads((data / "items.json").read_text(encoding="utf-8"))
    items = sum(e["part"] == part for e in listing)
    return PartGenerator(SMALL[part]), ShapeEncoder(items), TexEncoder(len(PATTERNS))


def smoothness(banks: nn.ModuleList) -> Tensor:
    """Mean squared difference of neighbouring texels: keeps unsupervised texels quiet."""
    return sum((b.basis.diff(dim=-1) ** 2).mean() + (b.basis.diff(dim=-2) ** 2).mean() for b in banks)  # type: ignore[return-value]


def train(
    data: Path,
    run: Path,
    net: str,
    minutes: float = math.inf,
    max_steps: float = math.inf,
    batch: int = 6,
    count: int = 3000,
    seed: int = 0,
) -> float:
    """Train one network for `minutes` or `max_steps`, whichever ends first; continue its state in `run` if there is
    one. Ended by steps, a run gives the same weights every time. Returns the final smoothed loss."""
    part, kind = net.split(".")
    torch.manual_seed(seed)
    generator, shape_encoder, tex_encoder = make_nets(data, part)
    trained = nn.ModuleDict()
    if kind == "shape":
        trained["net"], trained["encoder"] = generator.shape, shape_encoder
    else:
        trained["net"], trained["encoder"] = generator.tex, tex_encoder
        if shape_encoder is not None:  # the texture sees the finished shape code
            shape_state = {
                k: v for k, v in load_file(run / f"{part}.shape.safetensors").items() if k.startswith("encoder.")
            }
            shape_encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in shape_state.items()})
    path = run / f"{net}.safetensors"
    done = 0
    if path.exists():
        trained.load_state_dict(load_file(path))
        done = json.loads((run / f"{net}.json").read_text())["steps"]
    planes = [p for n, p in trained.named_parameters() if "basis" in n]
    rest = [p for n, p in trained.named_parameters() if "basis" not in n]
    first = 0.5 if done else 1.0  # a continued run anneals again
    optimiser = torch.optim.Adam(
        [{"params": planes, "lr": 0.02 * first}, {"params": rest, "lr": 0.003 * first}], betas=(0.9, 0.98), eps=1e-10
    )
    rates = [g["lr"] for g in optimiser.param_groups]
    rng = np.random.default_rng(seed + done)
    source = SkinData(data) if part == "body" else PartData(data, part)
    loss_of: Callable[[], Tensor]
    if kind == "shape":
        loss_of = lambda: _shape_loss(generator, shape_encoder, source, batch, count, rng)  # noqa: E731
    elif part == "body":
        loss_of = lambda: _skin_loss(generator, tex_encoder, source, batch, 2 * count, rng)  # noqa: E731
    else:
        loss_of = lambda: _tex_loss(generator, shape_encoder, tex_encoder, source, batch, count, rng)  # noqa: E731
    banks = trained["net"].banks
    roughness_weight = 3.0 if kind == "shape" else 0.3
    start = saved = time.monotonic()
    smooth, steps = 0.0, 0
    while (part_done := max((now := time.monotonic() - start) / (minutes * 60), steps / max_steps)) < 1:
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * max(0.02, 0.5 * (1 + np.cos(np.pi * part_done))) * min(1, (steps + 1) / 50)
        loss = loss_of()
        total = loss + roughness_weight * smoothness(banks) if steps % 4 == 0 else loss
        optimiser.zero_grad(set_to_none=True)
        total.backward()
        optimiser.step()
        steps += 1
        smooth = float(loss.detach()) if steps == 1 else 0.98 * smooth + 0.02 * float(loss.detach())
        if steps in (1, 10) or steps % 250 == 0:
            speed = steps / (now + 1e-9)
            log.info("%s step %d, %.0f %%, loss %.5f, %.1f/s", net, done + steps, 100 * part_done, smooth, speed)
        if time.monotonic() - saved > 120:
            _save(trained, path, done + steps, smooth)
            saved = time.monotonic()
    _save(trained, path, done + steps, smooth)
    return smooth


def _save(trained: nn.Module, path: Path, steps: int, loss: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file({k: v.contiguous() for k, v in trained.state_dict().items()}, temporary)
    temporary.replace(path)
    path.with_suffix(".json").write_text(json.dumps({"steps": steps, "loss": loss}))


def _shape_loss(generator, encoder, source, batch, count, rng) -> Tensor:
    """L1 between truncated distances in units of 1 cm; errors near the surface count most."""
    draws = [source.field(count, rng) for _ in range(batch)]
    planes = generator.shape.planes(encoder(torch.from_numpy(np.stack([d.described for d in draws]))))
    loss = torch.zeros(())
    for b, draw in enumerate(draws):
        points = torch.from_numpy(draw.points)
        target = torch.from_numpy(draw.sdf).clamp(-TRUNCATION, TRUNCATION)
        distance = torch.from_numpy(draw.body) + generator.shape([p[b : b + 1] for p in planes], points)
        # a little slope beyond the truncation, else a wrong far value would never come back
        clamped = distance.clamp(-TRUNCATION, TRUNCATION)
        clamped = clamped + 0.1 * (distance - clamped) * (clamped.sign() != target.sign())
        weight = 1 + 3 * (target.abs() < 0.008).float()
        loss = loss + (weight * (clamped - target).abs()).mean() / weight.mean()
    return 100 * loss / batch


def _tex_loss(generator, shape_encoder, tex_encoder, source, batch, count, rng) -> Tensor:
    draws = [source.color(count, rng) for _ in range(batch)]
    shapes, texs, palettes = (torch.from_numpy(np.stack([d[i] for d in draws])) for i in range(3))
    with torch.no_grad():
        w_shape = shape_encoder(shapes)
    w_tex = tex_encoder(palettes, texs)
    planes = generator.tex.planes(torch.cat([w_tex, w_shape], 1))
    return _color_loss(generator, planes, w_tex, [d[3] for d in draws], [d[4] for d in draws])


def _skin_loss(generator, tex_encoder, source, batch, count, rng) -> Tensor:
    draws = [source.color(count, rng) for _ in range(batch)]
    described, palettes = (torch.from_numpy(np.stack([d[i] for d in draws])) for i in range(2))
    w_tex = tex_encoder(palettes, described)
    return _color_loss(generator, generator.tex.planes(w_tex), w_tex, [d[2] for d in draws], [d[3] for d in draws])


def _color_loss(generator, planes, w_tex, points, colors) -> Tensor:
    loss = torch.zeros(())
    for b, (p, c) in enumerate(zip(points, colors, strict=True)):
        predicted = generator.tex([plane[b : b + 1] for plane in planes], w_tex[b, :6], torch.from_numpy(p))
        loss = loss + (predicted - torch.from_numpy(c)).abs().mean()
    return loss / len(points)


# --- schedule ---------------------------------------------------------------------------------------------------------

SHARES = {  # of the training time; textures need the codes of the shapes
    "top.shape": 0.14, "bottom.shape": 0.11, "hair.shape": 0.10, "shoes.shape": 0.05, "accessory.shape": 0.03,
    "body.tex": 0.22, "top.tex": 0.13, "bottom.tex": 0.10, "hair.tex": 0.06, "shoes.tex": 0.04, "accessory.tex": 0.02,
}  # fmt: skip


def train_all(data: Path, run: Path, minutes: float, only: tuple[str, ...] = (), seed: int = 0) -> dict[str, float]:
    """Train every network (or those in `only`) for its share of `minutes`; returns the smoothed losses.

    Networks of different parts are independent: run one process per part on as many cores as there are, with the
    shapes of a part before its texture.
    """
    chosen = {n: s for n, s in SHARES.items() if not only or n in only}
    total = sum(chosen.values())
    return {n: train(data, run, n, minutes * share / total, seed=seed) for n, share in chosen.items()}
