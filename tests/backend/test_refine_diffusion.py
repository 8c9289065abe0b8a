# SPDX-License-Identifier: GPL-3.0-or-later
"""The diffusion editor with a pipeline of a few thousand random weights, and what it says when something is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backend.families.base import Latents
from backend.geometry.mesh import Textures
from backend.photo import diffusion, hidden, refine
from backend.photo.diffusion import DiffusionEditor, JointAttention, attending_to_all
from backend.photo.refine import Painted
from backend.protocol import PopulaceError
from tests.backend.test_refine import CHART, MESH, TEXELS, half_seen, smooth


class Attention(nn.Module):
    """The parts of diffusers' attention that a processor uses."""

    heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(8, 8), nn.Identity()])


def plain(attn: Attention, x: Tensor, others: Tensor) -> Tensor:
    """One view's tokens [N, C] asking all tokens [M, C], head by head."""
    q, k, v = attn.to_q(x), attn.to_k(others), attn.to_v(others)
    parts = [torch.softmax(a @ b.T / 2, 1) @ c for a, b, c in zip(*(y.split(4, 1) for y in (q, k, v)))]
    return attn.to_out[0](torch.cat(parts, 1))


def test_every_view_attends_to_all_views_of_its_set() -> None:
    torch.manual_seed(0)
    attn, x = Attention(), torch.randn(6, 5, 8)  # two sets of three views
    found = JointAttention(3)(attn, x)
    for batch in range(6):
        own_set = x[3 * (batch // 3) : 3 * (batch // 3) + 3].reshape(-1, 8)
        torch.testing.assert_close(found[batch], plain(attn, x[batch], own_set), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="sets of 4"):
        JointAttention(4)(attn, x)


class Unet:
    """Holds processors as diffusers does."""

    def __init__(self) -> None:
        self.attn_processors = {"down.attn1.processor": "own", "down.attn2.processor": "prompt"}

    def set_attn_processor(self, processors: dict[str, Any]) -> None:
        self.attn_processors = processors


class Pipeline:
    """Speaks the protocol: makes everything redder by what is asked."""

    def __init__(self) -> None:
        self.unet, self.asked = Unet(), {}

    def __call__(self, **options: Any) -> Any:
        assert isinstance(self.unet.attn_processors["down.attn1.processor"], JointAttention)
        assert self.unet.attn_processors["down.attn2.processor"] == "prompt"
        self.asked = options
        from PIL import Image

        options["callback_on_step_end"](self, 0, 0, {})
        images = [Image.merge("RGB", (r.point(lambda v: min(255, v + 51)), g, b))
                  for r, g, b in (picture.split() for picture in options["image"])]  # fmt: skip
        return type("Found", (), {"images": images})


def test_views_are_painted_together_and_only_where_the_photo_saw_nothing() -> None:
    base = torch.full((TEXELS, TEXELS, 3), 0.4)
    part, pipeline, told = half_seen(base, base), Pipeline(), []
    editor = DiffusionEditor(pipeline, "an old man", size=64)
    (found,) = refine.refine([part], editor, lambda stage, share: told.append(share), size=128)
    hidden = (part.seen == 0) & CHART.covered & (CHART.points[..., 1] > 0.1) & (CHART.points[..., 1] < 1.5)
    torch.testing.assert_close(found[hidden].median(0).values, torch.tensor([0.6, 0.4, 0.4]), atol=0.01, rtol=0)
    assert torch.equal(found[part.seen == 1], part.color[part.seen == 1])
    assert pipeline.unet.attn_processors["down.attn1.processor"] == "own"
    assert told == sorted(told)
    prompts = pipeline.asked["prompt"]
    assert prompts[0].startswith("an old man, ")
    assert "back view" in prompts[0]
    assert len({generator.initial_seed() for generator in pipeline.asked["generator"]}) == 1


class PhotographedField:
    """Half of what it shows comes from a map, where z > 0."""

    name = "body"

    def __init__(self, maps: dict[str, Tensor]) -> None:
        self.pixel = next(iter(maps.values()))[0, 0, :3] / 255 if maps else None

    def color(self, points: Tensor) -> Tensor:
        believed = torch.full_like(points, 0.4)
        if self.pixel is None:
            return believed
        weight = (points[:, 2:] > 0).float()
        return believed + weight * (self.pixel - believed)


class PhotographedModel:
    def decode(self, latents: Latents, separate: bool = False) -> list[Any]:
        return [PhotographedField(dict(latents.maps))]


@pytest.mark.parametrize("maps", [True, False])
def test_baked_textures_are_painted_where_no_photo_saw(maps: bool) -> None:
    photo = torch.tensor([200, 100, 50, 255], dtype=torch.uint8).expand(4, 4, 4)
    latents = Latents("any", {"body/tex": torch.zeros(1, 1)}, {"body/photo": photo} if maps else {})
    field = PhotographedField(dict(latents.maps))
    color = (field.color(CHART.points.reshape(-1, 3)) * 255 + 0.5).to(torch.uint8).view(TEXELS, TEXELS, 3)
    editor = DiffusionEditor(Pipeline(), size=64)
    made: list[Any] = [(field, 0, MESH, Textures(color))]
    ((_, _, _, found),) = hidden.paint(made, PhotographedModel(), latents, False, [editor])  # type: ignore[arg-type]
    front, behind = (CHART.covered & (CHART.points[..., 2] * side > 0.02) for side in (1, -1))
    assert torch.equal(found.base_color[front], color[front])
    painted = found.base_color[behind].float().median(0).values.tolist()
    assert painted == pytest.approx([153, 102, 102] if maps else [102, 102, 102], abs=2)


def test_processors_come_back_after_a_failure() -> None:
    unet = Unet()
    with pytest.raises(KeyError), attending_to_all(unet, 2):
        raise KeyError
    assert unet.attn_processors["down.attn1.processor"] == "own"


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusion.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PopulaceError, match="diffusers and transformers") as caught:
        diffusion.load(tmp_path, torch.device("cpu"))
    assert caught.value.code == "weights_missing"
    assert "populace[diffusion]" in (caught.value.hint or "")
    monkeypatch.setattr(diffusion.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(PopulaceError, match="no diffusion model"):
        diffusion.load(tmp_path, torch.device("cpu"))


def random_pipeline(folder: Path) -> None:
    """A Stable Diffusion pipeline of random weights, saved as its authors' tools save theirs."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=400,
        bos_token_id=188, eos_token_id=189, pad_token_id=189,
    ))  # fmt: skip
    words = folder.parent / "words"
    words.mkdir(parents=True)
    letters = [chr(c) for c in range(33, 127)]
    vocabulary = {token: i for i, token in enumerate(
        [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"])}  # fmt: skip
    import json

    (words / "vocab.json").write_text(json.dumps(vocabulary))
    (words / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(words / "vocab.json"), str(words / "merges.txt"), model_max_length=77)
    diffusers.StableDiffusionImg2ImgPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_a_random_pipeline_paints_the_hidden_side(tmp_path: Path) -> None:
    random_pipeline(diffusion.weights_folder(tmp_path))
    editor = diffusion.load(tmp_path, torch.device("cpu"), "a woman", seed=3)
    editor.size, editor.steps, editor.strength = 32, 4, 0.5
    part = half_seen(smooth(1), smooth(2))
    small = Painted(MESH, part.color, part.seen, part.base)
    (found,) = refine.refine([small], editor, size=96)
    assert torch.isfinite(found).all()
    assert torch.equal(found[part.seen == 1], part.color[part.seen == 1])
    assert (found - part.color)[(part.seen == 0) & CHART.covered].abs().mean() > 0.01
    (again,) = refine.refine([small], editor, size=96)
    assert torch.equal(again, found)
