# SPDX-License-Identifier: GPL-3.0-or-later
"""How people are looked at in adversarial training, and the pool of real pictures.

Both sides are seen alike: standing in the rest pose with the feet on y = 0, unlit colours on white, one sample per
pixel, the whole person ("body") or the head. A view is (azimuth, elevation in radians, index into KINDS).
"""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from backend.render.camera import Camera, look_at, perspective
from backend.training import checkpoint
from backend.training.discriminators import KINDS
from backend.training.splits import split_of

ASPECT = 0.75  # width / height of every picture
ELEVATION = (-0.09, 0.35)  # radians; GET3D's people are seen from 0 to 20 degrees above
FRAMES = {"body": (1.08, 5.0), "head": (0.20, 2.5)}  # half height of the frame and distance, metres
WHITE = (1.0, 1.0, 1.0)

Shot = Callable[[int, Sequence[np.ndarray], tuple[int, int]], np.ndarray]
"""(seed, views, (height, width)) -> pictures u8 [V, H, W, 4] of one person: sRGB on white, coverage."""


def random_views(key: Sequence[int]) -> Float[np.ndarray, "2 3"]:
    """One view of each kind, a function of the key."""
    rng = np.random.default_rng(key)
    azimuth = rng.uniform(0, 2 * np.pi, len(KINDS))
    return np.stack([azimuth, rng.uniform(*ELEVATION, len(KINDS)), np.arange(len(KINDS))], 1).astype(np.float32)


def camera_of(view: Sequence[float] | np.ndarray, head: Float[Tensor, "2 3"]) -> Camera:
    """The camera of a view of a person whose head bone is `head`."""
    azimuth, elevation = float(view[0]), float(view[1])
    kind = KINDS[int(view[2])]
    half, distance = FRAMES[kind]
    target = head.mean(0) if kind == "head" else head.new_tensor([0.0, 1.0, 0.05])
    direction = head.new_tensor(
        [np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)]
    )
    projection = perspective(2 * float(np.arctan(half / distance)), ASPECT, distance - 1.5, distance + 1.5)
    return Camera(look_at(target + distance * direction, target), projection.to(head))


@dataclass(frozen=True)
class Reals:
    """Pictures of real people in the range that critics see."""

    pictures: UInt8[Tensor, "P V H W 4"]
    views: Float[Tensor, "P V 3"]

    def draw(self, keys: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """One person per key: pictures [V * N, 4, H, W] in -1..1, all of the first kind first, and views [V * N, 3]."""
        index = torch.tensor([int(np.random.default_rng(key).integers(len(self.pictures))) for key in keys])
        pictures = self.pictures[index].transpose(0, 1).flatten(0, 1).to(device)
        views = self.views[index].transpose(0, 1).flatten(0, 1).to(device)
        return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1, views


def make_reals(
    shot: Shot, count: int, size: tuple[int, int], seed: int, workers: int = 0, path: Path | None = None
) -> Reals:
    """`count` training people seen by `shot`; kept at `path` and read from there by the next session."""
    facts = {"count": count, "size": list(size), "seed": seed}
    if path is not None and path.exists():
        tensors, found = checkpoint.load(path)
        if found == facts:
            return Reals(tensors["pictures"], tensors["views"])
    seeds = training_seeds(count, seed)
    views = [random_views([seed, s, 7]) for s in seeds]
    if workers > 1:
        with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            pictures = list(pool.map(shot, seeds, views, [size] * count, chunksize=8))
    else:
        pictures = [shot(s, v, size) for s, v in zip(seeds, views, strict=True)]
    reals = Reals(torch.from_numpy(np.stack(pictures)), torch.from_numpy(np.stack(views)))
    if path is not None:
        checkpoint.save(path, {"pictures": reals.pictures, "views": reals.views}, facts)
    return reals


def training_seeds(count: int, seed: int) -> list[int]:
    """The first `count` seeds of the training split after an offset by `seed`."""
    found, at = [], seed * 1_000_003
    while len(found) < count:
        if split_of(at) == "train":
            found.append(at)
        at += 1
    return found


def kit_shot(kit: Path) -> Shot:
    """Sampled people of an asset folder."""
    return functools.partial(_shoot, str(kit))


@functools.cache
def _sampler(kit: str):
    from backend.training.makehuman import Kit
    from backend.training.sampler import Sampler

    return Sampler(Kit(Path(kit)))


def _shoot(kit: str, seed: int, views: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    from backend.training.sampler import render_person

    person = _sampler(kit).person(seed)
    head = torch.from_numpy(person.joints[:, person.bones.names.index("head")]).float()
    out = []
    for view in views:
        camera = camera_of(view, head)
        batch = Camera(camera.c2w[None], camera.projection[None])
        seen = render_person(person, batch, size, supersample=1, lit=False, background=WHITE)
        out.append(torch.cat([seen.rgb[0], seen.mask[0][..., None]], -1))
    return (torch.stack(out).clamp(0, 1) * 255 + 0.5).to(torch.uint8).numpy()
