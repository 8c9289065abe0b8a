# SPDX-License-Identifier: GPL-3.0-or-later
"""One reconstructed person as a field: occupancy and colours of the networks, the photo's own pixels where it shows the
surface, and the body's skeleton.

Field space is the photo's: the body's metres, Y up, x to the right and z towards the camera, in the pose of the photo.
Person space is the rest pose: `offset` undoes the pose with the body's own skinning, so the person can be posed anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.spatial import cKDTree
from torch import Tensor
from torch.nn import functional

from backend.families.base import Step, no_step
from backend.families.sifu.prior import Placed, SkinnedBody
from backend.families.sifu.query import Answers
from backend.families.sifu.surface import INSIDE, Scheme, coarse_to_fine

MARGIN = 0.3  # metres about the body that clothes and hair may reach
EDGE = 0.5  # occupancy falls to nothing within so many lattice cells of the box: what reaches it is cut there
NEIGHBOURS = 8  # vertices of the body that carry a point
DEPTH_CELLS = 160  # along the height, of the lattice whose depth says what the photo sees
BEHIND = 0.015  # metres behind the visible surface from which on the photo does not speak for a point
JUMP = 0.04  # metres: about a larger step of depth the photo does not speak
FRONTAL = (0.25, 0.6)  # cosines to the viewer between which the photo gains its full say
RIM = 2  # pixels of the photo at the silhouette where the background bleeds in
FLAT = 0.1  # share of its volume that a blend of bone matrices must leave, to be undone
ROUGHNESS = 0.8  # nothing is known of the material


class SifuField:
    """See `families.base.HumanField` and `LatticeField`."""

    name = "human"
    focus = None
    region_density = None

    def __init__(
        self,
        answers: Answers,
        body: SkinnedBody,
        placed: Placed,
        photo: Float[Tensor, "4 H W"],
        gain: Float[Tensor, " 3"],
        scheme: Scheme,
        step: Step = no_step,
    ) -> None:
        """`photo` is the crop, sRGB 0..1 with the matte; `gain` multiplies all colours."""
        self.answers, self.body, self.placed, self.photo, self.gain = answers, body, placed, photo, gain
        self.scheme: Scheme = scheme
        self.step = step
        self.rig = body.rig(placed.shape)
        self.posed = body.posed(placed.shape, placed.rotations)
        cube = placed.to_metres(torch.tensor([[-1.0] * 3, [1.0] * 3]))
        low, high = cube.amin(0), cube.amax(0)
        self.bounds = torch.stack([torch.maximum(self.posed.amin(0) - MARGIN, low),
                                   torch.minimum(self.posed.amax(0) + MARGIN, high)])  # fmt: skip
        self._grid: tuple[list[Tensor], Tensor] | None = None
        self._tree = cKDTree(self.posed.numpy())

    def occupancy(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        """1 inside, 0 outside, and at the box's faces."""
        low, high = self.bounds
        within = ((points > low + 1e-4) & (points < high - 1e-4)).all(1)
        return self.answers.occupancy(self.placed.to_network(points)) * within

    def sdf(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        """Not a distance: 0.5 - occupancy, which has a distance's sign and zero. Its surface wants a lattice."""
        return INSIDE - self.occupancy(points)

    def sdf_on_axes(self, axes: Sequence[Float[Tensor, " n"]]) -> np.ndarray:
        values, _ = coarse_to_fine(self.occupancy, axes, self.scheme, self.step)
        self._grid = [axis.cpu() for axis in axes], values
        return (INSIDE - values).numpy()

    # ------------------------------------------------------------------------------------------------------- colours

    def color(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        """The photo's pixel where it sees the surface from before, elsewhere the network's colour."""
        share, pixels = self._from_photo(points)
        found = pixels.clone()
        rest = (share < 0.999).nonzero()[:, 0]
        if len(rest):
            own = self.answers.color(self.placed.to_network(points[rest]))
            found = found.index_copy(0, rest, torch.lerp(own, pixels[rest], share[rest, None]))
        return (found * self.gain.to(found)).clamp(0, 1)

    def _from_photo(self, points: Float[Tensor, "N 3"]) -> tuple[Float[Tensor, " N"], Float[Tensor, "N 3"]]:
        """How much the photo says of each point, 0..1, and its colour there."""
        network = self.placed.to_network(points)
        depth, facing, sure, low, high = self._depth
        local = ((points[:, :2] - low) / (high - low) * 2 - 1)[:, [1, 0]]  # rows are x there
        seen = functional.grid_sample(torch.stack([depth, facing, sure])[None], local[None, None], align_corners=True,
                                      padding_mode="border")[0, :, 0]  # fmt: skip
        near = ((points[:, 2] - seen[0]) / BEHIND + 2).clamp(0, 1)
        frontal = ((seen[1] - FRONTAL[0]) / (FRONTAL[1] - FRONTAL[0])).clamp(0, 1)
        at = network[None, None, :, :2].to(self._pixels)
        read = functional.grid_sample(self._pixels[None], at, align_corners=True, padding_mode="border")[0, :, 0]
        share = near * frontal * (seen[2] > 0.5) * read[3]
        return share * share * (3 - 2 * share), read[:3].T

    @cached_property
    def _pixels(self) -> Float[Tensor, "4 H W"]:
        """The photo, colours drawn out beyond its matte, and where it may be believed."""
        rim = max(1, round(RIM * self.photo.shape[-1] / 512))
        alpha = self.photo[3:]
        inner = -functional.max_pool2d(-alpha[None], 2 * rim + 1, 1, rim)[0]
        believed = functional.avg_pool2d((inner > 0.9).float()[None], 2 * rim + 1, 1, rim)[0]
        return torch.cat([self.photo[:3], (2 * believed - 1).clamp(0, 1)])

    @cached_property
    def _depth(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Maps [X, Y] of the surface that a viewer in front sees: z in metres, cosine to the viewer, whether there is
        one without a step near by; and the box's low and high (x, y)."""
        if self._grid is None:
            spacing = float((self.bounds[1] - self.bounds[0]).max()) / DEPTH_CELLS
            axes = [torch.arange(float(a), float(b) + spacing, spacing) for a, b in self.bounds.T]
            self.sdf_on_axes(axes)
        assert self._grid is not None
        (x, y, z), values = self._grid
        inside = values > INSIDE
        some = inside.any(2)
        last = len(z) - 1 - inside.flip(2).int().argmax(2)
        last = last.clamp(max=len(z) - 2)
        here, beyond = (values.gather(2, (last + i)[..., None])[..., 0] for i in (0, 1))
        part = ((here - INSIDE) / (here - beyond).clamp(min=1e-6)).clamp(0, 1)
        depth = torch.where(some, torch.lerp(z[last], z[last + 1], part), z[0])
        wide = functional.max_pool2d(depth[None, None], 3, 1, 1)[0, 0]
        narrow = -functional.max_pool2d(-depth[None, None], 3, 1, 1)[0, 0]
        sure = (some & (wide - narrow < JUMP)).float()
        smooth = functional.avg_pool2d(depth[None, None], 3, 1, 1, count_include_pad=False)[0, 0]
        # the outermost nodes lie on the box; all others are evenly spaced
        cell = torch.stack([axis[len(axis) // 2] - axis[len(axis) // 2 - 1] for axis in (x, y)])
        slope = torch.stack(torch.gradient(smooth, spacing=(float(cell[0]), float(cell[1]))))
        facing = (1 + slope.square().sum(0)).rsqrt()
        low, high = torch.stack([x[1], y[1]]) - cell, torch.stack([x[-2], y[-2]]) + cell
        return depth, facing, sure, low, high

    def material(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 2"]:
        return points.new_tensor([ROUGHNESS, 0.0]).expand(len(points), 2)

    # ------------------------------------------------------------------------------------------------------ skeleton

    def offset(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        """To the rest pose: the inverse of the blend of bone matrices that `skin` poses the point with."""
        indices, weights = self.skin(points)
        matrices = self.body.matrices(self.placed.shape, self.placed.rotations)
        blended = (weights[..., None, None] * matrices[indices]).sum(1)
        # where bones turn against each other their mean flattens space: there the first one alone is undone
        flat = torch.linalg.det(blended[:, :, :3]) < FLAT
        blended = torch.where(flat[:, None, None], matrices[indices[:, 0]], blended)
        turned = torch.linalg.solve(blended[:, :, :3].double(), (points - blended[:, :, 3])[..., None].double())
        return turned[..., 0].to(points) - points

    def skin(self, points: Float[Tensor, "N 3"]) -> tuple[Int[Tensor, "N 4"], Float[Tensor, "N 4"]]:
        """As the nearest vertices of the body are; weights vanish at the last of them (modified Shepard)."""
        distance, index = self._tree.query(points.detach().cpu().numpy(), k=NEIGHBOURS + 1)
        radius = distance[:, -1:]
        share = ((radius - distance[:, :-1]) / (radius * (distance[:, :-1] + 0.25 * radius) + 1e-12)) ** 2 + 1e-9
        share = torch.from_numpy((share / share.sum(1, keepdims=True)).astype(np.float32))
        at = torch.from_numpy(index[:, :-1])
        dense = torch.zeros(len(points), len(self.body.bones))
        values = self.body.skin_weights[at] * share[..., None]
        dense.scatter_add_(1, self.body.skin_indices[at].flatten(1), values.flatten(1))
        top, which = dense.topk(4, dim=1)
        return which, top / top.sum(1, keepdim=True)

    def region(self, points: Float[Tensor, "N 3"]) -> Int[Tensor, " N"]:
        """By the bone that carries a point most, so that charts do not run from an arm to the belly beside it."""
        return self.skin(points)[0][:, 0]

    def counterpart(self, points: Float[Tensor, "N 3"], other: SifuField) -> Float[Tensor, "N 3"]:
        return points
