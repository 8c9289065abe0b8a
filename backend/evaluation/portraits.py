# SPDX-License-Identifier: GPL-3.0-or-later
"""What is kept of a person to be measured: pictures, points on the visible surface, silhouettes' numbers, health.

Generated and sampled people are seen by the same cameras at the same size, in flat base colour (no light) and as
normals, so that only the people differ. All stand in person space with their lowest point at y = 0.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from backend.evaluation import health, lightfield
from backend.families.base import FamilyModel, HumanField, Latents, Rig
from backend.geometry.clean import clean
from backend.geometry.mesh import TriMesh, vertex_normals
from backend.geometry.tetgrid import extract_surface
from backend.render.camera import Camera, look_at, orbit, orthographic, to_clip
from backend.render.rasterize import Raster, rasterize, sample, to_image
from backend.render.shade import BACKGROUND, to_linear, to_srgb

Array = np.ndarray[Any, Any]
PARTS = ("body", "hair", "top", "bottom", "shoes", "accessory")
VIEWS = ("front", "back", "side", "face")
SIZE = 128  # pixels of a picture
SUPERSAMPLE = 2
POINTS = 2048  # on the visible surface: for distances between people
GRID = 128  # cells along the height of generated people
FRAME = torch.tensor([[-0.76, -0.03, -0.76], [0.76, 2.13, 0.76]])  # metres: holds everybody, hats included
FACE_HALF = 0.15  # metres to either side of the middle of the head
SILHOUETTE = 128  # pixels
DEPTH_SLACK = 0.02  # metres behind what a camera sees that still counts as seen


@dataclass(frozen=True)
class Portrait:
    """One person, measured."""

    points: Float[Array, "N 3"]  # float32, area-uniform on the visible surface
    colors: Int[Array, "N 3"]  # uint8 sRGB
    labels: Int[Array, " N"]  # uint8 index into PARTS
    pictures: Int[Array, "4 S S 3"]  # uint8 sRGB, per view
    normals: Int[Array, "4 S S 3"]  # uint8, camera space, 128 is 0
    parts: Int[Array, "4 S S"]  # uint8: 1 + index into PARTS of the part at the pixel's middle, 0 nobody
    silhouettes: Float[Array, "10 45"]  # see `lightfield`
    facts: dict[str, Any]  # "height_m", "seconds", of generated people also their mesh's health

    def save(self, path: Path) -> None:
        """Written to a temporary file first: a killed run leaves whole files only."""
        arrays = {k: v for k, v in asdict(self).items() if k != "facts"}
        temporary = path.with_suffix(".part.npz")
        np.savez_compressed(temporary, facts=np.array(json.dumps(self.facts)), **arrays)
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Portrait:
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in file.files}
        return cls(**{**arrays, "facts": json.loads(str(arrays["facts"]))})


def cached(path: Path | None, make: Callable[[], Portrait]) -> Portrait:
    """The portrait at `path`, made if it is not there; its time of making is in its facts."""
    if path is not None and path.exists():
        return Portrait.load(path)
    begin = time.perf_counter()
    portrait = make()
    portrait.facts["seconds"] = round(time.perf_counter() - begin, 3)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        portrait.save(path)
    return portrait


def cameras(head: Float[Tensor, " 3"]) -> Camera:
    """Of `VIEWS`, orthographic; `head` is the middle of the head bone in person space."""
    body = orbit(FRAME, [0.0, math.pi, math.pi / 2], fov_y=None, margin=1.0)
    middle = head.float().cpu() + torch.tensor([0.0, 0.0, 0.02])
    face = look_at(middle + torch.tensor([0.0, 0.0, 1.0]), middle)
    lens = orthographic(FACE_HALF, 1.0, 0.5, 1.5)
    return Camera(torch.cat([body.c2w, face[None]]), torch.cat([body.projection, lens[None]]))


def around(count: int, height_m: float) -> Camera:
    """`count` orthographic cameras around a person of this height, the picture filled from feet to top."""
    box = torch.tensor([[-0.05, 0.0, -0.05], [0.05, height_m, 0.05]])
    return orbit(box, [2 * math.pi * i / count for i in range(count)], fov_y=None, margin=1.04)


def sphere(bounds: Float[Array, "2 3"]) -> Camera:
    """20 cameras on the vertices of a dodecahedron, the first ten those of `lightfield`."""
    there = lightfield.cameras(bounds)
    centre = torch.from_numpy(np.asarray(bounds).mean(0)).float()
    opposite = look_at(2 * centre - there.c2w[:, :3, 3], centre)
    return Camera(torch.cat([there.c2w, opposite]), torch.cat([there.projection] * 2))


def head_of(rig: Rig | None, height_m: float) -> Float[Tensor, " 3"]:
    """Middle of the head bone; without such a bone 0.13 m below the top."""
    if rig is not None and "head" in rig.names:
        i = rig.names.index("head")
        return (rig.heads[i] + rig.tails[i]) / 2
    return torch.tensor([0.0, height_m - 0.13, 0.0])


# --- generated people -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A field and its surface, moved up or down so that it stands on y = 0."""

    field: HumanField
    mesh: TriMesh
    pieces: int = 1  # of the surface before cleaning, inner shells and floaters included

    @property
    def height(self) -> float:
        return float(self.mesh.vertices[:, 1].max())

    @property
    def head(self) -> Float[Tensor, " 3"]:
        return head_of(self.field.rig, self.height) + torch.tensor([0.0, self.drop, 0.0])

    @property
    def drop(self) -> float:
        """Metres that were added to y of person space."""
        offset = self.field.offset(self.mesh.points[:1])
        return float((self.mesh.vertices[:1] - self.mesh.points[:1] - offset)[0, 1])


@torch.no_grad()
def figure(field: HumanField, grid: int = GRID) -> Figure:
    """The surface of a field on its feet. Raises PopulaceError("empty_surface")."""
    raw = extract_surface(field, grid)
    mesh = clean(raw)
    floor = mesh.vertices[:, 1].min()
    vertices = mesh.vertices - torch.stack([torch.zeros_like(floor), floor, torch.zeros_like(floor)])
    pieces = int(health.topology(raw.faces.cpu().numpy())["components"] or 0)
    return Figure(field, TriMesh(vertices.cpu(), mesh.faces.cpu(), mesh.points), pieces)


def part_of(field: HumanField, points: Float[Tensor, "N 3"]) -> Int[Tensor, " N"]:
    """Index into PARTS; families that do not know parts are all body."""
    if not hasattr(field, "label"):
        return torch.zeros(len(points), dtype=torch.int64)
    order = torch.tensor([PARTS.index(p) for p in ("body", *field.worn)])  # pyright: ignore[reportAttributeAccessIssue]
    return order[field.label(points).cpu()]  # pyright: ignore[reportAttributeAccessIssue]


def draw(mesh: TriMesh, camera: Camera, size: int) -> Raster:
    clip = to_clip(mesh.vertices, camera.mvp.reshape(-1, 4, 4))
    return rasterize(clip, mesh.faces, (size, size))


@torch.no_grad()
def photograph(figure: Figure, camera: Camera, size: int = SIZE) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures and normals uint8 [B, S, S, 3], parts uint8 [B, S, S]. The field is asked for colour and part at every
    visible sample: nothing is lost to texture or vertex density."""
    field, mesh = figure.field, figure.mesh
    raster = draw(mesh, camera, size * SUPERSAMPLE)
    points = sample(mesh.points.cpu(), raster, mesh.faces)
    color = field.color(points.to(mesh.points.device)).cpu()
    part = part_of(field, points.to(mesh.points.device))
    normal = functional.normalize(sample(vertex_normals(mesh.vertices, mesh.faces), raster, mesh.faces), dim=1)
    rgb, labels = to_image(color, raster), to_image((part + 1)[:, None].float(), raster)[..., 0]
    return develop(rgb, raster.mask, camera, to_image(normal, raster), labels.to(torch.uint8))


def develop(
    rgb: Float[Tensor, "B H W 3"],
    mask: Bool[Tensor, "B H W"],
    camera: Camera,
    normal: Float[Tensor, "B H W 3"],
    labels: Int[Tensor, "B H W"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Fine pictures to pictures of half the size: colours averaged in linear light on one background, normals (world)
    turned to the camera, the label of the finer pixel below right of the middle."""
    cover = mask[..., None].float()
    behind = to_linear(rgb.new_tensor(BACKGROUND))
    color = _halve(to_linear(rgb) * cover) + behind * (1 - _halve(cover))
    turned = torch.einsum("bij,bhwj->bhwi", camera.view[:, :3, :3], normal) * cover
    normals = functional.normalize(_halve(turned), dim=3) * (_halve(cover) > 0)
    coded = (to_srgb(color) * 255 + 0.5).to(torch.uint8), (normals * 127 + 128.5).clamp(0, 255).to(torch.uint8)
    return *coded, (labels * mask)[:, 1::SUPERSAMPLE, 1::SUPERSAMPLE].to(torch.uint8)


def _halve(image: Tensor) -> Tensor:
    return functional.avg_pool2d(image.permute(0, 3, 1, 2), SUPERSAMPLE).permute(0, 2, 3, 1)


@torch.no_grad()
def surface_points(figure: Figure, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Area-uniform points of the visible surface [count, 3] in person space, and the same in field space. Visible: not
    more than 2 cm behind what one of 20 cameras around the person sees."""
    mesh = figure.mesh
    a, b, c = mesh.vertices[mesh.faces].unbind(1)
    area = torch.linalg.cross(b - a, c - a).norm(dim=1).double().numpy()
    rng = np.random.default_rng(seed)
    drawn = 3 * count  # most are visible
    face = torch.from_numpy(np.sort(rng.choice(len(area), drawn, p=area / area.sum())))
    u, v = (torch.from_numpy(rng.random((drawn, 1)).astype(np.float32)) for _ in range(2))
    u = u.sqrt()
    weights = torch.cat([1 - u, u * (1 - v), u * v], 1)[:, :, None]
    person = (mesh.vertices[mesh.faces[face]] * weights).sum(1)
    canonical = (mesh.points.cpu()[mesh.faces[face]] * weights).sum(1)
    camera = sphere(bounds_of(mesh))
    raster = draw(mesh, camera, SILHOUETTE)
    seen = (visible(person, camera, raster.depth)).nonzero().squeeze(1)
    chosen = seen[torch.from_numpy(rng.permutation(len(seen))[:count])]
    if len(chosen) < count:  # nobody hides two thirds of the surface; small counts may be unlucky
        chosen = seen[torch.from_numpy(rng.integers(len(seen), size=count))]
    return person[chosen], canonical[chosen]


def visible(points: Float[Tensor, "N 3"], camera: Camera, depth: Float[Tensor, "B H W"]) -> Bool[Tensor, " N"]:
    """Does any of the cameras see the point or something less than 2 cm in front of it?"""
    clip = to_clip(points, camera.mvp)
    place = (clip[..., :2] / clip[..., 3:]) * clip.new_tensor([1.0, -1.0])
    front = functional.grid_sample(depth[:, None], place[:, None], mode="nearest", align_corners=False)[:, 0, 0]
    slack = DEPTH_SLACK * camera.projection[:, 2, 2].abs()
    return ((clip[..., 2] / clip[..., 3]) <= front + slack[:, None]).any(0)


def bounds_of(mesh: TriMesh) -> Float[Array, "2 3"]:
    return torch.stack([mesh.vertices.amin(0), mesh.vertices.amax(0)]).double().numpy()


def generated(model: FamilyModel, latents: Latents, grid: int = GRID) -> Portrait:
    """The portrait of a generated person, one field of it."""
    made = figure(model.decode(latents)[0], grid)
    mesh = made.mesh
    pictures, normals, parts = photograph(made, cameras(made.head))
    points, canonical = surface_points(made, POINTS)
    canonical = canonical.to(mesh.points.device)
    masks = draw(mesh, lightfield.cameras(bounds_of(mesh)), SILHOUETTE).mask.numpy()
    vertices, faces = mesh.vertices.numpy(), mesh.faces.numpy()
    facts = {"height_m": made.height, "faces": len(faces), "pieces": made.pieces, **health.topology(faces),
             "self_intersections": health.self_intersections(vertices, faces)}  # fmt: skip
    with torch.no_grad():
        colors = (made.field.color(canonical).clamp(0, 1) * 255 + 0.5).to(torch.uint8).cpu().numpy()
        labels = part_of(made.field, canonical).to(torch.uint8).numpy()
    return Portrait(points.numpy(), colors, labels, pictures.numpy(), normals.numpy(), parts.numpy(),
                    lightfield.describe(masks).astype(np.float32), facts)  # fmt: skip


def stack(portraits: Sequence[Portrait], name: str) -> Array:
    """One array of all portraits."""
    return np.stack([getattr(p, name) for p in portraits])
