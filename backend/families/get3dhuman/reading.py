# SPDX-License-Identifier: GPL-3.0-or-later
"""Point decoders made fast for one person: what is linear in the features is applied to the volume's pixels once.

A decoder's first layer, and every layer before which the input is appended again, is linear in the features, and the
features of a point are a bilinear mean of four pixels: W mean(V) = mean(W V). So the pixels carry W V, and a point
costs half the multiplications. `networks.decode_shape` and `decode_texture` are the slow twins.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from backend.families.get3dhuman.config import DEPTH_UNITS
from backend.families.get3dhuman.networks import PointDecoder

# Points at a time. Matrix products give the same bits for the same shape only, so all blocks are alike: the last one
# is filled up. Then a point's value does not depend on its company.
_BLOCK = {"cpu": 1024, "cuda": 1 << 16}


class Reader:
    """decoder(concat[features of `volume`, z']) at points; no gradient."""

    @torch.no_grad()
    def __init__(self, decoder: PointDecoder, volume: Float[Tensor, "C H W"]) -> None:
        channels, self.height, self.width = volume.shape
        pixels = volume.flatten(1).T  # [H W, C]
        maps, self.layers = [], []
        for i, layer in enumerate(decoder.filters):
            weight, bias = layer.weight[:, :, 0], layer.bias
            seen = i == 0 or i in decoder.again  # this layer reads the features
            hidden = weight.shape[1] - (channels + 1) if seen else weight.shape[1]
            self.layers.append((weight[:, :hidden].T.contiguous(), bias, weight[:, -1] * DEPTH_UNITS if seen else None))
            if seen:
                maps.append(pixels @ weight[:, hidden:-1].T)
        self.maps = torch.cat(maps, 1)
        self.block = _BLOCK[volume.device.type]

    @torch.no_grad()
    def __call__(self, ndc: Float[Tensor, "N 3"]) -> Float[Tensor, "N O"]:
        """The decoder's output after its sigmoid. Points must lie within the picture."""
        missing = -len(ndc) % self.block
        blocks = functional.pad(ndc, (0, 0, 0, missing)).split(self.block)
        outputs = [self._decode(block) for block in blocks] or [ndc.new_zeros(0, self.layers[-1][0].shape[1])]
        return torch.cat(outputs)[: len(ndc)]

    def _decode(self, ndc: Float[Tensor, "N 3"]) -> Float[Tensor, "N O"]:
        read, begin, hidden = self._read(ndc), 0, None
        for i, (weight, bias, depth) in enumerate(self.layers):
            y = bias if hidden is None else torch.addmm(bias, hidden, weight)
            if depth is not None:
                y = torch.addcmul(y + read[:, begin : begin + len(depth)], ndc[:, 2:], depth)
                begin += len(depth)
            hidden = functional.leaky_relu(y, 0.01) if i < len(self.layers) - 1 else torch.sigmoid(y)
        assert hidden is not None
        return hidden

    def _read(self, ndc: Float[Tensor, "N 3"]) -> Float[Tensor, "N S"]:
        """Bilinear means of the maps; the corner pixels' centres lie at +-1."""
        size = ndc.new_tensor([self.width - 1, self.height - 1])
        at = ((ndc[:, :2] + 1) / 2 * size).clamp(min=0).minimum(size)
        low = at.floor().minimum(size - 1)
        x, y = (at - low).unbind(1)
        first = (low[:, 1] * self.width + low[:, 0]).long()
        corners = torch.stack([first, first + 1, first + self.width, first + self.width + 1], 1)
        shares = torch.stack([(1 - x) * (1 - y), x * (1 - y), (1 - x) * y, x * y], 1)
        return functional.embedding_bag(corners, self.maps, per_sample_weights=shares, mode="sum")
