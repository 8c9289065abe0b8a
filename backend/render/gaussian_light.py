# SPDX-License-Identifier: GPL-3.0-or-later
"""Light as a sum of spherical Gaussians, and what a surface of given material sends to the eye: differentiable in
material, normal and light.

A lobe is G(v) = amplitude exp(sharpness (axis . v - 1)). Products of two have a closed integral over the sphere (Wang
et al. 2009, "All-frequency rendering of dynamic, spatially-varying reflectance"). So the microfacet term takes its
distribution of normals as a lobe, bent to the mirrored eye, and the diffuse term the cosine as one (Meder and Bruderlin
2018): the scheme of DIB-R++ (Chen et al. 2021), which GET3D's variant with materials renders with. Shadows and light
between surfaces are left out. The material is that of glTF: base colour, perceptual roughness, metallic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

COSINE = (2.133, 1.17)  # sharpness and amplitude of the lobe that stands for max(cos, 0)
SPECULAR_0 = 0.04  # of what is no metal, seen head-on
LEAST_ROUGHNESS = 0.1
_LEAST_COSINE = 1e-3


@dataclass(frozen=True)
class Light:
    """Lobes of an environment; linear radiance."""

    axis: Float[Tensor, "L 3"]  # unit, to the light
    sharpness: Float[Tensor, " L"]
    amplitude: Float[Tensor, "L 3"]

    def to(self, like: Tensor) -> Light:
        return Light(self.axis.to(like), self.sharpness.to(like), self.amplitude.to(like))

    def turned(self, angle: float) -> Light:
        """About +Y."""
        c, s = math.cos(angle), math.sin(angle)
        turn = self.axis.new_tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]])
        return Light(self.axis @ turn.T, self.sharpness, self.amplitude)


def random_light(key: list[int], lobes: int = 8) -> Light:
    """An environment as outdoors or in a studio: broad light from all around, most of it from above, and some lamps. A
    white surface that faces up is then about as bright as 1, from 0.5 to 2. The same for the same key."""
    rng = np.random.default_rng(key)
    axis = rng.normal(size=(lobes, 3))
    axis[:, 1] = np.abs(axis[:, 1]) * 0.8 + 0.1
    sharpness = np.exp(rng.uniform(np.log(3), np.log(60), lobes))
    warmth = 1 + 0.25 * rng.uniform(-1, 1, (lobes, 1)) * np.array([1.0, 0.0, -1.0])
    # a lamp's share of the light, whatever its size: the integral of a lobe is about 2 pi amplitude / sharpness
    share = rng.dirichlet(np.full(lobes, 0.7))[:, None] * rng.uniform(0.5, 1.5)
    amplitude = share * warmth * sharpness[:, None] / 2
    axis = np.concatenate([axis, [[0.0, 1.0, 0.0]]])
    sharpness = np.append(sharpness, 0.5)
    amplitude = np.concatenate([amplitude, np.full((1, 3), rng.uniform(0.3, 0.6))])
    axis /= np.linalg.norm(axis, axis=1, keepdims=True)
    return Light(*(torch.from_numpy(x).float() for x in (axis, sharpness, amplitude)))


def inner(
    axis: Float[Tensor, "*N 3"], sharpness: Float[Tensor, "*N"], other: Float[Tensor, "*N 3"], other_sharpness: Tensor
) -> Float[Tensor, "*N"]:
    """Integral over the sphere of the product of two lobes of amplitude 1: 4 pi exp(-a - b) sinh(u) / u with
    u = |a axis + b other|."""
    total = sharpness + other_sharpness
    u = (axis * sharpness[..., None] + other * other_sharpness[..., None]).square().sum(-1).clamp(min=1e-12).sqrt()
    return 2 * math.pi * (u - total).exp() * -torch.expm1(-2 * u) / u


def shade(
    base: Float[Tensor, "N 3"],
    roughness: Float[Tensor, " N"],
    metallic: Float[Tensor, " N"],
    normal: Float[Tensor, "N 3"],
    to_eye: Float[Tensor, "N 3"],
    light: Light,
) -> Float[Tensor, "N 3"]:
    """Linear radiance to the eye; `base` is linear, directions are unit."""
    n, v = normal[:, None], to_eye[:, None]
    axis, sharp = light.axis[None], light.sharpness[None]
    cosine = torch.full_like(sharp, COSINE[0])
    falling = COSINE[1] * inner(axis, sharp, n, cosine)  # [N, L]
    diffuse = base * (1 - metallic)[:, None] / math.pi * (falling @ light.amplitude)

    alpha2 = roughness.clamp(min=LEAST_ROUGHNESS) ** 4  # alpha = roughness^2
    facing = (n * v).sum(-1).clamp(min=_LEAST_COSINE)  # [N, 1]
    mirrored = functional.normalize(2 * facing[..., None] * n - v, dim=-1)
    lobe = (2 / alpha2)[:, None] / (4 * facing)  # the half vector turns by half as much as the light
    caught = inner(axis, sharp, mirrored, lobe.expand(-1, len(light.sharpness))) / (math.pi * alpha2)[:, None]
    # visibility (Smith, GGX) and Fresnel (Schlick) as they are at the lobe's axis, where light and eye face alike
    smith = 2 * facing / (facing + (alpha2[:, None] + (1 - alpha2[:, None]) * facing.square()).sqrt())
    specular_0 = SPECULAR_0 * (1 - metallic)[:, None] + base * metallic[:, None]
    fresnel = specular_0 + (1 - specular_0) * (1 - facing) ** 5
    return diffuse + fresnel * (smith.square() / (4 * facing)) * (caught @ light.amplitude)
