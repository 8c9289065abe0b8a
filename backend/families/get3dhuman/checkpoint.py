# SPDX-License-Identifier: GPL-3.0-or-later
"""The released files: which of their tensors are ours, under which names. `backend.checkpoints` reads the files.

The published loader is lenient; this one wants every tensor of the networks, and besides them only what is known to be
left over from training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from backend import checkpoints
from backend.checkpoints import Converted, StoredTensor
from backend.families.get3dhuman.config import Config, to_metadata
from backend.families.get3dhuman.networks import Get3DHuman, RefineNet

FILES = ("Get3DHuman_shape_texture_v2.pth", "Get3DHuman_refinement_v1.pth")
NAMES = ("get3dhuman", "get3dhuman_refine")  # of the weights that come of them
LEFTOVERS = re.compile(r"(dis|netd|criterion|loss|vgg|lpips|perceptual)", re.IGNORECASE)


def convert(content: Any, file: str, own: bool = False) -> Converted:
    """The weights in what `checkpoints.read` found: those of the generators, or those of the refine net.

    A generator's channels may be fewer than the published ones; with `own` other sizes may differ too. Raises
    `weights_corrupt` and says which tensors are missing, do not belong there or have another shape.
    """
    found = {name.removeprefix("module."): t for name, t in checkpoints.state_dict(content, file).items()}
    if any(name.startswith("rnet.") for name in found):
        width = _sizes(found, "rnet.Conv0.conv.0.bias", 64)[0] if own else Config().refine_width
        return Converted(NAMES[1], _taken(RefineNet(width), found, file), {"title": "Get3DHuman's refine net"})
    if not any(name.startswith("backbone_shape.") for name in found):
        raise checkpoints.refused(file, "it holds neither Get3DHuman's generators (backbone_shape.*) nor its refine "
                                  f"net (rnet.*), which are in {FILES[0]} and {FILES[1]}")  # fmt: skip
    config = _config(found, own)
    notes = {"title": "Get3DHuman's generators"}
    return Converted(NAMES[0], _taken(Get3DHuman(config), found, file), to_metadata(config) | notes)


def _taken(network: nn.Module, found: Mapping[str, StoredTensor], file: str) -> dict[str, Any]:
    """float32 arrays of a network's tensors. Counters of normalisation are left out: nothing reads them."""
    state = network.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if tensor.is_floating_point()}
    counters = state.keys() - shapes.keys()
    checkpoints.check_names(file, found, shapes, lambda name: name in counters or bool(LEFTOVERS.match(name)))
    return checkpoints.numbers(file, {name: found[name] for name in shapes})


def _config(found: Mapping[str, StoredTensor], own: bool) -> Config:
    """The sizes that a generator's names and shapes speak of. What is missing the check will say."""
    config = Config()
    if own:
        blocks = [int(m[1]) for name in found if (m := re.match(r"backbone_shape\.synthesis\.b(\d+)\.", name))]
        w_dim, z_dim = _sizes(found, "backbone_shape.mapping.fc0.weight", config.w_dim, config.z_dim)[:2]
        stem = _sizes(found, "filter_shape.conv1.bias", config.stem)[0]
        widths = {branch: tuple(_sizes(found, f"mlp_{branch}.filters.{i}.bias", w)[0] for i, w in enumerate(published))
                  for branch, published in (("shape", config.shape_widths), ("texture", config.texture_widths))}
        config = replace(
            config, z_dim=z_dim, w_dim=w_dim, resolution=max(blocks, default=config.resolution), stem=stem,
            mapping_layers=sum(bool(re.match(r"backbone_shape\.mapping\.fc\d+\.bias$", name)) for name in found),
            feature_channels=_sizes(found, "backbone_shape.synthesis.b4.torgb.bias", config.feature_channels)[0],
            volume=_sizes(found, "filter_shape.l0.bias", config.volume)[0], groups=math.gcd(32, max(stem // 2, 1)),
            shape_widths=widths["shape"], texture_widths=widths["texture"],
        )  # fmt: skip
    first, last = (_sizes(found, f"backbone_shape.synthesis.b{r}.conv1.bias", 0)[0] for r in (4, config.resolution))
    if not first or not last:
        return config
    return replace(config, channel_max=first, channel_base=last * config.resolution)


def _sizes(found: Mapping[str, StoredTensor], name: str, *default: int) -> tuple[int, ...]:
    return found[name].shape if name in found and len(found[name].shape) == len(default) else default
