# SPDX-License-Identifier: GPL-3.0-or-later
"""One closed surface per part: no floaters, no inner shells, no edge that more than two faces share."""

from __future__ import annotations

import dataclasses
import logging

import numba
import numpy as np
import torch
from jaxtyping import Float, Int

from backend.geometry.mesh import TriMesh
from backend.protocol import PopulaceError

log = logging.getLogger(__name__)


def clean(mesh: TriMesh, share: float = 1.0) -> TriMesh:
    """The largest closed component that is wound outward, by volume, and those that have at least `share` of its
    volume (a pair of shoes is two); without unused vertices.

    Floaters and inner shells (which are wound inward, as seen from the solid) go. Marching tetrahedra give a closed
    manifold with distinct vertices, which stays as it is; in any other mesh equal vertices are welded, degenerate
    and opposite pairs of faces dropped, and sheets that touch in an edge or a vertex are taken apart there.
    Raises `empty_surface` if no closed component is left.
    """
    vertices, faces = mesh.vertices.detach().cpu().numpy(), mesh.faces.cpu().numpy()
    origin = np.arange(len(vertices))
    twins = half_edge_twins(faces, len(vertices))
    if (twins < 0).any():
        faces, origin = _weld(vertices, faces)
        faces, split = separate_sheets(faces, vertices[origin])
        origin = origin[split]
        twins = half_edge_twins(faces, len(origin))
    label, count = face_components(twins)
    solid = np.bincount(label, _volumes(vertices[origin], faces), count)
    solid[np.unique(label[(twins < 0).any(1)])] = 0  # open
    if not len(solid) or solid.max() <= 0:
        raise PopulaceError(
            "empty_surface", f"None of {count} surface pieces is closed and wound outward.", "Try another seed."
        )
    kept = solid > share * solid.max()
    kept[solid.argmax()] = True
    if count > 1:
        log.info("clean: kept %d of %d pieces, dropped %d floaters and %d inner or open shells", kept.sum(), count,
                 np.count_nonzero(solid[~kept] > 0), np.count_nonzero(solid <= 0))  # fmt: skip
    return take_faces(mesh, faces[kept[label]], origin)


def take_faces(mesh: TriMesh, faces: Int[np.ndarray, "F 3"], origin: Int[np.ndarray, " V"]) -> TriMesh:
    """A mesh of `faces`, which index `origin`, which indexes the vertices of `mesh`; only the vertices in use."""
    used = np.zeros(len(origin), bool)
    used[faces.reshape(-1)] = True
    number = np.cumsum(used) - 1
    device = mesh.vertices.device
    rows = torch.from_numpy(origin[used]).to(device)
    return dataclasses.replace(
        mesh, vertices=mesh.vertices[rows], points=mesh.points[rows], uvs=None, face_uvs_idx=None,
        faces=torch.from_numpy(number[faces]).to(device),
    )  # fmt: skip


def _volumes(vertices: Float[np.ndarray, "V 3"], faces: Int[np.ndarray, "F 3"]) -> Float[np.ndarray, " F"]:
    """Signed volume under each face, seen from the centre of the mesh."""
    a, b, c = (vertices.astype(np.float64) - vertices.mean(0))[faces].transpose(1, 0, 2)
    return np.einsum("fi,fi->f", a, np.cross(b, c)) / 6


def _weld(
    vertices: Float[np.ndarray, "V 3"], faces: Int[np.ndarray, "F 3"]
) -> tuple[Int[np.ndarray, "F 3"], Int[np.ndarray, " V"]]:
    """Faces over distinct vertices, and which vertex each stands for; no face with a repeated vertex."""
    _, first, inverse = np.unique(vertices, axis=0, return_index=True, return_inverse=True)
    faces = inverse.reshape(-1)[faces]
    a, b, c = faces.T
    return faces[(a != b) & (b != c) & (c != a)], first


def is_closed(mesh: TriMesh) -> bool:
    """Every directed edge occurs as often as its reverse: no border, consistent winding."""
    faces = mesh.faces.cpu().numpy()
    a, b = faces.reshape(-1), np.roll(faces, -1, 1).reshape(-1)
    count = len(mesh.vertices)
    return bool(len(faces)) and np.array_equal(np.sort(a * count + b), np.sort(b * count + a))


def is_manifold(mesh: TriMesh) -> bool:
    """Closed; every edge has two faces, wound alike, and the faces at every vertex form one fan."""
    faces = mesh.faces.cpu().numpy()
    twins = half_edge_twins(faces, len(mesh.vertices))
    if not len(faces) or (twins < 0).any():
        return False
    fans = _fans(faces, twins)[1]
    return fans == len(np.unique(faces))


def euler_number(mesh: TriMesh) -> int:
    """Vertices - edges + faces of a closed manifold: 2 for a ball, 2 less for every handle."""
    return len(torch.unique(mesh.faces)) - len(mesh.faces) // 2


@numba.njit(cache=True, nogil=True)
def half_edge_twins(faces, vertex_count):
    """For half-edge (face, i), from corner i to corner i + 1, the number 3 * face + i of the one that runs the other
    way, [F, 3]. -1 where there is none or where the edge has more than two faces."""
    start = np.zeros(vertex_count + 1, np.int32)
    for face in range(len(faces)):
        for i in range(3):
            start[faces[face, i] + 1] += 1
    for vertex in range(vertex_count):
        start[vertex + 1] += start[vertex]
    fill = start[:-1].copy()
    half = np.empty(3 * len(faces), np.int32)  # half-edges sorted by the vertex that they leave,
    head = np.empty(3 * len(faces), np.int32)  # and the vertex where each ends
    for face in range(len(faces)):
        for i in range(3):
            slot = fill[faces[face, i]]
            fill[faces[face, i]] += 1
            half[slot], head[slot] = 3 * face + i, faces[face, (i + 1) % 3]
    twins = np.full((len(faces), 3), -1, np.int64)
    for a in range(vertex_count):
        for slot in range(start[a], start[a + 1]):
            b = head[slot]
            if a >= b:
                continue
            there, back = 0, 0
            for k in range(start[a], start[a + 1]):
                there += head[k] == b
            found = slot
            for k in range(start[b], start[b + 1]):
                if head[k] == a:
                    found = k
                    back += 1
            if there == 1 and back == 1:
                twins[half[slot] // 3, half[slot] % 3] = half[found]
                twins[half[found] // 3, half[found] % 3] = half[slot]
    return twins


@numba.njit(cache=True, nogil=True)
def face_components(twins):
    """A label per face, and how many connected pieces there are; across edges, not across single vertices."""
    label = np.full(len(twins), -1, np.int64)
    stack = np.empty(len(twins), np.int64)
    count = 0
    for seed in range(len(twins)):
        if label[seed] >= 0:
            continue
        label[seed] = count
        stack[0], depth = seed, 1
        while depth:
            depth -= 1
            face = stack[depth]
            for i in range(3):
                twin = twins[face, i]
                if twin >= 0 and label[twin // 3] < 0:
                    label[twin // 3] = count
                    stack[depth] = twin // 3
                    depth += 1
        count += 1
    return label, count


@numba.njit(cache=True, nogil=True)
def _fans(faces, twins):
    """Number the fans of faces around vertices: the fan of every corner [F, 3], and how many there are."""
    fan = np.full(faces.shape, -1, np.int64)
    count = 0
    for face in range(len(faces)):
        for i in range(3):
            if fan[face, i] >= 0:
                continue
            fan[face, i] = count
            half = twins[face, i]  # it ends at our vertex, in the next face of the fan
            while half >= 0 and fan[half // 3, (half + 1) % 3] < 0:
                fan[half // 3, (half + 1) % 3] = count
                half = twins[half // 3, (half + 1) % 3]
            half = twins[face, (i + 2) % 3]  # it starts at our vertex, in the face before
            while half >= 0 and fan[half // 3, half % 3] < 0:
                fan[half // 3, half % 3] = count
                half = twins[half // 3, (half + 2) % 3]
            count += 1
    return fan, count


def separate_sheets(
    faces: Int[np.ndarray, "F 3"], vertices: Float[np.ndarray, "V 3"]
) -> tuple[Int[np.ndarray, "F 3"], Int[np.ndarray, " W"]]:
    """Make a closed mesh manifold: faces over new vertices, and which old vertex each of those stands for.

    Faces on the same three corners cancel or become one. Where more than two faces share an edge, those that bound
    the same solid wedge stay together (Gueziec et al. 2001, "cutting and stitching"); then every fan of faces around
    a vertex gets a vertex of its own.
    """
    faces = _cancel(faces)
    twins = half_edge_twins(faces, len(vertices))
    around: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for face, i in np.argwhere(twins < 0).tolist():
        a, b = int(faces[face, i]), int(faces[face, (i + 1) % 3])
        around.setdefault((min(a, b), max(a, b)), []).append((face, i))
    for (a, b), halves in around.items():
        ordered = _by_angle(faces, vertices.astype(np.float64), a, b, halves)
        while ordered:  # turning into the solid behind a face that has a -> b, the next one must have b -> a
            size = len(ordered)
            for k in range(size):
                (face, i), (other, j) = ordered[k], ordered[k - 1]
                if faces[face, i] == a and faces[other, j] == b:
                    twins[face, i], twins[other, j] = 3 * other + j, 3 * face + i
                    ordered = [half for n, half in enumerate(ordered) if n not in (k, (k - 1) % size)]
                    break
            else:
                break
    fan, count = _fans(faces, twins)
    origin = np.empty(count, np.int64)
    origin[fan.reshape(-1)] = faces.reshape(-1)
    return fan, origin


def _cancel(faces: Int[np.ndarray, "F 3"]) -> Int[np.ndarray, "F 3"]:
    """Of all faces on the same three vertices one is left, or none if as many are wound one way as the other."""
    order = np.argsort(faces, axis=1)
    even = np.isin(order @ [9, 3, 1], [5, 15, 19])  # (0, 1, 2), (1, 2, 0), (2, 0, 1)
    _, first, group = np.unique(np.sort(faces, axis=1), axis=0, return_index=True, return_inverse=True)
    balance = np.bincount(group.reshape(-1), np.where(even, 1, -1), len(first)).astype(np.int64)
    kept = faces[first].copy()
    turn = (balance > 0) != even[first]
    kept[turn] = kept[turn][:, ::-1]
    return kept[balance != 0]


def _by_angle(
    faces: Int[np.ndarray, "F 3"], vertices: Float[np.ndarray, "V 3"], a: int, b: int, halves: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """The half-edges of edge (a, b) sorted by the angle of their faces, turning by the right hand about a -> b."""
    axis = vertices[b] - vertices[a]
    axis /= max(np.linalg.norm(axis), 1e-30)
    x = np.cross(axis, np.eye(3)[np.abs(axis).argmin()])
    y = np.cross(axis, x)
    spokes = np.array([vertices[faces[face, (i + 2) % 3]] - vertices[a] for face, i in halves])
    return [halves[k] for k in np.argsort(np.arctan2(spokes @ y, spokes @ x), kind="stable")]
