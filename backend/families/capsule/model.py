# SPDX-License-Identifier: GPL-3.0-or-later
"""The capsule person: a union of rounded cones whose signed distance, volume and colours are known in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from backend.families.base import AttributeValue, Encoded, Latents, PersonPhoto, Rig, Step, seeded_normal
from backend.protocol import Inversion, PopulaceError

# One bone per line: name, parent, region, start, end, start and end radius, for a person 1.7 m tall; A-pose.
# Lines whose name ends in ".L" (+X) are mirrored to ".R".
_BONES = (
    ("pelvis", None, "torso", (0.0, 0.92, 0.0), (0.0, 1.08, 0.0), 0.135, 0.125),
    ("chest", "pelvis", "torso", (0.0, 1.08, 0.0), (0.0, 1.32, 0.0), 0.125, 0.130),
    ("neck", "chest", "head", (0.0, 1.32, 0.0), (0.0, 1.50, 0.01), 0.060, 0.055),
    ("head", "neck", "head", (0.0, 1.54, 0.02), (0.0, 1.60, 0.02), 0.085, 0.100),
    ("upper_arm.L", "chest", "arm.L", (0.15, 1.36, 0.0), (0.36, 1.16, 0.0), 0.055, 0.044),
    ("forearm.L", "upper_arm.L", "arm.L", (0.36, 1.16, 0.0), (0.53, 0.98, 0.03), 0.044, 0.033),
    ("hand.L", "forearm.L", "arm.L", (0.53, 0.98, 0.03), (0.59, 0.89, 0.05), 0.038, 0.028),
    ("thigh.L", "pelvis", "leg.L", (0.09, 0.88, 0.0), (0.10, 0.48, 0.01), 0.088, 0.060),
    ("shin.L", "thigh.L", "leg.L", (0.10, 0.48, 0.01), (0.10, 0.09, -0.02), 0.060, 0.042),
    ("foot.L", "shin.L", "leg.L", (0.10, 0.05, -0.02), (0.11, 0.04, 0.14), 0.050, 0.040),
)
REGIONS = ("head", "torso", "arm.L", "arm.R", "leg.L", "leg.R")
SHAPE_CODES = 8  # height, girth, shoulders, arm and leg thickness, head size, leg length, belly
# Size i is exp(_REACH[i] * tanh(_SLOPE[i] * code[i])): every code is squashed, so no seed gives a broken body.
_REACH = np.array([0.20, 0.15, 0.10, 0.15, 0.15, 0.10, 0.05, 0.15])
_SLOPE = np.array([0.4, 1, 1, 1, 1, 1, 1, 1])
_CONTRAST = 1.5  # a colour is sigmoid(_CONTRAST * code)
_COLORED = {"top_color": ("torso", "arm.L", "arm.R"), "bottom_color": ("leg.L", "leg.R")}  # regions of an attribute
ROUGHNESS = (0.5, 0.8)  # of the head, which is bare, and of everything else
STRIPE_M = 0.1  # height of one stripe
_CHUNK = 1 << 15  # points at a time: what stays in the cache is several times faster


class CapsuleModel:
    """See `families.base.FamilyModel`."""

    name = "capsule"
    weights_sha256: str | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def sample(self, seed: int, truncation_psi: float, parameters: Mapping[str, Any]) -> Latents:
        """`single/shape` [1, 2] for one capsule, `body/shape` [1, 8] for a person; `*/tex` [1, 6 regions x 2 x RGB]."""
        part, width = ("single", 2) if parameters.get("single") else ("body", SHAPE_CODES)
        codes = {f"{part}/shape": width, f"{part}/tex": len(REGIONS) * 6}
        return Latents(
            "capsule",
            {
                name: torch.from_numpy(truncation_psi * seeded_normal(seed, name, (1, size))).to(self.device)
                for name, size in codes.items()
            },
        )

    def decode(self, latents: Latents, separate: bool = False) -> Sequence[CapsuleField]:
        """One field, "human". Raises `invalid_latents` unless the codes are those of a person or of one capsule."""
        if set(latents.codes) not in ({"single/shape", "single/tex"}, {"body/shape", "body/tex"}):
            raise PopulaceError("invalid_latents", "These codes are neither a capsule person nor a single capsule.",
                                "Send body/shape and body/tex, or single/shape and single/tex.")  # fmt: skip
        part = next(iter(latents.codes)).partition("/")[0]
        shape = latents.codes[f"{part}/shape"][0].double().cpu().numpy()
        palette = torch.sigmoid(_CONTRAST * latents.codes[f"{part}/tex"]).reshape(len(REGIONS), 2, 3)
        photo = latents.maps.get(f"{part}/photo")
        if part == "single":
            length, radius = 1.2 * np.exp(0.1 * np.tanh(shape[0])), 0.25 * np.exp(0.2 * np.tanh(shape[1]))
            ends = np.array([[[0, radius, 0], [0, radius + length, 0]]])
            return [CapsuleField(ends, np.array([[radius, radius]]), np.zeros(1, np.int64), None, palette)]
        return [_person(shape, palette, photo)]

    def encode(self, photos: Sequence[PersonPhoto], options: Inversion, step: Step) -> Encoded:
        """See `photo.people_in.PhotoModel`."""
        from backend.families.capsule.photo import encode

        return encode(self, photos, options, step)

    def describe(self, latents: Latents) -> dict[str, AttributeValue]:
        """Exact: the height is that of the surface. Of a single capsule nothing is said."""
        if "body/shape" not in latents.codes:
            return {}
        shape = latents.codes["body/shape"][0].double().cpu().numpy()
        tex = latents.codes["body/tex"].reshape(len(REGIONS), 2, 3)
        first = {name: tex[REGIONS.index(regions[0]), 0] for name, regions in _COLORED.items()}
        return {
            "height_m": _height(shape),
            "weight": float(1 + np.tanh(shape[1])) / 2,
            **{name: torch.sigmoid(_CONTRAST * codes.double()).tolist() for name, codes in first.items()},
            "pattern": "plain" if torch.equal(tex[:, 0], tex[:, 1]) else "stripes",
        }

    def edit(self, latents: Latents, values: Mapping[str, AttributeValue]) -> Latents:
        """Exact, and moves nothing else, but for the height, which girth changes by millimetres: it is set last."""
        if "body/shape" not in latents.codes:
            raise PopulaceError("invalid_request", "A single capsule has no attributes to set.", "Set single=false.")
        shape = latents.codes["body/shape"][0].double().cpu().numpy().copy()
        tex = latents.codes["body/tex"].clone().reshape(len(REGIONS), 2, 3)
        if "pattern" in values and values["pattern"] != self.describe(latents)["pattern"]:
            tex[:, 1] = tex[:, 0] if values["pattern"] == "plain" else -tex[:, 0]  # the complementary colour
        plain = torch.equal(tex[:, 0], tex[:, 1])
        for name, regions in _COLORED.items():
            if name in values:
                color: Any = values[name]
                for region in regions:
                    tex[REGIONS.index(region), slice(2) if plain else 0] = torch.tensor(color_code(color)).to(tex)
        height: Any = values.get("height_m", _height(shape))
        if "weight" in values:
            weight: Any = values["weight"]
            shape[1] = _atanh(2 * weight - 1)
        if {"height_m", "weight"} & values.keys():
            growth = np.log(height / _height(np.array([0.0, *shape[1:]])))
            shape[0] = _atanh(growth / _REACH[0]) / _SLOPE[0]
        codes = {"body/shape": torch.from_numpy(shape[None]), "body/tex": tex.reshape(1, -1)}
        return Latents("capsule", {name: code.to(latents.codes[name]) for name, code in codes.items()})


def color_code(rgb: Sequence[float] | np.ndarray) -> np.ndarray:
    """The code f64 [3] of a colour in 0..1."""
    inside = np.clip(np.asarray(rgb, np.float64), 1e-4, 1 - 1e-4)
    return np.log(inside / (1 - inside)) / _CONTRAST


def _atanh(x: float) -> float:
    """Inverse of tanh; numbers outside its range are taken as the ends."""
    return float(np.arctanh(np.clip(x, -0.999999, 0.999999)))


class CapsuleField:
    """A union of rounded cones. Its distance is exact outside and for a single cone; its sign is exact everywhere."""

    name = "human"
    focus = None
    region_density = None

    def __init__(
        self,
        ends: Float[np.ndarray, "K 2 3"],
        radii: Float[np.ndarray, "K 2"],
        regions: Int[np.ndarray, " K"],
        rig: Rig | None,
        palette: Float[Tensor, "R 2 3"],
        photo: UInt8[Tensor, "H W 4"] | None = None,
    ) -> None:
        """`photo` shows the person from in front, from the soles to the crown, as wide as high."""
        device = palette.device
        self.rig = rig
        self.ends = torch.tensor(ends, dtype=torch.float32, device=device)
        self.radii = torch.tensor(radii, dtype=torch.float32, device=device)
        self.regions = torch.tensor(regions, device=device)
        self.palette = palette
        self._photo = None if photo is None else photo.to(device).float() / 255
        reach = self.radii[..., None]
        self.bounds = torch.stack([(self.ends - reach).amin((0, 1)), (self.ends + reach).amax((0, 1))])
        self.bounds += torch.tensor([[-0.03], [0.03]], device=device)

    def _distances(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N K"]:
        """Signed distance to every cone. A rounded cone is the union of balls whose centre and radius move linearly;
        |p - c(t)| - r(t) is convex in t, so its minimum over [0, l] is the free minimum, clamped."""
        start, end, radii = self.ends[:, 0].to(points), self.ends[:, 1].to(points), self.radii.to(points)
        length = (end - start).norm(dim=1)
        slope = (radii[:, 0] - radii[:, 1]) / length
        relative = points[:, None] - start
        along = (relative * ((end - start) / length[:, None])).sum(-1)
        across = ((relative**2).sum(-1) - along**2).clamp_min(1e-18).sqrt()
        t = torch.minimum((along - across * slope / (1 - slope**2).sqrt()).clamp_min(0), length)
        return ((along - t) ** 2 + across**2).sqrt() - radii[:, 0] + slope * t

    def sdf(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        return torch.cat([self._distances(chunk).amin(1) for chunk in points.split(_CHUNK)])

    def _nearest(self, points: Float[Tensor, "N 3"]) -> Int[Tensor, " N"]:
        return torch.cat([self._distances(chunk).argmin(1) for chunk in points.split(_CHUNK)])

    def region(self, points: Float[Tensor, "N 3"]) -> Int[Tensor, " N"]:
        return self.regions[self._nearest(points)]

    def color(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        """Level stripes in two colours per region; in front what a photo showed."""
        stripe = torch.floor(points[:, 1] / STRIPE_M).long() % 2
        nearest = self._nearest(points)
        colors = self.palette[self.regions[nearest], stripe]
        if self._photo is None:
            return colors
        rows, columns = self._photo.shape[:2]
        height = (self.ends[..., 1] + self.radii).max()
        row = ((1 - points[:, 1] / height) * rows).long().clamp(0, rows - 1)
        column = ((points[:, 0] / height + 0.5) * columns).long().clamp(0, columns - 1)
        seen = self._photo[row, column]
        is_front = points[:, 2] > self.ends[nearest, :, 2].mean(1)
        return torch.lerp(colors, seen[:, :3], (seen[:, 3] * is_front)[:, None])

    def material(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 2"]:
        """Nothing is of metal."""
        skin, cloth = ROUGHNESS
        roughness = torch.where(self.region(points) == REGIONS.index("head"), skin, cloth).to(points)
        return torch.stack([roughness, torch.zeros_like(roughness)], 1)

    def offset(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        return torch.zeros_like(points)

    def counterpart(self, points: Float[Tensor, "N 3"], other: CapsuleField) -> Float[Tensor, "N 3"]:
        """Carried by the cones nearby: as far along each in its length, as far off it in its radius."""
        start, end = self.ends.unbind(1)
        new_start, new_end = other.ends.unbind(1)
        length, new_length = (end - start).norm(dim=1, keepdim=True), (new_end - new_start).norm(dim=1, keepdim=True)
        axis, new_axis = (end - start) / length, (new_end - new_start) / new_length
        relative = points[:, None] - start
        along = (relative * axis).sum(-1, keepdim=True)
        share = (along / length).clamp(0, 1)
        wider = torch.lerp(other.radii[:, :1], other.radii[:, 1:], share) / torch.lerp(
            self.radii[:, :1], self.radii[:, 1:], share)  # fmt: skip
        beyond = (along - share * length) * wider  # a cap grows with its radius
        carried = new_start + (share * new_length + beyond) * new_axis + (relative - along * axis) * wider
        weight = (-self._distances(points) / 0.02).softmax(1)
        return (weight[..., None] * carried).sum(1)

    def skin(self, points: Float[Tensor, "N 3"]) -> tuple[Int[Tensor, "N 4"], Float[Tensor, "N 4"]]:
        """The four nearest bones, weights falling off over 2 cm."""
        nearest = [(-self._distances(chunk) / 0.02).topk(4, dim=1) for chunk in points.split(_CHUNK)]
        return torch.cat([n.indices for n in nearest]), torch.cat([n.values for n in nearest]).softmax(1)


def _height(shape: Float[np.ndarray, " S"]) -> float:
    """Metres from the soles to the crown."""
    *_, joints, balls = _lines(shape)
    return float((joints[..., 1] + balls).max())


def _person(
    shape: Float[np.ndarray, " S"], palette: Float[Tensor, "R 2 3"], photo: UInt8[Tensor, "H W 4"] | None
) -> CapsuleField:
    names, parents, regions, joints, balls = _lines(shape)
    lines = torch.tensor(joints, dtype=torch.float32, device=palette.device)
    parent_ids = tuple(-1 if parent is None else names.index(parent) for parent in parents)
    rig = Rig(tuple(names), parent_ids, lines[:, 0], lines[:, 1])
    return CapsuleField(joints, balls, regions, rig, palette, photo)


def _lines(shape: Float[np.ndarray, " S"]) -> tuple[list[str], list[str | None], np.ndarray, np.ndarray, np.ndarray]:
    """Names, parents, regions [K], ends [K,2,3] and radii [K,2] of the lines of `_BONES`, scaled by the codes."""
    height, girth, shoulders, arm, leg, head, legs, belly = np.exp(_REACH * np.tanh(_SLOPE * shape))
    thickness = {"torso": girth, "arm": girth * arm, "leg": girth * leg, "head": head}
    names, parents, regions, ends, radii = [], [], [], [], []
    for name, parent, region, start, end, r_start, r_end in _BONES:
        ball = np.array([r_start, r_end]) * thickness[region.split(".")[0]] * (belly if name == "pelvis" else 1)
        line = np.array([start, end])
        if region.startswith("arm"):
            line[:, 0] *= shoulders
        line[:, 1] *= np.where(line[:, 1] < 0.92, legs, 1)
        line[:, 1] += np.where(line[:, 1] < 0.92, 0, 0.92 * (legs - 1))
        for side, flip in ((".L", 1), (".R", -1)) if name.endswith(".L") else (("", 1),):
            names.append(name.replace(".L", side))
            parents.append(None if parent is None else parent.replace(".L", side))
            regions.append(REGIONS.index(region.replace(".L", side)))
            ends.append(height * line * (flip, 1, 1))
            radii.append(height * ball)
    joints, balls = np.array(ends), np.array(radii)
    joints[..., 1] -= (joints[..., 1] - balls).min()  # feet on the floor
    return names, parents, np.array(regions), joints, balls


def load(device: torch.device, weights: None = None) -> CapsuleModel:
    return CapsuleModel(device)
