# SPDX-License-Identifier: GPL-3.0-or-later
"""Volume rendering of people composed of parts, with gradients (SemanticHuman-HD, Zheng et al. 2024, sec. 3).

Every part k answers with its own signed distance s_k and colour c_k; densities are added, not distances:

    sigma_k = sigmoid(-s_k / beta) / beta      sigma = sum_k sigma_k      c = sum_k (sigma_k / sigma) c_k

The integral of sigma_k over a stretch where s_k changes linearly from a to b has a closed form, so a stretch between
two samples is integrated exactly for linear distances instead of by its middle:

    integral sigma_k dt = (softplus(-a / beta) - softplus(-b / beta)) / (b - a) * dt

A flat surface seen straight on lets through T = sigmoid(s / beta): one half at s = 0, and the mean depth is that of
the surface whatever beta is.

`render_uniform` asks every part at evenly spaced samples. `render_guided` is the 3D-aware super-resolution: depth and
labels of a small picture say where on a ray of the large one the surface can be and which parts are worth asking, 11
samples of mostly one part instead of 72 samples of six.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from .camera import Camera

GUIDED_SAMPLES = 11
SUBSTEPS = {16: 8, 64: 3}  # of a stretch, up to so many samples: distances are interpolated there, not asked for
FAINT = 1 / 512  # a share of a pixel's colour below which a part is not asked for its colour
AWAY = 1.0  # metres: the distance of a part that is not asked


class Scene(Protocol):
    """Parts in one space; `bounds` [2, 3] holds all surfaces. Differentiable with respect to points and parameters."""

    parts: tuple[str, ...]
    bounds: Float[Tensor, "2 3"]

    def distances(self, points: Float[Tensor, "N 3"], asked: Bool[Tensor, "N K"] | None = None) -> Float[Tensor, "N K"]:
        """Signed distance to every part, metres, negative inside. Where `asked` is False anything far is right."""
        ...

    def color(self, part: int, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        """sRGB colour of one part in 0..1."""
        ...


@dataclass(frozen=True)
class Rays:
    """Rays of any number of pixels. Where `far <= near` the ray misses the scene."""

    origin: Float[Tensor, "N 3"]
    direction: Float[Tensor, "N 3"]  # unit
    near: Float[Tensor, " N"]  # metres along the ray
    far: Float[Tensor, " N"]

    def at(self, t: Float[Tensor, "N S"]) -> Float[Tensor, "N S 3"]:
        return self.origin[:, None] + t[..., None] * self.direction[:, None]

    def of(self, index: Tensor) -> Rays:
        """Some of the rays."""
        return Rays(self.origin[index], self.direction[index], self.near[index], self.far[index])

    @property
    def hit(self) -> Bool[Tensor, " N"]:
        return self.far > self.near


@dataclass(frozen=True)
class Rendered:
    """What the rays saw. Nothing is composited onto a background: `rgb + (1 - mask) * background` is a picture."""

    rgb: Float[Tensor, "N 3"]  # premultiplied by the mask
    mask: Float[Tensor, " N"]  # opacity 0..1
    depth: Float[Tensor, " N"]  # metres along the ray to the mean of what is seen; 0 where nothing is
    label: Float[Tensor, "N K"]  # how much of the pixel each part fills; sums to the mask
    normal: Float[Tensor, "N 3"] | None  # unit, in the scene's space; 0 where nothing is seen
    asked: int  # evaluations of local generators for distances: points x parts
    rays: int  # that were marched at all


def camera_rays(camera: Camera, size: tuple[int, int], bounds: Float[Tensor, "2 3"]) -> Rays:
    """Rays through the pixel centres of one camera's picture of (height, width), row by row, cut to the box."""
    height, width = size
    inverse = torch.linalg.inv(camera.mvp.detach().double().cpu())
    y, x = torch.meshgrid(torch.arange(height).double() + 0.5, torch.arange(width).double() + 0.5, indexing="ij")
    flat = torch.stack([x / width * 2 - 1, 1 - y / height * 2], -1).reshape(-1, 2)
    ends = []
    for z in (-1.0, 1.0):
        homogeneous = torch.cat([flat, torch.full((len(flat), 1), z).double(), torch.ones(len(flat), 1).double()], 1)
        point = homogeneous @ inverse.T
        ends.append(point[:, :3] / point[:, 3:])
    direction = functional.normalize(ends[1] - ends[0], dim=1)
    origin, length = ends[0], (ends[1] - ends[0]).norm(dim=1)
    low, high = bounds.detach().double().cpu()
    slope = torch.where(direction.abs() < 1e-12, 1e-12, direction)
    a, b = (low - origin) / slope, (high - origin) / slope
    near = torch.minimum(a, b).amax(1).clamp(min=0)
    far = torch.minimum(torch.maximum(a, b).amin(1), length)
    return Rays(origin.to(bounds), direction.to(bounds), near.to(bounds), far.to(bounds))


def mean_sigmoid(a: Tensor, b: Tensor) -> Tensor:
    """Mean of sigmoid over [a, b], in either order: (softplus(a) - softplus(b)) / (a - b), precise for a near b too."""
    high, gap = torch.maximum(a, b), (a - b).abs()
    small = gap < 1
    safe = torch.where(small, 1.0, gap)
    wide = (functional.softplus(high) - functional.softplus(high - safe)) / safe
    tiny = gap < 1e-3
    close = torch.where(small & ~tiny, gap, 0.5)
    narrow = -torch.log1p(torch.sigmoid(high) * torch.expm1(-close)) / close
    middle = torch.sigmoid((a + b) / 2)
    return torch.where(tiny, middle, torch.where(small, narrow, wide))


def optical_depths(t: Float[Tensor, "N S"], s: Float[Tensor, "N S K"], beta: float) -> Float[Tensor, "N S-1 K"]:
    """Integral of each part's density over every stretch, exact where its distance is linear."""
    x = -s / beta
    return mean_sigmoid(x[:, :-1], x[:, 1:]) * (t.diff(dim=1) / beta)[..., None]


def subdivide(
    t: Float[Tensor, "N S"], s: Float[Tensor, "N S K"], steps: int
) -> tuple[Float[Tensor, "N T"], Float[Tensor, "N T K"]]:
    """Samples and distances with every stretch cut in `steps`; T = (S - 1) * steps + 1. Between samples runs the cubic
    with the slopes of the parabola through three neighbours, no steeper than a distance can be: exact for parabolas,
    which distances are along rays that graze an outline."""
    if steps == 1:
        return t, s
    dt = t.diff(dim=1)[..., None]
    secant = s.diff(dim=1) / dt.clamp(min=1e-4)
    before, behind = dt[:, :-1], dt[:, 1:]
    inner = (behind * secant[:, :-1] + before * secant[:, 1:]) / (before + behind).clamp(min=1e-8)
    first, last = 2 * secant[:, :1] - inner[:, :1], 2 * secant[:, -1:] - inner[:, -1:]
    slope = torch.cat([first, inner, last], 1).clamp(-1, 1)
    u = (torch.arange(steps, dtype=t.dtype, device=t.device) / steps).view(1, 1, -1, 1)
    a, b = s[:, :-1, None], s[:, 1:, None]
    da, db = (slope[:, :-1] * dt)[:, :, None], (slope[:, 1:] * dt)[:, :, None]
    curve = a + u * (da + u * (3 * (b - a) - 2 * da - db + u * (2 * (a - b) + da + db)))
    fine_t = t[:, :-1, None] + dt * u[:, :, :, 0]
    return torch.cat([fine_t.flatten(1), t[:, -1:]], 1), torch.cat([curve.flatten(1, 2), s[:, -1:]], 1)


def extrapolate(
    t: Float[Tensor, "N S"], s: Float[Tensor, "N S K"], reach: float
) -> tuple[Float[Tensor, "N S+2"], Float[Tensor, "N S+2 K"]]:
    """A sample `reach` metres before and one behind the others: the guide saw no other surface there, so what is
    outside gets farther outside and what is inside deeper inside, as steeply as it came. A ray whose first sample is
    inside came in by the same slope."""
    slope = (s.diff(dim=1) / t.diff(dim=1).clamp(min=1e-4)[..., None]).clamp(-1, 1)
    first, last, steep, end = s[:, 0], s[:, -1], slope[:, 0], slope[:, -1].abs()
    first = first + reach * torch.where(first > 0, steep.abs(), -steep)
    last = last + reach * torch.where(last > 0, end, -end)
    ts = torch.cat([t[:, :1] - reach, t, t[:, -1:] + reach], 1)
    return ts, torch.cat([first[:, None], s, last[:, None]], 1)


def march(t: Float[Tensor, "N S"], s: Float[Tensor, "N S K"], beta: float) -> Float[Tensor, "N S-1 K"]:
    """How much of the pixel each part fills in each stretch: T_j (1 - exp(-I_j)) I_jk / I_j."""
    depths = optical_depths(t, s, beta)
    total = depths.sum(-1)
    before = torch.exp(-(total.cumsum(1) - total))
    # (1 - exp(-I)) / I without its hole at 0
    filled = -torch.expm1(-total) / total.clamp(min=1e-12)
    filled = torch.where(total < 1e-6, 1 - total / 2, filled)
    return (before * filled)[..., None] * depths


def render_uniform(
    scene: Scene,
    rays: Rays,
    samples: int,
    beta: float,
    normals: bool = False,
    colors: bool = True,
    chunk: int = 1 << 18,
) -> Rendered:
    """Every part at `samples` evenly spaced points of every ray that meets the box; without `colors` rgb is 0."""
    fraction = torch.linspace(0, 1, samples, dtype=rays.near.dtype, device=rays.near.device)
    index = rays.hit.nonzero().squeeze(1)
    pieces = []
    for part in index.split(max(1, chunk // samples)):
        some = rays.of(part)
        t = some.near[:, None] + (some.far - some.near)[:, None] * fraction
        pieces.append(_render(scene, some, t, None, beta, 0.0, normals, colors))
    return _spread(pieces, index, len(rays.near), scene, rays, normals)


def render_guided(
    scene: Scene,
    rays: Rays,
    guide: Guide,
    beta: float,
    normals: bool = False,
    chunk: int = 1 << 18,
) -> Rendered:
    """At most 11 samples per ray, only where the small picture saw something near, only of the parts it saw there."""
    index = (rays.hit & guide.seen).nonzero().squeeze(1)
    pieces = []
    for part in index.split(max(1, chunk // GUIDED_SAMPLES)):
        some = rays.of(part)
        pieces.append(_render(scene, some, guide.samples[part], guide.asked[part], beta, guide.reach, normals))
    return _spread(pieces, index, len(rays.near), scene, rays, normals)


@dataclass(frozen=True)
class Guide:
    """Where the rays of a large picture have to look, told by a small one."""

    samples: Float[Tensor, "N 11"]  # metres along the ray, ascending
    asked: Bool[Tensor, "N K"]  # parts that the small picture saw here or beside
    seen: Bool[Tensor, " N"]  # whether the small picture saw anything here or beside
    reach: float  # metres that the outer samples lie before and behind the depth of the small picture


@torch.no_grad()
def guide_from(
    low: Rendered, low_size: tuple[int, int], size: tuple[int, int], reach: float, faint: float = FAINT
) -> Guide:
    """Depth aggregation and semantic guidance. A pixel looks at the depths of the 3 x 3 small pixels around it. Where
    they are one surface, its 11 samples are spread evenly from the nearest less `reach` metres to the farthest and as
    much more (twice more at an outline, where the surface curves away). Where they are two, 6 samples go to the nearer
    and 5 to the farther one. `reach` is the larger of a stretch of the coarse march and the width of a small pixel.
    Distances along neighbouring rays are taken to be comparable: true for cameras a few metres off."""
    (h, w), (height, width) = low_size, size
    parts = low.label.shape[1]
    seen = (low.mask > faint).reshape(1, 1, h, w)
    label = (low.label > faint).T.reshape(1, parts, h, w).to(low.depth)

    def around(x: Tensor) -> Tensor:
        """The nine pixels around each, border pixels repeated: [h * w, 9]."""
        return functional.unfold(functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3)[0].T

    depth, valid = around(low.depth.reshape(1, 1, h, w)), around(seen.to(low.depth)) > 0.5
    asked = functional.max_pool2d(functional.pad(label, (1, 1, 1, 1), mode="replicate"), 3, stride=1)[0].flatten(1).T
    first = torch.where(valid, depth, math.inf).amin(1, keepdim=True)
    near = valid & (depth < first + 4 * reach)
    first_end = torch.where(near, depth, -math.inf).amax(1, keepdim=True)
    second = torch.where(valid & ~near, depth, math.inf).amin(1, keepdim=True)
    second_end = torch.where(valid & ~near, depth, -math.inf).amax(1, keepdim=True)
    first_end = first_end + reach * torch.where(near.all(1, keepdim=True), 1, 3)
    second_end = second_end + reach * torch.where(valid.all(1, keepdim=True), 1, 3)

    def ladder(low_end: Tensor, high_end: Tensor, count: int) -> Tensor:
        return low_end + (high_end - low_end) * torch.linspace(0, 1, count, dtype=depth.dtype, device=depth.device)

    one = ladder(first - reach, first_end, GUIDED_SAMPLES)
    many = GUIDED_SAMPLES // 2
    two = torch.cat(
        [ladder(first - reach, first_end, GUIDED_SAMPLES - many), ladder(second - reach, second_end, many)], 1
    )
    samples = torch.where(torch.isfinite(second), two, one).sort(1).values
    samples = torch.where(valid.any(1, keepdim=True), samples, 0.0)
    rows = (torch.arange(height, device=depth.device) * h) // height
    columns = (torch.arange(width, device=depth.device) * w) // width
    at = (rows[:, None] * w + columns).flatten()
    return Guide(samples[at], asked[at] > 0.5, valid.any(1)[at], reach)


def _render(
    scene: Scene,
    rays: Rays,
    t: Tensor,
    asked: Tensor | None,
    beta: float,
    reach: float,
    normals: bool,
    colors: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, int]:
    n, samples = t.shape
    parts = len(scene.parts)
    points = rays.at(t).reshape(-1, 3)
    per_point = None if asked is None else asked[:, None].expand(n, samples, parts).reshape(-1, parts)
    s = scene.distances(points, per_point).reshape(n, samples, parts)
    if reach:
        t, s = extrapolate(t, s, reach)
    stretches = t.shape[1] - 1
    steps = next((n for most, n in SUBSTEPS.items() if samples <= most), 1)
    fine_t, fine_s = subdivide(t, s, steps)
    weights = march(fine_t, fine_s, beta)
    middle = (fine_t[:, 1:] + fine_t[:, :-1]) / 2
    label = weights.sum(1)
    mask = label.sum(1)
    depth = (weights.sum(-1) * middle).sum(1) / mask.clamp(min=1e-6)
    # colours are asked for once per stretch and part, at the mean of what is seen there
    stretch = weights.reshape(n, stretches, steps, parts)
    share = stretch.sum(2)
    where = (stretch * middle.reshape(n, stretches, steps, 1)).sum(2) / share.clamp(min=1e-12)
    rgb = t.new_zeros(n, 3)
    for k in range(parts if colors else 0):
        found = share[:, :, k]
        kept = (found > torch.clamp(0.1 * found.amax(1, keepdim=True), min=1e-6)) & (label[:, k : k + 1] > FAINT)
        found = found * (label[:, k] / (found * kept).sum(1).clamp(min=1e-12))[:, None]  # the rest has their colour
        ray, j = kept.detach().nonzero().unbind(1)
        if len(ray):
            p = rays.origin[ray] + where[ray, j, k].detach()[:, None] * rays.direction[ray]
            rgb = rgb.index_add(0, ray, scene.color(k, p).to(rgb.dtype) * found[ray, j][:, None])
    normal = _normals(scene, rays, depth, mask, asked, beta) if normals else None
    count = points.shape[0] * parts if per_point is None else int(per_point.sum())
    return rgb, mask, depth, label, normal, count


def _normals(
    scene: Scene, rays: Rays, depth: Tensor, mask: Tensor, asked: Tensor | None, beta: float, step: float = 0.002
) -> Float[Tensor, "N 3"]:
    """Gradient of the soft union -beta log sum exp(-s_k / beta) at the mean depth, from the four corners of a
    tetrahedron: differentiable without second derivatives of the samplers. No gradient reaches the depth."""
    at = rays.origin + depth.detach()[:, None] * rays.direction
    corners = at.new_tensor([[1, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]])
    points = (at[:, None] + step * corners).reshape(-1, 3)
    per_point = None if asked is None else asked.repeat_interleave(4, 0)
    union = -beta * torch.logsumexp(-scene.distances(points, per_point) / beta, 1)
    normal = functional.normalize((union.reshape(-1, 4, 1) * corners).sum(1), dim=1, eps=1e-8)
    return normal * (mask > FAINT)[:, None]


def _spread(pieces: Sequence[tuple], index: Tensor, count: int, scene: Scene, rays: Rays, normals: bool) -> Rendered:
    """Results of the marched rays put in their places among all rays."""
    new, parts = rays.near.new_zeros, len(scene.parts)
    empty = [new(count, 3), new(count), new(count), new(count, parts), new(count, 3) if normals else None]
    if pieces:
        columns = [torch.cat(c) if c[0] is not None else None for c in list(zip(*pieces, strict=True))[:5]]
        empty = [e if c is None else e.index_copy(0, index, c.to(e)) for e, c in zip(empty, columns, strict=True)]
    rgb, mask, depth, label, normal = empty
    return Rendered(rgb, mask, depth, label, normal, sum(p[5] for p in pieces), len(index))
