# SPDX-License-Identifier: GPL-3.0-or-later
"""What a model family has to offer, and what it hands to the rest of the road.

Conventions everywhere behind this door: metres, right-handed, Y up, feet at y = 0, facing +Z;
sdf negative inside; colours sRGB in 0..1; float32.

A field lives in its own *field space* (for `people` the canonical rest body shared by all persons). The person
stands in *person space*; `offset` carries one to the other. It is DMTet's vertex offset (Shen et al. 2021, sec. 3.1):
the lattice is deformed, then the surface is interpolated on its edges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:  # the server reads `FamilyInfo` and never loads torch
    import torch
    from jaxtyping import Float, Int, UInt8
    from torch import Tensor

    from backend.geometry.focus import Focus

Step = Callable[[str, float], None]
"""`step(stage, fraction)` reports progress, fraction in 0..1 of that stage; raises `Cancelled` when asked to stop."""


def no_step(stage: str, fraction: float) -> None:
    """A `Step` that reports to nobody."""


@dataclass(frozen=True)
class Latents:
    """The identity of one human: enough to decode, save, mix and edit it."""

    family: str
    codes: Mapping[str, Float[Tensor, "L C"]]  # {"top/shape": [1, C], "top/tex": [1, C], ...}
    maps: Mapping[str, UInt8[Tensor, "H W 4"]] = field(default_factory=dict)
    """{"top/photo": ...}: colours that a photo showed of a part, sRGB with their weight, in the family's own layout.
    They belong to the part's looks."""


@dataclass(frozen=True)
class PersonPhoto:
    """One person in one photo."""

    rgba: UInt8[np.ndarray, "H W 4"]  # the whole photo, upright, sRGB; alpha is the person's matte
    box: tuple[int, int, int, int]  # left, top, right, bottom of the person, pixels, right and bottom exclusive


@dataclass(frozen=True)
class Encoded:
    """What a family makes of photos of one person."""

    latents: Latents
    rotations: Mapping[str, tuple[float, float, float, float]]  # of the first photo's pose, as in `poses`
    camera: Mapping[str, Any]  # of the first photo: c2w (4 rows), fov_y_rad, width, height
    scores: Mapping[str, float]  # how well it fits: mask_iou, psnr, ...


@dataclass(frozen=True)
class Rig:
    """A skeleton in rest pose, in person space. Bones are listed parents first; the root's parent is -1."""

    names: tuple[str, ...]
    parents: tuple[int, ...]
    heads: Float[Tensor, "J 3"]
    tails: Float[Tensor, "J 3"]


class HumanField(Protocol):
    """One object to be meshed. Every method takes field-space points on the field's device and is differentiable."""

    name: str  # "human", or "top", "shoes", ...
    bounds: Float[Tensor, "2 3"]  # field-space box that holds the surface with a margin
    rig: Rig | None
    focus: Focus | None  # where the lattice of the surface is finer
    region_density: Float[Tensor, " R"] | None  # per region: texels and triangles per area, relative to the others
    # A field may also have `colors_vertices = True`: after extraction everything is asked where vertices have moved to;
    # and `extract(grid_resolution, step) -> TriMesh`, a way of its own to its surface.

    def sdf(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        """Metres to the surface, negative inside; exact sign everywhere, magnitude truncated or approximate far off."""
        ...

    def color(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        """sRGB base colour in 0..1, meaningful near the surface."""
        ...

    def material(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 2"]:
        """Roughness (perceptual, as in glTF and Principled BSDF) and metallic, 0..1, meaningful near the surface."""
        ...

    def offset(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        """Displacement from field space to person space, metres; zeros if the two are one."""
        ...

    def counterpart(self, points: Float[Tensor, "N 3"], other: Any) -> Float[Tensor, "N 3"]:
        """About where these points lie in the field of the same part of an edited person: the points themselves if
        the field space is shared. Only called for families with numeric attributes; shape keys start from there."""
        ...

    def region(self, points: Float[Tensor, "N 3"]) -> Int[Tensor, " N"]:
        """Body region per point (head, torso, left arm, ...): atlas charts do not cross regions. Zeros if none."""
        ...

    def skin(self, points: Float[Tensor, "N 3"]) -> tuple[Int[Tensor, "N 4"], Float[Tensor, "N 4"]]:
        """Bone indices into `rig` and weights that sum to 1. Only called when `rig` is not None."""
        ...


@runtime_checkable
class LatticeField(Protocol):
    """What a `HumanField` also has if all nodes of a lattice are cheap at once; its values need no distances."""

    def sdf_on_axes(self, axes: Sequence[Float[Tensor, " n"]]) -> np.ndarray[Any, Any]:
        """`sdf` at every node (x, y, z) of the three axes, float32 [X, Y, Z]; zero or more beyond `bounds`."""
        ...


class FamilyModel(Protocol):
    """A loaded model. `device` is where its fields compute.

    The first code of `sample` is one of the body, which every person has; a part is worn if it has codes.
    """

    name: str
    device: torch.device
    weights_sha256: str | None  # None for families without weights

    def sample(self, seed: int, truncation_psi: float, parameters: Mapping[str, Any]) -> Latents:
        """Latents of the person with this seed. The same on every device: z is drawn by numpy on the CPU."""
        ...

    def decode(self, latents: Latents, separate: bool = False) -> Sequence[HumanField]:
        """One field per object to insert; with `separate`, clothes and hair are objects of their own. Parameters
        named by `FamilyInfo.of_decoding` come as keywords where a request has them."""
        ...

    def describe(self, latents: Latents) -> dict[str, AttributeValue]:
        """The attributes of this person, by name; choices of parts that are not worn are "none"."""
        ...

    def edit(self, latents: Latents, values: Mapping[str, AttributeValue]) -> Latents:
        """The person with these attributes, otherwise the same. Raises PopulaceError("invalid_request")."""
        ...


@dataclass(frozen=True)
class Attribute:
    """One thing that can be said of every person of a family: a slider, a colour, or a choice of names."""

    name: str  # as in requests: "height_m", "top_color"
    title: str
    kind: Literal["number", "color", "choice"]
    low: float = 0.0  # of numbers
    high: float = 1.0
    unit: str = ""
    choices: tuple[str, ...] = ()
    shape: bool = True  # of numbers: whether the surface changes with it, so that it can be a shape key


AttributeValue = float | Sequence[float] | str
"""A number within its bounds, an sRGB colour in 0..1 [3], or one of the choices."""


@dataclass(frozen=True)
class Code:
    """One code that a person of the family may have."""

    size: int  # numbers in a row: the code is [rows, size]; 0: as many as the weights say
    normal: bool = False  # normally distributed about the mean person; other codes form clusters or have bounds
    rows: int = 1  # 0: as many as the weights say


@dataclass(frozen=True)
class FamilyInfo:
    """What the registry, the API and the panel know of a family without importing torch."""

    name: str
    title: str
    description: str
    inputs: tuple[str, ...]  # of "seed", "image"
    weights: str | None  # name in weights_manifest/, None if the family needs none
    licence: str
    companions: tuple[str, ...] = ()  # weights that it reads as well where they are here
    readers: tuple[str, ...] = ()  # companions that read photos: what codes mean does not depend on them
    parameters: Mapping[str, Any] = field(default_factory=dict)  # JSON schema properties of family parameters
    of_decoding: tuple[str, ...] = ()  # parameters that `decode` takes by name: they are about what is made of codes
    attributes: tuple[Attribute, ...] = ()  # what `describe` tells and `edit` sets
    codes: Mapping[str, Code] = field(default_factory=dict)  # by name, "PART/KIND"; the first part is the body

    @property
    def parts(self) -> tuple[str, ...]:
        """What a person of this family is made of, the body first."""
        return tuple(dict.fromkeys(name.partition("/")[0] for name in self.codes))


def seeded_normal(seed: int, name: str, shape: Sequence[int]) -> np.ndarray:
    """Standard normal numbers for one named latent of one seed, float32: independent per name, equal everywhere."""
    key = [int(seed) & 0xFFFFFFFF, int(seed) >> 32, *name.encode()]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).standard_normal(shape, dtype=np.float32)
