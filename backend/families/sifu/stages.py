# SPDX-License-Identifier: GPL-3.0-or-later
"""The networks of a weights file, one stage in memory at a time.

Released weights are 1.6 GB; the normal networks alone are 1.4 GB of that. Files are mapped, not read; a large stage is
loaded when it is run and dropped behind it, so the peak is one normal network and its pictures. Small weights stay.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from backend import packet
from backend.families.base import Step, no_step
from backend.families.sifu.config import Config, from_metadata
from backend.families.sifu.networks import (
    ImageFeatures,
    NormalGenerator,
    PointDecoders,
    Reconstructor,
    RefineFilter,
    decoders_name,
)
from backend.families.sifu.transformer import ImageFilter, position_table
from backend.protocol import PopulaceError
from backend.weights import Weights, check_tensors

NORMALS = "normal_filter."  # what names of the normal networks' tensors begin with
LARGE = 4_000_000  # parameters from which on a stage is not kept
Module = TypeVar("Module", bound=nn.Module)


def distinct(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what files do not keep: the second name of tensors that have two (`downsample.0.*` is `bn4.*`), tables of
    positions, which follow from the sizes, and counters."""
    return {name: tensor for name, tensor in state.items() if ".downsample.0." not in name
            and not name.endswith(("_pos_embedding", "num_batches_tracked"))}  # fmt: skip


def whole(state: Mapping[str, Tensor], network: nn.Module, config: Config) -> dict[str, Tensor]:
    """What `load_state_dict` wants of a network, from what `distinct` left."""
    out = {}
    for name, tensor in network.state_dict().items():
        if name.endswith("_pos_embedding"):
            out[name] = position_table(config.tokens, config.dim)
        elif name.endswith("num_batches_tracked"):
            out[name] = torch.zeros((), dtype=tensor.dtype)
        else:
            out[name] = state[name.replace(".downsample.0.", ".bn4.")]
    return out


class Stages:
    """All networks of one model. Nothing is differentiated here."""

    def __init__(self, config: Config, arrays: Mapping[str, np.ndarray[Any, Any]], device: torch.device) -> None:
        self.config, self.arrays, self.device = config, arrays, device
        self._kept: dict[str, nn.Module] = {}

    @classmethod
    def of_network(cls, network: Reconstructor) -> Stages:
        """A network at hand, in training or in a test."""
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in distinct(network.state_dict()).items()}
        return cls(network.config, arrays, next(network.parameters()).device)

    @classmethod
    def of_files(cls, weights: Weights, device: torch.device) -> Stages:
        """Verified files, mapped into memory. Raises `weights_corrupt`, and `weights_missing` where the normal networks
        are not there."""
        arrays, metadata = {}, {}
        for path in weights.paths:
            with open(path, "rb") as file:
                view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            try:
                found, notes = packet.load_tensors(view)
            except ValueError as error:
                raise _corrupt(weights.name, f"{path.name} is not a safetensors file: {error}") from None
            if any(name.startswith(NORMALS) for name in arrays):
                continue  # the main file has its own: imported ones are of other weights
            arrays |= found
            metadata |= notes
        try:
            config = from_metadata(metadata)
        except ValueError as error:
            raise _corrupt(weights.name, str(error)) from None
        if not any(name.startswith(NORMALS) for name in arrays):
            raise PopulaceError(
                "weights_missing", f"The normal networks of {config.kind.upper()} are not here.",
                f"They are in the authors' second file. Run: populace weights import {config.kind} normal.ckpt",
            )  # fmt: skip
        with torch.device("meta"):
            shapes = {name: tuple(t.shape) for name, t in distinct(Reconstructor(config).state_dict()).items()}
        check_tensors(weights.name, arrays, shapes)
        return cls(config, arrays, device)

    @property
    def decoders(self) -> PointDecoders:
        name = decoders_name(self.config)
        if name not in self._kept:
            self._kept[name] = self._loaded(name, lambda: PointDecoders(self.config))
        found = self._kept[name]
        assert isinstance(found, PointDecoders)
        return found

    @torch.no_grad()
    def normals(
        self, image: Float[Tensor, "1 3 H W"], body: Mapping[str, Float[Tensor, "1 3 H W"]], step: Step = no_step
    ) -> tuple[Float[Tensor, "1 3 H W"], Float[Tensor, "1 3 H W"]]:
        """Clothed normals of front and back, as `Reconstructor.normals`."""
        found = []
        for i, side in enumerate("FB"):
            step("normals", i / 2)
            net = self._stage(f"normal_filter.net{side}", lambda: NormalGenerator(self.config))
            found.append(self._run(net, image, body[side]))
            del net  # before the next one is loaded
        return found[0], found[1]

    @torch.no_grad()
    def planes(
        self, image: Float[Tensor, "1 3 H W"], front: Float[Tensor, "1 3 H W"], back: Float[Tensor, "1 3 H W"],
        body: Mapping[str, Float[Tensor, "1 3 H W"]], step: Step = no_step,
    ) -> dict[str, Float[Tensor, "C h w"]]:  # fmt: skip
        """As `Reconstructor.planes`, without the batch."""
        config = self.config
        step("planes", 0.0)
        net = self._stage("image_filter", lambda: ImageFilter(config))
        planes = self._run(net, image, front, back, body.get("R"), body.get("L"))
        del net
        if config.kind == "gta":
            step("planes", 0.4)
            refine = self._stage("refine_filter", lambda: RefineFilter(config))
            planes["xy"] = refine.refine(image, planes["xy"])
        step("planes", 0.7)
        filter_ = self._stage("F_filter", lambda: ImageFeatures(config, config.normal_channels))
        planes["N"] = torch.cat([filter_(front), filter_(back)], 1)
        return {name: plane[0].float() for name, plane in planes.items()}

    def _run(self, net: nn.Module, *inputs: Tensor | None) -> Any:
        """In bfloat16 on a GPU, where it halves memory and time; on a CPU it would be slower."""
        if self.device.type == "cuda":
            with torch.autocast("cuda", torch.bfloat16):
                return _floats(net(*inputs))
        return net(*inputs)

    def _stage(self, name: str, make: Callable[[], Module]) -> Module:
        if name in self._kept:
            return self._kept[name]  # pyright: ignore[reportReturnType]
        net = self._loaded(name, make)
        if sum(p.numel() for p in net.parameters()) < LARGE:
            self._kept[name] = net
        return net

    def _loaded(self, name: str, make: Callable[[], Module]) -> Module:
        with torch.device("meta"):
            net = make()
        prefix = f"{name}."
        state = {key.removeprefix(prefix): torch.from_numpy(array.astype(np.float32)) for key, array in
                 self.arrays.items() if key.startswith(prefix)}  # fmt: skip
        net.load_state_dict(whole(state, net, self.config), assign=True)
        return net.to(self.device).eval().requires_grad_(False)


def _floats(found: Any) -> Any:
    if isinstance(found, dict):
        return {name: tensor.float() for name, tensor in found.items()}
    return found.float()


def _corrupt(name: str, what: str) -> PopulaceError:
    return PopulaceError("weights_corrupt", f"The weights {name!r} are damaged: {what}.", "Import the files again.")
