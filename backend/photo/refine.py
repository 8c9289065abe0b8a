# SPDX-License-Identifier: GPL-3.0-or-later
"""What a photo did not show: views of the hidden sides are rendered, edited together, and put back into the textures.

After the second stage of SIFU (Zhang et al. 2024, sec. 3.3), with two differences. A texture that shows through a
bilinear look-up depends linearly on its texels, so the optimisation is a least-squares problem, solved by conjugate
gradients instead of steps of Adam. And what the photo saw is not optimised at all: texels keep it, feathered by how
well it saw them.

    minimise over d  sum w (look-up of (1 - seen) d  -  (edited - rendered))^2  +  SMOOTH |grad d|^2  +  KEEP d^2
    texture = texture + (1 - seen) d

An editor that changes nothing therefore leaves every texel as it is, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse
from torch import Tensor

from backend.families.base import Step, no_step
from backend.geometry.mesh import TriMesh, vertex_normals
from backend.render.camera import Camera, orbit, to_clip
from backend.render.rasterize import Raster, interpolate, rasterize

SIZE = 768  # pixels along a side of a view
MOST_VIEWS = 9
GAIN = 0.02  # of the hidden surface, that one more view has to show
SMOOTH = 1e-3  # texels that no view shows go on as their neighbours do
KEEP = 1e-7
ITERATIONS = 400
PRECISION = 1e-5
KNOWN = 0.9  # share of the photo's from which on a texel is an example for others
MOST_KNOWN = 60_000  # examples
BACKGROUND = 0.5


@dataclass(frozen=True)
class Painted:
    """One textured object in its rest pose, standing upright about x = 0. Pictures have their top row first."""

    mesh: TriMesh  # with uvs
    color: Float[Tensor, "h w 3"]  # sRGB 0..1
    seen: Float[Tensor, "h w"]  # how far these are a photo's pixels, 0..1
    base: Float[Tensor, "h w 3"]  # what would be there without the photo


@dataclass(frozen=True)
class Known:
    """Examples: places that the photo showed."""

    points: Float[np.ndarray, "K 3"]
    normals: Float[np.ndarray, "K 3"]
    colors: Float[np.ndarray, "K 3"]
    base: Float[np.ndarray, "K 3"]
    part: Int[np.ndarray, " K"]


@dataclass(frozen=True)
class Views:
    """Pictures of the hidden sides, unlit, and what their pixels see."""

    cameras: Camera  # a batch
    rgb: Float[Tensor, "B H W 3"]  # sRGB 0..1
    base: Float[Tensor, "B H W 3"]
    seen: Float[Tensor, "B H W"]
    part: Int[Tensor, "B H W"]  # number of the object, -1 for none
    points: Float[Tensor, "B H W 3"]  # metres
    normals: Float[Tensor, "B H W 3"]
    known: Known

    @property
    def mask(self) -> Bool[Tensor, "B H W"]:
        return self.part >= 0


class Editor(Protocol):
    """Views in, edited views out."""

    def edit(self, views: Views, step: Step = no_step) -> Float[Tensor, "B H W 3"]:
        """All views together, so that they agree where they overlap; sRGB 0..1. The difference to `views.rgb` counts
        as far as the photo did not see a place."""
        ...


class Identity:
    """Changes nothing."""

    def edit(self, views: Views, step: Step = no_step) -> Float[Tensor, "B H W 3"]:
        return views.rgb


@torch.no_grad()
def refine(
    parts: Sequence[Painted], editor: Editor, step: Step = no_step, size: int = SIZE
) -> list[Float[Tensor, "h w 3"]]:
    """New textures of these objects, which are seen together. Texels with `seen` 1 and all texels when the editor
    changes nothing stay exactly as they are."""
    scene = _Scene.of(parts)
    cameras = choose_cameras(scene)
    if cameras is None:
        return [part.color for part in parts]
    step("refine", 0.05)
    views, looks = render(scene, cameras, size)
    step("refine", 0.2)
    edited = editor.edit(views, lambda stage, share: step("refine", 0.2 + 0.5 * share))
    step("refine", 0.7)
    change = (edited - views.rgb) * (1 - views.seen)[..., None]
    change = change[views.mask].double().cpu().numpy()
    if not change.any():
        return [part.color for part in parts]
    found = _solve(scene, looks, change)
    step("refine", 1.0)
    out, begin = [], 0
    for part in parts:
        count = part.seen.numel()
        delta = torch.from_numpy(found[begin : begin + count]).to(part.color).view_as(part.color)
        out.append((part.color + (1 - part.seen)[..., None] * delta).clamp(0, 1))
        begin += count
    return out


# --------------------------------------------------------------------------------------------------- places of texels


@dataclass(frozen=True)
class Chart:
    """What lies under the texels of one texture."""

    covered: Bool[Tensor, "h w"]
    points: Float[Tensor, "h w 3"]
    normals: Float[Tensor, "h w 3"]


def chart(mesh: TriMesh, shape: tuple[int, int]) -> Chart:
    """The texture's own picture of the surface: faces laid out by their uvs."""
    assert mesh.uvs is not None
    assert mesh.face_uvs_idx is not None
    flat = torch.cat([mesh.uvs * 2 - 1, torch.zeros_like(mesh.uvs[:, :1]), torch.ones_like(mesh.uvs[:, :1])], 1)
    raster = rasterize(flat[None], mesh.face_uvs_idx, shape)
    values = torch.cat([mesh.vertices, vertex_normals(mesh.vertices, mesh.faces)], 1)
    found = interpolate(values, raster, mesh.faces)[0]
    return Chart(raster.mask[0], found[..., :3], torch.nn.functional.normalize(found[..., 3:], dim=-1))


@dataclass(frozen=True)
class _Scene:
    parts: Sequence[Painted]
    charts: list[Chart]
    vertices: Float[Tensor, "V 3"]
    normals: Float[Tensor, "V 3"]
    faces: Int[Tensor, "F 3"]
    part_of_face: Int[Tensor, " F"]
    uv_of_corner: Float[Tensor, "F 3 2"]
    hidden: Float[Tensor, " F"]  # area that the photo did not see, square metres

    @classmethod
    def of(cls, parts: Sequence[Painted]) -> _Scene:
        vertices, normals, faces, numbers, corners, hidden, begin = [], [], [], [], [], [], 0
        for number, part in enumerate(parts):
            mesh = part.mesh
            assert mesh.uvs is not None
            assert mesh.face_uvs_idx is not None
            vertices.append(mesh.vertices)
            normals.append(vertex_normals(mesh.vertices, mesh.faces))
            faces.append(mesh.faces + begin)
            numbers.append(torch.full_like(mesh.faces[:, 0], number))
            corners.append(mesh.uvs[mesh.face_uvs_idx])
            a, b, c = mesh.vertices[mesh.faces].unbind(1)
            area = torch.linalg.cross(b - a, c - a, dim=1).norm(dim=1) / 2
            hidden.append(area * (1 - _at(part.seen[..., None], corners[-1].mean(1))[:, 0]))
            begin += len(mesh.vertices)
        charts = [chart(part.mesh, (part.seen.shape[0], part.seen.shape[1])) for part in parts]
        return cls(parts, charts, torch.cat(vertices), torch.cat(normals), torch.cat(faces), torch.cat(numbers),
                   torch.cat(corners), torch.cat(hidden))  # fmt: skip

    def raster(self, cameras: Camera, size: int) -> Raster:
        clip = torch.stack([to_clip(self.vertices, matrix) for matrix in cameras.mvp])
        return rasterize(clip, self.faces, (size, size))


def _at(image: Float[Tensor, "h w C"], uvs: Float[Tensor, "N 2"]) -> Float[Tensor, "N C"]:
    """Nearest texel."""
    height, width = image.shape[:2]
    column = (uvs[:, 0] * width).long().clamp(0, width - 1)
    row = ((1 - uvs[:, 1]) * height).long().clamp(0, height - 1)
    return image[row, column]


# -------------------------------------------------------------------------------------------------------------- views


def choose_cameras(scene: _Scene, size: int = 160) -> Camera | None:
    """Views that show most of what the photo did not, the best first; None if nothing is hidden. Candidates go around
    in steps of 45 degrees at eye level, and in steps of 90 from above and below."""
    bounds = torch.stack([scene.vertices.amin(0), scene.vertices.amax(0)])
    around = [math.radians(45 * i) for i in range(8)]
    rings = [orbit(bounds, around), *(orbit(bounds, around[::2], math.radians(e)) for e in (40, -35))]
    every = Camera(torch.cat([ring.c2w for ring in rings]), torch.cat([ring.projection for ring in rings]))
    raster = scene.raster(every, size)
    eyes = every.c2w[:, :3, 3]
    a, b, c = scene.vertices[scene.faces].unbind(1)
    middle, normal = (a + b + c) / 3, torch.nn.functional.normalize(torch.linalg.cross(b - a, c - a, dim=1), dim=1)
    shown = torch.zeros(len(eyes), len(scene.faces), device=middle.device)
    for i, ids in enumerate(raster.face_id):
        found = ids[ids >= 0].unique()
        towards = torch.nn.functional.normalize(eyes[i] - middle[found], dim=1)
        shown[i, found] = (normal[found] * towards).sum(1).clamp(min=0)
    left, chosen, total = scene.hidden.clone(), [], float(scene.hidden.sum())
    best_so_far = torch.zeros_like(left)
    while len(chosen) < MOST_VIEWS and total > 0:
        gains = ((shown - best_so_far).clamp(min=0) * left).sum(1)
        best = int(gains.argmax())
        if float(gains[best]) < GAIN * total:
            break
        chosen.append(best)
        best_so_far = torch.maximum(best_so_far, shown[best])
    if not chosen:
        return None
    return Camera(every.c2w[chosen], every.projection[chosen])


@dataclass(frozen=True)
class _Looks:
    """The look-up as a matrix: pixels by texels of all parts, one part's after the other's; and how pixels count."""

    matrix: sparse.csr_array
    weights: Float[np.ndarray, " N"]


def render(scene: _Scene, cameras: Camera, size: int) -> tuple[Views, _Looks]:
    raster = scene.raster(cameras, size)
    pixels = raster.pixels
    face = raster.face_id.flatten()[pixels]
    share = raster.barycentrics.reshape(-1, 3)[pixels]
    uvs = (scene.uv_of_corner[face] * share[..., None]).sum(1)
    part = scene.part_of_face[face]
    matrix = _look_up(scene, uvs.double().cpu().numpy(), part.cpu().numpy())

    def looked(name: str) -> Tensor:
        flat = [getattr(p, name).reshape(p.seen.numel(), -1) for p in scene.parts]
        found = matrix @ torch.cat(flat).double().cpu().numpy()
        return torch.from_numpy(found).to(scene.vertices)

    def image(rows: Tensor, empty: float) -> Tensor:
        whole = rows.new_full((raster.face_id.numel(), rows.shape[1]), empty)
        return whole.index_copy(0, pixels, rows).view(*raster.face_id.shape, -1)

    where = interpolate(torch.cat([scene.vertices, scene.normals], 1), raster, scene.faces)
    points, normals = where[..., :3], torch.nn.functional.normalize(where[..., 3:], dim=-1)
    eyes = cameras.c2w[:, :3, 3]
    towards = torch.nn.functional.normalize(eyes[:, None, None] - points, dim=-1)
    cosine = (towards * normals).sum(-1).clamp(min=0.05).reshape(-1)[pixels]
    numbers = torch.full_like(raster.face_id.flatten(), -1).index_copy(0, pixels, part).view_as(raster.face_id)
    views = Views(cameras, image(looked("color"), BACKGROUND), image(looked("base"), BACKGROUND),
                  image(looked("seen"), 0)[..., 0], numbers, points, normals, _examples(scene))  # fmt: skip
    return views, _Looks(matrix, (cosine**2).double().cpu().numpy())


def _look_up(scene: _Scene, uvs: Float[np.ndarray, "N 2"], part: Int[np.ndarray, " N"]) -> sparse.csr_array:
    """Bilinear, as `rasterize.texture` reads: edges clamped, centres at half texels."""
    counts = [p.seen.numel() for p in scene.parts]
    begin = np.cumsum([0, *counts])
    sizes = np.array([p.seen.shape for p in scene.parts])[part]
    x = (uvs[:, 0] * sizes[:, 1] - 0.5).clip(0, sizes[:, 1] - 1)
    y = ((1 - uvs[:, 1]) * sizes[:, 0] - 0.5).clip(0, sizes[:, 0] - 1)
    x0, y0 = np.minimum(np.floor(x), sizes[:, 1] - 2), np.minimum(np.floor(y), sizes[:, 0] - 2)
    u, v = x - x0, y - y0
    columns, values = [], []
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        columns.append(begin[part] + (y0 + dy).astype(np.int64) * sizes[:, 1] + (x0 + dx).astype(np.int64))
        values.append((u if dx else 1 - u) * (v if dy else 1 - v))
    rows = np.tile(np.arange(len(uvs)), 4)
    return sparse.csr_array((np.concatenate(values), (rows, np.concatenate(columns))), (len(uvs), int(begin[-1])))


def _examples(scene: _Scene) -> Known:
    """Texels of the photo, evenly thinned."""
    found = []
    for number, (part, place) in enumerate(zip(scene.parts, scene.charts, strict=True)):
        at = place.covered & (part.seen > KNOWN)
        values = torch.cat([place.points, place.normals, part.color, part.base], 2)[at]
        found.append(torch.cat([values, torch.full_like(values[:, :1], number)], 1))
    rows = torch.cat(found).double().cpu().numpy()
    rows = rows[:: max(1, math.ceil(len(rows) / MOST_KNOWN))]
    return Known(rows[:, :3], rows[:, 3:6], rows[:, 6:9], rows[:, 9:12], rows[:, 12].astype(np.int64))


# ------------------------------------------------------------------------------------------------ back into the texels


def _solve(scene: _Scene, looks: _Looks, change: Float[np.ndarray, "N 3"]) -> Float[np.ndarray, "T 3"]:
    """The texels' change d before feathering; texels that no chart covers take that of the nearest covered one."""
    free = np.concatenate([(1 - part.seen).double().cpu().numpy().ravel() for part in scene.parts])
    matrix = looks.matrix @ sparse.diags_array(free)
    weighted = sparse.diags_array(looks.weights) @ matrix
    covered = np.concatenate([place.covered.cpu().numpy().ravel() for place in scene.charts])
    normal = (matrix.T @ weighted).tocsr() + SMOOTH * _laplacian(scene, covered)
    normal = normal + KEEP * sparse.eye_array(len(free), format="csr")
    found = _conjugate_gradients(normal.tocsr(), weighted.T @ change)
    out, begin = [], 0
    for place in scene.charts:
        count = place.covered.numel()
        out.append(_spread(found[begin : begin + count], place.covered.cpu().numpy()))
        begin += count
    return np.concatenate(out)


def _laplacian(scene: _Scene, covered: Bool[np.ndarray, " T"]) -> sparse.csr_array:
    """Of the graph of covered texels that lie side by side."""
    pairs, begin = [], 0
    for part in scene.parts:
        height, width = part.seen.shape
        index = begin + np.arange(height * width).reshape(height, width)
        pairs += [np.stack([index[:, :-1].ravel(), index[:, 1:].ravel()]),
                  np.stack([index[:-1].ravel(), index[1:].ravel()])]  # fmt: skip
        begin += height * width
    a, b = np.concatenate(pairs, 1)
    both = covered[a] & covered[b]
    a, b = a[both], b[both]
    ones = np.ones(len(a))
    across = sparse.csr_array((np.concatenate([ones, ones]), (np.concatenate([a, b]), np.concatenate([b, a]))),
                              (begin, begin))  # fmt: skip
    return (sparse.diags_array(across.sum(1)) - across).tocsr()


def _conjugate_gradients(matrix: sparse.csr_array, right: Float[np.ndarray, "T C"]) -> Float[np.ndarray, "T C"]:
    """Every column of matrix x = right, preconditioned by the diagonal."""
    scale = 1 / matrix.diagonal()[:, None]
    x, rest = np.zeros_like(right), right.copy()
    direction = z = scale * rest
    product = (rest * z).sum(0)
    limit = PRECISION**2 * np.maximum(product, 1e-300)
    for _ in range(ITERATIONS):
        if (product <= limit).all():
            break
        moved = matrix @ direction
        length = product / np.maximum((direction * moved).sum(0), 1e-300)
        x = x + length * direction
        rest = rest - length * moved
        z = scale * rest
        following = (rest * z).sum(0)
        direction = z + following / np.maximum(product, 1e-300) * direction
        product = following
    return x


def _spread(values: Float[np.ndarray, "T C"], covered: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, "T C"]:
    from scipy.ndimage import distance_transform_edt

    if covered.all() or not covered.any():
        return values
    nearest = distance_transform_edt(~covered, return_distances=False, return_indices=True)
    assert nearest is not None
    return values[nearest[0].ravel() * covered.shape[1] + nearest[1].ravel()]
