# SPDX-License-Identifier: GPL-3.0-or-later
"""The `people` family at work: seed -> codes -> one field that unites body, clothes and hair.

field space  = canonical space: the mean body, shared by all persons
s_k(x)       = s_body(x) + r_k(x; w_k)          distance to part k; where r_k < 0 the part covers the skin
s(x)         = min_k s_k(x)                     union; inner layers are kept below outer ones where those cover them
offset(x)    = sum_i a_i(x) d_i(w_body)         displacement of the K nearest control points, blended
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.spatial import cKDTree
from torch import Tensor, nn

from backend.families.base import AttributeValue, Latents, Rig, seeded_normal
from backend.families.people.config import BODY_DIM, PARTS, SHAPE_DIM, SMALL, TEX_DIM, Z_DIM
from backend.families.people.networks import BodyDecoder, PartGenerator
from backend.families.people.networks import Mapping as MappingNetwork
from backend.protocol import PopulaceError
from backend.weights import Weights, check_tensors

NEIGHBOURS = 32  # control points that carry a point of the field; fewer leave ridges in loose cloth
GRIDS = ("whole", "head", "hand_l", "hand_r")  # coarse to fine: later ones replace earlier ones
REGIONS = ("head", "torso", "arm_l", "arm_r", "hand_l", "hand_r", "leg_l", "leg_r")
DENSITY = {"head": 3.0, "hand": 1.5}  # texels per area, and triangles: faces and hands are looked at
SCALE = "#scale"  # marks the scales of a quantised tensor
EASE = {"bottom": 0.005, "top": 0.005}  # metres added to cloth: what the networks are still off by, so no skin shows
CHUNK = 1 << 15  # points at a time
CENTRES = 96  # clusters per mapping


class PeopleNetworks(nn.Module):
    """All learned tensors of the family, under the names of the weights file."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        """`facts` is the JSON of the weights file's metadata: sizes that depend on the training data."""
        super().__init__()
        attributes = len(facts["attributes"])
        self.body_shape = BodyDecoder(facts["anchors"], 2 * len(facts["bones"]), facts["controls"], BODY_DIM)
        self.parts = nn.ModuleDict({name: PartGenerator(config) for name, config in SMALL.items()})
        self.mappings = nn.ModuleDict()
        self.mappings["body_shape"] = MappingNetwork(BODY_DIM, 0, BODY_DIM, 1)
        self.mappings["body_tex"] = MappingNetwork(Z_DIM, attributes, TEX_DIM, CENTRES)
        for part in PARTS:
            self.mappings[f"{part}_shape"] = MappingNetwork(Z_DIM, attributes + 3, SHAPE_DIM, CENTRES)
            self.mappings[f"{part}_tex"] = MappingNetwork(Z_DIM, attributes + 3, TEX_DIM, CENTRES)
        self.attributes = nn.Linear(BODY_DIM, attributes)  # standardised attributes of w_shape
        for name, shape in facts["grids"].items():
            self.register_buffer(f"grid_{name}", torch.zeros(shape))
            self.register_buffer(f"grid_{name}_box", torch.zeros(2, 3))
        self.register_buffer("control_skin_indices", torch.zeros(facts["controls"], 4, dtype=torch.uint8))
        self.register_buffer("control_skin_weights", torch.zeros(facts["controls"], 4))


class PeopleModel:
    """A loaded `people` model; see `FamilyModel`."""

    name = "people"

    def __init__(
        self, networks: PeopleNetworks, facts: Mapping[str, Any], device: torch.device, sha256: str | None
    ) -> None:
        self.device = device
        self.weights_sha256 = sha256
        self.networks = networks.to(device).eval().requires_grad_(False)
        self.facts = facts
        self.bones = tuple(facts["bones"])
        self.parents = tuple(facts["parents"])
        self.tree = cKDTree(self.networks.body_shape.rest_controls().cpu().numpy())
        self.bounds = torch.tensor(facts["bounds"], device=device)
        dominant = self.networks.control_skin_indices[
            torch.arange(self.tree.n, device=device), self.networks.control_skin_weights.argmax(1)
        ].cpu()
        self.control_region = torch.tensor([region_of(n) for n in self.bones])[dominant.long()].to(device)
        self.region_density = torch.tensor([DENSITY.get(name.split("_")[0], 1.0) for name in REGIONS], device=device)

    @torch.no_grad()
    def sample(self, seed: int, truncation_psi: float, parameters: Mapping[str, Any] | None = None) -> Latents:
        """Codes of the person with this seed; parts that the person does not wear have none."""

        def mapped(name: str, condition: Tensor, dim: int) -> Tensor:
            z = torch.from_numpy(seeded_normal(seed, name, (1, dim)))
            net = self.networks.mappings[name.replace("/", "_")]
            return net(z.to(self.device), condition, truncation_psi)

        nothing = torch.zeros(1, 0, device=self.device)
        codes = {"body/shape": mapped("body/shape", nothing, BODY_DIM)}
        attributes = self.networks.attributes(codes["body/shape"])
        codes["body/tex"] = mapped("body/tex", attributes, Z_DIM)
        condition = torch.cat([attributes, codes["body/tex"][:, :3]], 1)
        for part in PARTS:
            shape = mapped(f"{part}/shape", condition, Z_DIM)
            if shape[0, -1] > 0:
                codes[f"{part}/shape"] = shape
                codes[f"{part}/tex"] = mapped(f"{part}/tex", condition, Z_DIM)
        return Latents(self.name, codes)

    def describe(self, latents: Latents) -> dict[str, AttributeValue]:
        """Version 1 has no attributes; neither does `INFO` list any."""
        return {}

    def edit(self, latents: Latents, values: Mapping[str, AttributeValue]) -> Latents:
        raise PopulaceError("invalid_request", "These weights have no attributes to set.", "Use a newer version.")

    def decode(self, latents: Latents, separate: bool = False) -> Sequence[PeopleField]:
        """One field: the whole clothed person, in version 1 with `separate` too."""
        sizes = {"body/shape": BODY_DIM} | {f"{p}/shape": SHAPE_DIM for p in PARTS}
        for name, code in latents.codes.items():
            part, _, kind = name.partition("/")
            if kind not in ("shape", "tex") or part not in SMALL:
                raise PopulaceError("invalid_latents", f"The people family has no code named {name!r}.")
            want = sizes.get(name, TEX_DIM)
            if tuple(code.shape) != (1, want):
                raise PopulaceError("invalid_latents", f"{name} must have shape [1, {want}], not {list(code.shape)}.")
        missing = [f"{p}/{k}" for p in ("body", *PARTS) for k in ("shape", "tex")
                   if (p == "body" or f"{p}/shape" in latents.codes or f"{p}/tex" in latents.codes)
                   and f"{p}/{k}" not in latents.codes]  # fmt: skip
        if missing:
            raise PopulaceError("invalid_latents", f"Codes are missing: {', '.join(missing)}.")
        return [PeopleField(self, {k: v.to(self.device, torch.float32) for k, v in latents.codes.items()})]


def region_of(bone: str) -> int:
    """Body region of a bone of the rig."""
    side = bone[-2:] if bone[-2:] in ("_l", "_r") else ""
    stem = bone.removesuffix(side)
    if stem in ("head", "neck_01"):
        return REGIONS.index("head")
    if stem in ("upperarm", "lowerarm"):
        return REGIONS.index("arm" + side)
    if stem in ("thigh", "calf", "foot", "ball"):
        return REGIONS.index("leg" + side)
    if side and stem != "clavicle":
        return REGIONS.index("hand" + side)
    return REGIONS.index("torso")


class PeopleField:
    """The field of one person; see `HumanField`. Points are canonical."""

    name = "human"

    def __init__(self, model: PeopleModel, codes: Mapping[str, Tensor]) -> None:
        self.model, self.codes = model, codes
        self.bounds = model.bounds
        self.region_density = model.region_density
        self.worn = [p for p in PARTS if f"{p}/shape" in codes]
        parts = model.networks.parts
        self.shape_planes = {p: parts[p].shape.planes(codes[f"{p}/shape"]) for p in self.worn}
        self.tex_planes = {"body": parts["body"].tex.planes(codes["body/tex"])}
        for p in self.worn:
            self.tex_planes[p] = parts[p].tex.planes(torch.cat([codes[f"{p}/tex"], codes[f"{p}/shape"]], 1))
        self.displacement, ends = model.networks.body_shape(codes["body/shape"])
        count = len(model.bones)
        self.rig = Rig(model.bones, model.parents, ends[:count], ends[count:])

    def body_sdf(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        """Distance to the naked canonical body: trilinear in the finest grid that holds the point."""
        out = points.new_zeros(len(points))
        for name in GRIDS:
            lo, hi = getattr(self.model.networks, f"grid_{name}_box")
            local = (points - lo) / (hi - lo) * 2 - 1
            inside = slice(None) if name == GRIDS[0] else (local.abs() < 1).all(1).nonzero().squeeze(1)
            values = getattr(self.model.networks, f"grid_{name}").to(points.dtype)
            at = local[inside].flip(1)[None, None, None]  # grid_sample wants the last axis first
            read = F.grid_sample(values[None, None], at, align_corners=True, padding_mode="border")[0, 0, 0, 0]
            out = read if name == GRIDS[0] else out.index_copy(0, inside, read)
        return out

    def _layers(self, points: Float[Tensor, "N 3"]) -> list[Float[Tensor, " N"]]:
        """Distances to ("body", *worn) minus that to the body, inner to outer; what is covered lies below the cover."""
        layers = [points.new_zeros(len(points))]
        for part in self.worn:
            outer = self.model.networks.parts[part].shape(self.shape_planes[part], points) - EASE.get(part, 0.0)
            covers = torch.sigmoid((-0.002 - outer) / 0.0007)
            layers = [inner + covers * (outer + 0.004 - inner).clamp(min=0) for inner in layers]
            layers.append(outer)
        return layers

    def sdf(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        return torch.cat(
            [self.body_sdf(q) + functools.reduce(torch.minimum, self._layers(q)) for q in points.split(CHUNK)]
        )

    def label(self, points: Float[Tensor, "N 3"]) -> Int[Tensor, " N"]:
        """Index into ("body", *worn) of the part whose surface is the outermost here."""
        return torch.cat([self._label(q) for q in points.split(CHUNK)])

    def _label(self, points: Float[Tensor, "N 3"]) -> Int[Tensor, " N"]:
        best, *rest = self._layers(points)
        label = torch.zeros(len(points), dtype=torch.int64, device=points.device)
        for i, layer in enumerate(rest, 1):
            label = torch.where(layer < best, i, label)
            best = torch.minimum(best, layer)
        return label

    def color(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        label = self.label(points)
        out = points.new_zeros(len(points), 3)
        for i, part in enumerate(("body", *self.worn)):
            at = (label == i).nonzero().squeeze(1)
            if at.numel():
                tex = self.model.networks.parts[part].tex
                out = out.index_copy(0, at, tex(self.tex_planes[part], self.codes[f"{part}/tex"][0, :6], points[at]))
        return out.clamp(0, 1)

    def _neighbours(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Control points near each point [N, K] and weights that vanish at the K-th neighbour (modified Shepard), so
        that the blend does not jump where neighbours change."""
        distance, index = self.model.tree.query(points.detach().cpu().numpy(), k=NEIGHBOURS + 1, workers=2)
        radius = distance[:, -1:]
        weight = ((radius - distance[:, :-1]) / (radius * (distance[:, :-1] + 0.25 * radius))) ** 2
        weight = weight / weight.sum(1, keepdims=True)
        return (torch.from_numpy(index[:, :-1]).to(points.device),
                torch.from_numpy(weight.astype(np.float32)).to(points.device))  # fmt: skip

    def offset(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        index, weight = self._neighbours(points)
        return torch.einsum("nk,nkc->nc", weight, self.displacement[index])

    def region(self, points: Float[Tensor, "N 3"]) -> Int[Tensor, " N"]:
        nearest = self.model.tree.query(points.detach().cpu().numpy(), workers=2)[1]
        return self.model.control_region[torch.from_numpy(nearest).to(points.device)]

    def skin(self, points: Float[Tensor, "N 3"]) -> tuple[Int[Tensor, "N 4"], Float[Tensor, "N 4"]]:
        index, weight = self._neighbours(points)
        bones = self.model.networks.control_skin_indices[index].long()  # [N, K, 4]
        values = self.model.networks.control_skin_weights[index] * weight[..., None]
        dense = points.new_zeros(len(points), len(self.model.bones))
        dense.scatter_add_(1, bones.flatten(1), values.flatten(1))
        top, which = dense.topk(4, dim=1)
        return which, top / top.sum(1, keepdim=True)


def load(device: torch.device, weights: Weights | None) -> PeopleModel:
    """The model of verified weights. Raises PopulaceError("weights_corrupt") if the tensors are not this version's."""
    assert weights is not None, "the registry hands over weights to families that name some"
    arrays, metadata = weights.read()
    facts = json.loads(metadata.get("people", "{}"))
    networks = PeopleNetworks(facts)
    scales = {k.removesuffix(SCALE): a for k, a in arrays.items() if k.endswith(SCALE)}
    values = {k: a for k, a in arrays.items() if not k.endswith(SCALE)}
    check_tensors(weights.name, values, {k: tuple(v.shape) for k, v in networks.state_dict().items()})
    for key, target in networks.state_dict().items():
        value = values[key].astype(np.float32) * scales[key].astype(np.float32) if key in scales else values[key]
        target.copy_(torch.from_numpy(value.astype(target.numpy().dtype)))
    return PeopleModel(networks, facts, device, weights.sha256)
