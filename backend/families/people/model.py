# SPDX-License-Identifier: GPL-3.0-or-later
"""The `people` family at work: seed -> codes -> one field that unites body, clothes and hair.

field space  = canonical space: the mean body, shared by all persons
s_k(x)       = max(surface_k, borders_k)        distance to part k
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
from jaxtyping import Float, Int
from scipy.spatial import cKDTree
from torch import Tensor, nn

from backend.families.base import (
    AttributeValue,
    Encoded,
    Latents,
    PersonPhoto,
    Rig,
    Step,
    no_step,
    seeded_normal,
)
from backend.families.people import photo_maps, storage
from backend.families.people.config import (
    BODY_DIM,
    BROW,
    CLOTH,
    CODE_DIM,
    HAT,
    IRIS,
    ORDER,
    OWN,
    PARTS,
    PLAIN,
    SIZES,
    SKIN,
    SKIN_DIM,
    WORN,
    Z_DIM,
)
from backend.families.people.encoder import PhotoEncoder
from backend.families.people.networks import BodyDecoder, BodyField, BodyTexture, LocalShape, LocalTexture
from backend.families.people.networks import Mapping as MappingNetwork
from backend.geometry.focus import Focus
from backend.protocol import PopulaceError
from backend.weights import Weights, check_tensors

NEIGHBOURS = 32  # control points that carry a point of the field; fewer leave ridges in loose cloth
REGIONS = ("head", "torso", "arm_l", "arm_r", "hand_l", "hand_r", "leg_l", "leg_r")
DENSITY = {"head": 3.0, "hand": 1.5}  # texels per area, and triangles: faces and hands are looked at
EASE = {"bottom": 0.002, "top": 0.002}  # metres added to cloth, so that no skin shows between lattice points
RIM = 0.006  # metres before something else that a point beyond the border of a cloth must be to be the cloth's
HEM = 0.003  # metres that close-fitting cloth stands off what is below where it ends
FREE = 0.04  # metres from the skin at which a skirt hangs freely
SHELL = 0.012  # metres: how thick a garment is as an object of its own
FOCUS = 1.30, 1.50, 2.2  # the surface's cells are so many times smaller on heads, growing smaller over the neck
CHUNK = 1 << 15  # points at a time
READER = "encoder/"  # what names of the photo encoder's tensors begin with
CENTRES = 256  # real codes per mapping, for truncation


class PeopleNetworks(nn.Module):
    """All learned tensors of the family, under the names of the weights file."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        """`facts` is the JSON of the weights file's metadata: sizes that depend on the training data."""
        super().__init__()
        size = SIZES[facts["size"]]
        attributes = len(facts["attributes"])
        condition = attributes + 9  # and the palettes of skin, brows and top
        items = {part: len(facts["items"][part]) for part in PARTS}
        self.body_shape = BodyDecoder(facts["anchors"], 2 * len(facts["bones"]), facts["controls"], BODY_DIM)
        self.body_field = BodyField(size)
        own = {k: len(facts[k]) for k in ("skins", "brows", "irises")}
        self.body_tex = BodyTexture(size, **own)
        self.shapes = nn.ModuleDict({part: LocalShape(part, size, items[part]) for part in PARTS})
        self.textures = nn.ModuleDict({part: LocalTexture(part, size, items[part]) for part in PARTS})

        def mapping(groups: Sequence[tuple[int, int]]) -> MappingNetwork:
            return MappingNetwork(Z_DIM, condition, CODE_DIM, CENTRES, groups, size.width)

        self.mappings = nn.ModuleDict()
        self.mappings["body_shape"] = MappingNetwork(BODY_DIM, 0, BODY_DIM, 2, (), size.width)
        choices = [(at.start, at.start + n) for at, n in zip((SKIN, BROW, IRIS), own.values(), strict=True)]
        self.mappings["body_tex"] = MappingNetwork(Z_DIM, attributes, SKIN_DIM, CENTRES, choices, size.width)
        for part in PARTS:
            self.mappings[f"{part}_shape"] = mapping(((0, items[part] + (part in CLOTH)),))
            self.mappings[f"{part}_tex"] = mapping(((OWN, PLAIN + 1),))
        self.attributes = nn.Linear(BODY_DIM, attributes)  # standardised attributes of w_shape
        self.register_buffer("control_skin_indices", torch.zeros(facts["controls"], 4, dtype=torch.uint8))
        self.register_buffer("control_skin_weights", torch.zeros(facts["controls"], 4))


class PeopleModel:
    """A loaded `people` model; see `FamilyModel`."""

    name = "people"

    def __init__(
        self,
        networks: PeopleNetworks,
        facts: Mapping[str, Any],
        device: torch.device,
        sha256: str | None,
        encoder: PhotoEncoder | None = None,
    ) -> None:
        self.device, self.encoder = device, encoder
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
        reach = torch.tensor([[c - h for c, h in zip(HAT.centre, HAT.half_size)],
                              [c + h for c, h in zip(HAT.centre, HAT.half_size)]])  # fmt: skip
        self.focus = Focus(*FOCUS, axis=(0.0, 0.04), reach=reach)
        self.region_density = torch.tensor([DENSITY.get(name.split("_")[0], 1.0) for name in REGIONS], device=device)

    @torch.no_grad()
    def sample(self, seed: int, truncation_psi: float, parameters: Mapping[str, Any] | None = None) -> Latents:
        """Codes of the person with this seed; parts that the person does not wear have none."""
        names = ["body/shape", "body/tex", *(f"{p}/{k}" for p in PARTS for k in ("shape", "tex"))]
        z = {n: seeded_normal(seed, n, (1, BODY_DIM if n == "body/shape" else Z_DIM)) for n in names}
        return self.mapped({n: torch.from_numpy(a).to(self.device) for n, a in z.items()}, truncation_psi)

    def mapped(self, z: Mapping[str, Float[Tensor, "1 Z"]], truncation_psi: float = 1.0) -> Latents:
        """Codes of latents by name. Body first; then each part goes with the body and with the top's colour."""
        maps = self.networks.mappings
        shape = maps["body_shape"](z["body/shape"], z["body/shape"][:, :0], truncation_psi)
        attributes = self.networks.attributes(shape)
        codes = {"body/shape": shape, "body/tex": maps["body_tex"](z["body/tex"], attributes, truncation_psi)}
        for part in ORDER:
            codes |= self.mapped_part(part, codes, z, truncation_psi)
        return Latents(self.name, codes)

    def mapped_part(
        self, part: str, codes: Mapping[str, Tensor], z: Mapping[str, Tensor], psi: float, must: bool = False
    ) -> dict[str, Tensor]:
        """Codes of one part, none if it is not worn (unless it `must`) or if the weights know no item of it."""
        if not self.facts["items"][part]:
            return {}
        body = codes["body/tex"]
        top = codes["top/tex"][:, :3] if "top/tex" in codes and part != "top" else torch.zeros_like(body[:, :3])
        condition = torch.cat([self.networks.attributes(codes["body/shape"]), body[:, :6], top], 1)
        shape = self.networks.mappings[f"{part}_shape"](z[f"{part}/shape"], condition, psi)
        if float(shape[0, WORN].detach()) <= 0:
            if not must:
                return {}
            centres = self.networks.mappings[f"{part}_shape"].centres
            shape = centres[centres[:, WORN] > 0][:1]
        tex = self.networks.mappings[f"{part}_tex"](z[f"{part}/tex"], condition, psi)
        if float(tex[0, OWN].detach()) > 0.5:  # the kit's own colours go with the kit's own palette
            tex = torch.cat([self.networks.textures[part].palette(shape, tex), tex[:, OWN:]], 1)
        return {f"{part}/shape": shape, f"{part}/tex": tex}

    def decode(self, latents: Latents, separate: bool = False) -> Sequence[PeopleField]:
        """The whole clothed person as one field, or one field per object: body, then what is worn, inner to outer."""
        for name, code in latents.codes.items():
            part, _, kind = name.partition("/")
            if kind not in ("shape", "tex") or part not in ("body", *PARTS):
                raise PopulaceError("invalid_latents", f"The people family has no code named {name!r}.")
            want = {"body/shape": BODY_DIM, "body/tex": SKIN_DIM}.get(name, CODE_DIM)
            if tuple(code.shape) != (1, want):
                raise PopulaceError("invalid_latents", f"{name} must have shape [1, {want}], not {list(code.shape)}.")
        missing = [f"{p}/{k}" for p in ("body", *PARTS) for k in ("shape", "tex")
                   if (p == "body" or f"{p}/shape" in latents.codes or f"{p}/tex" in latents.codes)
                   and f"{p}/{k}" not in latents.codes]  # fmt: skip
        if missing:
            raise PopulaceError("invalid_latents", f"Codes are missing: {', '.join(missing)}.")
        person = Person(
            self, {k: v.to(self.device, torch.float32) for k, v in latents.codes.items()}, self._planes(latents)
        )
        return [PeopleField(person, p) for p in (person.parts if separate else (None,))]

    def _planes(self, latents: Latents) -> dict[str, list[Tensor]]:
        """Photo maps by part. Raises `invalid_latents`."""
        out: dict[str, list[Tensor]] = {}
        for name, picture in latents.maps.items():
            part, _, kind = name.partition("/")
            if kind != "photo" or f"{part}/tex" not in latents.codes:
                raise PopulaceError("invalid_latents", f"This person has no map named {name!r}.",
                                    "A map is called PART/photo, of a part that has codes.")  # fmt: skip
            try:
                out[part] = [plane.to(self.device) for plane in photo_maps.planes_of(picture)]
            except ValueError as error:
                raise PopulaceError("invalid_latents", f"{name}: {error}.") from None
        return out

    def encode(self, photos: Sequence[PersonPhoto], options: Any, step: Step = no_step) -> Encoded:
        """See `FamilyModel`. Raises `weights_missing` where these weights came without an encoder of photos."""
        from backend.families.people import inversion

        if self.encoder is None:
            raise PopulaceError("weights_missing", "These weights of the people family cannot read photos.",
                                "Use the weights that came with this version.")  # fmt: skip
        return inversion.encode(self, self.encoder, photos, options, step)

    def describe(self, latents: Latents) -> dict[str, AttributeValue]:
        """See `FamilyModel`."""
        from backend.families.people import attributes

        return attributes.describe(self, latents)

    def describe_part(self, part: str, codes: Mapping[str, Tensor]) -> str:
        """What a worn part is called."""
        from backend.families.people import attributes

        return attributes.word_for(self, part, codes[f"{part}/shape"][0])

    def edit(self, latents: Latents, values: Mapping[str, AttributeValue]) -> Latents:
        """See `FamilyModel`."""
        from backend.families.people import attributes

        return attributes.edit(self, latents, values)


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


class Person:
    """One person's mixed volumes and planes, shared by the fields of its objects. Points are canonical."""

    def __init__(
        self, model: PeopleModel, codes: Mapping[str, Tensor], photos: Mapping[str, list[Tensor]] | None = None
    ) -> None:
        """`photos` are the sides of photo maps by part."""
        self.model, self.codes, net, self.photos = model, codes, model.networks, photos or {}
        self.worn = [p for p in PARTS if f"{p}/shape" in codes]
        self.parts = ("body", *self.worn)
        self.volumes = {p: net.shapes[p].mixed(codes[f"{p}/shape"]) for p in self.worn}
        self.planes = {p: net.textures[p].mixed(codes[f"{p}/shape"], codes[f"{p}/tex"]) for p in self.worn}
        self.skin = net.body_tex.mixed(codes["body/tex"])
        self.skirted = "bottom" in self.worn and "skirt" in model.describe_part("bottom", codes)
        self.displacement, ends = net.body_shape(codes["body/shape"])
        count = len(model.bones)
        self.rig = Rig(model.bones, model.parents, ends[:count], ends[count:])

    def distances(
        self, points: Float[Tensor, "N 3"], worn: Sequence[str] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Distances to the body and to what is `worn` (all there is, if None), and of the worn parts' surfaces without
        their borders, and to the borders. What an outer part covers lies below it."""
        body = self.model.networks.body_field(points)
        layers, surfaces, edges = [body], {}, {}
        asked = self.worn if worn is None else worn
        inner = max((i for i, p in enumerate(self.worn) if p in CLOTH and p in asked), default=0)
        found = [p for i, p in enumerate(self.worn) if p in asked or i < inner]  # hems lie on what is below
        for part in found:
            base, edge = self.model.networks.shapes[part](self.volumes[part], self.codes[f"{part}/shape"], points, body)
            surfaces[part], edges[part] = base, edge = base - EASE.get(part, 0.0), edge
            if part == "top" and self.skirted:  # it hangs over the skirt, which spans the legs
                surfaces[part] = base = torch.minimum(base, layers[-1] - EASE[part])
            if part in CLOTH:  # thin towards its borders, or steps of less than a lattice cell would look torn
                thick = functools.reduce(torch.minimum, layers) - base - HEM
                near = ((edge + 0.02) / 0.018).clamp(0, 1) * ((0.03 - thick) / 0.012).clamp(0, 1)
                base = base + near * thick.clamp(min=0)
            outer = torch.maximum(base, edge)
            # it covers what it stands out from, near its own surface: farther off its distance is truncated
            covers = torch.sigmoid((body - 0.0012 - outer) / 0.0004) * torch.sigmoid((0.02 - outer) / 0.001)
            covers = covers * torch.sigmoid(-edge / 0.0004)  # and nothing beyond its hem
            layers = [inner + covers * (outer + 0.004 - inner).clamp(min=0) for inner in layers]
            layers.append(outer)
        return [layers[0], *(s for p, s in zip(found, layers[1:], strict=True) if p in asked)], surfaces, edges

    def color(self, part: str, points: Float[Tensor, "N 3"], facing: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        net, code = self.model.networks, self.codes[f"{part}/tex"]
        if part == "body":
            color = net.body_tex(self.skin, code, points, facing)
        else:
            color = net.textures[part](self.planes[part], code, points, facing)
        if part in self.photos:
            seen, weight = photo_maps.read(self.photos[part], points, facing)
            color = color + weight * (seen - color)
        return color

    def material(self, part: str, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 2"]:
        """Roughness and metallic of one part."""
        net = self.model.networks
        if part == "body":
            roughness = net.body_tex.roughness(self.skin, points)
            return torch.stack([roughness, torch.zeros_like(roughness)], 1)
        return net.shapes[part].material(self.codes[f"{part}/shape"]).expand(len(points), 2)


class PeopleField:
    """The field of a whole person, or of one part as an object of its own; see `HumanField`."""

    def __init__(self, person: Person, part: str | None = None) -> None:
        self.person, self.part = person, part
        self.name = part or "human"
        self.model, self.codes, self.rig, self.worn = person.model, person.codes, person.rig, person.worn
        self.displacement = person.displacement
        self.bounds = self.model.bounds
        self._labelled: tuple[Tensor, int, Tensor] | None = None
        self._near: tuple[Tensor, int, tuple[Tensor, Tensor]] | None = None
        self.focus, self.region_density = self.model.focus, self.model.region_density

    def body_sdf(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        """Distance to the naked canonical body."""
        return self.model.networks.body_field(points)

    def layers(self, points: Float[Tensor, "N 3"]) -> list[Float[Tensor, " N"]]:
        """Distances to ("body", *worn), inner to outer; what is covered lies below the cover."""
        return self.person.distances(points)[0]

    def _sdf(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        layers, surfaces, _ = self.person.distances(points)
        if self.part is None:
            return functools.reduce(torch.minimum, layers)
        s = layers[self.person.parts.index(self.part)]
        if self.part in CLOTH:  # a shell with an inside; open at its borders, where the sheet ends
            s = torch.maximum(s, -(surfaces[self.part] + SHELL))
        return s

    def sdf(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
        return torch.cat([self._sdf(q) for q in points.split(CHUNK)])

    def label(self, points: Float[Tensor, "N 3"]) -> Int[Tensor, " N"]:
        """Index into ("body", *worn) of the part whose surface is the outermost here. The last answer is kept, because
        colour and material ask for the same points in turn."""
        if self._labelled is None or self._labelled[0] is not points or self._labelled[1] != points._version:
            self._labelled = (points, points._version, torch.cat([self._label(q) for q in points.split(CHUNK)]))
        return self._labelled[2]

    def _label(self, points: Float[Tensor, "N 3"]) -> Int[Tensor, " N"]:
        if self.part is not None:
            return torch.full((len(points),), self.person.parts.index(self.part), device=points.device)
        (best, *rest), _, edges = self.person.distances(points)
        label = torch.zeros(len(points), dtype=torch.int64, device=points.device)
        for i, (part, layer) in enumerate(zip(self.person.worn, rest, strict=True), 1):
            # a hem is as straight as its border, also where the lattice is not and between two cloths
            layer = layer + RIM * (edges[part] > 0)
            label = torch.where(layer < best, i, label)
            best = torch.minimum(best, layer)
        return label

    def color(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        label = self.label(points)
        facing = self.model.networks.body_field.facing(points)
        out = points.new_zeros(len(points), 3)
        for i, part in enumerate(self.person.parts):
            at = (label == i).nonzero().squeeze(1)
            if at.numel():
                out = out.index_copy(0, at, self.person.color(part, points[at], facing[at]))
        return out.clamp(0, 1)

    def material(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 2"]:
        label = self.label(points)
        out = points.new_zeros(len(points), 2)
        for i, part in enumerate(self.person.parts):
            at = (label == i).nonzero().squeeze(1)
            if at.numel():
                out = out.index_copy(0, at, self.person.material(part, points[at]))
        return out.clamp(0, 1)

    def _neighbours(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Control points near each point [N, K] and weights that vanish at the K-th neighbour (modified Shepard), so
        that the blend does not jump where neighbours change. The last answer is kept, as that of `label`."""
        if self._near is not None and self._near[0] is points and self._near[1] == points._version:
            return self._near[2]
        distance, index = self.model.tree.query(points.detach().cpu().numpy(), k=NEIGHBOURS + 1, workers=2)
        radius = distance[:, -1:]
        weight = ((radius - distance[:, :-1]) / (radius * (distance[:, :-1] + 0.25 * radius))) ** 2
        weight = weight / weight.sum(1, keepdims=True)
        near = (torch.from_numpy(index[:, :-1]).to(points.device),
                torch.from_numpy(weight.astype(np.float32)).to(points.device))  # fmt: skip
        self._near = (points, points._version, near)
        return near

    def offset(self, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        index, weight = self._neighbours(points)
        return torch.einsum("nk,nkc->nc", weight, self.displacement[index])

    def counterpart(self, points: Float[Tensor, "N 3"], other: PeopleField) -> Float[Tensor, "N 3"]:
        return points

    def region(self, points: Float[Tensor, "N 3"]) -> Int[Tensor, " N"]:
        nearest = self.model.tree.query(points.detach().cpu().numpy(), workers=2)[1]
        return self.model.control_region[torch.from_numpy(nearest).to(points.device)]

    def skin(self, points: Float[Tensor, "N 3"]) -> tuple[Int[Tensor, "N 4"], Float[Tensor, "N 4"]]:
        index, weight = self._neighbours(points)
        bones = self.model.networks.control_skin_indices[index].long()  # [N, K, 4]
        values = self.model.networks.control_skin_weights[index] * weight[..., None]
        dense = points.new_zeros(len(points), len(self.model.bones))
        dense.scatter_add_(1, bones.flatten(1), values.flatten(1))
        self._hang(points, dense)
        top, which = dense.topk(4, dim=1)
        return which, top / top.sum(1, keepdim=True)

    def _hang(self, points: Tensor, dense: Tensor) -> None:
        """Skirts, and tops over them, hang from both legs: at the middle a point follows half of each, not first one,
        then the other; next to a leg it follows that leg, to which its underside is joined."""
        if self.person.skirted and self.part in (None, *CLOTH):
            label, hanging = self.label(points), [i for i, p in enumerate(self.person.parts) if p in CLOTH]
            cloth = torch.isin(label, torch.tensor(hanging, device=points.device))
            share = ((points[:, 0] + 0.15) / 0.3).clamp(0, 1)
            share = share * share * (3 - 2 * share)
            free = (self.body_sdf(points) / FREE).clamp(0, 1) * cloth
            free = free * free * (3 - 2 * free)
            for bone in ("thigh", "calf"):
                left, right = (self.model.bones.index(f"{bone}_{side}") for side in "lr")
                both = dense[:, left] + dense[:, right]
                dense[:, left] += free * (both * share - dense[:, left])
                dense[:, right] += free * (both * (1 - share) - dense[:, right])


def load(device: torch.device, weights: Weights | None) -> PeopleModel:
    """The model of verified weights. Raises PopulaceError("weights_corrupt") if the tensors are not this version's."""
    assert weights is not None, "the registry hands over weights to families that name some"
    arrays, metadata = weights.read()
    facts = json.loads(metadata.get("people", "{}"))
    if facts.get("size") not in SIZES:
        raise PopulaceError(
            "weights_corrupt", f"The weights {weights.name!r} are of another version of the people family.",
            "Take the weights that came with this version, or train new ones."
        )  # fmt: skip
    networks = PeopleNetworks(facts)
    reader = {k: v for k, v in arrays.items() if k.startswith(READER)}
    values = storage.unpack({k: v for k, v in arrays.items() if k not in reader})
    check_tensors(weights.name, values, {k: tuple(v.shape) for k, v in networks.state_dict().items()})
    networks.load_state_dict({k: torch.from_numpy(v) for k, v in values.items()})
    return PeopleModel(networks, facts, device, weights.sha256, _load_encoder(weights.name, reader, facts, device))


def _load_encoder(
    name: str, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any], device: torch.device
) -> PhotoEncoder | None:
    """From arrays whose names begin with READER, None if there are none. Raises `weights_corrupt`."""
    if not arrays:
        return None
    encoder = PhotoEncoder(facts)
    values = {k.removeprefix(READER): v for k, v in arrays.items()}
    check_tensors(name, values, {k: tuple(v.shape) for k, v in encoder.state_dict().items()})
    encoder.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in values.items()})
    return encoder.to(device).eval().requires_grad_(False)
