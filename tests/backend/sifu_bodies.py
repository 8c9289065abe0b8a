# SPDX-License-Identifier: GPL-3.0-or-later
"""Bodies for tests: a ball, and the capsule person with a skeleton and a shape space."""

from __future__ import annotations

import functools

import torch

from backend.families.capsule.model import CapsuleModel
from backend.families.sifu.prior import SkinnedBody
from backend.geometry.body import BodyMesh
from backend.geometry.clean import clean
from backend.geometry.simplify import simplify
from backend.geometry.tetgrid import extract_surface
from tests.backend.test_geometry_body import ball

FRAME = torch.tensor([1.0, -1.0, 1.0])


def ball_body(rings: int = 16) -> BodyMesh:
    """Radius 0.5, in the network's frame: mirrored."""
    vertices, faces = ball(rings, 0.5, (0.05, 0.1, 0.0))
    vertices = vertices * FRAME
    low, high = vertices.amin(0), vertices.amax(0)
    return BodyMesh(vertices, faces, (vertices - low) / (high - low))


@functools.cache
def capsule_body(faces: int = 4000, thin: float = 0.0) -> SkinnedBody:
    """The mean capsule person, with two shapes: size and girth."""
    model = CapsuleModel(torch.device("cpu"))
    codes = {name: torch.zeros_like(code) for name, code in model.sample(0, 1.0, {}).codes.items()}
    from backend.families.base import Latents

    field = model.decode(Latents("capsule", codes))[0]
    mesh = simplify(clean(extract_surface(field, 96)), faces)
    indices, weights = field.skin(mesh.points)
    low, high = mesh.points.amin(0), mesh.points.amax(0)
    rig = field.rig
    assert rig is not None
    girth = torch.tensor([0.05, 0.0, 0.05])
    return SkinnedBody(
        "capsule", mesh.points, torch.stack([0.05 * mesh.points, girth * mesh.points]), mesh.faces,
        (mesh.points - low) / (high - low), rig.names, rig.parents, rig.heads,
        torch.stack([0.05 * rig.heads, girth * rig.heads]), rig.tails,
        torch.stack([0.05 * rig.tails, girth * rig.tails]), indices, weights,
    )  # fmt: skip
