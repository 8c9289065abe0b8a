# SPDX-License-Identifier: GPL-3.0-or-later
"""The transformers of GTA (arXiv 2309.13524) and SIFU (arXiv 2312.06704), under the names of the released state dicts.

One encoding h of photo and normal maps is asked once per plane: the plane that faces the viewer by self-attention, the
others by cross-attention, GTA's with learned questions, SIFU's with normal maps of the hidden sides.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from backend.families.sifu.config import Config


def position_table(side: int, dim: int) -> Float[Tensor, "1 N dim"]:
    """Fixed positions of side x side tokens, row by row: sines and cosines of the column, then of the row, at
    frequencies 10000^(-k / (dim / 4))."""
    k = torch.arange(dim // 4, dtype=torch.float64)
    waves = torch.arange(side, dtype=torch.float64)[:, None] * 10000 ** (-k / (dim // 4))
    line = torch.cat([waves.sin(), waves.cos()], 1)  # [side, dim / 2]
    columns = line[None].expand(side, side, -1)
    rows = line[:, None].expand(side, side, -1)
    return torch.cat([columns, rows], 2).reshape(1, side * side, dim).float()


def _table(config: Config) -> nn.Parameter:
    return nn.Parameter(position_table(config.tokens, config.dim), requires_grad=False)


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v per head; heads are consecutive channels."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads = config.heads
        self.to_qkv = nn.Linear(config.dim, 3 * inner, bias=False)
        self.to_out = nn.Linear(inner, config.dim)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        q, k, v = self.to_qkv(x).chunk(3, 2)
        return self.to_out(_attend(q, k, v, self.heads))


class FeedForward(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(config.dim, config.feed), nn.Tanh(), nn.Linear(config.feed, config.dim))

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return self.net(x)


class Normed(nn.Module):
    """fn(LayerNorm(x))"""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return self.fn(self.norm(x))


class SelfTransformer(nn.Module):
    def __init__(self, config: Config, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([Normed(config.dim, SelfAttention(config)), Normed(config.dim, FeedForward(config))])
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            for part in layer:
                x = x + part(x)
        return self.norm(x)


class CrossAttention(nn.Module):
    """State looks at itself, is normalised, and asks the memory; what it finds is added to the *normalised* state."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads = config.heads
        self.to_kv = nn.Linear(config.dim, 2 * inner, bias=False)
        self.to_q = nn.Linear(config.dim, inner, bias=False)
        self.norm = nn.LayerNorm(config.dim)
        self.to_out = nn.Linear(inner, config.dim)
        self.multi_head_attention = Normed(config.dim, SelfAttention(config))

    def forward(self, z: Float[Tensor, "B N D"], memory: Float[Tensor, "B M D"]) -> Float[Tensor, "B N D"]:
        a = self.norm(self.multi_head_attention(z) + z)
        k, v = self.to_kv(memory).chunk(2, 2)
        return self.to_out(_attend(self.to_q(a), k, v, self.heads)) + a


class CrossTransformer(nn.Module):
    def __init__(self, config: Config, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([CrossAttention(config), Normed(config.dim, FeedForward(config))]) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, z: Float[Tensor, "B N D"], memory: Float[Tensor, "B M D"]) -> Float[Tensor, "B N D"]:
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            z = layer[0](z, memory)
            z = layer[1](z) + z
        return self.norm(z)


class Tokens(nn.Sequential):
    """Picture -> tokens, row by row; the convolution is called `0`."""

    def __init__(self, inputs: int, config: Config) -> None:
        super().__init__(nn.Conv2d(inputs, config.dim, config.patch, stride=config.patch))

    def forward(self, input: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        return self[0](input).flatten(2).transpose(1, 2)


class Pixels(nn.Module):
    """Tokens -> plane with a quarter of the picture's pixels per side; the transposed convolution is called `1`."""

    def __init__(self, outputs: int, config: Config) -> None:
        super().__init__()
        size = config.patch // 4
        self.add_module("1", nn.ConvTranspose2d(config.dim, outputs, size, stride=size))
        self.side = config.tokens

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B C h w"]:
        return self.get_submodule("1")(tokens.transpose(1, 2).unflatten(2, (self.side, self.side)))


class Encoder(nn.Module):
    """Photo and both normal maps -> h."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.en_pos_embedding = _table(config)
        self.to_patch_embedding = Tokens(9, config)
        self.transformer = SelfTransformer(config, config.depth)

    def forward(self, x9: Float[Tensor, "B 9 H W"]) -> Float[Tensor, "B N D"]:
        return self.transformer(self.to_patch_embedding(x9) + self.en_pos_embedding)


class SelfDecoder(nn.Module):
    """h -> the plane that faces the viewer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.de_pos_embedding = _table(config)
        self.transformer = SelfTransformer(config, config.decoder_depth)
        self.to_pixel = Pixels(config.plane, config)

    def forward(self, h: Float[Tensor, "B N D"]) -> Float[Tensor, "B C h w"]:
        return self.to_pixel(self.transformer(h + self.de_pos_embedding))


class LearnedDecoder(nn.Module):
    """GTA: h -> a plane that a learned question asks for."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(config.tokens**2, config.dim))
        self.de_pos_embedding = _table(config)
        self.transformer = CrossTransformer(config, config.decoder_depth)
        self.to_pixel = Pixels(config.side_plane, config)

    def forward(self, h: Float[Tensor, "B N D"]) -> Float[Tensor, "B C h w"]:
        z = (self.query + self.de_pos_embedding).expand(len(h), -1, -1)
        return self.to_pixel(self.transformer(z, h + self.de_pos_embedding))


class NormalDecoder(nn.Module):
    """SIFU: h -> the plane of a side whose normals ask for it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.de_pos_embedding = _table(config)
        self.to_patch_embedding = Tokens(3, config)
        self.transformer = CrossTransformer(config, config.decoder_depth)
        self.to_pixel = Pixels(config.plane, config)

    def forward(self, h: Float[Tensor, "B N D"], normals: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        z = self.to_patch_embedding(normals) + self.de_pos_embedding
        return self.to_pixel(self.transformer(z, h + self.de_pos_embedding))


class ImageFilter(nn.Module):
    """Encoder and decoders: photo [-1, 1] and normal maps -> planes by name."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.kind = config.kind
        self.encoder = Encoder(config)
        if config.kind == "gta":
            self.xy_decoder = SelfDecoder(config)
            self.yz_decoder = LearnedDecoder(config)
            self.xz_decoder = LearnedDecoder(config)
        else:
            self.F_decoder = SelfDecoder(config)
            self.B_decoder = NormalDecoder(config)
            self.R_decoder = NormalDecoder(config)
            self.L_decoder = NormalDecoder(config)

    def forward(
        self,
        image: Float[Tensor, "B 3 H W"],
        front: Float[Tensor, "B 3 H W"],
        back: Float[Tensor, "B 3 H W"],
        right: Float[Tensor, "B 3 H W"] | None = None,
        left: Float[Tensor, "B 3 H W"] | None = None,
    ) -> dict[str, Float[Tensor, "B C h w"]]:
        """`front` and `back` are the predicted clothed normals, `right` and `left` those of the body's sides, which
        only SIFU reads. SIFU's back plane is asked for by the *clothed* back normals, as the released network was
        trained (the paper has the body's)."""
        h = self.encoder(torch.cat([image, front, back], 1))
        if self.kind == "gta":
            return {"xy": self.xy_decoder(h), "yz": self.yz_decoder(h), "xz": self.xz_decoder(h)}
        assert right is not None
        assert left is not None
        return {
            "F": self.F_decoder(h), "B": self.B_decoder(h, back), "R": self.R_decoder(h, right),
            "L": self.L_decoder(h, left),
        }  # fmt: skip
