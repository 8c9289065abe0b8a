# SPDX-License-Identifier: GPL-3.0-or-later
"""CLIP (Radford et al. 2021): pictures and sentences as unit vectors that point alike where they mean alike.

Modules are named as in the public safetensors files (openai/clip-vit-base-patch32), so `load_state_dict` of such a file
is all there is to do. Both towers are pre-norm transformers with quick GELU, x sigmoid(1.702 x).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from backend.protocol import PopulaceError
from backend.weights import Weights, check_tensors

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of pictures in 0..1, per channel
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Config:
    """The defaults are ViT-B/32's."""

    width: int = 768  # of the picture tower
    text_width: int = 512
    layers: int = 12
    text_layers: int = 12
    heads: int = 12
    text_heads: int = 8
    embedding: int = 512
    size: int = 224  # of pictures, pixels
    patch: int = 32
    words: int = 49408
    context: int = 77


class Attention(nn.Module):
    """Of every token to every token, or to those before it."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        q, k, v = (p(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        found = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(found.transpose(1, 2).flatten(2))


class Feed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads, causal)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = Feed(width)

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, width: int, heads: int, layers: int, causal: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, heads, causal) for _ in range(layers))


class TextEmbeddings(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.words, config.text_width)
        self.position_embedding = nn.Embedding(config.context, config.text_width)


class TextTower(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config.text_width, config.text_heads, config.text_layers, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.text_width)

    def forward(self, tokens: Int[Tensor, "B N"]) -> Float[Tensor, "B C"]:
        """At the end of each text, which has the highest number of all tokens."""
        x = self.embeddings.token_embedding(tokens) + self.embeddings.position_embedding.weight[: tokens.shape[1]]
        for layer in self.encoder.layers:
            x = layer(x)
        return self.final_layer_norm(x)[torch.arange(len(x), device=x.device), tokens.argmax(1)]


class PatchEmbeddings(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(0.02 * torch.randn(config.width))
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch, config.patch, bias=False)
        self.position_embedding = nn.Embedding((config.size // config.patch) ** 2 + 1, config.width)


class VisionTower(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embeddings = PatchEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.width)  # spelt as in the public files
        self.encoder = Encoder(config.width, config.heads, config.layers, causal=False)
        self.post_layernorm = nn.LayerNorm(config.width)

    def forward(self, pictures: Float[Tensor, "B 3 S S"]) -> list[Float[Tensor, "B N C"]]:
        """The tokens before the first layer and behind each one, the picture's own first."""
        e = self.embeddings
        patches = e.patch_embedding(pictures).flatten(2).transpose(1, 2)
        first = e.class_embedding.expand(len(pictures), 1, -1)
        seen = [self.pre_layrnorm(torch.cat([first, patches], 1) + e.position_embedding.weight)]
        for layer in self.encoder.layers:
            seen.append(layer(seen[-1]))
        return seen


class Clip(nn.Module):
    """Both towers and what brings them into one space."""

    def __init__(self, config: Config = Config()) -> None:
        super().__init__()
        self.config = config
        self.text_model, self.vision_model = TextTower(config), VisionTower(config)
        self.visual_projection = nn.Linear(config.width, config.embedding, bias=False)
        self.text_projection = nn.Linear(config.text_width, config.embedding, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))

    def prepared(self, pictures: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 S S"]:
        """Square pictures, sRGB 0..1, as the network was trained to see them. Differentiable."""
        size = (self.config.size, self.config.size)
        if pictures.shape[2:] != size:
            pictures = functional.interpolate(pictures, size, mode="bicubic", antialias=True, align_corners=False)
        mean, deviation = (pictures.new_tensor(x)[:, None, None] for x in (MEAN, DEVIATION))
        return (pictures - mean) / deviation

    def of_pictures(self, pictures: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B E"]:
        """Unit vectors of sRGB pictures in 0..1."""
        tokens = self.vision_model(self.prepared(pictures))[-1][:, 0]
        return functional.normalize(self.visual_projection(self.vision_model.post_layernorm(tokens)), dim=1)

    def of_texts(self, tokens: Int[Tensor, "B N"]) -> Float[Tensor, "B E"]:
        """Unit vectors of texts as `Tokenizer` splits them."""
        return functional.normalize(self.text_projection(self.text_model(tokens)), dim=1)

    def distance(self, a: Float[Tensor, "B 3 H W"], b: Float[Tensor, "B 3 H W"]) -> Tensor:
        """How differently two pictures look: mean of 1 - cosine of their patches behind a third and two thirds of the
        layers. sRGB 0..1; differentiable."""
        seen = [self.vision_model(self.prepared(x)) for x in (a, b)]
        depths = [max(1, round(len(self.vision_model.encoder.layers) * share)) for share in (1 / 3, 2 / 3)]
        alike = [functional.cosine_similarity(seen[0][k][:, 1:], seen[1][k][:, 1:], dim=2).mean() for k in depths]
        return 1 - torch.stack(alike).mean()


class Tokenizer:
    """Byte-pair encoding: text to numbers. Made from the public tokenizer.json (its vocabulary and merges)."""

    # contractions, letters, one digit at a time, anything else that is no space
    PIECES = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+")

    def __init__(self, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> None:
        self.vocabulary = dict(vocabulary)
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.begin, self.end = (self.vocabulary[f"<|{name}oftext|>"] for name in ("start", "end"))

    @classmethod
    def read(cls, content: bytes) -> Tokenizer:
        """From tokenizer.json. Raises ValueError if it is none."""
        try:
            model = json.loads(content)["model"]
            merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
            return cls({str(k): int(v) for k, v in model["vocab"].items()}, merges)  # pyright: ignore
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise ValueError(f"it is no tokenizer ({error!r})") from None

    def __call__(self, text: str, context: int = 77) -> list[int]:
        """The text between its marks, at most `context` numbers, the end mark always among them."""
        words = [self.vocabulary[part] for piece in self.PIECES.findall(" ".join(text.lower().split()))
                 for part in self._split("".join(_LETTERS[byte] for byte in piece.encode()))]  # fmt: skip
        return [self.begin, *words[: context - 2], self.end]

    def _split(self, word: str) -> list[str]:
        """Merge neighbours, those first that were merged first in training."""
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            pairs = list(itertools.pairwise(parts))
            best = min(pairs, key=lambda pair: self.rank.get(pair, len(self.rank)))
            if best not in self.rank:
                break
            merged: list[str] = []
            for part in parts:
                if merged and (merged[-1], part) == best:
                    merged[-1] += part
                else:
                    merged.append(part)
            parts = merged
        return parts


def _letters() -> list[str]:
    """A visible character for every byte: its own where Latin-1 has one, else one from 256 on."""
    own = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in own else next(others)) for byte in range(256)]


_LETTERS = _letters()


def padded(texts: Sequence[Sequence[int]], device: torch.device) -> Int[Tensor, "B N"]:
    """Texts of different length, filled with their end marks: what comes behind an end mark is not seen."""
    longest = max(len(text) for text in texts)
    return torch.tensor([[*text, *[text[-1]] * (longest - len(text))] for text in texts], device=device)


def load(weights: Weights, device: torch.device) -> tuple[Clip, Tokenizer]:
    """Verified weights with their tokenizer. Sizes are read off the tensors, heads are 64 wide as in all public files.
    Raises `weights_corrupt`."""
    arrays, _ = weights.read()
    arrays = {name: array for name, array in arrays.items() if not name.endswith("position_ids")}
    try:
        config = _config_of(arrays)
        tokenizer = Tokenizer.read(weights.path("tokenizer.json").read_bytes())
    except (KeyError, ValueError, IndexError) as error:
        raise PopulaceError("weights_corrupt", f"The weights {weights.name!r} are not CLIP's: {error}.",
                            "Fetch them again: populace weights fetch clip.") from None  # fmt: skip
    with torch.device("meta"):
        clip = Clip(config)
    check_tensors(weights.name, arrays, {name: tuple(tensor.shape) for name, tensor in clip.state_dict().items()})
    values = {name: torch.from_numpy(np.array(array, np.float32)) for name, array in arrays.items()}
    clip.load_state_dict(values, assign=True)
    return clip.to(device).eval().requires_grad_(False), tokenizer


def _config_of(arrays: Mapping[str, np.ndarray]) -> Config:
    def layers(tower: str) -> int:
        return 1 + max(int(m[1]) for n in arrays if (m := re.match(rf"{tower}\.encoder\.layers\.(\d+)\.", n)))

    words, text_width = arrays["text_model.embeddings.token_embedding.weight"].shape
    width, _, patch, _ = arrays["vision_model.embeddings.patch_embedding.weight"].shape
    side = round((len(arrays["vision_model.embeddings.position_embedding.weight"]) - 1) ** 0.5)
    return Config(
        width, text_width, layers("vision_model"), layers("text_model"), max(1, width // 64), max(1, text_width // 64),
        len(arrays["visual_projection.weight"]), side * patch, patch, words,
        len(arrays["text_model.embeddings.position_embedding.weight"]),
    )  # fmt: skip
