# SPDX-License-Identifier: GPL-3.0-or-later
"""The released files of SIFU and GTA: which of their tensors are ours. `backend.checkpoints` reads the files.

Two files make a model. The main one holds everything but the normal networks, under `netG.`; `normal.ckpt` holds these.
The published loader drops tensors that do not fit and goes on, which users see as a cube of noise; here every tensor
must be there, and each that is missing is named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from backend import checkpoints
from backend.checkpoints import Converted, StoredTensor
from backend.families.sifu.config import Config, Kind, normal_sizes, to_metadata
from backend.families.sifu.networks import NormalFilter, Reconstructor, decoders_name
from backend.families.sifu.transformer import position_table

NORMALS = re.compile(r"(normal_filter\.)?net[FB]\.")
LEFTOVERS = re.compile(r"(reconEngine|voxelization|normal_filter\.criterion|normal_filter\.vgg|criterion|loss)",
                       re.IGNORECASE)  # fmt: skip
TABLE = 1e-4  # that a stored position table may differ from the computed one


def convert(content: Any, file: str, own: bool = False, kind: Kind = "sifu") -> Converted:
    """The weights in what `checkpoints.read` found: the main ones, or the normal networks.

    With `own` widths and depths may differ from the published ones. Raises `weights_corrupt` and says which tensors are
    missing, do not belong there or have another shape.
    """
    nested = isinstance(content, Mapping) and "state_dict" in content
    found = checkpoints.state_dict(content, file, "state_dict") if nested else checkpoints.state_dict(content, file)
    found = {name.removeprefix("netG."): tensor for name, tensor in found.items()}
    found = {name: tensor for name, tensor in found.items() if not LEFTOVERS.match(name)}
    title = kind.upper()
    if found and all(NORMALS.match(name) for name in found):
        found = {name.removeprefix("normal_filter."): tensor for name, tensor in found.items()}
        config = _normal_config(found, kind) if own else Config.published(kind)
        with torch.device("meta"):
            shapes = _shapes(NormalFilter(config))
        checkpoints.check_names(file, found, shapes, lambda name: False)
        arrays = checkpoints.numbers(file, found)
        arrays = {f"normal_filter.{name}": array for name, array in checkpoints.numbers(file, found).items()}
        notes = normal_sizes(config) | {"title": f"{title}'s normal networks"}
        return Converted(f"{kind}_normals", arrays, notes)
    other: Kind = "gta" if kind == "sifu" else "sifu"
    if any(name.startswith(f"{decoders_name(Config.published(other))}.geo_mlp") for name in found):
        raise checkpoints.refused(file, f"it is a file of {other.upper()}; import it as {other}")
    if not any(name.startswith("image_filter.") for name in found):
        raise checkpoints.refused(file, f"it holds neither {title}'s networks (netG.image_filter.*) nor the normal "
                                  "networks (netG.netF.*, netG.netB.*)")  # fmt: skip
    own_normals = {name: tensor for name, tensor in found.items() if name.startswith("normal_filter.")}
    found = {name: tensor for name, tensor in found.items() if name not in own_normals}
    config = _config(found, kind, file) if own else Config.published(kind)
    with torch.device("meta"):
        network = Reconstructor(config, normals=False)
    shapes = _shapes(network)
    counters = {name for name, tensor in network.state_dict().items() if not tensor.is_floating_point()}
    checkpoints.check_names(file, found, shapes, lambda name: name in counters)
    _same_twice(found, file)
    arrays = checkpoints.numbers(
        file, {name: found[name] for name in shapes if ".downsample.0." not in name and name not in counters}
    )
    for name in [name for name in arrays if name.endswith("_pos_embedding")]:
        if not np.allclose(arrays.pop(name), position_table(config.tokens, config.dim).numpy(), atol=TABLE):
            raise checkpoints.refused(file, f"{name} is not the published table of positions")
    notes = {"title": f"{title}, the authors' networks" if not own else f"{title}, own networks"}
    return Converted(f"{kind}_official", arrays, to_metadata(config) | notes)


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _same_twice(found: Mapping[str, StoredTensor], file: str) -> None:
    """Tensors with two names must be one."""
    for name, tensor in found.items():
        if ".downsample.0." in name:
            other = found[name.replace(".downsample.0.", ".bn4.")]
            if not np.array_equal(tensor.array(), other.array()):
                raise checkpoints.refused(file, f"{name} differs from its second name, which it must not")


def _config(found: Mapping[str, StoredTensor], kind: Kind, file: str) -> Config:
    """The sizes that names and shapes speak of. What is missing the check will say."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in found:
            raise checkpoints.refused(file, f"1 tensors are missing: {name}")
        return found[name].shape

    def depth(of: str) -> int:
        return len({m[1] for name in found if (m := re.match(rf"{re.escape(of)}transformer\.layers\.(\d+)\.", name))})

    encoder, first = "image_filter.encoder.", "xy" if kind == "gta" else "F"
    dim, _, patch, _ = shape(f"{encoder}to_patch_embedding.0.weight")
    tokens = round(shape(f"{encoder}en_pos_embedding")[1] ** 0.5)
    inner = shape(f"{encoder}transformer.layers.0.0.fn.to_out.weight")[1]
    heads = next(h for h in (8, 4, 2, 1) if inner % h == 0)
    decoders = decoders_name(Config.published(kind))
    widths = tuple(shape(f"{decoders}.geo_mlp.filters.{i}.bias")[0] for i in range(4))
    stem = shape("F_filter.conv1.bias")[0]
    return replace(
        Config.published(kind), image=tokens * patch, patch=patch, dim=dim, heads=heads, head_dim=inner // heads,
        feed=shape(f"{encoder}transformer.layers.0.1.fn.net.0.bias")[0], depth=depth(encoder),
        decoder_depth=depth(f"image_filter.{first}_decoder."),
        plane=shape(f"image_filter.{first}_decoder.to_pixel.1.bias")[0],
        side_plane=shape("image_filter.yz_decoder.to_pixel.1.bias")[0] if kind == "gta" else 64, stem=stem,
        width=shape("F_filter.conv_last0.bias")[0], groups=32 if stem % 64 == 0 else 4,
        normal_channels=shape("F_filter.l1.bias")[0], mlp=widths,
    )  # fmt: skip


def _normal_config(found: Mapping[str, StoredTensor], kind: Kind) -> Config:
    """Widths of the normal networks; the convolutions down come at every third place, then blocks, then up."""
    places = sorted({int(m[1]) for name in found if (m := re.match(r"netF\.model\.(\d+)\.", name))})
    blocks = {int(m[1]) for name in found if (m := re.match(r"netF\.model\.(\d+)\.conv_block", name))}
    first = found.get("netF.model.1.bias")
    if not blocks or first is None:
        return Config.published(kind)
    downs = sum(4 <= place < min(blocks) for place in places)
    return replace(Config.published(kind), normal_width=first.shape[0], normal_downs=downs, normal_blocks=len(blocks))
