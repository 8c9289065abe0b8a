# SPDX-License-Identifier: GPL-3.0-or-later
"""Cameras in OpenGL's conventions: the camera looks down its own -Z, clip space is -w..w with z = -w at the near plane.

World space is that of the whole project: metres, right-handed, Y up, people face +Z. Every function works on the
device and in the dtype of its tensors and is differentiable; leading dimensions are batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Camera:
    """One camera or a batch of them."""

    c2w: Float[Tensor, "... 4 4"]  # camera space to world space, a rigid motion
    projection: Float[Tensor, "... 4 4"]  # camera space to clip space

    @property
    def view(self) -> Float[Tensor, "... 4 4"]:
        """World space to camera space: the inverse of the rigid `c2w`."""
        rotation, eye = self.c2w[..., :3, :3], self.c2w[..., :3, 3:]
        inverse = rotation.transpose(-1, -2)
        top = torch.cat([inverse, -inverse @ eye], dim=-1)
        return torch.cat([top, self.c2w[..., 3:, :]], dim=-2)

    @property
    def mvp(self) -> Float[Tensor, "... 4 4"]:
        """World space to clip space."""
        return self.projection @ self.view

    def intrinsics(self, resolution: tuple[int, int]) -> Float[Tensor, "... 3 3"]:
        """Pinhole matrix K of a perspective camera for an image of (height, width): pixel = K (x, y, depth) / depth
        with x to the right, y down, depth forward; the centre of the top-left pixel is (0.5, 0.5)."""
        height, width = resolution
        matrix = self.projection.new_zeros(*self.projection.shape[:-2], 3, 3)
        matrix[..., 0, 0] = self.projection[..., 0, 0] * (width / 2)
        matrix[..., 1, 1] = self.projection[..., 1, 1] * (height / 2)
        matrix[..., 0, 2] = (1 - self.projection[..., 0, 2]) * (width / 2)
        matrix[..., 1, 2] = (1 + self.projection[..., 1, 2]) * (height / 2)
        matrix[..., 2, 2] = 1
        return matrix


def look_at(
    eye: Float[Tensor, "... 3"], target: Float[Tensor, "... 3"], up: Float[Tensor, "... 3"] | None = None
) -> Float[Tensor, "... 4 4"]:
    """Camera-to-world matrix of a camera at `eye` that looks at `target`; `up` is +Y unless given and must not be
    parallel to the line of sight."""
    up = torch.tensor([0.0, 1.0, 0.0], dtype=eye.dtype, device=eye.device) if up is None else up
    back = functional.normalize(eye - target, dim=-1)
    right = functional.normalize(torch.linalg.cross(up.expand_as(back), back), dim=-1)
    columns = torch.stack([right, torch.linalg.cross(back, right), back, eye.expand_as(back)], dim=-1)
    last = columns.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*columns.shape[:-2], 1, 4)
    return torch.cat([columns, last], dim=-2)


def perspective(fov_y: float, aspect: float, near: float, far: float) -> Float[Tensor, "4 4"]:
    """Projection with a vertical field of view of `fov_y` radians; aspect is width / height; near, far in metres."""
    scale = 1 / math.tan(fov_y / 2)
    depth, shift = (far + near) / (near - far), 2 * far * near / (near - far)
    return torch.tensor([[scale / aspect, 0, 0, 0], [0, scale, 0, 0], [0, 0, depth, shift], [0, 0, -1.0, 0]])


def orthographic(half_height: float, aspect: float, near: float, far: float) -> Float[Tensor, "4 4"]:
    """Parallel projection that shows `half_height` metres above and below the axis; aspect is width / height."""
    depth, shift = 2 / (near - far), (far + near) / (near - far)
    scale = 1 / half_height
    return torch.tensor([[scale / aspect, 0, 0, 0], [0, scale, 0, 0], [0, 0, depth, shift], [0, 0, 0, 1.0]])


def to_clip(points: Float[Tensor, "... V 3"], matrix: Float[Tensor, "... 4 4"]) -> Float[Tensor, "... V 4"]:
    """Points [V, 3] or [B, V, 3] through `mvp` [4, 4] or [B, 4, 4]: homogeneous clip coordinates."""
    matrix = matrix.to(points)
    return points @ matrix[..., :3].transpose(-1, -2) + matrix[..., None, :, 3]


def orbit(
    bounds: Float[Tensor, "2 3"],
    azimuths: Sequence[float],
    elevation: float = 0.0,
    fov_y: float | None = math.radians(25),
    aspect: float = 1.0,
    margin: float = 1.05,
) -> Camera:
    """Cameras [B] that look at the centre of a box from `azimuths` (radians; 0 is in front, +Z, pi/2 is +X) and
    `elevation` (radians above the horizon), far enough that the whole box is in the picture with `margin`.
    Orthographic when `fov_y` is None. The frame is that of the box's upright cylinder, so every azimuth frames alike
    and a turntable does not breathe."""
    low, high = bounds.detach().double().cpu()
    centre, half = (low + high) / 2, (high - low) / 2
    radius = float(torch.linalg.vector_norm(half[[0, 2]])) * margin
    half_height = float(half[1]) * margin * math.cos(elevation) + radius * abs(math.sin(elevation))
    half_height = max(half_height, radius / aspect)
    reach = float(torch.linalg.vector_norm(half)) * margin
    distance = 2 * reach if fov_y is None else half_height / math.tan(fov_y / 2) + radius
    angles = torch.tensor(list(azimuths), dtype=torch.float64)
    height = torch.full_like(angles, math.sin(elevation))
    direction = torch.stack([angles.sin() * math.cos(elevation), height, angles.cos() * math.cos(elevation)], dim=-1)
    near, far = max(distance - reach, 0.01 * distance), distance + reach
    if fov_y is None:
        projection = orthographic(half_height, aspect, near, far)
    else:
        projection = perspective(fov_y, aspect, near, far)
    c2w = look_at(centre + distance * direction, centre).to(bounds)
    return Camera(c2w, projection.to(bounds).expand(len(angles), 4, 4))


def turntable(bounds: Float[Tensor, "2 3"], count: int, **options: float | None) -> Camera:
    """`count` cameras evenly around the box, the first one in front; `options` as for `orbit`."""
    return orbit(bounds, [2 * math.pi * i / count for i in range(count)], **options)
