# SPDX-License-Identifier: GPL-3.0-or-later
"""Making targets, codes and weights: analytic shapes, distributions with known answers, a short real training run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import trimesh

from backend.families.people import storage
from backend.families.people.attributes import STAGES, aged
from backend.families.people.cut import ELBOW, OPEN, SHOULDER, WRIST, arm_distance, borders, pattern_mask
from backend.families.people.networks import Mapping
from backend.networks.volumes import GridBank, PlaneBank, Volume, read_grid, six_sides
from backend.training.canonical import Samples, border_distance, sample_surface, signed_distance, winding_number
from backend.training.mapping import fit_body, fit_choices, transport
from backend.training.people_data import in_front, lash_line
from backend.training.splat import splat


def sampled(mesh: trimesh.Trimesh, count: int = 60_000) -> Samples:
    vertices, faces = np.asarray(mesh.vertices, np.float64), np.asarray(mesh.faces)
    return sample_surface(vertices, faces, np.zeros((1, 2)), np.zeros_like(faces), count, seed=0)


@pytest.fixture(scope="module")
def tube() -> Samples:
    """Open at both ends: radius 0.15 m around y from 0 to 1 m."""
    angle, height = np.meshgrid(np.linspace(0, 2 * np.pi, 96, endpoint=False), np.linspace(0, 1, 40), indexing="ij")
    vertices = np.stack([0.15 * np.sin(angle), height, 0.15 * np.cos(angle)], -1).reshape(-1, 3)
    i, j = np.meshgrid(np.arange(96), np.arange(39), indexing="ij")
    a, b = i * 40 + j, (i + 1) % 96 * 40 + j
    quads = np.stack([a, b, b + 1, a + 1], -1).reshape(-1, 4)
    return sampled(trimesh.Trimesh(vertices, np.concatenate([quads[:, :3], quads[:, [0, 2, 3]]]), process=False))


def test_distance_to_a_sphere_is_the_distance_to_a_sphere() -> None:
    samples = sampled(trimesh.creation.icosphere(subdivisions=5, radius=0.3))
    rng = np.random.default_rng(0)
    points = rng.normal(size=(4000, 3))
    points *= rng.uniform(0.02, 0.6, (4000, 1)) / np.linalg.norm(points, axis=1, keepdims=True)
    exact = np.linalg.norm(points, axis=1) - 0.3
    found = signed_distance(samples, points)
    assert (np.sign(found) == np.sign(exact))[np.abs(exact) > 1e-3].all()
    near = np.abs(exact) < 0.006
    assert np.abs(found - exact)[near].max() < 5e-4  # distances to tangent planes
    assert np.abs(found - exact).max() < 0.012  # far off, to a thinned set


def test_an_open_tube_encloses_what_its_caps_would_close_in(tube: Samples) -> None:
    queries = np.array([[0, 0.5, 0], [0.05, 0.9, 0], [0, 1.1, 0], [0, -0.1, 0], [0.3, 0.5, 0], [0, 3.0, 0]])
    assert np.allclose(winding_number(tube, queries), [1, 1, 0, 0, 0, 0], atol=0.1)
    distance = signed_distance(tube, queries[:5])
    assert distance[0] == pytest.approx(-0.15, abs=0.003)
    assert (distance[2:] > 0).all()


def test_beyond_a_rim_is_outside_on_either_side(tube: Samples) -> None:
    angle = np.linspace(0, 6, 50)
    for radius, y, sign in ((0.148, 1.004, 1), (0.152, 1.004, 1), (0.148, 0.99, -1), (0.152, 0.99, 1)):
        ring = np.stack([radius * np.sin(angle), np.full(50, y), radius * np.cos(angle)], 1)
        assert (np.sign(signed_distance(tube, ring)) == sign).mean() > 0.95


def test_transport_reaches_clusters_and_respects_the_condition() -> None:
    rng = np.random.default_rng(0)
    condition = rng.choice([-1.0, 1.0], (2000, 1))
    w = np.stack([2 * condition[:, 0], rng.choice([-2.0, 2.0], 2000)], 1) + rng.normal(0, 0.05, (2000, 2))
    moved = transport(w, 3 * condition, rng.normal(size=(2000, 2)), rng)
    assert (np.sign(moved[:, 0]) == condition[:, 0]).mean() > 0.97
    assert (np.abs(np.abs(moved[:, 1]) - 2) < 0.3).mean() > 0.9
    assert (moved[:, 1] > 0).mean() == pytest.approx(0.5, abs=0.05)


def test_a_mapping_reaches_the_choices_and_truncates_to_real_codes() -> None:
    rng = np.random.default_rng(0)
    n = 1500
    condition = rng.choice([-1.0, 1.0], (n, 1))
    choice = np.where(rng.random(n) < 0.85, condition[:, 0] > 0, condition[:, 0] < 0).astype(int)
    w = np.concatenate([np.eye(2)[choice], rng.normal(0, 0.3, (n, 1)) + choice[:, None]], 1)
    mapping = Mapping(4, 1, 3, 20, ((0, 2),), 32)
    fit_choices(mapping, w, condition, steps=600)
    z = torch.from_numpy(rng.normal(size=(2000, 4)).astype(np.float32))
    for side in (-1.0, 1.0):
        out = mapping(z, torch.full((2000, 1), side), 1.0).detach().numpy()
        assert set(np.unique(out[:, :2])) <= {0.0, 1.0}  # a choice, not a mixture
        assert (out[:, :2].sum(1) == 1).all()
        assert out[:, 1].mean() == pytest.approx(0.85 if side > 0 else 0.15, abs=0.08)
    still = mapping(z, torch.ones(2000, 1), 0.0).detach().numpy()
    assert all((np.abs(w - code).max(1) < 1e-5).any() for code in np.unique(still, axis=0))


def test_bodies_are_transported_to_their_distribution() -> None:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(1500, 4))
    w[:, 0] = rng.choice([-1.0, 1.0], 1500) + rng.normal(0, 0.1, 1500)  # two sexes, nothing between
    mapping = Mapping(4, 0, 4, 1, (), 32)
    fit_body(mapping, w, active=2, steps=800)
    out = (
        mapping(torch.from_numpy(rng.normal(size=(1500, 4)).astype(np.float32)), torch.zeros(1500, 0)).detach().numpy()
    )
    assert (np.abs(out[:, 0]) < 0.5).mean() < 0.12  # of a Gaussian 38 % would lie there
    assert out[:, 2:].std(0) == pytest.approx([1, 1], abs=0.1)


def test_arm_distance_runs_along_the_bones_of_both_arms() -> None:
    shoulder, elbow, wrist = (np.array(p) for p in (SHOULDER, ELBOW, WRIST))
    upper, lower = np.linalg.norm(elbow - shoulder), np.linalg.norm(wrist - elbow)
    points = np.stack([shoulder, elbow, wrist, wrist * [-1, 1, 1]])
    assert np.allclose(arm_distance(points), [0, upper, upper + lower, upper + lower], atol=0.012)
    assert arm_distance(np.array([[0.0, 1.2, 0.0]]))[0] < -0.1  # the torso is no arm


def test_borders_cut_where_they_say() -> None:
    y = np.linspace(0.56, 1.4, 85)
    column = np.stack([np.zeros(85), y, np.zeros(85)], 1)
    short = borders("top", (1.0, 0.0, -3.0, 0.0), column)
    neck = np.minimum(y - 1.43 + 0.625 * 0.03, -0.055)  # no neckline; a hem at 0.885 m, nothing on the head
    assert np.allclose(short, np.maximum.reduce([0.885 - y, arm_distance(column) - 0.49, neck, y - 1.49]))
    assert (borders("top", OPEN["top"], column) < 0).all()
    legs = np.stack([np.full(85, 0.1), y - 0.4, np.zeros(85)], 1)
    assert np.allclose(borders("bottom", (0.0, 1.0), legs), np.maximum(0.39 - legs[:, 1], -0.19))
    for part, trims in (("top", (-0.5, -0.6, 0.4, 0.3)), ("bottom", (0.5, -0.9))):  # torch and numpy agree
        both = borders(part, torch.tensor(trims), torch.from_numpy(column.astype(np.float32)))
        assert np.allclose(both.numpy(), borders(part, trims, column), atol=1e-6)


def test_stripes_repeat_and_scale_doubles_the_period() -> None:
    y = np.linspace(0.5, 1.5, 801)
    points = np.stack([np.zeros(801), y, np.zeros(801)], 1)
    wide = pattern_mask("wide stripes", points)
    assert np.allclose(wide[80:], wide[:-80], atol=1e-6)  # a period of 0.1 m
    assert (wide.min(), wide.max()) == (0, 1)
    assert np.allclose(pattern_mask("wide stripes", 2 * points, 1.0), wide)


def test_grids_mix_linearly_and_read_linear_fields_exactly() -> None:
    volume = Volume("v", (0.1, 0.2, 0.3), (0.2, 0.1, 0.15), ((0.6, 0.8, 0.0), (-0.8, 0.6, 0.0), (0.0, 0.0, 1.0)))
    bank = GridBank(volume, 2, 0.03).requires_grad_(False)
    nodes = volume.nodes(0.03)
    for j, slope in enumerate(([1.0, 2.0, -1.0], [0.5, -1.0, 3.0])):
        bank.basis[j] = nodes @ torch.tensor(slope)
    inside = torch.rand(200, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    points = (inside * torch.tensor(volume.half_size)) @ torch.tensor(volume.axes) + torch.tensor(volume.centre)
    values = read_grid(bank(torch.tensor([0.25, 0.75])), volume.local(points))[:, 0]
    assert torch.allclose(values, points @ torch.tensor([0.625, -0.25, 2.0]), atol=1e-5)


def test_mirrored_volumes_read_the_same_on_both_sides() -> None:
    volume = Volume("v", (0.3, 0, 0), (0.35, 0.3, 0.3), mirror=True)
    points = torch.tensor([[0.4, 0.1, -0.2], [0.0, 0.2, 0.1]])
    assert torch.equal(volume.local(points), volume.local(points * torch.tensor([-1, 1, 1])))
    facing = torch.tensor([[0.8, 0.0, 0.6], [-0.8, 0.0, 0.6]])
    turned = volume.turned(points * torch.tensor([[1, 1, 1], [-1, 1, 1]]), facing)
    assert torch.allclose(turned[0], facing[0])
    assert (volume.window(volume.local(torch.tensor([[0.0, 0.0, 0.0]]))) == 1).all()


def test_splatted_colours_are_read_back() -> None:
    """A ball with a smooth colour: planes made from its points give the colour again, at points never seen."""
    rng = np.random.default_rng(0)
    volume, sides = Volume("ball", (0.0, 0.0, 0.0), (0.12, 0.12, 0.12)), six_sides(0.003)
    directions = rng.normal(size=(60_000, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    points = 0.1 * directions
    values = np.stack([np.sin(30 * points[:, 0]), points[:, 1] * 8, np.cos(20 * points[:, 2])], 1)
    planes = splat(volume, sides, points[:50_000], directions[:50_000], values[:50_000])
    bank = PlaneBank(volume, sides, 1, 3)
    p, d = (torch.from_numpy(a[50_000:].astype(np.float32)) for a in (points, directions))
    read = bank.read([torch.from_numpy(q) for q in planes], volume.local(p), d)
    assert np.abs(read.numpy() - values[50_000:]).mean() < 0.02


def test_what_lies_behind_is_not_seen_from_the_front() -> None:
    """A square 1 cm before another one hides it, beyond its edges it does not."""
    grid = np.stack(np.meshgrid(np.linspace(0, 0.02, 61), np.linspace(0, 0.02, 61)), -1).reshape(-1, 2)
    near, far = np.c_[grid, np.full(len(grid), 0.11)], np.c_[2 * grid - 0.01, np.full(len(grid), 0.10)]
    seen = in_front(np.concatenate([near, far]))
    assert seen[: len(near)].all()
    behind = ((far[:, :2] > 0.001) & (far[:, :2] < 0.019)).all(1)
    assert not seen[len(near) :][behind].any()
    beyond = ((far[:, :2] < -0.002) | (far[:, :2] > 0.022)).any(1)
    assert seen[len(near) :][beyond].all()


def test_lashes_line_the_upper_lid() -> None:
    """An eye is a disc in a plane of skin: the line is dark above it, faint below, and away from it there is none."""
    rng = np.random.default_rng(0)
    points = np.c_[rng.uniform(-0.02, 0.02, (40_000, 2)), np.zeros(40_000)]
    radius = np.linalg.norm(points[:, :2], axis=1)
    alpha = lash_line(points, radius < 0.01)
    rim = (radius > 0.0101) & (radius < 0.0104) & (np.abs(points[:, 0]) < 0.003)
    assert alpha[rim & (points[:, 1] > 0)].min() > 0.7
    assert 0.2 < alpha[rim & (points[:, 1] < 0)].mean() < 0.35
    assert alpha[(radius > 0.0125) | (radius < 0.007)].max() == 0


def test_curved_samples_leave_flat_faces_for_the_sphere() -> None:
    mesh = trimesh.creation.icosphere(subdivisions=2, radius=0.3)
    vertices, faces = np.asarray(mesh.vertices, np.float64), np.asarray(mesh.faces)
    errors = [
        np.abs(np.linalg.norm(sample_surface(
            vertices, faces, np.zeros((1, 2)), np.zeros_like(faces), 5000, 0, curved).points, axis=1) - 0.3).mean()
        for curved in (0.0, 0.6)
    ]  # fmt: skip
    assert errors[1] < 0.5 * errors[0]


def test_years_move_a_skin_along_its_kin() -> None:
    """From young to old through what there is between; a skin of another region and one of a free name stay as they
    are, and shares still sum to one."""
    skins = ["young_asian_female", "middleage_asian_female", "old_asian_female", "old_asian_male", "pale"]
    assert aged(skins, [1, 0, 0, 0, 0], 0.5) == [1, 0, 0, 0, 0]
    assert aged(skins, [1, 0, 0, 0, 0], 0.95) == [0, 0, 1, 0, 0]
    between = aged(skins, [1, 0, 0, 0, 0], (STAGES["young"] + STAGES["middleage"]) / 2)
    assert between == pytest.approx([0.5, 0.5, 0, 0, 0])
    assert aged(skins, [0.5, 0, 0, 0.2, 0.3], 0.95) == pytest.approx([0, 0, 0.5, 0.2, 0.3])
    assert aged(skins, [0, 0, 0, 1, 0], 0.5) == [0, 0, 0, 1, 0]  # there is no younger one


def test_a_border_is_where_the_sheet_ends(tube: Samples) -> None:
    queries = np.array([[0.15, 0.9, 0], [0.15, 1.03, 0], [0.15, 0.5, 0], [0.16, 0.05, 0], [-0.14, -0.08, 0.0]])
    assert np.allclose(border_distance(tube, queries), [-0.1, 0.03, -0.5, -0.051, 0.081], atol=0.004)


def test_narrow_bands_keep_distances_to_half_a_step_and_signs_exactly() -> None:
    rng = np.random.default_rng(0)
    shape = np.clip(rng.normal(0, 0.05, (3, 6, 7, 8)), -0.03, 0.03).astype(np.float32)
    shape[:, :2] = 0.03
    shape[:, 5] = -0.03
    state = {"a": shape, "b": rng.normal(size=(4, 2, 5, 5)).astype(np.float32), "c": np.float32([1.5, 2.5]),
             "d": np.array([[3, 200]], np.uint8)}  # fmt: skip
    packed = storage.pack(state, {"a": 0.03}, frozenset({"b"}))
    assert packed["a"].dtype == packed["b"].dtype == np.int8
    assert packed["a"].size < shape.size
    back = storage.unpack(packed)
    assert back.keys() == state.keys()
    assert np.abs(back["a"] - shape).max() <= 0.03 / 127 / 2 + 1e-7
    assert (back["a"][:, :2] == np.float32(0.03)).all()
    assert (
        np.abs(back["b"] - state["b"]) <= np.abs(state["b"]).reshape(4, -1).max(1).reshape(4, 1, 1, 1) / 254 + 1e-6
    ).all()
    assert np.array_equal(back["d"], state["d"])
