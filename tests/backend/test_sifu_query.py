# SPDX-License-Identifier: GPL-3.0-or-later
"""What points are told: the query path against a float64 twin that spells the paper out, the body's pictures against a
ball's closed answers, and the body priors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from backend import poses
from backend.families.sifu.config import Config
from backend.families.sifu.networks import Reconstructor
from backend.families.sifu.prior import SkinnedBody, framed, rest_placed, smplx_body
from backend.families.sifu.query import Answers, BodySpeaker, Query
from backend.families.sifu.views import normal_views
from backend.geometry.body import BodyMesh
from backend.geometry.clean import is_closed
from backend.geometry.mesh import TriMesh
from backend.protocol import PopulaceError
from tests.backend.sifu_bodies import FRAME, ball_body, capsule_body


def planes_of(kind: str, size: int = 24) -> dict[str, Tensor]:
    torch.manual_seed(0)
    names, channels = (("xy", "yz", "xz"), 8) if kind == "gta" else (("F", "B", "R", "L"), 8)
    return {name: torch.randn(channels, size, size) for name in names} | {"N": torch.randn(12, size, size)}


def read(plane: Tensor, column: float, row: float) -> Tensor:
    """Bilinear, corner centres at +-1, zero beyond; float64."""
    size = plane.shape[1]
    x, y = (column + 1) / 2 * (size - 1), (row + 1) / 2 * (size - 1)
    out = torch.zeros(len(plane), dtype=torch.float64)
    for i in (math.floor(y), math.floor(y) + 1):
        for j in (math.floor(x), math.floor(x) + 1):
            if 0 <= i < size and 0 <= j < size:
                out += plane[:, i, j].double() * (1 - abs(y - i)) * (1 - abs(x - j))
    return out


def halves(planes: dict[str, Tensor], p: Tensor, kind: str, half: int) -> Tensor:
    x, y, z = p.tolist()
    at = {name: plane[: len(plane) // 2] if half == 0 else plane[len(plane) // 2 :] for name, plane in planes.items()}
    if kind == "gta":
        return torch.cat([read(at["xy"], x, y), (read(at["yz"], y, z) + read(at["xz"], x, z)) / 2])
    return torch.cat([read(at["F"], x, y), (read(at["B"], x, y) + read(at["R"], z, y) + read(at["L"], z, y)) / 3])


def nearest_of_all(p: Tensor, corners: Tensor) -> tuple[float, set[int]]:
    """The distance to the triangles, and all that have it: where the nearest place is an edge they are two or more."""
    distances = []
    for a, b, c in corners:
        n = torch.linalg.cross(b - a, c - a)
        foot = p - n * ((p - a) @ n) / (n @ n)
        candidates = []
        if all((torch.linalg.cross(e - s, foot - s) @ n) >= 0 for s, e in ((a, b), (b, c), (c, a))):
            candidates.append(foot)
        for s, e in ((a, b), (b, c), (c, a)):
            t = ((p - s) @ (e - s) / ((e - s) @ (e - s))).clamp(0, 1)
            candidates.append(s + t * (e - s))
        distances.append(min(float((p - q).norm()) for q in candidates))
    best = min(distances)
    return best, {f for f, d in enumerate(distances) if d < best + 1e-9}


@pytest.mark.parametrize("kind", ["gta", "sifu"])
def test_the_query_path_is_its_slow_twin(kind) -> None:
    body = ball_body(rings=8)
    planes, speaker = planes_of(kind), BodySpeaker(body)
    query = Query(planes, speaker, kind)
    torch.manual_seed(1)
    points = torch.randn(24, 3) * 0.35
    found = query.features(points)
    vertices, faces = body.vertices.double(), body.faces
    corners = vertices[faces]
    cross = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    sums = torch.zeros_like(vertices).index_add(0, faces.flatten(), cross.repeat_interleave(3, 0))
    outward = sums / sums.norm(dim=1, keepdim=True) * torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64)
    seen = body.seen().double()
    centre = torch.tensor([0.05, -0.1, 0.0], dtype=torch.float64)
    for n, p in enumerate(points.double()):
        distance, ties = nearest_of_all(p, corners)
        f = int(speaker.body.nearest(points[n : n + 1]).face[0])
        assert f in ties
        v0, v1, v2 = corners[f]
        e1, e2, w = v1 - v0, v2 - v0, p - v0
        normal = torch.linalg.cross(e1, e2)
        b2 = torch.linalg.cross(e1, w) @ normal / (normal @ normal)
        b1 = torch.linalg.cross(w, e2) @ normal / (normal @ normal)
        b = torch.stack([1 - b1 - b2, b1, b2])
        own = faces[f]
        prior = sum(b[i] * halves(planes, vertices[own[i]], kind, 1) for i in range(3))
        assert isinstance(prior, Tensor)
        sign = 1 if (p - centre).norm() < 0.5 else -1
        visible = bool((b * seen[own]).sum() >= 0.1)
        half = planes["N"][:6] if visible else planes["N"][6:]
        facing = (b[:, None] * outward[own]).sum(0)
        wanted = torch.cat([
            halves(planes, p, kind, 0), prior, read(half, float(p[0]), float(p[1])),
            torch.tensor([sign * distance / math.sqrt(3)]), (b[:, None] * body.codes[own].double()).sum(0).clamp(0, 1),
            facing / facing.norm(), torch.tensor([float(visible)]).double(),
        ])  # fmt: skip
        assert (found[n].double() - wanted).abs().max() < 1e-5, n


@pytest.mark.parametrize("kind", ["gta", "sifu"])
def test_inputs_have_the_decoders_width_and_nothing_is_beyond_the_cube(kind) -> None:
    config = Config.tiny(kind)
    network = Reconstructor(config).eval()
    image = torch.randn(1, 3, config.image, config.image)
    body = ball_body()
    views = {side: view[None, :3] for side, view in normal_views(body.vertices, body.faces, config.image).items()}
    with torch.no_grad():
        planes = network.planes(image, *network.normals(image, views), views)
        query = Query({name: plane[0] for name, plane in planes.items()}, BodySpeaker(body), kind)
        answers = Answers(query, network.decoders)
        points = torch.tensor([[0.0, 0, 0], [1.0, 0, 0], [0, 0, -1.01], [0.3, 0.2, 0.1]])
        assert query.features(points).shape == (4, config.features)
        o = answers.occupancy(points)
    assert (o[[1, 2]] == 0).all()
    assert (o[[0, 3]] > 0).all()
    assert answers.color(points).shape == (4, 3)
    published = {"gta": 142, "sifu": 78}[kind]
    assert Config.published(kind).features == published


def test_a_balls_pictures_are_its_normals() -> None:
    body = ball_body(rings=64)
    size, radius = 129, 0.5
    views = normal_views(body.vertices, body.faces, size)
    axis = torch.linspace(-1, 1, size)
    centre = torch.tensor([0.05, 0.1, 0.0])  # in the viewer's frame
    up, right = torch.meshgrid(-axis, axis, indexing="ij")
    for side, column, depth in (("F", 0, 2), ("B", 0, 2), ("R", 2, 0), ("L", 2, 0)):
        across, along = right - centre[column], up - centre[1]
        square = across**2 + along**2
        inside = square < (0.97 * radius) ** 2
        assert (
            torch.equal(views[side][3] > 0.5, square < radius**2)
            or ((views[side][3] > 0.5) != (square < radius**2)).sum() < 60
        )
        normal = torch.zeros(3, size, size)
        normal[column], normal[1] = across / radius, along / radius
        toward = (1 - square / radius**2).clamp(min=0).sqrt()
        normal[depth] = toward if side in ("F", "R") else -toward
        if side in ("R", "L"):
            normal = torch.stack([normal[2], normal[1], -normal[0]])
        off = (views[side][:3] - normal).norm(dim=0)
        assert off[inside].max() < 0.06
    legacy = normal_views(body.vertices, body.faces, size, ("L",), legacy_side_normals=True)["L"]
    assert torch.equal(legacy[:3], views["L"][:3] * torch.tensor([-1.0, -1.0, 1.0])[:, None, None])


def test_the_body_poses_as_the_pose_library_does() -> None:
    body, model_rig = capsule_body(), None
    shape = 0.3 * torch.randn(body.dimensions, generator=torch.Generator().manual_seed(0))
    rig = body.rig(shape)
    rotations, _ = poses.pose("walking", rig)
    posed = body.posed(shape, torch.from_numpy(poses.to_matrices(rotations)).float())
    wanted = poses.skin(body.rest(shape), body.skin_indices, body.skin_weights, rig, rotations, np.zeros((1, 3)))
    assert np.abs(posed.numpy() - wanted).max() < 1e-5
    assert model_rig is None


def test_a_placed_body_comes_back() -> None:
    body = capsule_body()
    placed = rest_placed(body)
    network = placed.vertices(body)
    assert network.abs().max() <= 1 / 1.11 + 1e-5
    assert torch.allclose(placed.to_metres(network), body.template, atol=1e-5)
    assert float(network[body.template[:, 1].argmax(), 1]) < 0  # the head is at the top, where y is negative
    assert placed.mesh(body).outward == -1  # a mirrored frame


def made_up_smplx(path: Path, **changes: object) -> Path:
    """A tube of four rings on three joints, open at the top like SMPL-X's mouth, and a stray eyeball."""
    angles = np.arange(6) * (2 * np.pi / 6)
    rings = [np.stack([np.cos(angles), np.full(6, y), np.sin(angles)], 1) * [0.2, 1, 0.2] for y in (0, 0.5, 1.0, 1.5)]
    eye = np.array([[0, 1.4, 0.1], [0.02, 1.4, 0.1], [0, 1.42, 0.1], [0, 1.41, 0.12]])
    vertices = np.concatenate([*rings, [[0, 0, 0]], eye])
    faces = []
    for ring in range(3):
        for i in range(6):
            a, b, c, d = 6 * ring + i, 6 * ring + (i + 1) % 6, 6 * ring + 6 + i, 6 * ring + 6 + (i + 1) % 6
            faces += [(a, c, b), (b, c, d)]
    faces += [(24, i, (i + 1) % 6) for i in range(6)]
    faces += [(25, 26, 27), (25, 28, 26), (25, 27, 28), (26, 28, 27)]
    count = len(vertices)
    regressor = np.zeros((3, count))
    for j, ring in enumerate((0, 1, 2)):
        regressor[j, 6 * ring : 6 * ring + 6] = 1 / 6
    weights = np.zeros((count, 3))
    weights[np.arange(count), np.clip((vertices[:, 1] / 0.5).astype(int), 0, 2)] = 1
    arrays = {
        "v_template": vertices, "shapedirs": np.stack([vertices * 0.1, vertices * [0.1, 0, 0]], 2),
        "posedirs": np.zeros((count, 3, 18)), "J_regressor": regressor, "weights": weights,
        "kintree_table": np.array([[2**32 - 1, 0, 1], [0, 1, 2]]), "f": np.array(faces),
    }  # fmt: skip
    arrays.update(changes)  # pyright: ignore[reportArgumentType, reportCallIssue]
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_a_users_smplx_is_read_and_closed(tmp_path: Path) -> None:
    body = smplx_body(made_up_smplx(tmp_path / "SMPLX_NEUTRAL.npz"))
    assert isinstance(body, SkinnedBody)
    assert body.parents == (-1, 0, 1)
    assert body.bones == ("pelvis", "left_hip", "right_hip")
    used = torch.unique(body.faces)
    assert int(used.max()) == 24  # the eyeball's vertices stay, its faces do not
    mesh = TriMesh(body.template, body.faces, body.template)
    assert is_closed(mesh)
    shape = torch.tensor([1.0, 0.0])
    assert torch.allclose(body.rest(shape), body.template * 1.1, atol=1e-6)
    assert torch.allclose(body.rig(shape).heads, body.joints * 1.1, atol=1e-6)
    bend = torch.eye(3).repeat(3, 1, 1)
    bend[2] = torch.from_numpy(poses.to_matrices(np.array([[math.sqrt(0.5), 0, 0, math.sqrt(0.5)]]))[0]).float()
    posed = body.posed(torch.zeros(2), bend)
    assert torch.allclose(posed[18:24].mean(0), torch.tensor([-0.5, 1.0, 0.0]), atol=1e-5)
    placed = framed(body, torch.zeros(2), bend)
    solid = placed.mesh(body)
    assert solid.inside(placed.to_network(torch.tensor([[0.0, 0.5, 0.0]])))[0]
    table = tmp_path / "smplx_cmap.npy"
    np.save(table, np.full((29, 3), 0.25))
    assert (smplx_body(tmp_path / "SMPLX_NEUTRAL.npz", table).codes == 0.25).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"J_regressor": None}, "has no J_regressor"),
        ({"weights": np.zeros((29, 2))}, r"weights is \[29, 2\] instead of \[29, 3\]"),
        ({"f": np.array([[0, 1, 99]])}, "no triangles of its vertices"),
        ({"kintree_table": np.array([[-1, 2, 0], [0, 1, 2]])}, "parents first"),
        ({"posedirs": np.zeros((29, 3, 5))}, "does not fit 3 joints"),
        ({"v_template": np.array([{"a": 1}], dtype=object)}, "without running"),
    ],
)
def test_a_file_that_is_not_smplx_is_refused_by_name(tmp_path: Path, changes: dict, said: str) -> None:
    path = made_up_smplx(tmp_path / "model.npz", **changes)
    with pytest.raises(PopulaceError, match=said) as error:
        smplx_body(path)
    assert error.value.code == "weights_corrupt"


def test_a_missing_smplx_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(PopulaceError) as error:
        smplx_body(tmp_path / "none.npz")
    assert error.value.code == "weights_missing"
    assert "smpl-x.is.tue.mpg.de" in str(error.value.hint)


def test_legacy_visibility_reaches_the_points() -> None:
    body = ball_body(rings=24)
    hidden = body.vertices * torch.tensor([0.5, 0.5, 0.5]) - torch.tensor([0, 0, 0.4])
    both = BodyMesh(torch.cat([body.vertices, hidden]), torch.cat([body.faces, body.faces + len(body.vertices)]),
                    torch.cat([body.codes, body.codes]))  # fmt: skip
    points = hidden[hidden[:, 2] > hidden[:, 2].max() - 0.05] + torch.tensor([0, 0, -0.001])
    ours, legacy = BodySpeaker(both).about(points), BodySpeaker(both, legacy_visibility=True).about(points)
    assert ours.values[:, -1].mean() < legacy.values[:, -1].mean()
    assert FRAME.tolist() == [1.0, -1.0, 1.0]
