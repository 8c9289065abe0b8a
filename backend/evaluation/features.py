# SPDX-License-Identifier: GPL-3.0-or-later
"""What FID, KID, precision and recall look at: numbers that describe a picture of a person.

The default needs no download: a wavelet scattering of two orders (Bruna and Mallat 2013), a convolutional network whose
filters are known beforehand - oriented Gabor filters on four octaves, modulus, the same again, local means - so that it
holds still under small shifts, tells textures apart, and has nothing to learn and no seed that luck depends on. Order
zero keeps the colours of an 8 x 4 grid of places: people stand in the middle of their pictures, so places mean parts.
That Frechet distances need no network trained on ImageNet, and are often better without one for pictures unlike
photographs, is what Naeem et al. 2020 ("Reliable fidelity and diversity metrics", random embeddings) found.

`Scale` divides every number by its spread over the reference people and turns the result by a fixed random matrix to
DIMENSIONS numbers (Johnson and Lindenstrauss: distances stay), so that covariances of 500 people have full rank. A
distance of 1 is about "one standard deviation of people". Such figures compare with each other, never with papers' FID.

With a safetensors file of torchvision's `inception_v3` weights, and torchvision installed, Inception's 2048 numbers
are used instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from backend.evaluation.images import shrink
from backend.evaluation.metrics import frechet_distance
from backend.protocol import PopulaceError

NAME = "scattering-v1"
LEVELS = 4  # octaves
ORIENTATIONS = 4
RADIUS = 4  # of the filters, pixels
DIMENSIONS = 96
LIMIT = 5.0
SMALLEST = 64  # pixels along a side that the filters need
BATCH = 32

Extractor = Callable[[Float[Tensor, "B 3 H W"]], Float[Tensor, "B D"]]


def opponent(images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    """Luma, red-green and yellow-blue of sRGB."""
    r, g, b = images.unbind(1)
    return torch.stack([(r + g + b) / 3, r - g, (r + g) / 2 - b], 1)


def gabor() -> Float[Tensor, "K 1 S S"]:
    """Real parts, then imaginary parts, of Morlet wavelets: wavelength 4 pixels, mean 0, |.| of unit sum."""
    axis = torch.arange(-RADIUS, RADIUS + 1, dtype=torch.float32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    window = torch.exp(-(x**2 + y**2) / (2 * 1.6**2))
    parts = []
    for i in range(ORIENTATIONS):
        angle = math.pi * i / ORIENTATIONS
        wave = torch.exp(1j * (math.pi / 2) * (x * math.cos(angle) + y * math.sin(angle)))
        wavelet = window * (wave - (window * wave).sum() / window.sum())
        parts.append(wavelet / wavelet.abs().sum())
    return torch.cat([torch.stack(parts).real, torch.stack(parts).imag])[:, None]


def modulus(image: Float[Tensor, "B C H W"], filters: Float[Tensor, "K 1 S S"]) -> Float[Tensor, "B CO H W"]:
    """|image * wavelet| for every channel and orientation."""
    batch, channels = image.shape[:2]
    flat = functional.pad(image.flatten(0, 1)[:, None], (RADIUS,) * 4, mode="reflect")
    real, imaginary = functional.conv2d(flat, filters).chunk(2, 1)
    return (real**2 + imaginary**2 + 1e-12).sqrt().unflatten(0, (batch, channels)).flatten(1, 2)


@torch.no_grad()
def scattering(images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
    """672 numbers of each picture of at least 64 x 64 pixels."""
    return torch.cat([_scatter(part) for part in images.float().split(BATCH)])


def _scatter(images: Tensor) -> Tensor:
    filters = gabor().to(images)

    def pooled(maps: Tensor, rows: int, columns: int) -> Tensor:
        # roots of small numbers tell more apart than the numbers
        return functional.adaptive_avg_pool2d(maps, (rows, columns)).flatten(1)

    level = opponent(images)
    out = [pooled(level, 8, 4)]
    for octave in range(LEVELS):
        first = modulus(level, filters)
        out.append(pooled(first, 4, 2).sqrt())
        luma = first[:, :ORIENTATIONS]
        for _ in range(octave + 1, LEVELS):
            luma = shrink(luma)
            out.append(pooled(modulus(luma, filters), 2, 1).sqrt())
        level = shrink(level)
    return torch.cat(out, 1)


@dataclass(frozen=True)
class Scale:
    """Fixed by the reference people: what one unit of each number is."""

    mean: Float[np.ndarray, " D"]
    spread: Float[np.ndarray, " D"]
    turn: Float[np.ndarray, "D K"]

    @classmethod
    def of(cls, features: Float[np.ndarray, "N D"], dimensions: int = DIMENSIONS) -> Scale:
        spread = features.std(0)
        spread = np.maximum(spread, 0.3 * np.median(spread) + 1e-9)  # air that somebody's hat once fills is no news
        size = features.shape[1]
        random = np.random.default_rng(0).standard_normal((size, min(dimensions, size)))
        turn, triangle = np.linalg.qr(random)
        turn = turn * np.sign(np.diag(triangle)) * math.sqrt(size / turn.shape[1])
        return cls(features.mean(0), spread, turn)

    def whole(self, features: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
        """In deviations from the mean person, LIMIT at most: one odd person shall not decide over five hundred."""
        return ((features - self.mean) / self.spread).clip(-LIMIT, LIMIT)

    def __call__(self, features: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N K"]:
        return self.whole(features) @ self.turn / math.sqrt(len(self.mean))


class Target:
    """Pictures that others are to be like. Their own spread is the unit: compare distances to one target only."""

    def __init__(self, pictures: Float[Tensor, "N 3 H W"]) -> None:
        found = scattering(enlarged(pictures)).numpy()
        self.scale = Scale.of(found)
        self._own = self.scale(found)

    def distance(self, pictures: Float[Tensor, "M 3 H W"]) -> float:
        """The Frechet distance."""
        return frechet_distance(self.scale(scattering(enlarged(pictures)).numpy()), self._own)


def enlarged(pictures: Float[Tensor, "N C R R"], least: int = SMALLEST) -> Float[Tensor, "N C S S"]:
    """To `least` pixels if they are smaller."""
    if pictures.shape[-1] >= least:
        return pictures
    return functional.interpolate(pictures, (least, least), mode="bilinear", antialias=True)


def extractor(inception: Path | None = None) -> tuple[str, Extractor]:
    """Name and function. `inception` is a safetensors file with the state of torchvision's `inception_v3`.

    Raises PopulaceError("invalid_request") if it cannot be used.
    """
    if inception is None:
        return NAME, scattering
    try:
        from torchvision.models import inception_v3  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise PopulaceError(
            "invalid_request", "Inception features need the package torchvision, which is not installed.",
            "Install it, or leave --inception away to use the built-in features."
        ) from None  # fmt: skip
    from safetensors.torch import load_file

    network = inception_v3(weights=None, init_weights=False, aux_logits=True)
    try:
        network.load_state_dict(load_file(inception))
    except (OSError, RuntimeError) as error:
        raise PopulaceError(
            "invalid_request", f"{inception} does not hold the weights of torchvision's inception_v3 ({error}).",
            "Save its state_dict with safetensors.torch.save_file."
        ) from None  # fmt: skip
    network.fc = torch.nn.Identity()
    network.eval()
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        out = []
        for part in images.float().split(BATCH):
            large = functional.interpolate(part, (299, 299), mode="bilinear", antialias=True)
            out.append(network((large - mean[:, None, None]) / deviation[:, None, None]))
        return torch.cat(out)

    return "inception_v3", run
