# SPDX-License-Identifier: GPL-3.0-or-later
"""Photos of a family's own people with everything known: what the photo encoder learns from (Lan et al. 2023, E3DGE,
section 3: the generator makes its own pairs), and what inversion is measured on.

A figure is a person once extracted, with colours on its vertices; a shot is one photo of it, posed, lit and framed as
people frame people. Conventions are those of `backend.render`: OpenGL cameras, images with the top row first.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from safetensors import safe_open
from safetensors.numpy import save_file

from backend import poses
from backend.families.base import Latents
from backend.families.people.config import PARTS
from backend.families.people.model import PeopleModel
from backend.geometry.bake import smooth_normals
from backend.geometry.tetgrid import extract_surface
from backend.poses import Bones
from backend.render.camera import Camera, perspective, to_clip
from backend.render.rasterize import rasterize, sample, to_image
from backend.render.shade import to_linear, to_srgb

LABELS = ("body", *PARTS)
FRAMED = 7  # of as many vertices one is looked at to frame a person
MARGIN = 1.1  # side of a crop over the longer side of the person's box
LIMBS = {"arm_l": ("clavicle_l", "upperarm_l", "lowerarm_l", "hand_l"),
         "arm_r": ("clavicle_r", "upperarm_r", "lowerarm_r", "hand_r")}  # fmt: skip
LOOSE_JOINTS = {"upperarm": 14.0, "lowerarm": 16.0, "thigh": 7.0, "calf": 7.0, "head": 9.0, "neck_01": 5.0,
                "spine_01": 3.0, "spine_02": 3.0, "spine_03": 3.0, "hand": 9.0, "foot": 4.0}  # fmt: skip
"""Degrees of random play (one standard deviation) on top of the library's poses, for a play of 1."""
CALM = 0.4
UPRIGHT = ("standing_1", "standing_2", "standing_3", "standing_4", "arms_down", "contrapposto", "walking", "walking_2",
           "hands_on_hips", "waving", "rest", "t_pose", "running", "sitting")  # fmt: skip
SHARES = (0.12, 0.10, 0.08, 0.08, 0.16, 0.08, 0.07, 0.06, 0.06, 0.04, 0.05, 0.04, 0.03, 0.03)

Array = np.ndarray


@dataclass(frozen=True)
class Figure:
    """A person in rest, standing on y = 0, ready to be posed and seen."""

    codes: dict[str, Float[Array, "1 C"]]
    points: Float[Array, "V 3"]  # canonical
    vertices: Float[Array, "V 3"]  # person space
    faces: Int[Array, "F 3"]
    colors: UInt8[Array, "V 3"]  # sRGB
    labels: UInt8[Array, " V"]  # index into LABELS
    skin_indices: UInt8[Array, "V 4"]
    skin_weights: Float[Array, "V 4"]
    bones: Bones

    def save(self, path: Path) -> None:
        arrays = {f"codes/{name}": code for name, code in self.codes.items()}
        arrays |= {"points": self.points.astype(np.float16), "vertices": self.vertices, "faces": self.faces,
                   "colors": self.colors, "labels": self.labels, "skin_indices": self.skin_indices,
                   "skin_weights": self.skin_weights.astype(np.float16), "heads": self.bones.heads,
                   "tails": self.bones.tails, "parents": self.bones.parents}  # fmt: skip
        save_file(arrays, path, {"bones": json.dumps(self.bones.names)})

    @classmethod
    def load(cls, path: Path) -> Figure:
        with safe_open(path, "np") as file:
            a = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            names = tuple(json.loads(file.metadata()["bones"]))
        codes = {name.removeprefix("codes/"): code for name, code in a.items() if name.startswith("codes/")}
        return cls(codes, a["points"].astype(np.float32), a["vertices"], a["faces"], a["colors"], a["labels"],
                   a["skin_indices"], a["skin_weights"].astype(np.float32),
                   Bones(names, a["parents"], a["heads"], a["tails"]))  # fmt: skip


@torch.no_grad()
def make_figure(model: PeopleModel, latents: Latents, grid_resolution: int = 80) -> Figure:
    """Raises `empty_surface` where the person has none."""
    field: Any = model.decode(latents)[0]
    mesh = extract_surface(field, grid_resolution)
    label = torch.tensor([LABELS.index(part) for part in ("body", *field.worn)])[field.label(mesh.points)]
    indices, weights = field.skin(mesh.points)
    floor = mesh.vertices[:, 1].min()
    drop = torch.stack([torch.zeros(()), floor, torch.zeros(())])
    colors = (field.color(mesh.points) * 255 + 0.5).to(torch.uint8)
    rig = field.rig
    bones = Bones(rig.names, np.array(rig.parents, np.int32), (rig.heads - drop).numpy(), (rig.tails - drop).numpy())
    return Figure(
        {k: v.numpy() for k, v in latents.codes.items()}, mesh.points.numpy(), (mesh.vertices - drop).numpy(),
        mesh.faces.int().numpy(), colors.numpy(), label.to(torch.uint8).numpy(), indices.to(torch.uint8).numpy(),
        weights.numpy(), bones,
    )  # fmt: skip


def random_person(model: PeopleModel, seed: int) -> Latents:
    """The person of a seed; every third one wears parts of another, so that clothes do not tell the body."""
    latents = model.sample(seed, 0.7 + 0.3 * (seed % 2))
    if seed % 3 == 0:
        other = model.sample(seed + (1 << 40), 1.0)
        mine = {k: v for k, v in latents.codes.items() if k.startswith("body/")}
        latents = Latents(latents.family, mine | {k: v for k, v in other.codes.items() if not k.startswith("body/")})
    return latents


def random_rotations(rng: np.random.Generator, bones: Bones, play: float = CALM) -> Float[Array, "J 4"]:
    """A pose of the library, sometimes mirrored, sometimes with another one's arms, with `play` in every joint: CALM as
    people stand before a camera, 1 as in a dance."""
    names = list(bones.names)
    rotations = _library_pose(rng, bones)
    for limb in LIMBS.values():
        if rng.random() < 0.35 * play:
            other = _library_pose(rng, bones)
            at = [j for j, name in enumerate(names) if name in limb or _hangs_on(bones, j, names.index(limb[-1]))]
            rotations[at] = other[at]
    for stem, degrees in LOOSE_JOINTS.items():
        for name in (stem, f"{stem}_l", f"{stem}_r"):
            if name in names:
                turn = rng.normal(0, math.radians(degrees) * play * (0.5 + rng.random()), 3) * [1.0, 0.6, 1.0]
                j = names.index(name)
                rotations[j] = _times(_exp(turn), rotations[j])
    return rotations


def _library_pose(rng: np.random.Generator, bones: Bones) -> Float[Array, "J 4"]:
    rotations = poses.pose(str(rng.choice(UPRIGHT, p=np.array(SHARES) / sum(SHARES))), bones)[0].astype(np.float64)
    if rng.random() < 0.5:
        return mirrored(rotations, bones.names)
    return rotations


def mirrored(rotations: Float[Array, "J 4"], names: tuple[str, ...] | list[str]) -> Float[Array, "J 4"]:
    """The pose in a mirror: sides change places, turns about y and z change their sense."""
    other = {"_l": "_r", "_r": "_l"}
    partner = [names.index(n[:-2] + other[n[-2:]]) if n[-2:] in other else j for j, n in enumerate(names)]
    return rotations[partner] * [1, 1, -1, -1]


def _hangs_on(bones: Bones, j: int, ancestor: int) -> bool:
    while j >= 0:
        if j == ancestor:
            return True
        j = int(bones.parents[j])
    return False


def _exp(turn: Float[Array, " 3"]) -> Float[Array, " 4"]:
    """Rotation vector to quaternion."""
    angle = float(np.linalg.norm(turn))
    return np.array([math.cos(angle / 2), *(turn * (math.sin(angle / 2) / max(angle, 1e-12)))])


def _times(a: Float[Array, " 4"], b: Float[Array, " 4"]) -> Float[Array, " 4"]:
    w, x, y, z = a
    return np.array([[w, -x, -y, -z], [x, w, -z, y], [y, z, w, -x], [z, -y, x, w]]) @ b


@dataclass(frozen=True)
class View:
    """From where a shot is taken: a square picture whose camera looks at the middle of the person's box."""

    c2w: Float[Array, "4 4"]
    fov: float  # radians, of the square


@dataclass(frozen=True)
class Light:
    """One far lamp in front of the camera's half space, and a sky; linear colours, directions in camera space."""

    direction: Float[Array, " 3"]
    key: Float[Array, " 3"]
    sky: Float[Array, " 3"]
    ground: Float[Array, " 3"]


@dataclass(frozen=True)
class Shot:
    """One photo, a square crop about the person, and how it was taken."""

    rgba: Float[Array, "S S 4"]  # sRGB before the background; alpha is coverage
    background: Float[Array, "S S 3"]
    view: View
    light: Light
    rotations: Float[Array, "J 4"]
    vertices: Float[Array, "V 3"]  # posed, in the world


def random_view(rng: np.random.Generator, vertices: Float[Array, "V 3"], yaw: float | None = None) -> View:
    """Mostly from before, at about the height of the chest, from 1.6 to 8 m away; framed by the person's box."""
    if yaw is None:
        yaw = rng.normal(0, 0.5) if rng.random() < 0.7 else rng.uniform(-math.pi, math.pi)
    pitch, roll = rng.normal(0.03, 0.1), rng.normal(0, 0.03)
    distance = math.exp(rng.uniform(math.log(2.0), math.log(8.0)))
    return view_from(vertices, yaw, pitch, roll, distance, rng.normal(0, 0.02, 2), rng.uniform(0.97, 1.06))


def view_from(
    vertices: Float[Array, "V 3"], yaw: float, pitch: float, roll: float = 0.0, distance: float = 4.0,
    shift: Float[Array, " 2"] | tuple[float, float] = (0.0, 0.0), zoom: float = 1.0,
) -> View:  # fmt: skip
    """A camera `distance` metres from the middle of the body, `yaw` about the vertical (0 in front), `pitch` above."""
    vertices = vertices[::FRAMED]
    cy, sy, cp, sp = math.cos(yaw), math.sin(yaw), math.cos(pitch), math.sin(pitch)
    back = np.array([sy * cp, sp, cy * cp])
    middle = (vertices.min(0) + vertices.max(0)) / 2
    eye = middle + distance * back
    right = np.array([cy, 0, -sy])
    axes = np.stack([right, np.cross(back, right), back], 1)
    axes = axes @ np.array([[math.cos(roll), -math.sin(roll), 0], [math.sin(roll), math.cos(roll), 0], [0, 0, 1]])
    for turn in range(2):  # then turn it to the middle of the box that it sees
        seen = (vertices - eye) @ axes
        slopes = seen[:, :2] / -seen[:, 2:]
        low, high = slopes.min(0), slopes.max(0)
        centre = (low + high) / 2 + np.asarray(shift) * (high - low).max()
        forward = axes @ np.array([centre[0], centre[1], -1.0])
        axes = _turned(axes, forward * (-1 / np.linalg.norm(forward)))
        shift = (0.0, 0.0) if turn else shift
    seen = (vertices - eye) @ axes
    half = float(np.abs(seen[:, :2] / seen[:, 2:]).max()) * MARGIN * zoom
    c2w = np.eye(4)
    c2w[:3, :3], c2w[:3, 3] = axes, eye
    return View(c2w, 2 * math.atan(half))


def _turned(axes: Float[Array, "3 3"], back: Float[Array, " 3"]) -> Float[Array, "3 3"]:
    """The frame with its last axis turned onto `back` the shortest way."""
    old = axes[:, 2]
    axis = np.cross(old, back)
    cosine = float(old @ back)
    k = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    return (np.eye(3) + k + k @ k / (1 + cosine)) @ axes


def random_light(rng: np.random.Generator) -> Light:
    direction = rng.normal(0, 1, 3) * [1, 0.7, 0.5] + [0, 0.7, 0.8]
    direction = direction / np.linalg.norm(direction)
    share, level = rng.uniform(0.1, 0.75), rng.uniform(0.8, 1.15)
    warmth = 1 + rng.normal(0, 0.05) * np.array([1, 0, -1])
    sky = (1 - share) * level * (2 - warmth) * rng.uniform(1.0, 1.2)
    return Light(direction, 1.35 * share * level * warmth, sky, sky * rng.uniform(0.45, 0.95))


def lit(color: torch.Tensor, normal: torch.Tensor, light: Light) -> torch.Tensor:
    """Matt surfaces [N, 3] (linear colour, unit normals in camera space) under a light; linear."""
    up = normal[:, 1:2] * 0.5 + 0.5
    key, sky, ground, to = (normal.new_tensor(v) for v in (light.key, light.sky, light.ground, light.direction))
    return color * (sky * up + ground * (1 - up) + key * (normal @ to).clamp(min=0)[:, None])


def take(
    figure: Figure, rotations: Float[Array, "J 4"], view: View, light: Light | None, size: int, supersample: int = 2,
    vertices: Float[Array, "V 3"] | None = None,
) -> Float[Array, "S S 4"]:  # fmt: skip
    """The figure in this pose, premultiplied sRGB with coverage; without a light in its flat colours."""
    posed = stand(figure, rotations) if vertices is None else vertices
    points, faces = torch.from_numpy(posed).float(), torch.from_numpy(figure.faces)
    camera = camera_of(view)
    side = size * supersample
    raster = rasterize(to_clip(points, camera.mvp)[None], faces, (side, side))
    colors = torch.from_numpy(figure.colors).float() / 255
    linear = to_linear(sample(colors, raster, faces))
    if light is not None:
        normals = torch.from_numpy(smooth_normals(posed.astype(np.float64), figure.faces)).float()
        normal = sample(normals, raster, faces) @ camera.view[:3, :3].T
        linear = lit(linear, torch.nn.functional.normalize(normal, dim=1), light)
    image = to_image(torch.cat([linear, torch.ones(len(linear), 1)], 1), raster)[0].movedim(2, 0)
    image = torch.nn.functional.avg_pool2d(image[None], supersample)[0]
    alpha = image[3:]
    rgb = to_srgb(image[:3] / alpha.clamp(min=1e-6)) * (alpha > 0)
    return torch.cat([rgb, alpha]).movedim(0, 2).numpy()


def camera_of(view: View) -> Camera:
    return Camera(torch.from_numpy(view.c2w).float(), perspective(view.fov, 1.0, 0.2, 30.0))


def stand(figure: Figure, rotations: Float[Array, "J 4"]) -> Float[Array, "V 3"]:
    """Posed vertices, the pelvis where it was."""
    return poses.skin(figure.vertices, figure.skin_indices, figure.skin_weights, figure.bones, rotations,
                      np.zeros((1, 3)))  # fmt: skip


def random_background(rng: np.random.Generator, size: int, plain: bool = False) -> Float[Array, "S S 3"]:
    """Walls, floors, blurred clutter."""
    low, high = rng.uniform(0.1, 0.95, 3), rng.uniform(0.1, 0.95, 3)
    rows = np.linspace(0, 1, size)[:, None, None]
    if plain:
        return np.broadcast_to(low + 0.12 * (rows - 0.5), (size, size, 3)).clip(0, 1).astype(np.float32)
    image = low + (high - low) * rows
    if rng.random() < 0.6:
        edge = int(size * rng.uniform(0.55, 0.9))
        image = np.where(np.arange(size)[:, None, None] > edge, rng.uniform(0.1, 0.9, 3), image)
    image = np.broadcast_to(image, (size, size, 3)).copy()
    for scale in (4, 16):
        noise = torch.from_numpy(rng.normal(0, rng.uniform(0, 0.12), (1, 3, scale, scale)))
        grown = torch.nn.functional.interpolate(noise, (size, size), mode="bicubic", align_corners=False)
        image += grown[0].movedim(0, 2).numpy()
    return image.clip(0, 1).astype(np.float32)
