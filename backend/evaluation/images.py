# SPDX-License-Identifier: GPL-3.0-or-later
"""Pictures compared: one with one (PSNR, SSIM), or set with set (sliced Wasserstein distance of patches).

Images are [B, C, H, W] in 0..1.
"""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

LOSSLESS = 100.0  # dB
BINOMIAL = (1.0, 4.0, 6.0, 4.0, 1.0)  # / 16: the pyramids' low-pass (Burt and Adelson 1983)


def psnr(a: Tensor, b: Tensor, mask: Bool[Tensor, "B H W"] | None = None) -> float:
    """Peak signal to noise ratio in dB, peak 1; LOSSLESS for equal images. With `mask` only over its pixels."""
    square = (a.double() - b.double()) ** 2
    mean = square.mean() if mask is None else square.mean(1)[mask].mean()
    return min(LOSSLESS, float(-10 * torch.log10(mean)))


def ssim(a: Float[Tensor, "B C H W"], b: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w"]:
    """Structural similarity per window (Wang et al. 2004, eq. 13), mean over channels: 11 x 11 Gaussian windows, sigma
    1.5, K = (0.01, 0.03), only windows that lie in the image: h = H - 10, w = W - 10. Its mean is "the SSIM"."""
    a, b = a.double(), b.double()
    x = torch.arange(11, dtype=torch.float64, device=a.device) - 5
    line = torch.exp(-(x**2) / (2 * 1.5**2))
    line = line / line.sum()

    def mean(image: Tensor) -> Tensor:
        return _separable(image, line)

    mu_a, mu_b = mean(a), mean(b)
    var_a, var_b, cov = mean(a * a) - mu_a**2, mean(b * b) - mu_b**2, mean(a * b) - mu_a * mu_b
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mu_a * mu_b + c1) * (2 * cov + c2) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))
    return value.mean(1)


def sliced_wasserstein(
    a: Float[Tensor, "N C H W"], b: Float[Tensor, "M C H W"], seed: int = 0, patches: int = 128, directions: int = 512
) -> dict[int, float]:
    """Sliced Wasserstein distance of the 7 x 7 patches of each level of a Laplacian pyramid, by height of the level
    (Karras et al. 2018, sec. 5 and appendix): finest details first, down to 16 pixels.

    `patches` places per image, the same places in both sets; channels are normalised to mean 0 and deviation 1 over
    each set, as there. Multiply by 1000 to compare with papers. Takes the same number of images of both sets.
    """
    count = min(len(a), len(b))
    generator = torch.Generator().manual_seed(seed)
    out: dict[int, float] = {}
    for level_a, level_b in zip(laplacian_pyramid(a[:count]), laplacian_pyramid(b[:count]), strict=True):
        height, width = level_a.shape[2:]
        rows = torch.randint(0, height - 6, (count, patches), generator=generator)
        columns = torch.randint(0, width - 6, (count, patches), generator=generator)
        first, second = _descriptors(level_a, rows, columns), _descriptors(level_b, rows, columns)
        slices = functional.normalize(torch.randn(first.shape[1], directions, generator=generator), dim=0)
        total = 0.0
        for part in slices.split(64, 1):  # sorted columns of N * patches numbers: some at a time
            gap = (first @ part).sort(0).values - (second @ part).sort(0).values
            total += float(gap.abs().mean(0).sum())
        out[height] = total / directions
    return out


def laplacian_pyramid(images: Float[Tensor, "N C H W"], smallest: int = 16) -> list[Tensor]:
    """Differences of neighbouring levels of the Gaussian pyramid, finest first; the last level, of at least `smallest`
    pixels, is the Gaussian's own. Adding each level to the enlarged next ones gives the image back."""
    levels = [images.float()]
    while min(levels[-1].shape[2:]) // 2 >= smallest:
        levels.append(shrink(levels[-1]))
    return [fine - enlarge(coarse, fine) for fine, coarse in itertools.pairwise(levels)] + levels[-1:]


def shrink(images: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C h w"]:
    """Low-pass and every second pixel."""
    line = images.new_tensor(BINOMIAL) / 16
    padded = functional.pad(images, (2, 2, 2, 2), mode="reflect")
    return _separable(padded, line)[:, :, ::2, ::2]


def enlarge(coarse: Tensor, like: Tensor) -> Tensor:
    """Zeros between the pixels, and the low-pass times four."""
    out = like.new_zeros(like.shape)
    out[:, :, ::2, ::2] = coarse
    line = like.new_tensor(BINOMIAL) / 8
    return _separable(functional.pad(out, (2, 2, 2, 2), mode="reflect"), line)


def _separable(images: Tensor, line: Tensor) -> Tensor:
    channels, kernel = images.shape[1], line.to(images)
    images = functional.conv2d(images, kernel.expand(channels, 1, 1, -1), groups=channels)
    return functional.conv2d(images, kernel[:, None].expand(channels, 1, -1, 1), groups=channels)


def _descriptors(level: Tensor, rows: Tensor, columns: Tensor) -> Float[Tensor, "P D"]:
    """Patches [N * patches, C * 49], each channel normalised over all of them."""
    window = torch.arange(7)
    image = torch.arange(len(level))[:, None, None, None]
    found = level.permute(0, 2, 3, 1)[
        image, rows[..., None, None] + window[:, None], columns[..., None, None] + window
    ]  # [N, patches, 7, 7, C]
    mean, deviation = found.mean((0, 1, 2, 3)), found.std((0, 1, 2, 3), correction=0)
    return ((found - mean) / deviation.clamp(min=1e-8)).flatten(2).flatten(0, 1)
