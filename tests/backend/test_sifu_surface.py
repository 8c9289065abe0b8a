# SPDX-License-Identifier: GPL-3.0-or-later
"""From occupancy to a surface: a ball where it is, a person, a thin sheet that one scheme finds, nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backend.families.capsule.model import CapsuleModel
from backend.families.sifu.surface import coarse_to_fine, cube_mesh, levels_of
from backend.geometry.clean import is_closed
from backend.geometry.mesh import signed_volume
from backend.protocol import PopulaceError


def soft(distance: Tensor, width: float = 0.03) -> Tensor:
    return torch.sigmoid(-distance / (width / 4)) * 1.0


CENTRE = torch.tensor([0.21, -0.13, 0.17])


def ball(points: Tensor) -> Tensor:
    return soft((points - CENTRE).norm(dim=1) - 0.5) * (points.abs() < 1).all(1)


@pytest.mark.parametrize("scheme", ["official", "full"])
@pytest.mark.parametrize("cells", [128, 256])
def test_a_ball_is_where_it_is(scheme, cells: int) -> None:
    mesh = cube_mesh(ball, cells, scheme)
    assert is_closed(mesh)
    assert (mesh.vertices.mean(0) - CENTRE).abs().max() < 1e-3  # no shift by a voxel, nor by a part of one
    assert ((mesh.vertices - CENTRE).norm(dim=1) - 0.5).abs().max() < 5e-3
    assert signed_volume(mesh.vertices, mesh.faces) > 0


def test_few_points_are_asked_and_the_values_are_those_of_all() -> None:
    axes = [torch.linspace(-1, 1, 257)] * 3
    official, some = coarse_to_fine(ball, axes, "official")
    assert some < 0.02 * 257**3
    full, more = coarse_to_fine(ball, axes, "full")
    assert some < more < 0.1 * 257**3
    grid = torch.stack(torch.meshgrid(*[a[::2] for a in axes], indexing="ij"), -1).reshape(-1, 3)
    truth = ball(grid).reshape(129, 129, 129)
    near = (truth > 0.02) & (truth < 0.98)
    assert torch.equal(full[::2, ::2, ::2][near], truth[near])
    assert torch.equal(official[::2, ::2, ::2][near], truth[near])  # as fine as it is ever asked
    assert ((full > 0.5)[::2, ::2, ::2] == (truth > 0.5)).all()


def test_grids_are_the_published_ones_and_small_ones_are_asked_wholly() -> None:
    assert levels_of("official", 256) == [(8, 0), (4, 9), (2, 7), (1, 0)]
    assert levels_of("full", 256) == [(4, 0), (2, 7), (1, 3)]
    assert levels_of("official", 48) == levels_of("full", 48) == [(1, 0)]
    assert levels_of("official", 512) == [(16, 0), (8, 9), (4, 7), (2, 3), (1, 0)]


def test_axes_of_any_length() -> None:
    axes = [torch.linspace(-0.9, 0.9, n) for n in (46, 91, 60)]
    values, _ = coarse_to_fine(ball, axes, "full")
    assert values.shape == (46, 91, 60)
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    assert ((values > 0.5) == (ball(grid).reshape(values.shape) > 0.5)).all()


def test_a_person_of_capsules_keeps_its_shape() -> None:
    model = CapsuleModel(torch.device("cpu"))
    field = model.decode(model.sample(3, 1.0, {}))[0]
    low, high = field.bounds
    scale = 1.8 / float((high - low).max())
    middle = (low + high) / 2

    def ask(points: Tensor) -> Tensor:
        return soft(field.sdf(points / scale + middle) * scale, 0.01) * (points.abs() < 1).all(1)

    for scheme, limit in (("official", 0.008), ("full", 0.004)):
        mesh = cube_mesh(ask, 256, scheme)
        off = field.sdf(mesh.vertices / scale + middle).abs() * scale
        assert off.max() < limit
        assert is_closed(mesh)


def test_a_thin_sheet_is_found_by_the_full_scheme_only() -> None:
    """A sheet of 1.4 % of the cube's side, between the nodes of the grid of 33, hung on nothing."""

    def sheet(points: Tensor) -> Tensor:
        distance = torch.stack([(points[:, 2] - 0.0315).abs() - 0.014, points[:, 0].abs() - 0.5,
                                points[:, 1].abs() - 0.5]).amax(0)  # fmt: skip
        return soft(distance, 0.004)

    with pytest.raises(PopulaceError) as error:
        cube_mesh(sheet, 256, "official")
    assert error.value.code == "empty_surface"
    mesh = cube_mesh(sheet, 256, "full")
    assert is_closed(mesh)
    assert (mesh.vertices[:, 2].amax() - mesh.vertices[:, 2].amin() - 0.028).abs() < 4e-3


def test_nothing_is_said_to_be_nothing() -> None:
    with pytest.raises(PopulaceError) as error:
        cube_mesh(lambda points: torch.zeros(len(points)), 64)
    assert error.value.code == "empty_surface"
