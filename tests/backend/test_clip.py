# SPDX-License-Identifier: GPL-3.0-or-later
"""CLIP's networks against a slow float64 version, its tokenizer, and GET3D weights led by two texts; a tiny CLIP."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from backend import families, weight_files, weights
from backend.__main__ import main
from backend.families.base import PersonPhoto
from backend.families.get3d import adapt, inversion
from backend.families.get3d.model import Get3dModel, load, metadata_of
from backend.networks import clip as clips
from backend.networks.clip import Clip, Config, Tokenizer
from backend.protocol import PopulaceError
from backend.settings import Settings
from backend.tensors import dump_tensors
from tests.backend.get3d_taught import taught

CPU = torch.device("cpu")
TINY = Config(64, 64, 2, 2, 1, 1, 16, 32, 8, 260, 12)
TOKENIZER = {
    "model": {
        "vocab": {
            **{letter: i for i, letter in enumerate(clips._LETTERS[33:127])},
            **{f"{letter}</w>": 94 + i for i, letter in enumerate(clips._LETTERS[33:127])},
            "re": 188, "red</w>": 189, "lo": 190, "low</w>": 191, "<|startoftext|>": 258, "<|endoftext|>": 259,
        },
        "merges": ["r e", "re d</w>", ["l", "o"], "lo w</w>"],
    }
}  # fmt: skip


def tiny() -> Clip:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Clip(TINY).eval().requires_grad_(False)


def test_published_names_and_sizes() -> None:
    with torch.device("meta"):
        state = Clip().state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == 151_277_313
    for name, shape in {
        "text_model.embeddings.token_embedding.weight": (49408, 512),
        "text_model.encoder.layers.11.self_attn.out_proj.bias": (512,),
        "text_model.final_layer_norm.weight": (512,),
        "vision_model.embeddings.class_embedding": (768,),
        "vision_model.embeddings.patch_embedding.weight": (768, 3, 32, 32),
        "vision_model.embeddings.position_embedding.weight": (50, 768),
        "vision_model.pre_layrnorm.weight": (768,),
        "vision_model.encoder.layers.0.mlp.fc1.weight": (3072, 768),
        "visual_projection.weight": (512, 768),
        "text_projection.weight": (512, 512),
        "logit_scale": (),
    }.items():
        assert tuple(state[name].shape) == shape
    manifest = weights.find("clip", Path("nowhere"))
    assert manifest.licence == "MIT"
    assert [file.path for file in manifest.files] == ["model.safetensors", "tokenizer.json"]


def normed(x: np.ndarray, layer: torch.nn.LayerNorm) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * layer.weight.numpy() + layer.bias.numpy()


def slow_layer(x: np.ndarray, layer: clips.Layer, causal: bool) -> np.ndarray:
    """[N, C], head by head and token by token."""

    def linear(part: torch.nn.Linear, y: np.ndarray) -> np.ndarray:
        return y @ part.weight.numpy().T + part.bias.numpy()

    a, y = layer.self_attn, normed(x, layer.layer_norm1)
    q, k, v = linear(a.q_proj, y), linear(a.k_proj, y), linear(a.v_proj, y)
    size, out = q.shape[1] // a.heads, np.zeros_like(q)
    for head in range(a.heads):
        part = slice(head * size, (head + 1) * size)
        for i in range(len(x)):
            seen = range(i + 1) if causal else range(len(x))
            score = np.array([math.exp(q[i, part] @ k[j, part] / math.sqrt(size)) for j in seen])
            out[i, part] = sum(s * v[j, part] for s, j in zip(score / score.sum(), seen))
    x = x + linear(a.out_proj, out)
    hidden = linear(layer.mlp.fc1, normed(x, layer.layer_norm2))
    return x + linear(layer.mlp.fc2, hidden / (1 + np.exp(-1.702 * hidden)))


def test_the_towers_are_their_equations() -> None:
    torch.manual_seed(1)
    net = Clip(Config(16, 12, 2, 2, 2, 3, 5, 8, 4, 20, 6)).double().eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.normal_(0, 0.3)
    tokens = torch.tensor([[18, 3, 4, 19, 19]])
    t = net.text_model
    x = (t.embeddings.token_embedding.weight[tokens[0]] + t.embeddings.position_embedding.weight[:5]).numpy()
    for layer in t.encoder.layers:
        x = slow_layer(x, layer, causal=True)
    expected = normed(x, t.final_layer_norm)[3] @ net.text_projection.weight.numpy().T
    assert np.allclose(net.of_texts(tokens)[0].numpy(), expected / np.linalg.norm(expected), atol=1e-12)
    picture = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    scaled = (picture[0].numpy() - np.array(clips.MEAN)[:, None, None]) / np.array(clips.DEVIATION)[:, None, None]
    v = net.vision_model
    kernel = v.embeddings.patch_embedding.weight.numpy()
    patches = [(kernel * scaled[:, i : i + 4, j : j + 4]).sum((1, 2, 3)) for i in (0, 4) for j in (0, 4)]
    x = np.stack([v.embeddings.class_embedding.numpy(), *patches]) + v.embeddings.position_embedding.weight.numpy()
    x = normed(x, v.pre_layrnorm)
    for layer in v.encoder.layers:
        x = slow_layer(x, layer, causal=False)
    expected = normed(x, v.post_layernorm)[0] @ net.visual_projection.weight.numpy().T
    assert np.allclose(net.of_pictures(picture)[0].numpy(), expected / np.linalg.norm(expected), atol=1e-6)
    assert float(net.distance(picture, picture)) == pytest.approx(0, abs=1e-12)
    assert float(net.distance(picture, 1 - picture)) > 1e-3
    moving = torch.rand(1, 3, 12, 12, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(net.of_pictures(moving).sum(), moving)
    assert (gradient != 0).any()


def test_texts_are_split_as_merges_say() -> None:
    split = Tokenizer.read(json.dumps(TOKENIZER).encode())
    vocabulary = TOKENIZER["model"]["vocab"]

    def parts(text: str, **options: int) -> list[str]:
        names = {number: name for name, number in vocabulary.items()}
        return [names[i] for i in split(text, **options)][1:-1]

    assert parts("Red  LOW\tred") == ["red</w>", "low</w>", "red</w>"]
    assert parts("lower") == ["lo", "w", "e", "r</w>"]
    assert parts("red's 42!?") == ["red</w>", "'", "s</w>", "4</w>", "2</w>", "!", "?</w>"]
    assert len(split("low " * 50, context=12)) == 12
    assert split("low " * 50, context=12)[-1] == 259
    batch = clips.padded([split("red"), split("red low red")], CPU)
    assert batch.shape == (2, 5)
    net = tiny()
    assert torch.allclose(net.of_texts(batch)[:1], net.of_texts(batch[:1, :3]), atol=1e-6)  # filling is not seen
    for bad in (b"{}", b"[1]", b"no json"):
        with pytest.raises(ValueError):  # noqa: PT011
            Tokenizer.read(bad)


class Coloured(Clip):
    """Its texts are colours: the first number of a text, 0 to 7, says which channels are full."""

    def of_texts(self, tokens: Tensor) -> Tensor:
        bits = [float(tokens[0, 0] >> k & 1) for k in range(3)]
        return self.of_pictures(torch.tensor(bits)[None, :, None, None].expand(1, 3, 32, 32))


def test_pictures_go_where_the_texts_point() -> None:
    torch.manual_seed(0)
    net, generator = Coloured(TINY).eval().requires_grad_(False), taught()
    red, cyan = torch.tensor([[1]]), torch.tensor([[6]])
    settings = adapt.Settings(part="texture", steps=14, batch=1, views=2, size=32, cells=10, rate=0.005)
    made = adapt.adapt(generator, net, (cyan, red), settings)
    assert np.mean(made.directions[-5:]) > 0.6 > made.directions[0]
    seen = []
    for net_of in (generator, made.generator):  # codes and cameras that were not learned from
        drawn = adapt._drawn(generator, settings, 99, CPU)
        shown, _ = adapt.pictures(net_of, adapt.Surfacer(generator.config, 10, CPU), *drawn, 32)
        seen.append(net.of_pictures(shown))
    way = net.of_texts(red) - net.of_texts(cyan)
    assert float(torch.cosine_similarity(seen[1] - seen[0], way).mean()) > 0.4
    before, after = generator.state_dict(), made.generator.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(any(word in name for word in adapt.TEXTURE) for name in changed)
    with pytest.raises(PopulaceError, match="mean the same"):
        adapt.adapt(generator, net, (red, red), settings)


def test_the_same_seed_adapts_alike() -> None:
    split = Tokenizer.read(json.dumps(TOKENIZER).encode())
    texts = [clips.padded([split(text)], CPU) for text in ("low", "red")]
    settings = adapt.Settings(steps=2, batch=1, views=2, size=32, cells=8)
    runs = [adapt.adapt(taught(), tiny(), (texts[0], texts[1]), settings) for _ in range(2)]
    assert runs[0].losses == runs[1].losses
    for one, other in zip(runs[0].generator.parameters(), runs[1].generator.parameters()):
        assert torch.equal(one, other)


def test_parts_share_the_synthesis_between_them() -> None:
    names = {part: set(adapt.trainable(taught(), part)) for part in ("texture", "geometry", "both")}
    assert names["texture"] | names["geometry"] == names["both"]
    assert not names["texture"] & names["geometry"]
    assert any("togeo" in name for name in names["geometry"])
    assert any("to_rgb" in name for name in names["texture"])
    assert not any("mapping" in name for name in names["both"])


def write(path: Path, arrays: dict[str, Tensor], notes: dict[str, str]) -> Path:
    path.write_bytes(b"".join(dump_tensors({k: v.numpy() for k, v in arrays.items()}, notes)))
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with own weights of GET3D and a tiny CLIP where the public one would be."""
    monkeypatch.setenv("POPULACE_DATA_DIR", str(tmp_path))
    weight_files.import_file(write(tmp_path / "g.safetensors", taught().state_dict(), metadata_of(taught().config)),
                             "mine", "CC0-1.0", tmp_path)  # fmt: skip
    weight_files.use("mine", "get3d", tmp_path)
    write(tmp_path / "c.safetensors", tiny().state_dict(), {})
    folder = tmp_path / "weights" / "imported"
    (tmp_path / "weights" / "small_clip").mkdir(parents=True)
    (tmp_path / "c.safetensors").rename(tmp_path / "weights/small_clip/c.safetensors")
    (tmp_path / "weights/small_clip/tokenizer.json").write_text(json.dumps(TOKENIZER))
    text = 'name = "small_clip"\ntitle = "t"\nlicence = "CC0-1.0"\nlicence_url = ""\nprovenance = "random"\n'
    text += "embedded = false\nimported = true\n\n"
    for name in ("c.safetensors", "tokenizer.json"):
        text += weights.describe(tmp_path / "weights/small_clip" / name)
    (folder / "small_clip.toml").write_text(text)
    weight_files.use("small_clip", "clip", tmp_path)
    return tmp_path


def test_the_command_makes_weights_of_ones_own(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["adapt", "--from", "low", "--text", "red", "--name", "reddish", "--steps", "2", "--views", "2", "--size",
            "32", "--cells", "8", "--batch", "1", "--device", "cpu"]  # fmt: skip
    assert main(call) == 0
    assert "populace weights use reddish --for get3d" in capsys.readouterr().out
    manifest = weights.find("reddish", home)
    assert manifest.licence == "CC0-1.0"
    assert "'low' to 'red'" in manifest.provenance
    weight_files.use("reddish", "get3d", home)
    model = load(CPU, weights.locate("get3d", home))
    assert model.config == taught().config
    assert not torch.equal(model.generator.synthesis.to_rgb.weight, taught().synthesis.to_rgb.weight)
    assert torch.equal(model.generator.mapping.fc0.weight, taught().mapping.fc0.weight)


def test_photos_are_compared_by_clip_where_it_is_here(home: Path) -> None:
    model = families.load("get3d", "cpu", Settings(data_dir=home))
    assert isinstance(model, Get3dModel)
    assert model.weights_sha256 == weights.locate("get3d", home).sha256  # what codes mean does not depend on CLIP
    assert model.perceptual is not None
    grey, noise = torch.zeros(1, 3, 32, 32), torch.rand(1, 3, 32, 32) * 2 - 1
    assert float(model.perceptual(grey, noise)) > float(model.perceptual(grey, grey)) == pytest.approx(0, abs=1e-5)
    pixels = np.zeros((20, 20, 4), np.uint8)
    pixels[5:15, 5:15] = (200, 100, 0, 255)
    options = {"steps": 0, "size": 32, "cells": 10}
    photos = [PersonPhoto(pixels, (5, 5, 15, 15))]
    without = inversion.fit(model.generator, photos, **options)
    assert inversion.fit(model.generator, photos, **options, perceptual=model.perceptual).losses[0] > without.losses[0]
    assert load(CPU, weights.locate("get3d", home)).perceptual is None


def test_clip_that_is_not_here_or_none_is_a_sentence(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["adapt", "--from", "low", "--text", "red", "--name", "x", "--device", "cpu"]
    (home / "weights/small_clip/tokenizer.json").write_text("{}")
    assert main(call) != 0
    assert "small_clip" in capsys.readouterr().err
    weight_files.use("clip", "clip", home)
    assert main(call) != 0
    assert "populace weights fetch clip" in capsys.readouterr().err
    weight_files.use("mine", "clip", home)
    assert main(call) != 0
    assert "are not CLIP's" in capsys.readouterr().err
