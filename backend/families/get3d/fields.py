# SPDX-License-Identifier: GPL-3.0-or-later
"""Functions of position: three feature planes, a feature volume, and the small modulated MLPs that read them.

Points are in the grid's cube [-scale / 2, scale / 2]^3. On the nodes of a lattice the planes separate: a node (i, j, k)
sums one feature of each plane, and no plane knows all three indices. So does the first linear layer of an MLP. What
takes n^3 bilinear reads and a matrix product as written takes 3 n^2 of them and n^3 sums: see `on_axes`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numba
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from backend.networks.stylegan2 import EPSILON, GAIN, SLOPE, EqualLinear, leaky_relu, modulated_linear

PLANE_AXES = ((0, 1), (1, 2), (0, 2))  # of the three planes: axis along the image width, axis along its height


def to_unit(points: Float[Tensor, "... 3"], scale: float) -> Float[Tensor, "... 3"]:
    """g = 2 clamp((p + s/2) / s, 0, 1) - 1: the cube to [-1, 1]^3, points beyond onto its border."""
    return ((points + scale / 2) / scale).clamp(0, 1) * 2 - 1


def stack_planes(planes: Float[Tensor, "B 3C R R"]) -> Float[Tensor, "B 3 R R C"]:
    """The three planes with the features of a pixel side by side, as they are read."""
    return planes.unflatten(1, (3, -1)).permute(0, 1, 3, 4, 2).contiguous()


def read_planes(planes: Float[Tensor, "B 3 R R C"], g: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N C"]:
    """Sum of the three planes' features, bilinear, zero beyond the border, pixel areas (align_corners off).

    A point sums twelve rows of a table of pixels, weighted: one fused kernel, with gradients to planes and points.
    """
    count, _, size, _, channels = planes.shape
    table = planes.reshape(-1, channels)
    places, weights = [], []
    at = (g + 1) * (size / 2) - 0.5  # in pixels
    low = at.detach().floor()
    share = at - low
    low = low.long()
    start = size * size * torch.arange(count, device=g.device)[:, None] * 3
    for plane, (u, v) in enumerate(PLANE_AXES):
        for right in (0, 1):
            column, along = low[..., u] + right, share[..., u] if right else 1 - share[..., u]
            for down in (0, 1):
                row, across = low[..., v] + down, share[..., v] if down else 1 - share[..., v]
                inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)
                places.append(torch.where(inside, (start + plane * size * size) + row * size + column, 0))
                weights.append(torch.where(inside, along * across, 0))
    index = torch.stack(places, -1).flatten(0, 1)
    weight = torch.stack(weights, -1).flatten(0, 1)
    out = functional.embedding_bag(index, table, mode="sum", per_sample_weights=weight.to(table.dtype))
    return out.unflatten(0, (count, -1))


def read_volume(volume: Float[Tensor, "B C D H W"], g: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N C"]:
    """Trilinear, corners of the cube at the outermost voxels' centres (align_corners on); x runs along W."""
    grid = g[:, None, None]
    found = functional.grid_sample(volume, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return found[:, :, 0, 0].transpose(1, 2)


class ModulatedLinear(nn.Module):
    """Linear layer whose weights are scaled per input by a style and then normalised per output."""

    def __init__(self, inputs: int, outputs: int, w_dim: int) -> None:
        super().__init__()
        self.affine = EqualLinear(w_dim, inputs, bias=1.0)
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Float[Tensor, "B N I"], w: Float[Tensor, "B W"]) -> Float[Tensor, "B N O"]:
        return modulated_linear(x, self.weight, self.bias, self.affine(w))

    def kernel(self, w: Float[Tensor, "1 W"]) -> Float[Tensor, "O I"]:
        """The weights as they act for one sample."""
        return modulated_kernel(self.weight, self.affine(w))[0]


def modulated_kernel(weight: Float[Tensor, "O I"], styles: Float[Tensor, "B I"]) -> Float[Tensor, "B O I"]:
    """Scaled per input by each sample's style, then normalised per output."""
    kernel = weight * styles[:, None]
    return kernel * (kernel.square().sum(2, keepdim=True) + EPSILON).rsqrt()


class FieldMLP(nn.Module):
    """Features of points -> numbers: hidden layers with sqrt(2) lrelu, a plain last one; a row of w for each."""

    def __init__(self, inputs: int, hidden: int, outputs: int, w_dim: int, hidden_layers: int = 1) -> None:
        super().__init__()
        sizes = [inputs, *[hidden] * hidden_layers, outputs]
        self.layers = nn.ModuleList(ModulatedLinear(a, b, w_dim) for a, b in itertools.pairwise(sizes))

    def forward(self, x: Float[Tensor, "B N I"], ws: Sequence[Float[Tensor, "B W"]]) -> Float[Tensor, "B N O"]:
        return run_layers(self.layers, x, ws)


def run_layers(
    layers: nn.ModuleList, x: Float[Tensor, "B N I"], ws: Sequence[Float[Tensor, "B W"]]
) -> Float[Tensor, "B N O"]:
    """Modulated linear layers with sqrt(2) lrelu between them."""
    for i, (layer, w) in enumerate(zip(layers, ws, strict=True)):
        x = layer(leaky_relu(x) if i else x, w)
    return x


def planes_on_axis(planes: Float[Tensor, "B 3 R R C"], g: Float[Tensor, " n"]) -> list[Float[Tensor, "B n n C"]]:
    """Each plane at all nodes of a cubic lattice whose coordinates along every axis are `g`, in -1..1; the lower axis
    comes first. Differentiable in the planes."""
    weights = _weights(g, planes[0, 0])
    return [torch.einsum("bhwc,iw,jh->bijc", plane, weights, weights) for plane in planes.unbind(1)]


def separated(
    parts: Sequence[Float[Tensor, "B n n C"]], mlp: FieldMLP, ws: Sequence[Float[Tensor, "B W"]]
) -> Float[Tensor, "B N O"]:
    """`mlp` at all nodes, in lexicographic order: its first layer is applied to the planes before they are summed.
    Differentiable; see `on_axes` for the fast way to one number."""
    first, (xy, yz, xz) = mlp.layers[0], parts
    kernel = modulated_kernel(first.weight, first.affine(ws[0]))
    xy, yz, xz = (torch.einsum("bijc,boc->bijo", part, kernel) for part in (xy, yz, xz))
    x = (xy[:, :, :, None] + yz[:, None] + (xz + first.bias)[:, :, None]).flatten(1, 3)
    for layer, w in zip(list(mlp.layers)[1:], list(ws)[1:], strict=True):
        x = layer(leaky_relu(x), w)
    return x


@torch.no_grad()
def on_axes(
    planes: Float[Tensor, "1 3 R R C"],
    mlp: FieldMLP,
    ws: Sequence[Float[Tensor, "1 W"]],
    axes: Sequence[Float[Tensor, " n"]],
) -> Float[np.ndarray, "X Y Z"]:
    """The value of an MLP with one hidden layer and one output at all nodes of a lattice, whose coordinates along each
    axis are in -1..1: the numbers of `mlp(read_planes(...))` to rounding, many times faster on a CPU."""
    first, last = mlp.layers
    kernel = first.kernel(ws[0])
    parts = []
    for plane, (u, v) in zip(planes[0], PLANE_AXES, strict=True):
        # each row of the plane at all columns asked for, then all rows: bilinear is linear in each
        features = torch.einsum("hwc,iw,jh->ijc", plane, _weights(axes[u], plane), _weights(axes[v], plane))
        parts.append((features @ kernel.T).contiguous().cpu().numpy())
    end = (last.kernel(ws[1])[0] * GAIN).cpu().numpy()
    values = np.empty([len(axis) for axis in axes], np.float32)
    _combine(*parts, first.bias.detach().cpu().numpy(), end, np.float32(last.bias.item()), np.float32(SLOPE), values)
    return values


def _weights(g: Float[Tensor, " n"], plane: Float[Tensor, "R R C"]) -> Float[Tensor, "n R"]:
    """How much each pixel counts at coordinate g: 1 - distance in pixels, at least 0."""
    size = len(plane)
    pixels = torch.arange(size, device=plane.device, dtype=plane.dtype)
    return (1 - ((g.to(plane)[:, None] + 1) * (size / 2) - 0.5 - pixels).abs()).clamp(min=0)


@numba.njit(cache=True, nogil=True, fastmath={"contract", "reassoc"})
def _combine(xy, yz, xz, bias, end, constant, slope, values):
    """values[i, j, k] = constant + end . lrelu(bias + xy[i, j] + yz[j, k] + xz[i, k])."""
    channels = len(bias)
    sums = np.empty(channels, np.float32)
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            for c in range(channels):
                sums[c] = bias[c] + xy[i, j, c]
            for k in range(values.shape[2]):
                total = constant
                for c in range(channels):
                    h = sums[c] + yz[j, k, c] + xz[i, k, c]
                    total += end[c] * max(h, slope * h)
                values[i, j, k] = total
