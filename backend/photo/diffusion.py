# SPDX-License-Identifier: GPL-3.0-or-later
"""The editor that paints: Stable Diffusion, image to image, all views at once.

As in TokenFlow (Geyer et al. 2024) the views attend to one another: in every self-attention each view's queries see the
keys and values of all views, so that they agree on what is there. TokenFlow goes on to hand features from key views to
the others by nearest neighbours and inverts the pictures first; here all views are key views, they are few, and noise
that is shared by all stands for the inversion. What then still differs, the least squares of `refine` average.

The libraries are the optional extra [diffusion]; the weights (2 to 5 GB) are the user's to bring, under the terms of
whoever made them: a folder of a Stable Diffusion pipeline with safetensors files, at weights/diffusion in the data
folder. Nothing is downloaded here, and only safetensors are read.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional

from backend.families.base import Step, no_step
from backend.photo.refine import Views
from backend.protocol import PopulaceError

SIDES = {"front": 50.0, "side": 130.0, "back": 180.0}  # degrees from the front up to which a view is called so
PROMPT = "a photo of a person, {side} view, plain grey background, even light"
NEGATIVE = "ugly, blurry, low res, unrealistic, unaesthetic"
STRENGTH = 0.35  # share of the noise that is added and taken off: outlines stay, textures are repainted
STEPS, GUIDANCE = 50, 7.5
SIZE = 512  # what the usual models were trained at


class ImageToImage(Protocol):
    """What is used of diffusers' StableDiffusionImg2ImgPipeline."""

    unet: Any

    def __call__(self, **options: Any) -> Any: ...


@dataclass
class DiffusionEditor:
    """See `refine.Editor`. `about` is put before the prompt's own words: "an old man in a red coat"."""

    pipeline: ImageToImage
    about: str = ""
    seed: int = 0
    strength: float = STRENGTH
    steps: int = STEPS
    guidance: float = GUIDANCE
    size: int = SIZE

    @torch.no_grad()
    def edit(self, views: Views, step: Step = no_step) -> Float[Tensor, "B H W 3"]:
        """Views are painted at the model's size; what changed there is enlarged again."""
        count, height = views.rgb.shape[:2]
        small = functional.interpolate(views.rgb.permute(0, 3, 1, 2), 2 * [self.size], mode="area")
        pictures = [Image.fromarray(picture) for picture in _bytes(small)]
        prompts = [self._prompt(angle) for angle in azimuths(views)]
        noise = [torch.Generator("cpu").manual_seed(self.seed) for _ in range(count)]  # the same for every view

        def told(pipeline: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            step("edit", (index + 1) / max(self.steps * self.strength, 1))
            return values

        with attending_to_all(self.pipeline.unet, count):
            found = self.pipeline(
                prompt=prompts, negative_prompt=[NEGATIVE] * count, image=pictures, strength=self.strength,
                num_inference_steps=self.steps, guidance_scale=self.guidance, generator=noise, output_type="pil",
                callback_on_step_end=told,
            ).images  # fmt: skip
        painted = torch.from_numpy(np.stack([np.asarray(picture.convert("RGB")) for picture in found])).to(views.rgb)
        painted = painted.permute(0, 3, 1, 2) / 255
        change = functional.interpolate(painted - small, 2 * [height], mode="bicubic", align_corners=False)
        return (views.rgb + change.permute(0, 2, 3, 1)).clamp(0, 1)

    def _prompt(self, azimuth: float) -> str:
        side = next(name for name, most in SIDES.items() if azimuth <= most)
        return ", ".join(part for part in (self.about.strip(), PROMPT.format(side=side)) if part)


def azimuths(views: Views) -> list[float]:
    """Degrees from the front, 0..180, of every view."""
    back = views.cameras.c2w[:, :3, 2]
    return torch.atan2(back[:, 0].abs(), back[:, 2]).rad2deg().tolist()


def _bytes(pictures: Float[Tensor, "B 3 H W"]) -> np.ndarray:
    return (pictures.permute(0, 2, 3, 1).clamp(0, 1) * 255 + 0.5).to(torch.uint8).cpu().numpy()


class JointAttention:
    """In place of a self-attention's own processor: keys and values of all views, side by side. The batch holds whole
    sets of `views` pictures: with guidance one without and one with the prompt."""

    def __init__(self, views: int) -> None:
        self.views = views

    def __call__(
        self, attn: Any, hidden_states: Float[Tensor, "B N C"], encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, temb: Tensor | None = None, **options: Any,
    ) -> Float[Tensor, "B N C"]:  # fmt: skip
        batch, tokens, _ = hidden_states.shape
        if encoder_hidden_states is not None or attention_mask is not None or batch % self.views:
            raise ValueError(f"joint attention takes sets of {self.views} views, not {batch}, and no prompt or mask")
        query, key, value = (layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v))
        sets = batch // self.views

        def heads(x: Tensor, groups: int) -> Float[Tensor, "G H M D"]:
            return x.reshape(groups, -1, attn.heads, x.shape[-1] // attn.heads).transpose(1, 2)

        # every view of a set asks all of the set's tokens: one sequence per set
        found = functional.scaled_dot_product_attention(heads(query, sets), heads(key, sets), heads(value, sets))
        joined = found.transpose(1, 2).reshape(batch, tokens, -1).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](joined))


class attending_to_all:
    """While it lasts, self-attentions of a UNet see all `views` of a set; attention to the prompt stays as it is."""

    def __init__(self, unet: Any, views: int) -> None:
        self.unet, self.views = unet, views

    def __enter__(self) -> None:
        self.before = dict(self.unet.attn_processors)
        self.unet.set_attn_processor({
            name: JointAttention(self.views) if name.endswith("attn1.processor") else processor
            for name, processor in self.before.items()
        })  # fmt: skip

    def __exit__(self, *problem: object) -> None:
        self.unet.set_attn_processor(dict(self.before))


def weights_folder(data_dir: Path) -> Path:
    """Where the user puts a pipeline."""
    return data_dir / "weights" / "diffusion"


def load(data_dir: Path, device: torch.device, about: str = "", seed: int = 0) -> DiffusionEditor:
    """The editor with the user's own weights. Raises `weights_missing` with what to do, `weights_corrupt`."""
    missing = [name for name in ("diffusers", "transformers") if importlib.util.find_spec(name) is None]
    folder = weights_folder(data_dir)
    if missing:
        raise PopulaceError("weights_missing", f"Painting hidden sides needs {' and '.join(missing)}.",
                            "Install them: pip install 'populace[diffusion]', or do not ask for it.")  # fmt: skip
    if not (folder / "model_index.json").is_file():
        raise PopulaceError(
            "weights_missing", f"There is no diffusion model at {folder}.",
            "Read the licence of a Stable Diffusion model that you may use, then put its folder there, for instance "
            f"with: hf download OWNER/NAME --local-dir {folder}",
        )  # fmt: skip
    import diffusers

    try:
        pipeline = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, safety_checker=None, requires_safety_checker=False,
            torch_dtype=torch.float16 if device.type == "cuda" else torch.float32,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PopulaceError(
            "weights_corrupt", f"The diffusion model at {folder} was not read: {str(error)[:200]}",
            "It must be a Stable Diffusion 1 or 2 pipeline with safetensors files.",
        ) from None  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return DiffusionEditor(pipeline.to(device), about, seed)
