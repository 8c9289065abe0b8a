# SPDX-License-Identifier: GPL-3.0-or-later
"""Official GET3D files -> weights of ours: G_ema, every name and shape checked, the mean codes computed once."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from backend.checkpoints import Converted, StoredTensor, check_names, numbers, refused, state_dict
from backend.families.base import seeded_normal
from backend.families.get3d.config import Config
from backend.families.get3d.model import metadata_of
from backend.families.get3d.networks import Generator
from backend.networks.stylegan2 import MappingNetwork, filter_taps

AVERAGE_OF = 100_000  # codes, as in the published inference, which draws them anew each time
SCALES = {"car": 1.0, "motorbike": 1.0, "chair": 0.8, "table": 0.8}


def convert(content: Any, file: str, own: bool = False) -> Converted:
    """The generator of a file that holds {G, G_ema, D} or just the names of G_ema. With `own` its sizes may differ from
    the published ones. Raises `weights_corrupt` and says which names or shapes are wrong."""
    nested = isinstance(content, Mapping) and "G_ema" in content
    found = state_dict(content, file, "G_ema") if nested else state_dict(content, file)
    config = config_of(found, file, own)
    category = next((name for name in SCALES if name in file.lower()), "")
    config = dataclasses.replace(config, scale=SCALES.get(category, 1.0))
    with torch.device("meta"):
        generator = Generator(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in generator.state_dict().items()}
    check_names(file, found, shapes, lambda name: name.endswith("resample_filter"))
    arrays = numbers(file, {name: found[name] for name in shapes if not name.endswith("resample_filter")})
    arrays |= {name: filter_taps().numpy() for name in shapes if name.endswith("resample_filter")}
    for name in ("mapping", "mapping_geo"):
        arrays[f"{name}.w_avg"] = average_code(name, arrays, config)
    title = f"GET3D {category or 'generator'}"
    notes = {"title": title, "w_avg": f"mean of {AVERAGE_OF} codes, seed 0"}
    return Converted(f"get3d_{category}" if category else "get3d_own", arrays, metadata_of(config) | notes)


def config_of(found: Mapping[str, StoredTensor], file: str, own: bool) -> Config:
    """Which generator a file is of. Raises `weights_corrupt` unless it is of the published sizes or `own`."""
    separate = any(name.startswith("synthesis.geometry_synthesis_") for name in found)
    root = "synthesis.geometry_synthesis_tex." if separate else "synthesis.generator."
    if not any(name.startswith(root) for name in found):
        raise refused(file, "it is no GET3D generator (no tensor is called synthesis...)")
    planes = f"{root}tri_plane_synthesis."
    sizes = {int(m[1]) for name in found if (m := re.match(rf"{re.escape(planes)}b(\d+)\.", name))}
    published = Config(kind="separate" if separate else "unified")
    if max(sizes, default=0) != published.resolution and not own:
        raise refused(file, f"its tri-planes have {max(sizes, default=0)} x {max(sizes, default=0)} pixels instead of "
                      f"{published.resolution} x {published.resolution} (--own takes other sizes)")  # fmt: skip
    if not own:
        return published

    def shape(name: str, axis: int) -> int:
        if name not in found or len(found[name].shape) <= axis:
            raise refused(file, f"{name} is missing or has another shape")
        return found[name].shape[axis]

    head, mlp = ("torgb", "mlp_synthesis") if separate else ("togeo", "mlp_synthesis_sdf")
    top = shape(f"{planes}b{max(sizes)}.conv1.weight", 0)
    return dataclasses.replace(
        published, z_dim=shape("mapping.fc0.weight", 1), w_dim=shape("mapping.fc0.weight", 0),
        mapping_layers=sum(bool(re.fullmatch(r"mapping\.fc\d+\.weight", name)) for name in found),
        resolution=max(sizes), limit=shape(f"{planes}b4.const", 0), base=top * max(sizes),
        features=shape(f"{planes}b4.{head}.weight", 0) // 3, color_features=shape("synthesis.to_rgb.weight", 1),
        hidden_layers=sum(bool(re.fullmatch(rf"{re.escape(root + mlp)}\.layers\.\d+\.weight", n)) for n in found) - 1,
        material="synthesis.to_material.weight" in found,
        surface="flexicubes" if f"{root}mlp_synthesis_weight.layers.0.weight" in found else "dmtet",
    )  # fmt: skip


@torch.no_grad()
def average_code(name: str, arrays: Mapping[str, np.ndarray], config: Config) -> np.ndarray:
    """The mean of w over many z of a fixed seed."""
    mapping = MappingNetwork(config.z_dim, config.w_dim, 1, config.mapping_layers)
    prefix = f"{name}."
    mapping.load_state_dict({key.removeprefix(prefix): torch.from_numpy(array)
                             for key, array in arrays.items() if key.startswith(prefix)})  # fmt: skip
    total = torch.zeros(config.w_dim, dtype=torch.float64)
    for part in range(10):
        z = seeded_normal(0, f"average/{name}/{part}", (AVERAGE_OF // 10, config.z_dim))
        total += mapping(torch.from_numpy(z)).sum((0, 1), dtype=torch.float64)
    return (total / AVERAGE_OF).float().numpy()
