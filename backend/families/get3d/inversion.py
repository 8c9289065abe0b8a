# SPDX-License-Identifier: GPL-3.0-or-later
"""From photos back to rows of w_geo and w_tex and to cameras, by descent through the renderer.

GET3D's authors name inversion and never published one; this is ours. It begins at the mean codes and at the camera
(of the authors' distribution) from which the mean shape's outline is most like the photo's, then Adam moves all rows
and the cameras together. The loss sees a square about the object at several sizes:

    colour      L1 of pictures and of their gradients (Mathieu et al. 2016), and a perceptual distance if one is given
    silhouette  L1 of the antialiased coverage: it moves outlines
    hull        outside of the photo's outline nothing may be inside, and every ray within it must meet the inside
                somewhere: unlike outlines it makes parts appear and vanish
    near_mean   pulls towards the mean codes, where shapes look like those of the training

How good it gets depends on how close a photo is to the pictures that the weights were trained on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from backend.families.base import PersonPhoto, Step, no_step
from backend.families.get3d.networks import Generator
from backend.families.get3d.surfaces import FOV_Y, RADIUS, Surfacer, c2w_of, projection, see
from backend.protocol import PopulaceError
from backend.render.camera import Camera

FRAME = 0.8  # of the square's side that the object's longer side fills, about as in training
POLAR = (math.radians(50), math.radians(100))  # from +Y; training has 60 to 90 degrees
AZIMUTHS = 12  # from which the mean shape is looked at for a beginning
LEVELS = 3  # of the pictures' pyramid
EMPTY = -1.0  # colour around the object, as in the training's pictures

Perceptual = Callable[[Float[Tensor, "N 3 S S"], Float[Tensor, "N 3 S S"]], Tensor]
"""Distance of pictures in -1..1."""


@dataclass(frozen=True)
class Rates:
    """How much each term counts, and how fast codes and cameras go."""

    color: float = 1.0
    perceptual: float = 1.0
    silhouette: float = 2.0
    hull: float = 0.5
    near_mean: float = 1e-3
    surface: float = 1.0  # of the training's own regularisers
    codes: float = 0.05
    camera: float = 0.02


@dataclass(frozen=True)
class Target:
    """A photo's square about the object."""

    rgb: Float[Tensor, "3 S S"]  # -1..1, EMPTY around the object
    mask: Float[Tensor, "1 S S"]  # coverage 0..1
    square: tuple[float, float, float]  # centre x, y and side of the square, pixels of the photo
    photo: tuple[int, int]  # width and height of the photo


@dataclass
class Cameras:
    """Of P photos: the authors' angles, and where the square lies in the camera's picture."""

    azimuth: Float[Tensor, " P"]
    polar_raw: Float[Tensor, " P"]  # a sigmoid keeps it within POLAR
    shift: Float[Tensor, "P 2"]  # of the picture in its square, in halves of its side, y up
    zoom: Float[Tensor, " P"]  # logarithm

    @property
    def polar(self) -> Float[Tensor, " P"]:
        return POLAR[0] + (POLAR[1] - POLAR[0]) * torch.sigmoid(self.polar_raw)

    def parameters(self) -> list[Tensor]:
        return [self.azimuth, self.polar_raw, self.shift, self.zoom]

    def mvp(self) -> Float[Tensor, "P 4 4"]:
        """The generator's cube to clip space of the squares."""
        device = self.azimuth.device
        matrix = Camera(c2w_of(self.azimuth, self.polar), projection(device).expand(len(self.azimuth), 4, 4)).mvp
        x, y, z, w = matrix.unbind(1)
        scale = self.zoom.exp()[:, None]
        return torch.stack([x * scale + self.shift[:, :1] * w, y * scale + self.shift[:, 1:] * w, z, w], 1)

    def of_photo(self, i: int, target: Target, metres: float) -> dict[str, object]:
        """c2w (rows; `metres` per unit of the cube), vertical field of view, size of the whole photo. The square is off
        the photo's centre, so the camera turns to where the photo's centre looks."""
        width, height = target.photo
        x, y, side = target.square
        zoom = math.exp(float(self.zoom[i]))
        focal = zoom * side / 2 / math.tan(FOV_Y / 2)  # pixels
        # where the origin of the cube is seen, pixels right of and below the photo's centre
        right = x + float(self.shift[i, 0]) * side / 2 - width / 2
        down = y - float(self.shift[i, 1]) * side / 2 - height / 2
        c2w = c2w_of(self.azimuth[i : i + 1], self.polar[i : i + 1], RADIUS * metres)[0].detach().double().cpu()
        c2w[:3, :3] = c2w[:3, :3] @ _turn(right / focal, -down / focal).T
        return {"c2w": c2w.tolist(), "fov_y_rad": 2 * math.atan(height / 2 / focal), "width": width, "height": height}


def _turn(x: float, y: float) -> Float[Tensor, "3 3"]:
    """The rotation that brings the axis of sight (0, 0, -1) to the direction (x, y, -1)."""
    a, b = torch.tensor([0.0, 0.0, -1.0], dtype=torch.float64), torch.tensor([x, y, -1.0], dtype=torch.float64)
    b = b / b.norm()
    axis = torch.linalg.cross(a, b)
    cross = torch.zeros(3, 3, dtype=torch.float64)
    cross[[2, 0, 1], [1, 2, 0]] = axis
    cross = cross - cross.T
    return torch.eye(3, dtype=torch.float64) + cross + cross @ cross / (1 + a @ b)


@dataclass(frozen=True)
class Fit:
    """What was found."""

    ws_geo: Float[Tensor, "L W"]
    ws_tex: Float[Tensor, "M W"]
    cameras: Cameras
    losses: list[float]
    scores: Mapping[str, float]  # of the first photo: mask_iou, psnr within the photo's outline (dB)
    begun: Mapping[str, float]  # the same at the beginning


def place(photo: PersonPhoto, size: int, device: torch.device) -> Target:
    """The square about the object in a photo, made `size` pixels. Raises `no_person_found` for an empty matte."""
    height, width = photo.rgba.shape[:2]
    left, top, right, bottom = photo.box
    if right <= left or bottom <= top or not photo.rgba[top:bottom, left:right, 3].any():
        raise PopulaceError("no_person_found", "The photo's mask is empty.", "Give a mask that shows the object.")
    side = max(right - left, bottom - top) / FRAME
    x, y = (left + right) / 2, (top + bottom) / 2
    image = torch.from_numpy(photo.rgba.copy()).to(device).permute(2, 0, 1).float() / 255
    image = torch.cat([image[:3] * image[3:], image[3:]])  # premultiplied, so that nothing bleeds in from around
    shrink = side / size
    if shrink > 1:  # first to about the size that is asked for, every pixel counted
        around = (max(1, round(height / shrink)), max(1, round(width / shrink)))
        image = functional.interpolate(image[None], around, mode="area")[0]
    line = (torch.arange(size, device=device) + 0.5) / size * 2 - 1
    v, u = torch.meshgrid(line, line, indexing="ij")
    at = torch.stack([2 * (x + u * side / 2) / width - 1, 2 * (y + v * side / 2) / height - 1], -1)[None]
    found = functional.grid_sample(image[None], at, align_corners=False)[0]
    mask = found[3:].clamp(0, 1)
    return Target(found[:3] * 2 - mask + EMPTY * (1 - mask), mask, (x, y, side), (width, height))


def fit(
    generator: Generator,
    photos: Sequence[PersonPhoto],
    steps: int = 200,
    seconds: float | None = None,
    size: int = 128,
    cells: int = 48,
    rates: Rates = Rates(),
    perceptual: Perceptual | None = None,
    step: Step = no_step,
) -> Fit:
    """Rows and cameras of the object in these photos. Ends early after `seconds`. The best that was met is kept."""
    device = generator.mapping.w_avg.device
    targets = [place(photo, size, device) for photo in photos]
    rgb, mask = torch.stack([t.rgb for t in targets]), torch.stack([t.mask for t in targets])
    surfacer = Surfacer(generator.config, cells, device)
    mean = [m.w_avg.expand(m.num_ws, -1) for m in (generator.mapping_geo, generator.mapping)]
    rows = [w.clone().requires_grad_(True) for w in mean]
    cameras = first_cameras(generator, surfacer, rgb, mask)
    for parameter in cameras.parameters():
        parameter.requires_grad_(True)

    def loss() -> tuple[Tensor, Mapping[str, float]]:
        decoded = generator.synthesis(rows[0][None], rows[1][None])
        shapes, mvp = surfacer(decoded), cameras.mvp()
        colors, covered = (x[0] for x in see(decoded, shapes, mvp[None], size))
        shown = colors * covered + EMPTY * (1 - covered)
        total = rates.color * _pyramid(shown, rgb) + rates.silhouette * (covered - mask).abs().mean()
        total = total + rates.hull * hull(surfacer, shapes.values[0], mvp, mask)
        total = total + rates.surface * shapes.regulariser()
        pulled = sum((w - m).square().mean() for w, m in zip(rows, mean))
        if perceptual is not None:
            total = total + rates.perceptual * perceptual(shown, rgb)
        return total + rates.near_mean * pulled, compare(shown[0], covered[0], rgb[0], mask[0])

    with torch.no_grad():
        value, begun = loss()
    losses, scores = [float(value)], begun
    best = [x.detach().clone() for x in (*rows, *cameras.parameters())]
    optimizer = torch.optim.Adam(
        [{"params": rows, "lr": rates.codes}, {"params": cameras.parameters(), "lr": rates.camera}], betas=(0.9, 0.99)
    )
    begin = time.monotonic()
    for i in range(steps):
        done = (i + 1) / steps
        if seconds is not None:
            done = max(done, (time.monotonic() - begin) / seconds)
        for group, rate in zip(optimizer.param_groups, (rates.codes, rates.camera)):
            group["lr"] = rate * min(1.0, (i + 1) / 10) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        optimizer.zero_grad()
        value, now = loss()
        losses.append(float(value.detach()))
        if losses[-1] <= min(losses):
            best, scores = [x.detach().clone() for x in (*rows, *cameras.parameters())], now
        value.backward()
        optimizer.step()
        step("fit", min(done, 1.0))
        if done >= 1:
            break
    return Fit(best[0], best[1], Cameras(*best[2:]), losses, scores, begun)


@torch.no_grad()
def first_cameras(
    generator: Generator, surfacer: Surfacer, pictures: Float[Tensor, "P 3 S S"], masks: Float[Tensor, "P 1 S S"]
) -> Cameras:
    """For each photo the camera, among AZIMUTHS around, from which the mean shape is most like it once their outlines'
    boxes are laid over each other."""
    device, size = masks.device, masks.shape[-1]
    mappings = (generator.mapping_geo, generator.mapping)
    decoded = generator.synthesis(*(m.w_avg.expand(1, m.num_ws, -1) for m in mappings))
    shapes = surfacer(decoded)
    azimuth = torch.arange(AZIMUTHS, device=device) * (2 * math.pi / AZIMUTHS)
    zero = torch.zeros(AZIMUTHS, device=device)
    around = Cameras(azimuth, zero, torch.zeros(AZIMUTHS, 2, device=device), zero)
    boxes = torch.stack([_box(mask) for mask in see(decoded, shapes, around.mvp()[None], size)[1][0]])
    chosen = []
    for picture, mask in zip(pictures, masks, strict=True):
        wanted = _box(mask)
        zoom = ((wanted[2:] - wanted[:2]).amax() / (boxes[:, 2:] - boxes[:, :2]).amax(1).clamp(min=2 / size)).log()
        shift = (wanted[:2] + wanted[2:]) / 2 - (boxes[:, :2] + boxes[:, 2:]) / 2 * zoom.exp()[:, None]
        laid = Cameras(azimuth, zero, shift, zoom)
        colors, covered = (x[0] for x in see(decoded, shapes, laid.mvp()[None], size))
        shown = colors * covered + EMPTY * (1 - covered)
        best = int((_iou(covered, mask) - (shown - picture).abs().mean((1, 2, 3))).argmax())
        chosen.append([x[best] for x in laid.parameters()])
    return Cameras(*(torch.stack(x).clone() for x in zip(*chosen, strict=True)))


def _box(mask: Float[Tensor, "1 S S"]) -> Float[Tensor, " 4"]:
    """Left, bottom, right, top in halves of the side, y up; the whole square if nothing is there."""
    size = mask.shape[-1]
    rows, columns = (mask[0] > 0.5).nonzero(as_tuple=True)
    if not len(rows):
        return mask.new_tensor([-1.0, -1.0, 1.0, 1.0])
    edges = torch.stack([columns.min(), size - 1 - rows.max(), columns.max() + 1, size - rows.min()])
    return edges.to(mask.dtype) * (2 / size) - 1


def _iou(a: Float[Tensor, "N 1 S S"], b: Float[Tensor, "1 S S"]) -> Float[Tensor, " N"]:
    both, either = torch.minimum(a, b).sum((1, 2, 3)), torch.maximum(a, b).sum((1, 2, 3))
    return both / either.clamp(min=1)


def compare(shown: Tensor, covered: Tensor, rgb: Tensor, mask: Tensor) -> dict[str, float]:
    """Intersection over union of the outlines, and PSNR (dB) of the pictures within the photo's outline, both 0..1."""
    with torch.no_grad():
        error = ((shown.clamp(-1, 1) - rgb).square() / 4 * mask).sum() / (3 * mask.sum().clamp(min=1))
        iou = float(_iou(covered[None], mask))
        return {"mask_iou": iou, "psnr": float(-10 * error.clamp(min=1e-10).log10())}


def _pyramid(a: Float[Tensor, "N 3 S S"], b: Float[Tensor, "N 3 S S"]) -> Tensor:
    """Mean over the levels of L1 and of L1 between differences of neighbours."""
    total = a.new_zeros(())
    for level in range(LEVELS):
        if level:
            a, b = functional.avg_pool2d(a, 2), functional.avg_pool2d(b, 2)
        total = total + (a - b).abs().mean()
        for axis in (2, 3):
            total = total + (a.diff(dim=axis) - b.diff(dim=axis)).abs().mean()
    return total / LEVELS


def hull(
    surfacer: Surfacer, sdf: Float[Tensor, " N"], mvp: Float[Tensor, "P 4 4"], masks: Float[Tensor, "P 1 S S"]
) -> Tensor:
    """Values are judged at the lattice's nodes, in units of their own mean size: a node inside that is seen beside the
    outline, and a pixel (about as large as a cell) of the outline behind which no node is inside."""
    scale = sdf.detach().abs().mean().clamp(min=1e-6)
    values = sdf / scale
    total = sdf.new_zeros(())
    bins = max(8, surfacer.cells // 2)
    for matrix, mask in zip(mvp.detach(), masks, strict=True):
        small = functional.adaptive_avg_pool2d(mask, bins)[0]
        clip = surfacer.grid.vertices @ matrix[:, :3].T + matrix[:, 3]
        ndc = clip[:, :2] / clip[:, 3:].clamp(min=1e-3)
        column = ((ndc[:, 0] + 1) / 2 * bins).floor().long()
        row = ((1 - ndc[:, 1]) / 2 * bins).floor().long()
        within = (column >= 0) & (column < bins) & (row >= 0) & (row < bins)
        pixel = (row * bins + column)[within]
        beside = 1 - functional.max_pool2d(small[None, None], 3, 1, 1)[0, 0].flatten()  # a cell of grace
        outside = torch.ones_like(sdf).index_put((within.nonzero()[:, 0],), beside[pixel])
        total = total + (values.clamp(min=0) * outside).mean() * 10
        most = values.new_full((bins * bins,), -4.0).scatter_reduce(0, pixel, values[within], "amax")
        total = total + ((0.1 - most).clamp(min=0) * (small.flatten() > 0.9)).mean()
    return total / len(masks)
