# SPDX-License-Identifier: GPL-3.0-or-later
"""GET3D on the main road: seeds to codes, codes to a field in metres with negative values inside.

The generator's cube [-s/2, s/2]^3 becomes metres by one factor, such that the shape has the height its code asks for.
+Y is up, as the generator has it. A surface that reaches the cube's border is capped there: the authors leave it open.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from backend.families.base import AttributeValue, Encoded, Latents, PersonPhoto, Step, no_step, seeded_normal
from backend.families.get3d import inversion
from backend.families.get3d.config import Config, Surface
from backend.families.get3d.fields import on_axes, to_unit
from backend.families.get3d.networks import Decoded, Generator, mixed_rows
from backend.geometry import flexicubes
from backend.geometry.mesh import TriMesh
from backend.protocol import Inversion, PopulaceError
from backend.weights import Weights, check_tensors

HEIGHT_M = 1.7  # of a new shape
ROUGHNESS = 0.6
_COARSE = 33  # nodes along a side of the lattice that tells a shape's height and the field's steepness
_RIM = 1e-3  # of the cube's half side that is outside in any case
_CHUNK = 1 << 15


class Get3dModel:
    """A loaded generator; see `FamilyModel`."""

    name = "get3d"

    def __init__(
        self, generator: Generator, device: torch.device, sha256: str | None = None, clip: Weights | None = None
    ) -> None:
        """`clip`: what compares pictures when photos are fitted; it is read when the first one comes."""
        self.device = device
        self._clip = clip
        self.weights_sha256 = sha256
        self.generator = generator.to(device).eval().requires_grad_(False)
        self.config = generator.config

    @torch.no_grad()
    def sample(self, seed: int, truncation_psi: float, parameters: Mapping[str, Any] | None = None) -> Latents:
        """w_geo and w_tex of this seed, a row for every layer; `style_*` parameters take the later rows of another."""
        asked = parameters or {}
        codes = self._rows(seed, truncation_psi)
        if "style_seed" in asked:
            other = self._rows(asked["style_seed"], truncation_psi)
            for kind in ("shape", "tex"):
                name = f"body/{kind}"
                cut = asked.get(f"style_{kind}_row", len(codes[name]))
                codes[name] = mixed_rows(codes[name][None], other[name][None], cut)[0]
        return Latents(self.name, {**codes, "body/size": torch.full((1, 1), HEIGHT_M, device=self.device)})

    def _rows(self, seed: int, truncation_psi: float) -> dict[str, Float[Tensor, "L W"]]:
        codes = {}
        for name, mapping in (("body/shape", self.generator.mapping_geo), ("body/tex", self.generator.mapping)):
            z = torch.from_numpy(seeded_normal(seed, f"get3d/{name}", (1, self.config.z_dim))).to(self.device)
            codes[name] = mapping(z, truncation_psi)[0].clone()
        return codes

    @torch.enable_grad()
    def encode(self, photos: Sequence[PersonPhoto], options: Inversion | None = None, step: Step = no_step) -> Encoded:
        """Rows of w for the object in these photos, by descent (see `inversion`). There is no encoder: with 0 steps it
        is the mean shape. The camera is in metres about the object's middle, as the field is."""
        options = options or Inversion()
        found = inversion.fit(
            self.generator, photos, options.steps, options.seconds, perceptual=self.perceptual, step=step
        )
        codes = {"body/shape": found.ws_geo, "body/tex": found.ws_tex,
                 "body/size": torch.full((1, 1), HEIGHT_M, device=self.device)}  # fmt: skip
        latents = Latents(self.name, codes)
        target = inversion.place(photos[0], 8, self.device)
        camera = found.cameras.of_photo(0, target, self.decode(latents)[0].metres)
        return Encoded(latents, {}, camera, dict(found.scores))

    @functools.cached_property
    def perceptual(self) -> inversion.Perceptual | None:
        """How differently two pictures in -1..1 look, if CLIP is here."""
        if self._clip is None:
            return None
        from backend.networks.clip import load as load_clip

        net, _ = load_clip(self._clip, self.device)
        return lambda a, b: net.distance((a + 1) / 2, (b + 1) / 2)

    @torch.no_grad()
    def decode(self, latents: Latents, separate: bool = False, surface: Surface | None = None) -> Sequence[Get3dField]:
        """One field, "object". `surface` says how it becomes triangles; left to itself as in the weights' training.
        Raises `invalid_latents`, and `empty_surface` for a shape without a surface."""
        width = self.config.w_dim
        wanted = {"body/shape": (self.config.geo_rows, width), "body/tex": (self.config.tex_rows, width),
                  "body/size": (1, 1)}  # fmt: skip
        for name in {**wanted, **latents.codes}:
            found = tuple(latents.codes[name].shape) if name in latents.codes else None
            if found != wanted.get(name):
                raise PopulaceError(
                    "invalid_latents", f"Latents {name!r} are {_sized(found)}; these weights take "
                    f"{_sized(wanted.get(name))}.", "Send latents that were made with the same weights."
                )  # fmt: skip
        codes = {name: code.to(self.device, torch.float32) for name, code in latents.codes.items()}
        decoded = self.generator.synthesis(codes["body/shape"][None], codes["body/tex"][None])
        separable = self.config.kind == "unified" and self.config.hidden_layers == 1
        dual = (surface or self.config.surface) == "flexicubes"
        kinds = {(False, False): Get3dField, (True, False): PlaneField, (False, True): DualField,
                 (True, True): DualPlaneField}  # fmt: skip
        return [kinds[separable, dual](decoded, float(codes["body/size"]))]

    def describe(self, latents: Latents) -> dict[str, AttributeValue]:
        return {"height_m": float(latents.codes["body/size"])}

    def edit(self, latents: Latents, values: Mapping[str, AttributeValue]) -> Latents:
        height: Any = values["height_m"]  # the only attribute; `checks` has seen the value
        return Latents(self.name, {**latents.codes, "body/size": torch.full((1, 1), height, device=self.device)})


def _sized(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"{shape[0]}x{shape[1]} numbers"


class Get3dField:
    """One shape; see `HumanField`. Its vertices move by the generator's offsets, and colours are those of the places
    to which they have moved."""

    name = "object"
    rig = None
    focus = None
    region_density = None
    colors_vertices = True

    def __init__(self, decoded: Decoded, height_m: float) -> None:
        """Raises `empty_surface` if nothing or everything in the cube is inside."""
        self.decoded = decoded
        self.side = decoded.synthesis.config.scale
        device = decoded.texture.device
        axis = torch.linspace(-self.side / 2, self.side / 2, _COARSE, device=device)
        raw = self._raw_on([axis, axis, axis])
        if not np.isfinite(raw).all():
            raise PopulaceError("empty_surface", "The field of this shape is not a number everywhere.",
                                "Try another seed; if it happens again, verify the weights.")  # fmt: skip
        if (raw > 0).all() or not (raw > 0).any():
            what = "fills its whole cube" if raw.flat[0] > 0 else "is empty: no point of its cube is inside"
            raise PopulaceError("empty_surface", f"The shape {what}.", "Try another seed or less truncation_psi.")
        step = self.side / (_COARSE - 1)
        # the field counts as steep as it is between neighbours anywhere, so that it behaves like a distance
        self.steepness = max(float(np.abs(np.diff(raw, axis=k)).max()) for k in range(3)) / step
        self.metres = height_m / (step * (_reach(raw) + _reach(raw[:, ::-1]) - (_COARSE - 1)))
        half = self.side / 2 * self.metres
        self.bounds = torch.tensor([[-half] * 3, [half] * 3], device=device)

    def _raw_on(self, axes: Sequence[Float[Tensor, " n"]]) -> Float[np.ndarray, "X Y Z"]:
        """The generator's own values at the nodes of a lattice in its cube."""
        points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
        found = torch.cat([self.decoded.sdf(chunk[None])[0] for chunk in points.split(_CHUNK)])
        return found.reshape([len(axis) for axis in axes]).cpu().numpy()

    def _asked(self, points: Float[Tensor, "N 3"], ask: Any) -> Tensor:
        return torch.cat([ask(chunk[None] / self.metres)[0] for chunk in points.split(_CHUNK)])

    def sdf(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        rim = points.abs().amax(1) - self.side / 2 * self.metres * (1 - _RIM)
        return torch.maximum(self._asked(points, self.decoded.sdf) * (-self.metres / self.steepness), rim)

    def color(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        return ((self._asked(points, self.decoded.color) + 1) / 2).clamp(0, 1)

    def material(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 2"]:
        """The published generators know none."""
        if not self.decoded.synthesis.config.material:
            return points.new_tensor([ROUGHNESS, 0.0]).expand(len(points), 2)
        return self._asked(points, lambda p: self.decoded.to_material(self.decoded.features(p))[0])

    @property
    def bend(self) -> Callable[[Float[Tensor, "N 3"]], Float[Tensor, "N 3"]] | None:
        """What is added to the surface's unit normals, if the generator knows: baking puts it into the normal map."""
        return self._bend if self.decoded.synthesis.config.material else None

    def _bend(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        return self._asked(points, lambda p: self.decoded.to_material(self.decoded.features(p))[1])

    def offset(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        return self._asked(points, self.decoded.offset) * self.metres

    def counterpart(self, points: Float[Tensor, "N 3"], other: Get3dField) -> Float[Tensor, "N 3"]:
        """Heights differ by a factor."""
        return points * (other.metres / self.metres)

    def region(self, points: Float[Tensor, "N 3"]) -> Int[Tensor, " N"]:
        return torch.zeros(len(points), dtype=torch.int64, device=points.device)

    def skin(self, points: Float[Tensor, "N 3"]) -> tuple[Int[Tensor, "N 4"], Float[Tensor, "N 4"]]:
        raise NotImplementedError("objects have no rig")


class PlaneField(Get3dField):
    """A shape whose field separates on lattices: all nodes cost less than the surface's would one by one."""

    def _raw_on(self, axes: Sequence[Float[Tensor, " n"]]) -> Float[np.ndarray, "X Y Z"]:
        mlp = self.decoded.synthesis.generator.mlp_synthesis_sdf
        unit = [to_unit(axis, self.side) for axis in axes]
        return on_axes(self.decoded.geometry[0], mlp, self.decoded.geo_rows, unit)

    def sdf_on_axes(self, axes: Sequence[Float[Tensor, " n"]]) -> Float[np.ndarray, "X Y Z"]:
        """See `LatticeField`."""
        values = self._raw_on([axis / self.metres for axis in axes])
        values *= -self.metres / self.steepness
        for k, axis in enumerate(axes):
            rim = axis.abs().cpu().numpy() - self.side / 2 * self.metres * (1 - _RIM)
            np.maximum(values, np.expand_dims(rim, [i for i in range(3) if i != k]), out=values)
        return values


class DualField(Get3dField):
    """A shape that becomes triangles by FlexiCubes: half as many, which follow edges better."""

    def extract(self, grid_resolution: int, step: Step = no_step) -> TriMesh:
        """As `tetgrid.extract_surface`, by which the pipeline goes where a field has no way of its own."""
        return flexicubes.extract_surface(self, grid_resolution, step)

    def cube_weights(self, points: Float[Tensor, "U 3"], corners: Int[Tensor, "C 8"]) -> Float[Tensor, "C 21"] | None:
        """Learned ones if the generator was made for FlexiCubes."""
        if self.decoded.synthesis.config.surface != "flexicubes":
            return None
        return self.decoded.weights(points[None] / self.metres, corners)[0]


class DualPlaneField(DualField, PlaneField):
    """Both."""


def _reach(raw: Float[np.ndarray, "X Y Z"]) -> float:
    """How far up (in steps along y) the inside goes, interpolated between the nodes."""
    top = int(np.flatnonzero((raw > 0).any((0, 2)))[-1])
    if top == raw.shape[1] - 1:
        return float(top)
    below, above = raw[:, top], raw[:, top + 1]
    return top + float((below / (below - above))[below > 0].max())


def load(device: torch.device, weights: Weights | None) -> Get3dModel:
    """The model of verified weights. Raises `weights_corrupt` if they are not those of a GET3D generator."""
    assert weights is not None, "the registry hands over weights to families that name some"
    read = tuple(path for path in weights.paths if path.with_name("tokenizer.json") in weights.paths)
    clip = dataclasses.replace(weights, name="clip", paths=read) if read else None
    weights = dataclasses.replace(weights, paths=tuple(path for path in weights.paths if path not in read))
    arrays, metadata = weights.read()
    try:
        config = Config(**json.loads(metadata["get3d"]))
    except (KeyError, TypeError, ValueError):
        raise PopulaceError(
            "weights_corrupt", f"The weights {weights.name!r} do not say which GET3D generator they are for.",
            "Import the official file again: populace weights import get3d FILE."
        ) from None  # fmt: skip
    with torch.device("meta"):
        generator = Generator(config)
    check_tensors(weights.name, arrays, {k: tuple(v.shape) for k, v in generator.state_dict().items()})
    values = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    generator.load_state_dict(values, assign=True)
    return Get3dModel(generator, device, weights.sha256, clip)


def metadata_of(config: Config) -> dict[str, str]:
    """What a weights file says of itself."""
    return {"get3d": json.dumps(dataclasses.asdict(config))}
