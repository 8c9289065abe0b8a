# SPDX-License-Identifier: GPL-3.0-or-later
"""The published files: which of their tensors are ours, under which names. `backend.checkpoints` reads the files.

ffhq1024x1024.pt       g_ema: StyleSDF's generator                              -> e3dge
ffhq_vol_renderer.pt   d: the volume renderer's discriminator, a pose estimator -> e3dge_pose
E3DGE_Full_Runner.pt   encoder, netLocal, grid_align, Fuse_sft_block            -> e3dge_encoder
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from backend import checkpoints
from backend.checkpoints import Converted, StoredTensor
from backend.families.base import seeded_normal
from backend.families.e3dge.config import Config, to_metadata
from backend.families.e3dge.generator import Mapped
from backend.families.e3dge.inversion import E3dge
from backend.networks.stylegan2 import EqualLinear, filter_taps, normalize_second_moment

AVERAGE_OF = 100_000  # codes for the means, which the published run draws anew each time
PUBLISHED = {  # bytes and MD5 of the files as their authors link them
    "ffhq1024x1024.pt": (202_570_217, "1ab9522157e537351fcf4faed9c92abb"),
    "ffhq_vol_renderer.pt": (63_736_197, "fe62f26032ccc8f04e1101b07bcd7462"),
    "E3DGE_Full_Runner.pt": (1_582_414_403, "4bc643cfa89adba5fa7c0451c49d1c64"),
}
NETWORKS = {"encoder": "encoder.", "netLocal": "generator.renderer.network.netLocal.", "grid_align": "grid_align.",
            "Fuse_sft_block": "fuse."}  # fmt: skip
_FIELD, _LOCAL = "generator.renderer.network.netGlobal.", NETWORKS["netLocal"]


def convert(content: Any, file: str, own: bool = False) -> Converted:
    """The weights in what `checkpoints.read` found: the generator's, the pose estimator's, or those of everything that
    E3DGE adds. With `own` their sizes may differ from the published ones. Raises `weights_corrupt` and says which
    tensors are missing, do not belong there or have another shape."""
    keys = set(content) if isinstance(content, Mapping) else set()
    if NETWORKS.keys() <= keys:
        found = {prefix + name: tensor for key, prefix in NETWORKS.items()
                 for name, tensor in _plain(content, file, key).items()}  # fmt: skip
        return _converted("e3dge_encoder", found, file, own, tuple(NETWORKS.values()))
    for key in keys & {"d", "g_ema"}:
        found = _plain(content, file, key)
        if key == "d" and "convs.1.conv1.conv.conv.weight" in found:
            found = {f"camera.{name}": tensor for name, tensor in found.items()}
            return _converted("e3dge_pose", found, file, own, ("camera.",))
        if key == "g_ema" and any(name.startswith("decoder.") for name in found):
            found = {f"generator.{_in_global(name)}": tensor for name, tensor in found.items()}
            return _converted("e3dge", found, file, own, ("generator.",))
    raise checkpoints.refused(file, f"it is none of E3DGE's files, which are {', '.join(PUBLISHED)}")


def _plain(content: Any, file: str, key: str) -> dict[str, StoredTensor]:
    return {name.removeprefix("module."): t for name, t in checkpoints.state_dict(content, file, key).items()}


def _in_global(name: str) -> str:
    """StyleSDF's own files have no netGlobal in their names."""
    return re.sub(r"^renderer\.network\.(?!netGlobal\.|netLocal\.)", "renderer.network.netGlobal.", name)


def _converted(part: str, found: dict[str, StoredTensor], file: str, own: bool, prefixes: tuple[str, ...]) -> Converted:
    config = _config(part, found) if own else Config()
    if f"{_LOCAL}residual_conv.1.conv.0.running_mean" in found:
        config = replace(config, local_norm="batch")
    with torch.device("meta"):
        net = E3dge(config)
    floats = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()
              if tensor.is_floating_point() and name.startswith(prefixes)}  # fmt: skip
    if part == "e3dge":  # local detail is in the other file
        floats = {name: shape for name, shape in floats.items() if not name.startswith(_LOCAL)}
    checkpoints.check_names(file, found, floats, _ignored)
    arrays = checkpoints.numbers(file, {name: found[name] for name in floats if not name.endswith(".kernel")})
    arrays |= {name: (4 * filter_taps()).numpy() for name in floats if name.endswith(".kernel")}
    if part == "e3dge":
        arrays |= average_codes(arrays, config)
    title = {"e3dge": "StyleSDF's generator", "e3dge_pose": "StyleSDF's pose estimator",
             "e3dge_encoder": "E3DGE's encoder and local detail"}[part]  # fmt: skip
    return Converted(part, arrays, to_metadata(part, config) | {"title": title})


def _ignored(name: str) -> bool:
    """Fixed filters, counters of normalisation, and an average that the encoder's training kept."""
    return name.endswith((".kernel", "num_batches_tracked", "latent_avg"))


@torch.no_grad()
def average_codes(arrays: Mapping[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """Means over many z of a fixed seed of w and of the decoder's w."""
    style = nn.Sequential(*(Mapped(config.style_dim, config.style_dim) for _ in range(3)))
    sizes = [config.style_dim, *[config.decoder_dim] * 5]
    decoder = nn.Sequential(*(EqualLinear(a, b, True, 0.01) for a, b in pairwise(sizes)))
    for module, prefix, first in ((style, "generator.style.", 0), (decoder, "generator.decoder.style.", 1)):
        module.load_state_dict({name: torch.from_numpy(arrays[f"{prefix}{int(name[0]) + first}{name[1:]}"])
                                for name in module.state_dict()})  # fmt: skip
    means = [torch.zeros(config.style_dim).double(), torch.zeros(config.decoder_dim).double()]
    for part in range(10):
        z = torch.from_numpy(seeded_normal(0, f"average/{part}", (AVERAGE_OF // 10, config.style_dim)))
        w = style(z)
        for mean, codes in zip(means, (w, decoder(normalize_second_moment(w)))):
            mean += codes.double().mean(0) / 10
    return {"w_avg": means[0].float().numpy(), "decoder_avg": means[1].float().numpy()}


def _config(part: str, found: Mapping[str, StoredTensor]) -> Config:
    """The sizes that names and shapes speak of. What is missing the check will say."""
    c = Config()

    def sizes(name: str, *default: int) -> tuple[int, ...]:
        return found[name].shape if name in found and len(found[name].shape) == len(default) else default

    def count(pattern: str) -> int:
        return len({m[1] for name in found if (m := re.match(pattern, name))})

    if part == "e3dge":
        width, style = sizes(f"{_FIELD}pts_linears.0.gamma.weight", c.width, c.style_dim)
        dim = sizes("generator.decoder.style.1.weight", c.decoder_dim, 0)[0]
        noises = [tensor.shape[-1] for name, tensor in found.items() if ".noises." in name and tensor.shape]
        picture, thumb = max(noises, default=c.picture), min(noises, default=c.thumb)
        last = max(count(r"generator\.decoder\.convs\.(\d+)\.") - 1, 0)
        top = sizes(f"generator.decoder.convs.{last}.activate.bias", c.decoder_channels(picture))[0]
        return replace(c, width=width, style_dim=style, layers=count(rf"{re.escape(_FIELD)}pts_linears\.(\d+)\."),
                       thumb=thumb, picture=picture, decoder_dim=dim, decoder_base=top * picture,
                       decoder_rows=2 + len(set(noises)) * 2 - 2)  # fmt: skip
    if part == "e3dge_pose":
        widths = [sizes("camera.convs.0.activation.bias", c.pose_widths[0])[0]]
        widths += [sizes(f"camera.convs.{i}.conv2.activation.bias", 0)[0]
                   for i in range(1, count(r"camera\.convs\.(\d+)\."))]  # fmt: skip
        return replace(c, pose_widths=tuple(widths))
    return replace(c, **_encoder_sizes(c, found, sizes, count))


def _encoder_sizes(c: Config, found: Mapping[str, StoredTensor], sizes: Any, count: Any) -> dict[str, Any]:
    width = sizes("encoder.input_layer.1.bias", c.encoder_width)[0]
    outputs = [sizes(f"encoder.body.{i}.res_layer.4.bias", width)[0] for i in range(count(r"encoder\.body\.(\d+)\."))]
    filters = f"{_LOCAL}image_filter."
    joined = sizes(f"{_LOCAL}local_feat_to_tex_modulations_linear.fc_1.weight", 2 * c.width, 0)[0]
    return {
        "width": joined // 2, "style_dim": sizes("encoder.styles_pigan.0.linear.bias", c.style_dim)[0],
        "layers": count(r"encoder\.styles_pigan\.(\d+)\.") - 1, "encoder_width": width,
        "encoder_units": tuple(outputs.count(width << level) for level in range(4)),
        "decoder_dim": sizes("encoder.styles_stylegan.0.linear.bias", c.decoder_dim)[0],
        "decoder_rows": count(r"encoder\.styles_stylegan\.(\d+)\."),
        "local_stem": sizes(f"{_LOCAL}residual_conv.2.weight", c.local_stem, 0, 0, 0)[0],
        "hourglass_stacks": count(rf"{re.escape(filters)}m(\d+)\."),
        "hourglass_stem": sizes(f"{filters}conv1.bias", c.hourglass_stem)[0],
        "aligner_widths": (
            sizes("grid_align.conv_layer1.1.bias", 0)[0],
            *(sizes(f"grid_align.conv_layer{i}.0.res_layer.4.bias", 0)[0] for i in (2, 3, 4)),
        ),
    }  # fmt: skip
