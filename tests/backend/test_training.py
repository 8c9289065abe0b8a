# SPDX-License-Identifier: GPL-3.0-or-later
"""Making targets, codes and weights: analytic shapes, distributions with known answers, a short real training run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh

from backend import weights
from backend.families.people.model import SCALE, load
from backend.networks.triplane import PlaneBank, Volume, gather
from backend.training.canonical import Samples, sample_surface, signed_distance, winding_number
from backend.training.people import ELBOW, SHOULDER, WRIST, arm_distance, pattern_mask, train
from backend.training.people_export import find_clusters, quantise, transport

CENTRE = np.array([0.0, 1.63, 0.06])  # of the volume of hats


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


def test_codes_that_occur_often_are_clusters_without_spread() -> None:
    rng = np.random.default_rng(0)
    often, rare = rng.normal(size=(3, 6)), rng.normal(size=(600, 6))
    w = np.concatenate([np.repeat(often, 100, 0), rare])
    centres, radii = find_clusters(w, w, 40, rng)
    assert all((np.abs(centres[radii == 0] - code).max(1) < 1e-3).any() for code in often)
    assert all((np.abs(w - c).max(1) < 1e-9).any() for c in centres)
    assert (radii > 0).sum() > 20


def test_arm_distance_runs_along_the_bones_of_both_arms() -> None:
    upper, lower = np.linalg.norm(ELBOW - SHOULDER), np.linalg.norm(WRIST - ELBOW)
    points = np.stack([SHOULDER, ELBOW, WRIST, WRIST * [-1, 1, 1], [0, 1.2, 0]])
    assert np.allclose(arm_distance(points), [0, upper, upper + lower, upper + lower, 0], atol=0.012)


def test_stripes_repeat_and_plain_is_plain() -> None:
    y = np.linspace(0.5, 1.5, 801)
    points = np.stack([np.zeros(801), y, np.zeros(801)], 1)
    wide = pattern_mask("wide stripes", points)
    assert np.allclose(wide[80:], wide[:-80], atol=1e-6)  # a period of 0.1 m
    assert (wide.min(), wide.max()) == (0, 1)
    assert not pattern_mask("plain", points).any()


def test_volumes_blend_to_one_and_mirrors_agree() -> None:
    banks = torch.nn.ModuleList([
        PlaneBank(Volume("a", (0.3, 0, 0), (0.3, 0.3, 0.3), mirror=True), 2, 2, 8),
        PlaneBank(Volume("b", (0.0, 0, 0), (0.2, 0.2, 0.2)), 2, 2, 8),
    ])  # fmt: skip
    with torch.no_grad():
        for bank in banks:
            bank.basis.fill_(0.5)
    planes = [bank(torch.zeros(1, 2)) for bank in banks]
    points = torch.rand(500, 3, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.7
    features, held = gather(banks, planes, points)
    x = points.abs()
    inside = ((x < torch.tensor([0.6, 0.3, 0.3])) & (x[:, :1] > 0)).all(1) | (x < 0.2).all(1)
    assert torch.equal(held, inside)
    assert torch.allclose(features, torch.full_like(features, 0.5), atol=1e-5)
    with torch.no_grad():
        banks[0].basis.normal_(generator=torch.Generator().manual_seed(1))
    planes = [bank(torch.ones(1, 2)) for bank in banks]
    outer = torch.tensor([[0.4, 0.1, -0.2], [-0.4, 0.1, -0.2]])
    left, right = gather(banks, planes, outer)[0]
    assert torch.equal(left, right)


def test_quantised_planes_are_within_half_a_step(tmp_path: Path) -> None:
    networks = load(torch.device("cpu"), weights.locate("people", tmp_path)).networks
    exact, packed = networks.state_dict(), quantise(networks)
    planes = [k for k in packed if k + SCALE in packed]
    assert len(planes) >= 12
    for key in planes:
        scale = packed[key + SCALE].float()
        # the scale itself is a half-precision number: 127 of its roundings come on top of half a step
        assert ((packed[key].float() * scale - exact[key]).abs() <= scale * (0.5 + 127 * 2**-11) + 1e-7).all()


@pytest.fixture
def hats(tmp_path: Path) -> Path:
    """A training set of two balls as hats above a ball as body."""
    rng = np.random.default_rng(0)
    data = tmp_path / "data"
    (data / "items").mkdir(parents=True)
    nodes = [np.linspace(-1, 2.5, 60)] * 3
    body = np.linalg.norm(np.stack(np.meshgrid(*nodes, indexing="ij"), -1) - CENTRE, axis=-1) - 0.07
    step = float(nodes[0][1] - nodes[0][0])
    grid = {"lo": np.full(3, -1, np.float32), "step": np.float32(step), "values": body.astype(np.float32)}
    np.savez(
        data / "grids.npz", **{f"{n}/{k}": v for n in ("whole", "head", "hand_l", "hand_r") for k, v in grid.items()}
    )
    shell = rng.normal(size=(5000, 3))
    shell *= 0.07 / np.linalg.norm(shell, axis=1, keepdims=True)
    np.savez(data / "pool.npz", skin=(shell + CENTRE).astype(np.float32))
    listing = []
    for i, radius in enumerate((0.08, 0.1)):
        points = (CENTRE + rng.uniform(-0.12, 0.12, (20_000, 3))).astype(np.float32)
        from_centre = np.linalg.norm(points - CENTRE, axis=1).astype(np.float32)
        surface = shell / 0.07 * radius + CENTRE
        np.savez(data / f"items/{i}.npz", points=points, sdf=from_centre - radius, body=from_centre - 0.07,
                 surface=surface.astype(np.float32), color=np.full((5000, 3), 60 + 100 * i, np.uint8))  # fmt: skip
        listing.append({"part": "accessory", "name": str(i), "gender": "any", "file": f"items/{i}.npz"})
    (data / "items.json").write_text(json.dumps(listing))
    return data


def test_training_learns_repeats_and_resumes(hats: Path, tmp_path: Path) -> None:
    runs = [tmp_path / "run", tmp_path / "again"]
    losses = [train(hats, run, "accessory.shape", max_steps=60, batch=2, count=400) for run in runs]
    assert losses[0] == losses[1]
    assert (runs[0] / "accessory.shape.safetensors").read_bytes() == (
        runs[1] / "accessory.shape.safetensors"
    ).read_bytes()
    later = train(hats, runs[0], "accessory.shape", max_steps=60, batch=2, count=400)
    assert json.loads((runs[0] / "accessory.shape.json").read_text())["steps"] == 120
    assert later < 0.5 * losses[0]
    assert train(hats, runs[0], "accessory.tex", max_steps=120, batch=2, count=400) < 0.15  # untrained: 0.25
    assert not list(runs[0].glob("*.tmp"))


def test_training_is_boxed_in_time(hats: Path, tmp_path: Path) -> None:
    train(hats, tmp_path, "accessory.shape", minutes=1e-4, max_steps=10**6, batch=1, count=50)
    assert 1 <= json.loads((tmp_path / "accessory.shape.json").read_text())["steps"] < 10**4
