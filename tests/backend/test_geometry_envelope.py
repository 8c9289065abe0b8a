# SPDX-License-Identifier: GPL-3.0-or-later
"""The surface of coarse levels of detail: pinholes close, the rest stays where it is."""

from __future__ import annotations

import math

import pytest
import torch

from backend.geometry.clean import clean, euler_number, is_closed
from backend.geometry.envelope import GAP_M, envelope
from backend.geometry.simplify import simplify
from backend.geometry.tetgrid import extract_surface

from .geometry_fields import Shape, torus


def pierced(radius: float):
    """A hollow ball, outside 0.4 m and inside 0.36 m, with six round holes of this radius along the axes."""

    def sdf(p):
        far = p.norm(dim=1)
        shell = torch.maximum(far - 0.4, 0.36 - far)
        ways = torch.stack([p[:, [j for j in range(3) if j != i]].norm(dim=1) for i in range(3)], 1)
        return torch.maximum(shell, radius - ways.amin(1))

    return sdf


def test_pinholes_close_and_the_cavity_behind_them_goes() -> None:
    field = Shape(pierced(0.8 * GAP_M / 2))
    fine = clean(extract_surface(field, 256))
    assert euler_number(fine) == 2 - 2 * 5  # a sphere within a sphere, joined by six tunnels
    coarse = envelope(field, 256)
    assert is_closed(coarse)
    assert euler_number(coarse) == 2
    assert coarse.points.norm(dim=1).min() > 0.4 - 0.041  # a vertex over a hole lies on its wall
    vertices, faces = coarse.vertices.double(), coarse.faces
    a, b, c = vertices[faces].unbind(1)
    volume = float((a * torch.linalg.cross(b, c)).sum() / 6)
    assert volume == pytest.approx(4 / 3 * math.pi * 0.4**3, rel=0.02)  # full: the cavity is gone
    assert len(simplify(coarse, 60).faces) <= 60


def test_what_is_wider_than_a_gap_stays_open_and_in_place() -> None:
    field = Shape(pierced(3 * GAP_M))
    assert euler_number(envelope(field, 256)) == 2 - 2 * 5
    ring = Shape(torus())
    mesh = envelope(ring, 256)
    assert euler_number(mesh) == 0
    assert ring.sdf(mesh.points).abs().max() < 1e-4


def test_a_field_that_the_closing_does_not_suit_has_none() -> None:
    assert envelope(Shape(lambda p: p.norm(dim=1) + 1), 256) is None
