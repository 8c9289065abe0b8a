# SPDX-License-Identifier: GPL-3.0-or-later
"""Pictures of sampled people, pixel by pixel what a renderer of their layers sees: alpha-tested hair, brows as decals.

Conventions are those of `backend.render`: OpenGL cameras, images with the top row first, both sides of a face seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from backend.render.camera import Camera, to_clip
from backend.render.rasterize import Raster, _locate, rasterize
from backend.render.shade import BACKGROUND, studio, to_linear, to_srgb
from backend.render.visibility import HALF, SUBPIXEL, _scan, _screen_scan, clip_faces
from backend.training.person import Layer, SampledPerson, label_of

DECAL = 0.01  # metres between a brow and the skin that it is painted on, along the line of sight
OPAQUE = 0.5  # opacity from which a texel is surface


class Portrait(NamedTuple):
    """Images of B cameras. A pixel is the mean of its samples, except for the label, which is its middle sample's."""

    rgb: Float[Tensor, "B H W 3"]  # sRGB, before the background
    mask: Float[Tensor, "B H W"]  # coverage 0..1
    depth: Float[Tensor, "B H W"]  # metres along the line of sight, 0 where nothing is seen
    normal: Float[Tensor, "B H W 3"]  # unit, camera space, towards the viewer; 0 where nothing is seen
    label: Int[Tensor, "B H W"]  # index into `person.LABELS`, -1 where nothing is seen


class Soup:
    """The layers of a person (all but decals) as one mesh."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = list(layers)
        start = np.cumsum([0] + [len(layer.vertices) for layer in self.layers])
        self.vertices = np.concatenate([layer.vertices for layer in self.layers])
        self.normals = np.concatenate([layer.normals for layer in self.layers])
        self.faces = np.concatenate([layer.faces + at for layer, at in zip(self.layers, start, strict=False)])
        self.first = np.cumsum([0] + [len(layer.faces) for layer in self.layers])  # face of each layer
        self.label = np.concatenate([np.full(len(layer.faces), label_of(layer.part)) for layer in self.layers])

    def color(self, face: np.ndarray, corners: np.ndarray) -> np.ndarray:
        """sRGB and opacity f32 [N, 4] on the soup's faces [N] at barycentric coordinates [N, 3]."""
        out = np.zeros((len(face), 4), np.float32)
        for layer, low, high in zip(self.layers, self.first, self.first[1:], strict=False):
            at = np.flatnonzero((face >= low) & (face < high))
            out[at] = layer.color(face[at] - low, corners[at])
        return out


def split_decals(person: SampledPerson) -> tuple[list[Layer], list[Layer]]:
    """What has a surface (hidden skin included, which shows in wide sleeves), and brows."""
    solid = [layer for layer in person.layers if layer.part != "brows" and len(layer.faces)]
    if person.filler is not None:
        solid.append(person.filler)
    return solid, [layer for layer in person.layers if layer.part == "brows"]


def render_person(
    person: SampledPerson, cameras: Camera, size: tuple[int, int], supersample: int = 2, lit: bool = True,
    background: Sequence[float] = BACKGROUND,
) -> Portrait:  # fmt: skip
    """`person` seen by B cameras in images of (height, width) pixels of `supersample`^2 samples each; in the light of
    `render.shade.studio`, or with `lit` off in its flat colours."""
    solid, decals = split_decals(person)
    soup = Soup(solid)
    raster, depth = _see(soup, cameras, (size[0] * supersample, size[1] * supersample))
    pixels = raster.pixels
    face = raster.face_id.flatten()[pixels].numpy()
    corners = raster.barycentrics.reshape(-1, 3)[pixels].numpy()
    rgb = soup.color(face, corners)[:, :3]
    label = torch.full((raster.face_id.numel(),), -1, dtype=torch.int64)
    label[pixels] = torch.from_numpy(soup.label[face])
    skin = np.flatnonzero(face < soup.first[1]) if solid[0].part == "body" else np.zeros(0, np.int64)
    for layer in decals:
        over, painted = _decal(layer, cameras, raster, depth, pixels.numpy()[skin])
        at = skin[over]
        rgb[at] += painted[:, 3:] * (painted[:, :3] - rgb[at])

    view = cameras.view.reshape(-1, 4, 4).float()
    image_of = torch.div(pixels, raster.face_id[0].numel(), rounding_mode="floor")
    normal = torch.from_numpy((soup.normals[soup.faces[face]] * corners[..., None]).sum(1)).float()
    geometric = torch.from_numpy(_cross(soup.vertices[soup.faces[face]])).float()
    where = torch.from_numpy((soup.vertices[soup.faces[face]] * corners[..., None]).sum(1)).float()
    sight = where - cameras.c2w.reshape(-1, 4, 4)[image_of, :3, 3].float()
    if bool((cameras.projection.reshape(-1, 4, 4)[:, 3, 3] != 0).all()):  # parallel rays
        sight = -cameras.c2w.reshape(-1, 4, 4)[image_of, :3, 2].float()
    normal = torch.where(((geometric * sight).sum(1) > 0)[:, None], -normal, normal)  # both sides are seen
    normal = functional.normalize((view[image_of, :3, :3] @ normal[:, :, None]).squeeze(-1), dim=1)

    def shrink(rows: Tensor) -> Tensor:
        image = rows.new_zeros(raster.face_id.numel(), rows.shape[-1]).index_copy(0, pixels, rows)
        image = image.view(*raster.face_id.shape, -1).permute(0, 3, 1, 2)
        return functional.avg_pool2d(image, supersample).permute(0, 2, 3, 1)

    linear = to_linear(torch.from_numpy(rgb))
    mask = shrink(torch.ones(len(face), 1))
    color = shrink(studio(linear, normal) if lit else linear) + to_linear(torch.tensor(background)) * (1 - mask)
    mean_depth = shrink(depth.flatten()[pixels][:, None].float()) / mask.clamp(min=1e-8)
    middle = supersample // 2
    return Portrait(
        to_srgb(color), mask[..., 0], mean_depth[..., 0] * (mask[..., 0] > 0),
        functional.normalize(shrink(normal), dim=-1),
        label.view(raster.face_id.shape)[:, middle::supersample, middle::supersample],
    )  # fmt: skip


def _cross(triangles: np.ndarray) -> np.ndarray:
    return np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])


def _see(soup: Soup, cameras: Camera, resolution: tuple[int, int]) -> tuple[Raster, Tensor]:
    """Raster of the soup with cut-out layers, and depth along the line of sight [B, H, W]."""
    vertices = torch.from_numpy(soup.vertices).double()
    clip = to_clip(vertices, cameras.mvp.reshape(-1, 4, 4).double())
    faces = torch.from_numpy(soup.faces)
    face_id = torch.stack([_visible(soup, image, faces, resolution) for image in clip])
    raster = _locate(clip, faces, face_id)
    return raster, _line_of_sight(vertices, cameras, raster, faces)


def _line_of_sight(vertices: Tensor, cameras: Camera, raster: Raster, faces: Tensor) -> Tensor:
    z = -to_clip(vertices, cameras.view.reshape(-1, 4, 4).double())[..., 2]  # [B, V]
    out = torch.zeros(raster.face_id.shape, dtype=torch.float64)
    for b, image in enumerate(raster.face_id):
        seen = image >= 0
        out[b][seen] = (z[b][faces[image[seen]]] * raster.barycentrics[b][seen].double()).sum(-1)
    return out


def _visible(soup: Soup, clip: Tensor, faces: Tensor, resolution: tuple[int, int]) -> Tensor:
    """Face that each pixel sees [H, W], -1 for none; texels below half opacity are seen through."""
    height, width = resolution
    depth, face_id = np.full(resolution, np.inf), np.full(resolution, -1, np.int64)
    points = clip.numpy()
    for layer, low, high in zip(soup.layers, soup.first, soup.first[1:], strict=False):
        part = soup.faces[low:high]
        screen, crossing = _screen_scan(points, part, np.arange(low, high), True, height, width)
        screens = [screen]
        if len(crossing):
            cut, source = clip_faces(clip, faces, torch.from_numpy(crossing))
            loose = torch.arange(3 * len(cut)).view(-1, 3).numpy()
            screens.append(_screen_scan(cut.view(-1, 4).numpy(), loose, source.numpy(), False, height, width)[0])
        for triangles in screens:
            if layer.cutout and layer.paint is not None:
                _scan_cutout(*triangles, depth, face_id, points, soup.faces, layer.uvs, layer.face_uvs, low,
                             layer.paint.texels)  # fmt: skip
            else:
                _scan(*triangles, 0, height, depth, face_id)
    return torch.from_numpy(face_id)


@numba.njit(cache=True, nogil=True)
def _scan_cutout(
    corners, plane, face, depth, face_id, clip, faces, uvs, face_uvs, first, texels
):  # pragma: no cover (compiled)
    """As `visibility._scan`, but a fragment counts only if the texture is opaque there."""
    height, width = depth.shape
    rows, columns = texels.shape[:2]
    for t in range(len(face)):
        ax, ay = corners[t, 0, 0], corners[t, 0, 1]
        bx, by = corners[t, 1, 0], corners[t, 1, 1]
        cx, cy = corners[t, 2, 0], corners[t, 2, 1]
        top = max((min(ay, by, cy) + HALF - 1) // SUBPIXEL, 0)
        bottom = min((max(ay, by, cy) - HALF) // SUBPIXEL, height - 1)
        left = max((min(ax, bx, cx) + HALF - 1) // SUBPIXEL, 0)
        right = min((max(ax, bx, cx) - HALF) // SUBPIXEL, width - 1)
        not_a = 0 if cy < by or (cy == by and cx > bx) else 1
        not_b = 0 if ay < cy or (ay == cy and ax > cx) else 1
        not_c = 0 if by < ay or (by == ay and bx > ax) else 1
        p0, p1, p2, low, high = plane[t]
        f = face[t]
        a, b, c = clip[faces[f, 0]], clip[faces[f, 1]], clip[faces[f, 2]]
        uv = uvs[face_uvs[f - first, 0]], uvs[face_uvs[f - first, 1]], uvs[face_uvs[f - first, 2]]
        for row in range(top, bottom + 1):
            y = row * SUBPIXEL + HALF
            for column in range(left, right + 1):
                x = column * SUBPIXEL + HALF
                ea = (cx - bx) * (y - by) - (cy - by) * (x - bx) - not_a
                eb = (ax - cx) * (y - cy) - (ay - cy) * (x - cx) - not_b
                ec = (bx - ax) * (y - ay) - (by - ay) * (x - ax) - not_c
                if (ea | eb | ec) < 0:
                    continue
                z = min(max(p0 * column + p1 * row + p2, low), high)
                if z > 1 or z >= depth[row, column]:
                    continue
                px, py = (column + 0.5) * (2 / width) - 1, 1 - (row + 0.5) * (2 / height)
                ua, ub, uc = a[0] - a[3] * px, b[0] - b[3] * px, c[0] - c[3] * px
                va, vb, vc = a[1] - a[3] * py, b[1] - b[3] * py, c[1] - c[3] * py
                wa, wb, wc = ub * vc - vb * uc, uc * va - vc * ua, ua * vb - va * ub
                total = wa + wb + wc
                wa, wb, wc = max(wa / total, 0.0), max(wb / total, 0.0), max(wc / total, 0.0)
                total = wa + wb + wc
                u = (wa * uv[0][0] + wb * uv[1][0] + wc * uv[2][0]) / total
                v = (wa * uv[0][1] + wb * uv[1][1] + wc * uv[2][1]) / total
                i = min(max(u * columns - 0.5, 0.0), columns - 1.0)
                j = min(max((1 - v) * rows - 0.5, 0.0), rows - 1.0)
                i0, j0 = int(i), int(j)
                i1, j1 = min(i0 + 1, columns - 1), min(j0 + 1, rows - 1)
                fi, fj = i - i0, j - j0
                upper = texels[j0, i0, 3] * (1 - fi) + texels[j0, i1, 3] * fi
                lower = texels[j1, i0, 3] * (1 - fi) + texels[j1, i1, 3] * fi
                if upper * (1 - fj) + lower * fj >= OPAQUE * 255:
                    depth[row, column] = z
                    face_id[row, column] = f


def _decal(
    layer: Layer, cameras: Camera, raster: Raster, depth: Tensor, skin: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which of the skin pixels (flat indices) the decal lies on, and its colour and opacity there [N, 4]."""
    vertices, faces = torch.from_numpy(layer.vertices).double(), torch.from_numpy(layer.faces)
    clip = to_clip(vertices, cameras.mvp.reshape(-1, 4, 4).double())
    height, width = raster.face_id.shape[1:]
    found = rasterize(clip, faces, (height, width), "numba")
    gap = (depth - _line_of_sight(vertices, cameras, found, faces)).flatten().numpy()[skin]
    face = found.face_id.flatten().numpy()[skin]
    over = np.flatnonzero((face >= 0) & (np.abs(gap) < DECAL))
    corners = found.barycentrics.reshape(-1, 3).numpy()[skin[over]]
    return over, layer.color(face[over], corners)
