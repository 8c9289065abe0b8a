# SPDX-License-Identifier: GPL-3.0-or-later
"""Which face does each pixel centre see: the portable half of `rasterize`, twice.

Both ways take the same steps with the same arithmetic (float64 in the same order, integers for coverage), so they
agree bit for bit:

1. faces outside the frustum go; faces that cross the near plane or leave the guard band are clipped;
2. corners are snapped to 1/SUBPIXEL pixel; depth becomes a plane over the screen, kept within the corners' depths;
3. a pixel centre belongs to a triangle if its three integer edge functions say so, with the top-left rule for centres
   exactly on an edge; the nearest triangle wins, of equally near ones that with the lowest face index.

`visible_numba` does so face by face on the CPU, in bands of rows on two threads. `visible_torch` holds all candidate
pairs of triangle and pixel at once: slow on a CPU, where it is the reference, and fit for CUDA.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

SUBPIXEL = 256
HALF = SUBPIXEL // 2
GUARD = 64.0  # faces are clipped at |x|, |y| = GUARD * w: snapped coordinates and their products stay within int64
BANDS = 8  # bands of rows per image that the threads share out
FRAGMENTS = 1 << 21  # candidate pairs that the torch way holds at once


class Screen(NamedTuple):
    """Triangles on the snapped grid, with positive area (x right, y down), T of them or rows of numpy arrays."""

    corners: Int[Tensor, "T 3 2"]  # x, y in 1/SUBPIXEL pixel
    plane: Float[Tensor, "T 5"]  # z / w = p0 * column + p1 * row + p2 at pixel centres, kept within p3..p4; float64
    face: Int[Tensor, " T"]


def visible_torch(
    clip: Float[Tensor, "V 4"], faces: Int[Tensor, "F 3"], resolution: tuple[int, int]
) -> Int[Tensor, "H W"]:
    """Index of the visible face of every pixel, -1 for none. `clip` is float64, any device."""
    height, width = resolution
    corners, plane, face = _screen_torch(clip, faces, resolution)
    first = torch.clamp((corners.amin(dim=1) + HALF - 1) // SUBPIXEL, min=0)
    last = torch.minimum((corners.amax(dim=1) - HALF) // SUBPIXEL, corners.new_tensor([width - 1, height - 1]))
    extent = torch.clamp(last - first + 1, min=0)
    count = extent.prod(dim=1)
    ends = torch.cumsum(count, dim=0)
    nobody = torch.iinfo(torch.int64).max
    depth = plane.new_full((height * width,), torch.inf)
    face_id = face.new_full((height * width,), nobody)
    begin, done = 0, 0
    while begin < len(count):
        end = max(int(torch.searchsorted(ends, done + FRAGMENTS, right=True)), begin + 1)
        t = torch.repeat_interleave(torch.arange(begin, end, device=face.device), count[begin:end])
        index = torch.arange(len(t), device=face.device) + done - (ends - count)[t]
        column, row = first[t, 0] + index % extent[t, 0], first[t, 1] + index // extent[t, 0]
        covered = torch.ones_like(t, dtype=torch.bool)
        for i in range(3):
            (sx, sy), (ex, ey) = corners[:, (i + 1) % 3].unbind(-1), corners[:, (i + 2) % 3].unbind(-1)
            dx, dy = ex - sx, ey - sy
            owns = (dy < 0) | ((dy == 0) & (dx > 0))
            edge = dx[t] * (row * SUBPIXEL + HALF - sy[t]) - dy[t] * (column * SUBPIXEL + HALF - sx[t])
            covered &= (edge > 0) | ((edge == 0) & owns[t])
        p0, p1, p2, low, high = plane[t].unbind(-1)
        z = torch.minimum(torch.maximum(p0 * column + p1 * row + p2, low), high)
        covered &= z <= 1
        pixel, z, found = (row * width + column)[covered], z[covered], face[t[covered]]
        nearest = depth.scatter_reduce(0, pixel, z, "amin")
        face_id[nearest < depth] = nobody
        front = z == nearest[pixel]
        face_id = face_id.scatter_reduce(0, pixel[front], found[front], "amin")
        depth, begin, done = nearest, end, int(ends[end - 1])
    return torch.where(face_id == nobody, -1, face_id).view(height, width)


def visible_numba(
    clip: Float[Tensor, "V 4"], faces: Int[Tensor, "F 3"], resolution: tuple[int, int]
) -> Int[Tensor, "H W"]:
    """The same on the CPU, compiled."""
    height, width = resolution
    points, corners = clip.numpy(), faces.numpy()
    screen, crossing = _screen_scan(points, corners, np.arange(len(faces)), True, height, width)
    screens = [screen]
    if len(crossing):
        triangles, source = clip_faces(clip, faces, torch.from_numpy(crossing))
        soup = torch.arange(3 * len(triangles)).view(-1, 3).numpy()
        screens.append(_screen_scan(triangles.view(-1, 4).numpy(), soup, source.numpy(), False, height, width)[0])
    face_id = np.full((height, width), -1, dtype=np.int64)
    depth = np.full((height, width), np.inf)
    rows = np.linspace(0, height, BANDS + 1).astype(np.int64)

    def fill(band: int) -> None:
        for screen in screens:
            _scan(*screen, rows[band], rows[band + 1], depth, face_id)

    # Threads of our own and kernels without the GIL: numba's parallel loops must not be entered from two threads.
    list(_threads().map(fill, range(BANDS)))
    return torch.from_numpy(face_id)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2, thread_name_prefix="rasterize")


def clip_faces(
    clip: Float[Tensor, "V 4"], faces: Int[Tensor, "F 3"], which: Int[Tensor, " N"]
) -> tuple[Float[Tensor, "T 3 4"], Int[Tensor, " T"]]:
    """Sutherland-Hodgman in homogeneous space for the few faces that need it, and the face that each piece is of.
    A new corner is computed from the inner to the outer end of its edge, whichever face asks, so that neighbours get
    the same corner and stay closed. Faces with a corner that is not finite have no pieces."""
    planes = np.array([[0, 0, 1, 1], [-1, 0, 0, GUARD], [1, 0, 0, GUARD], [0, -1, 0, GUARD], [0, 1, 0, GUARD]])
    triangles, sources = [], []
    for polygon, source in zip(clip[faces[which]].cpu().numpy(), which.tolist()):
        points = list(polygon) if np.isfinite(polygon).all() else []
        for plane in planes:
            distances = [float(plane @ point) for point in points]
            kept = []
            for i, (point, distance) in enumerate(zip(points, distances)):
                if (distance >= 0) != (distances[i - 1] >= 0):
                    ends = [(point, distance), (points[i - 1], distances[i - 1])]
                    (inner, d_inner), (outer, d_outer) = ends if distance >= 0 else ends[::-1]
                    kept.append(inner + (outer - inner) * (d_inner / (d_inner - d_outer)))
                if distance >= 0:
                    kept.append(point)
            points = kept
        for i in range(1, len(points) - 1):
            triangles.append(np.stack([points[0], points[i], points[i + 1]]))
            sources.append(source)
    found = torch.from_numpy(np.array(triangles, dtype=np.float64).reshape(-1, 3, 4)).to(clip.device)
    return found, torch.tensor(sources, dtype=torch.long, device=clip.device)


def _screen_torch(clip: Float[Tensor, "V 4"], faces: Int[Tensor, "F 3"], resolution: tuple[int, int]) -> Screen:
    height, width = resolution
    x, y, z, w = clip.unbind(-1)
    inside = torch.stack([z + w, GUARD * w - x, GUARD * w + x, GUARD * w - y, GUARD * w + y], dim=-1) >= 0
    outside = ~(inside & torch.isfinite(clip).all(dim=-1, keepdim=True))[faces]  # [F, corner, plane]
    beyond = torch.stack([z > w, x > w, x < -w, y > w, y < -w], dim=-1)[faces]
    hidden = outside.all(dim=1).any(dim=-1) | beyond.all(dim=1).any(dim=-1)
    crossing = outside.flatten(1).any(dim=-1) & ~hidden
    source = torch.nonzero(~crossing & ~hidden).squeeze(-1)
    cut, cut_source = clip_faces(clip, faces, torch.nonzero(crossing).squeeze(-1))
    triangles, source = torch.cat([clip[faces[source]], cut]), torch.cat([source, cut_source])

    px = (triangles[..., 0] / triangles[..., 3] * 0.5 + 0.5) * width
    py = (triangles[..., 1] / triangles[..., 3] * -0.5 + 0.5) * height
    pz = triangles[..., 2] / triangles[..., 3]
    corners = torch.floor(torch.stack([px, py], dim=-1) * SUBPIXEL + 0.5).long()
    (ax, ay), (bx, by), (cx, cy) = (corner.unbind(-1) for corner in corners.unbind(1))
    area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
    corners = torch.where((area < 0)[:, None, None], corners[:, [0, 2, 1]], corners)

    # depth as a plane over the screen, from the unsnapped corners
    (ax, bx, cx), (ay, by, cy), (az, bz, cz) = px.unbind(-1), py.unbind(-1), pz.unbind(-1)
    denominator = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
    p0 = ((bz - az) * (cy - ay) - (cz - az) * (by - ay)) / denominator
    p1 = ((cz - az) * (bx - ax) - (bz - az) * (cx - ax)) / denominator
    p2 = az + p0 * (0.5 - ax) + p1 * (0.5 - ay)
    plane = torch.stack([p0, p1, p2, pz.amin(dim=-1), pz.amax(dim=-1)], dim=-1)
    # An edge-on face can gain area by snapping though it has no depth plane: it is not seen.
    keep = (area != 0) & torch.isfinite(plane).all(dim=-1)
    return Screen(corners[keep], plane[keep], source[keep])


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _screen_scan(clip, faces, source, check, height, width):  # pragma: no cover (compiled)
    """`_screen_torch` for faces [F, 3] whose indices in the mesh are `source` [F]: a Screen of arrays, and the sources
    of faces that have to be clipped first. With `check` off nothing is: the faces are such pieces."""
    corners = np.empty((len(faces), 3, 2), np.int64)
    plane = np.empty((len(faces), 5), np.float64)
    face = np.empty(len(faces), np.int64)
    crossing = np.empty(len(faces), np.int64)
    out = np.empty(10, np.int64)  # corners outside of each plane: five to clip at, five more of the frustum
    n, crossings = 0, 0
    for f in range(len(faces)):
        if check:
            out[:] = 0
            for k in range(3):
                x, y, z, w = clip[faces[f, k]]
                finite = np.isfinite(x) and np.isfinite(y) and np.isfinite(z) and np.isfinite(w)
                out[0] += not (finite and z + w >= 0)
                out[1] += not (finite and GUARD * w - x >= 0)
                out[2] += not (finite and GUARD * w + x >= 0)
                out[3] += not (finite and GUARD * w - y >= 0)
                out[4] += not (finite and GUARD * w + y >= 0)
                out[5] += z > w
                out[6] += x > w
                out[7] += x < -w
                out[8] += y > w
                out[9] += y < -w
            if out.max() == 3:
                continue
            if out[:5].max() > 0:
                crossing[crossings] = source[f]
                crossings += 1
                continue
        a, b, c = clip[faces[f, 0]], clip[faces[f, 1]], clip[faces[f, 2]]
        ax, ay, az = (a[0] / a[3] * 0.5 + 0.5) * width, (a[1] / a[3] * -0.5 + 0.5) * height, a[2] / a[3]
        bx, by, bz = (b[0] / b[3] * 0.5 + 0.5) * width, (b[1] / b[3] * -0.5 + 0.5) * height, b[2] / b[3]
        cx, cy, cz = (c[0] / c[3] * 0.5 + 0.5) * width, (c[1] / c[3] * -0.5 + 0.5) * height, c[2] / c[3]
        denominator = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        p0 = ((bz - az) * (cy - ay) - (cz - az) * (by - ay)) / denominator
        p1 = ((cz - az) * (bx - ax) - (bz - az) * (cx - ax)) / denominator
        p2 = az + p0 * (0.5 - ax) + p1 * (0.5 - ay)
        if not (np.isfinite(p0) and np.isfinite(p1) and np.isfinite(p2)):
            continue
        iax, iay = np.int64(np.floor(ax * SUBPIXEL + 0.5)), np.int64(np.floor(ay * SUBPIXEL + 0.5))
        ibx, iby = np.int64(np.floor(bx * SUBPIXEL + 0.5)), np.int64(np.floor(by * SUBPIXEL + 0.5))
        icx, icy = np.int64(np.floor(cx * SUBPIXEL + 0.5)), np.int64(np.floor(cy * SUBPIXEL + 0.5))
        area = (ibx - iax) * (icy - iay) - (iby - iay) * (icx - iax)
        if area == 0:
            continue
        if area < 0:
            ibx, iby, icx, icy = icx, icy, ibx, iby
        corners[n, 0, 0], corners[n, 0, 1] = iax, iay
        corners[n, 1, 0], corners[n, 1, 1] = ibx, iby
        corners[n, 2, 0], corners[n, 2, 1] = icx, icy
        plane[n, 0], plane[n, 1], plane[n, 2] = p0, p1, p2
        plane[n, 3], plane[n, 4] = min(az, bz, cz), max(az, bz, cz)
        face[n] = source[f]
        n += 1
    return (corners[:n], plane[:n], face[:n]), crossing[:crossings]


@numba.njit(nogil=True, cache=True)
def _scan(corners, plane, face, row_begin, row_end, depth, face_id):  # pragma: no cover (compiled)
    """Draw triangles into rows row_begin..row_end - 1 of one image."""
    width = face_id.shape[1]
    for t in range(len(face)):
        ax, ay = corners[t, 0, 0], corners[t, 0, 1]
        bx, by = corners[t, 1, 0], corners[t, 1, 1]
        cx, cy = corners[t, 2, 0], corners[t, 2, 1]
        # pixel centres lie at SUBPIXEL * i + HALF: the first and last ones inside the bounding box
        top = max((min(ay, by, cy) + HALF - 1) // SUBPIXEL, row_begin)
        bottom = min((max(ay, by, cy) - HALF) // SUBPIXEL, row_end - 1)
        left = max((min(ax, bx, cx) + HALF - 1) // SUBPIXEL, 0)
        right = min((max(ax, bx, cx) - HALF) // SUBPIXEL, width - 1)
        if top > bottom or left > right:
            continue
        # top-left rule: y goes down and the area is positive, so a left edge goes up and a top edge goes right
        not_a = 0 if cy < by or (cy == by and cx > bx) else 1
        not_b = 0 if ay < cy or (ay == cy and ax > cx) else 1
        not_c = 0 if by < ay or (by == ay and bx > ax) else 1
        p0, p1, p2, low, high = plane[t]
        x = left * SUBPIXEL + HALF
        for row in range(top, bottom + 1):
            y = row * SUBPIXEL + HALF
            ea = (cx - bx) * (y - by) - (cy - by) * (x - bx) - not_a
            eb = (ax - cx) * (y - cy) - (ay - cy) * (x - cx) - not_b
            ec = (bx - ax) * (y - ay) - (by - ay) * (x - ax) - not_c
            for column in range(left, right + 1):
                if (ea | eb | ec) >= 0:
                    z = min(max(p0 * column + p1 * row + p2, low), high)
                    old = depth[row, column]
                    if z <= 1 and (z < old or (z == old and face[t] < face_id[row, column])):
                        depth[row, column] = z
                        face_id[row, column] = face[t]
                ea -= (cy - by) * SUBPIXEL
                eb -= (ay - cy) * SUBPIXEL
                ec -= (by - ay) * SUBPIXEL
