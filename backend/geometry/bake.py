# SPDX-License-Identifier: GPL-3.0-or-later
"""Textures of a coarse mesh from the field and the fine surface that it stands for.

Every texel is taken from its place on the coarse mesh to the closest point of the fine mesh, walking over fine faces
from a corner of its coarse face: the walk cannot jump to the other side of a cuff or to the next finger. There the
field gives colour and material, and the fine mesh the normal.

Tangent space as MikkTSpace (Mikkelsen 2008) has it, which Blender and glTF use: per uv vertex, the direction of
growing u in each face, turned into the plane of the vertex normal and averaged by angle; bitangent = sign * (normal x
tangent); all three interpolated and not normalised within a face. The map is the exact inverse of that.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from scipy.spatial import cKDTree

from backend.families.base import HumanField, Step, no_step
from backend.geometry.clean import half_edge_twins
from backend.geometry.mesh import Textures, TriMesh, vertex_normals
from backend.protocol import PopulaceError

log = logging.getLogger(__name__)

_CHUNK = 1 << 15  # points for the field between two looks at whether to stop


@torch.no_grad()
def bake(
    field: HumanField, fine: TriMesh, mesh: TriMesh, texture_size: int, step: Step = no_step, pbr: bool = True
) -> Textures:
    """Base colour and, if `pbr`, tangent-space normal and ORM maps of `mesh`, which has uvs and lies close to `fine`.

    `field.color` and `field.material` are asked once for each covered texel, at a point of the fine surface, one right
    after the other with the same tensor. Texels that no chart covers take the value of the nearest covered one, so
    nothing bleeds in at seams. Shading normals are those of `vertex_normals(mesh.vertices, mesh.faces)`. Raises
    `internal_error` if a colour or material is not finite.
    """
    assert mesh.uvs is not None
    assert mesh.face_uvs_idx is not None
    uvs, corners = _array(mesh.uvs), _array(mesh.face_uvs_idx)
    vertices, faces = _array(mesh.vertices), _array(mesh.faces)
    fine_vertices, fine_faces = _array(fine.vertices), _array(fine.faces)
    normals = _array(vertex_normals(mesh.vertices.double(), mesh.faces))
    tangents = _tangents(vertices, faces, normals, uvs, corners)
    fine_normals = smooth_normals(fine_vertices, fine_faces)
    if pbr and (bend := getattr(field, "bend", None)) is not None:  # the field knows finer normals than its surface has
        fine_normals += _array(torch.cat([bend(chunk) for chunk in fine.points.split(_CHUNK)]))
        fine_normals /= np.maximum(np.linalg.norm(fine_normals, axis=1, keepdims=True), 1e-30)
    twins = half_edge_twins(fine_faces, len(fine_vertices))
    tree = cKDTree(_array(fine.points), balanced_tree=False, compact_nodes=False)
    start = _face_of_vertex(fine_faces, len(fine_vertices))[tree.query(_array(mesh.points))[1]]
    step("bake", 0.1)

    begin = np.zeros(len(faces) + 1, np.int64)
    _count_texels(uvs, corners, texture_size, begin)
    texels = np.empty(begin[-1], np.int32)
    points = np.empty((begin[-1], 3), np.float32)
    normal = np.empty((begin[-1], 3), np.uint8)
    bounds = np.searchsorted(begin, np.linspace(0, begin[-1], 9)).clip(0, len(faces))
    bounds[-1] = len(faces)

    def work(share: int) -> None:
        _gather(
            bounds[share], bounds[share + 1], begin, uvs, corners, texture_size, vertices, faces, normals, tangents,
            start, fine_vertices, _array(fine.points), fine_faces, fine_normals, twins, texels, points, normal
        )  # fmt: skip

    with ThreadPoolExecutor(min(2, torch.get_num_threads())) as pool:
        for share, _ in enumerate(pool.map(work, range(len(bounds) - 1))):
            step("bake", 0.1 + 0.3 * (share + 1) / (len(bounds) - 1))
    done, looks = 0, []
    for chunk in torch.from_numpy(points).to(fine.vertices.device).split(_CHUNK):
        looks.append(torch.cat([field.color(chunk), field.material(chunk)], 1) if pbr else field.color(chunk))
        done += len(chunk)
        step("bake", 0.4 + 0.5 * done / len(points))
    look = torch.cat(looks)
    if not torch.isfinite(look).all():
        raise PopulaceError(
            "internal_error", f"The colours of {field.name!r} are not finite.", "Try another seed; verify the weights."
        )
    pixels = (look.clamp(0, 1) * 255 + 0.5).to(torch.uint8).cpu().numpy()
    nearest = _nearest(texels, texture_size)
    log.info("bake: %d of %d texels covered", len(texels), texture_size**2)
    base_color = torch.from_numpy(np.ascontiguousarray(pixels[:, :3])[nearest])
    if not pbr:
        return Textures(base_color)
    pixels[:, 2] = 255  # the colour's last channel makes room for "not occluded"
    return Textures(base_color, torch.from_numpy(normal[nearest]), torch.from_numpy(pixels[:, 2:][nearest]))


def _array(tensor: torch.Tensor) -> np.ndarray:
    """Contiguous numpy, floats in double precision."""
    array = np.ascontiguousarray(tensor.detach().cpu().numpy())
    return array.astype(np.float64) if array.dtype == np.float32 else array


@numba.njit(cache=True, nogil=True)
def smooth_normals(vertices, faces):
    """Unit normals per vertex, faces weighted by area: the slivers of a fine mesh count little."""
    normals = np.zeros_like(vertices)
    for f in range(len(faces)):
        a, b, c = vertices[faces[f, 0]], vertices[faces[f, 1]], vertices[faces[f, 2]]
        ux, uy, uz = b[0] - a[0], b[1] - a[1], b[2] - a[2]
        vx, vy, vz = c[0] - a[0], c[1] - a[1], c[2] - a[2]
        for i in range(3):
            normals[faces[f, i], 0] += uy * vz - uz * vy
            normals[faces[f, i], 1] += uz * vx - ux * vz
            normals[faces[f, i], 2] += ux * vy - uy * vx
    for v in range(len(normals)):
        n = normals[v]
        n /= max(np.sqrt(n[0] * n[0] + n[1] * n[1] + n[2] * n[2]), 1e-30)
    return normals


@numba.njit(cache=True, nogil=True)
def _face_of_vertex(faces, vertex_count):
    found = np.zeros(vertex_count, np.int64)
    for f in range(len(faces)):
        for i in range(3):
            found[faces[f, i]] = f
    return found


@numba.njit(cache=True, nogil=True)
def _unit_across(v, n):
    """v without its part along the unit vector n, as a unit vector; zero if nothing is left."""
    w = v - (v[0] * n[0] + v[1] * n[1] + v[2] * n[2]) * n
    return w / max(np.sqrt(w[0] * w[0] + w[1] * w[1] + w[2] * w[2]), 1e-30)


@numba.njit(cache=True, nogil=True)
def _tangents(vertices, faces, normals, uvs, corners):
    """Unit tangent and sign of the bitangent per uv vertex, [U, 4]."""
    tangents = np.zeros((len(uvs), 4))
    for f in range(len(faces)):
        a, b, c = vertices[faces[f, 0]], vertices[faces[f, 1]], vertices[faces[f, 2]]
        ta, tb, tc = uvs[corners[f, 0]], uvs[corners[f, 1]], uvs[corners[f, 2]]
        area = (tb[0] - ta[0]) * (tc[1] - ta[1]) - (tb[1] - ta[1]) * (tc[0] - ta[0])
        sign = 1.0 if area > 0 else -1.0
        along = sign * ((tc[1] - ta[1]) * (b - a) - (tb[1] - ta[1]) * (c - a))
        for i in range(3):
            here, n = vertices[faces[f, i]], normals[faces[f, i]]
            to_next = _unit_across(vertices[faces[f, (i + 1) % 3]] - here, n)
            to_last = _unit_across(vertices[faces[f, (i + 2) % 3]] - here, n)
            angle = np.arccos(min(1.0, max(-1.0, (to_next * to_last).sum())))
            tangents[corners[f, i], :3] += angle * _unit_across(along, n)
            tangents[corners[f, i], 3] = sign
    for t in tangents:
        t[:3] /= max(np.sqrt(t[0] * t[0] + t[1] * t[1] + t[2] * t[2]), 1e-30)
    return tangents


@numba.njit(cache=True, nogil=True)
def _edge(a, b, x, y, uvs, size):
    """Twice the signed area of (a, b, (x, y)) in texels, computed alike from both faces of an edge, and whether the
    texel centre (x, y) counts as left of a -> b. A centre exactly on an edge belongs to one of its two faces."""
    low, high = min(a, b), max(a, b)
    ax, ay = uvs[low, 0] * size, uvs[low, 1] * size
    area = (uvs[high, 0] * size - ax) * (y - ay) - (uvs[high, 1] * size - ay) * (x - ax)
    if a != low:
        area = -area
    return area, area > 0 or (area == 0 and a == low)


@numba.njit(cache=True, nogil=True)
def _box(corner, uvs, size):
    """The texels (first and last column and row, rows counted from below) whose centres a face may cover."""
    least, most = uvs[corner[0]].copy(), uvs[corner[0]].copy()
    for i in range(1, 3):
        for k in range(2):
            least[k], most[k] = min(least[k], uvs[corner[i], k]), max(most[k], uvs[corner[i], k])
    x0, y0 = max(int(np.ceil(least[0] * size - 0.5)), 0), max(int(np.ceil(least[1] * size - 0.5)), 0)
    x1, y1 = min(int(np.floor(most[0] * size - 0.5)), size - 1), min(int(np.floor(most[1] * size - 0.5)), size - 1)
    return x0, x1, y0, y1


@numba.njit(cache=True, nogil=True)
def _count_texels(uvs, corners, size, begin):
    """Fill `begin` [F + 1] so that the texels of face f are begin[f] to begin[f + 1]."""
    for f in range(len(corners)):
        a, b, c = corners[f]
        x0, x1, y0, y1 = _box(corners[f], uvs, size)
        count = 0
        for y in range(y0, y1 + 1):
            for x in range(x0, x1 + 1):
                count += (
                    _edge(a, b, x + 0.5, y + 0.5, uvs, size)[1]
                    and _edge(b, c, x + 0.5, y + 0.5, uvs, size)[1]
                    and _edge(c, a, x + 0.5, y + 0.5, uvs, size)[1]
                )
        begin[f + 1] = begin[f] + count


@numba.njit(cache=True, nogil=True)
def _gather(
    first, last, begin, uvs, corners, size, vertices, faces, normals, tangents,
    start, fine_vertices, fine_points, fine_faces, fine_normals, twins, texels, points, normal
):  # fmt: skip
    """For the texels of the coarse faces `first` to `last`: texel number (top row first), point of the fine surface
    in field space, and the fine normal in the tangent space of the coarse mesh as a colour."""
    place, n, t, smooth = np.empty(3), np.empty(3), np.empty(3), np.empty(3)
    for f in range(first, last):
        if begin[f] == begin[f + 1]:
            continue
        a, b, c = corners[f]
        x0, x1, y0, y1 = _box(corners[f], uvs, size)
        at = begin[f]
        sign = tangents[a, 3]
        row_start = start[faces[f, 0]]
        far = 0.01 * _squared_side(vertices, faces[f])
        for y in range(y0, y1 + 1):
            hit, first_in_row = row_start, True
            for x in range(x0, x1 + 1):
                wc, in_c = _edge(a, b, x + 0.5, y + 0.5, uvs, size)
                wa, in_a = _edge(b, c, x + 0.5, y + 0.5, uvs, size)
                wb, in_b = _edge(c, a, x + 0.5, y + 0.5, uvs, size)
                if not (in_a and in_b and in_c):
                    continue
                total = wa + wb + wc
                wa, wb, wc = wa / total, wb / total, wc / total
                for k in range(3):
                    i, j, m = faces[f]
                    place[k] = wa * vertices[i, k] + wb * vertices[j, k] + wc * vertices[m, k]
                    n[k] = wa * normals[i, k] + wb * normals[j, k] + wc * normals[m, k]
                    t[k] = wa * tangents[a, k] + wb * tangents[b, k] + wc * tangents[c, k]
                hit, u, v, w, distance = _walk(place, hit, fine_vertices, fine_faces, twins)
                if distance > far:  # down into the wrong side of a crease? look from every corner
                    for k in range(3):
                        other = _walk(place, start[faces[f, k]], fine_vertices, fine_faces, twins)
                        if other[4] < distance:
                            hit, u, v, w, distance = other
                if first_in_row:
                    row_start, first_in_row = hit, False
                i, j, m = fine_faces[hit]
                for k in range(3):
                    points[at, k] = u * fine_points[i, k] + v * fine_points[j, k] + w * fine_points[m, k]
                    smooth[k] = u * fine_normals[i, k] + v * fine_normals[j, k] + w * fine_normals[m, k]
                _encode(smooth, n, t, sign, normal[at])
                texels[at] = (size - 1 - y) * size + x
                at += 1


@numba.njit(cache=True, nogil=True)
def _squared_side(vertices, face):
    """Square of the shortest side of a face."""
    least = np.inf
    for i in range(3):
        a, b = vertices[face[i]], vertices[face[(i + 1) % 3]]
        least = min(least, (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 + (a[2] - b[2]) ** 2)
    return least


@numba.njit(cache=True, nogil=True)
def _encode(smooth, n, t, sign, out):
    """Write the direction `smooth` = x t + y sign (n x t) + z n as a colour; z at least 0.05 of its length."""
    bx, by, bz = sign * (n[1] * t[2] - n[2] * t[1]), sign * (n[2] * t[0] - n[0] * t[2]), sign * (
        n[0] * t[1] - n[1] * t[0])  # fmt: skip
    tt, nn, tn = t[0] * t[0] + t[1] * t[1] + t[2] * t[2], n[0] * n[0] + n[1] * n[1] + n[2] * n[2], (
        t[0] * n[0] + t[1] * n[1] + t[2] * n[2])  # fmt: skip
    st = smooth[0] * t[0] + smooth[1] * t[1] + smooth[2] * t[2]
    sn = smooth[0] * n[0] + smooth[1] * n[1] + smooth[2] * n[2]
    det = max(tt * nn - tn * tn, 1e-12)
    x, z = (st * nn - sn * tn) / det, (sn * tt - st * tn) / det
    y = (smooth[0] * bx + smooth[1] * by + smooth[2] * bz) / max(bx * bx + by * by + bz * bz, 1e-12)
    z = max(z, 0.05 * np.sqrt(x * x + y * y + z * z))
    length = max(np.sqrt(x * x + y * y + z * z), 1e-12)
    out[0] = int((x / length * 0.5 + 0.5) * 255 + 0.5)
    out[1] = int((y / length * 0.5 + 0.5) * 255 + 0.5)
    out[2] = int((z / length * 0.5 + 0.5) * 255 + 0.5)


@numba.njit(cache=True, nogil=True)
def _walk(p, face, vertices, faces, twins):
    """The point of the surface closest to p, found downhill from `face`: the face that has it, its barycentric
    coordinates, and its squared distance."""
    u, v, w, best, feature = _closest(p, face, vertices, faces)
    for _ in range(256):
        moved = False
        if 0 <= feature < 3:  # on an edge: look across it
            half = twins[face, feature]
            if half >= 0:
                u2, v2, w2, d2, feature2 = _closest(p, half // 3, vertices, faces)
                if d2 < best * (1 - 1e-9):
                    face, u, v, w, best, feature, moved = half // 3, u2, v2, w2, d2, feature2, True
        elif feature >= 3:  # at a corner: look around it
            corner = feature - 3
            here = face
            half = twins[face, corner]
            while half >= 0 and half // 3 != here:
                u2, v2, w2, d2, feature2 = _closest(p, half // 3, vertices, faces)
                if d2 < best * (1 - 1e-9):
                    face, u, v, w, best, feature, moved = half // 3, u2, v2, w2, d2, feature2, True
                half = twins[half // 3, (half + 1) % 3]
        if not moved:
            break
    return face, u, v, w, best


@numba.njit(cache=True, nogil=True)
def _closest(p, face, vertices, faces):
    """The point of a triangle closest to p (Ericson 2005, sec. 5.1.5): barycentric coordinates, squared distance, and
    where it lies: -1 inside, 0..2 on the edge from that corner to the next, 3..5 at that corner (plus 3)."""
    a, b, c = vertices[faces[face, 0]], vertices[faces[face, 1]], vertices[faces[face, 2]]
    abx, aby, abz = b[0] - a[0], b[1] - a[1], b[2] - a[2]
    acx, acy, acz = c[0] - a[0], c[1] - a[1], c[2] - a[2]
    apx, apy, apz = p[0] - a[0], p[1] - a[1], p[2] - a[2]
    d1, d2 = abx * apx + aby * apy + abz * apz, acx * apx + acy * apy + acz * apz
    bpx, bpy, bpz = p[0] - b[0], p[1] - b[1], p[2] - b[2]
    d3, d4 = abx * bpx + aby * bpy + abz * bpz, acx * bpx + acy * bpy + acz * bpz
    cpx, cpy, cpz = p[0] - c[0], p[1] - c[1], p[2] - c[2]
    d5, d6 = abx * cpx + aby * cpy + abz * cpz, acx * cpx + acy * cpy + acz * cpz
    va, vb, vc = d3 * d6 - d5 * d4, d5 * d2 - d1 * d6, d1 * d4 - d3 * d2
    v, w, feature = 0.0, 0.0, 3
    if d1 <= 0 and d2 <= 0:
        pass
    elif d3 >= 0 and d4 <= d3:
        v, feature = 1.0, 4
    elif d6 >= 0 and d5 <= d6:
        w, feature = 1.0, 5
    elif vc <= 0 and d1 >= 0 and d3 <= 0:
        v, feature = d1 / max(d1 - d3, 1e-300), 0
    elif vb <= 0 and d2 >= 0 and d6 <= 0:
        w, feature = d2 / max(d2 - d6, 1e-300), 2
    elif va <= 0 and d4 >= d3 and d5 >= d6:
        w, feature = (d4 - d3) / max((d4 - d3) + (d5 - d6), 1e-300), 1
        v = 1 - w
    elif va + vb + vc > 0:
        v, w, feature = vb / (va + vb + vc), vc / (va + vb + vc), -1
    x, y, z = apx - v * abx - w * acx, apy - v * aby - w * acy, apz - v * abz - w * acz
    return 1 - v - w, v, w, x * x + y * y + z * z, feature


@numba.njit(cache=True, nogil=True)
def _nearest(texels, size):
    """For every texel the number (in `texels`) of a nearest covered one, [size, size], by sweeps that hand on the
    nearest found so far (Danielsson 1980); a texel off now and then, far from any chart."""
    nearest = np.full((size, size), -1, np.int32)
    for n in range(len(texels)):
        nearest[texels[n] // size, texels[n] % size] = n
    for sweep in range(2):
        step = 1 - 2 * sweep
        for row in range(size):
            y = row if sweep == 0 else size - 1 - row
            for turn in range(2):
                along = 1 - 2 * turn
                for column in range(size):
                    x = column if turn == 0 else size - 1 - column
                    best, found = np.int64(1) << 60, nearest[y, x]
                    if found >= 0:
                        dy, dx = y - texels[found] // size, x - texels[found] % size
                        best = dy * dy + dx * dx
                        if best == 0:
                            continue
                    for k in range(4):
                        j, i = (y, x - along) if k == 0 else (y - step, x + k - 2)
                        if 0 <= j < size and 0 <= i < size and nearest[j, i] >= 0:
                            n = nearest[j, i]
                            dy, dx = y - texels[n] // size, x - texels[n] % size
                            if dy * dy + dx * dx < best:
                                best, found = dy * dy + dx * dx, n
                    nearest[y, x] = found
    return nearest
