# SPDX-License-Identifier: GPL-3.0-or-later
"""From the encoder's answer to the photo: analysis by synthesis through the differentiable renderer.

A person's surface is extracted once per round; its vertices then follow the body's shape code (linearly), the joints
(linear blend skinning) and the place before the camera, and its picture is compared with the photo's on several scales,
so that outlines pull from afar. Light is second-order spherical harmonics (Ramamoorthi and Hanrahan 2001), solved for;
garments are chosen by trying the likely ones. Several photos share the codes; pose, place and light are each photo's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from backend.families.base import Latents
from backend.families.people.config import BODY_DIM, LOOSE, PARTS, THICK, TRIM
from backend.families.people.encoder import JOINTS, Crop, Placement, square_camera
from backend.geometry.bake import smooth_normals
from backend.geometry.mesh import vertex_normals
from backend.geometry.tetgrid import extract_surface
from backend.photo.posing import forward_kinematics, skin
from backend.render.camera import to_clip
from backend.render.rasterize import Raster, rasterize, sample, to_image
from backend.render.shade import to_linear, to_srgb
from backend.render.silhouette import antialias, edge_topology

if TYPE_CHECKING:
    from backend.families.people.model import PeopleModel

SCALES = 4  # halvings of the pictures that are compared
GRID = 72  # cells of the surface that is fitted
TINT = 3.0  # how much surer grey light is than any colour of it, in whole pictures
GAIN = 3.5  # largest log of what a palette is multiplied by at once
STRANGE = 0.5  # log colours off from which on a pixel counts a quarter
LEAST = 1e-3  # share of the square that a part must fill to tell its colours
PRIORS = {"shape": 0.004, "pose": 2e-3}
DOUBTS = {"upperarm": 0.3, "lowerarm": 0.35, "hand": 0.2, "thigh": 0.12, "calf": 0.12, "foot": 0.12, "head": 0.15}
"""Radians by which the encoder errs about each joint (one standard deviation), the others by 0.07."""
DOUBT_TURN = 0.25


@dataclass(frozen=True)
class Surface:
    """A person extracted: what does not change while body and pose move a little."""

    points: Float[Tensor, "V 3"]  # canonical
    faces: Int[Tensor, "F 3"]
    topology: Int[Tensor, "E 4"]
    near: Int[Tensor, "V K"]  # control points that carry a vertex
    share: Float[Tensor, "V K"]
    bones: Int[Tensor, "V 4"]
    weights: Float[Tensor, "V 4"]
    labels: Int[Tensor, " V"]  # index into ("body", *worn)
    albedo: Float[Tensor, "V 3"]  # linear


@dataclass
class Sitting:
    """What belongs to one photo. The prior holds the pose near `said`, to which it is set by the first descent."""

    crop: Crop
    rotations: Float[Tensor, "J 3 3"]
    place: Placement
    light: Float[Tensor, "9 3"] | None = None
    said: tuple[Float[Tensor, "J 3 3"], Float[Tensor, "3 3"]] | None = None  # rotations, turn


def surface_of(model: PeopleModel, codes: Mapping[str, Tensor], grid_resolution: int = GRID) -> Surface:
    """Raises `empty_surface`."""
    field: Any = model.decode(Latents("people", codes))[0]
    with torch.no_grad():
        mesh = extract_surface(field, grid_resolution, displaced=False)
        near, share = field._neighbours(mesh.points)
        bones, weights = field.skin(mesh.points)
        albedo = to_linear(field.color(mesh.points))
        labels = field.label(mesh.points)
    return Surface(mesh.points, mesh.faces, edge_topology(mesh.faces), near, share, bones, weights, labels, albedo)


class Body:
    """The linear body: vertices and joints of a shape code."""

    def __init__(self, model: PeopleModel) -> None:
        decoder: Any = model.networks.body_shape
        self.decoder, self.count = decoder, len(model.bones)
        self.parents = model.parents
        self.at = [model.bones.index(name) for name in JOINTS]
        self.pelvis = model.bones.index("pelvis")
        self.doubts = torch.tensor([[DOUBTS.get(name.removesuffix("_l").removesuffix("_r"), 0.07)] for name in JOINTS])

    def rest(self, surface: Surface, w: Float[Tensor, "1 W"]) -> tuple[Float[Tensor, "V 3"], Float[Tensor, "J 3"]]:
        """Vertices in person space and heads of the bones."""
        displacement, joints = self.decoder(w)
        moved = torch.einsum("vk,vkc->vc", surface.share, displacement[surface.near])
        return surface.points + moved, joints[: self.count]

    def pose(
        self, surface: Surface, w: Float[Tensor, "1 W"], rotations: Float[Tensor, "J 3 3"]
    ) -> tuple[Float[Tensor, "V 3"], Float[Tensor, "J 3"]]:
        """Posed vertices; heads in rest."""
        vertices, heads = self.rest(surface, w)
        turns, places = forward_kinematics(rotations[None], heads[None], self.parents)
        return skin(vertices, surface.bones, surface.weights, turns[0], places[0], heads), heads


def harmonics(normal: Float[Tensor, "N 3"]) -> Float[Tensor, "N 9"]:
    """Real spherical harmonics up to the second order, without their constants."""
    x, y, z = normal.unbind(1)
    return torch.stack([torch.ones_like(x), x, y, z, x * y, y * z, z * x, x * x - y * y, 3 * z * z - 1], 1)


@dataclass
class Seen:
    """What a render of one photo knows without gradient."""

    raster: Raster
    shading: Float[Tensor, "N 9"]
    albedo: Float[Tensor, "N 3"]
    labels: Int[Tensor, " N"]


class Fit:
    """Codes, poses, places and lights of one person in one or several photos."""

    def __init__(self, model: PeopleModel, codes: Mapping[str, Tensor], sittings: Sequence[Sitting]) -> None:
        self.model, self.body = model, Body(model)
        self.codes = {k: v.detach().clone() for k, v in codes.items()}
        self.sittings = list(sittings)
        self.surface = surface_of(model, self.codes)
        self.targets = [_pyramid(s.crop.square[None]) for s in self.sittings]
        self.valid = [_pyramid(s.crop.seen[None]) for s in self.sittings]

    # --- pictures

    def clip(self, sitting: Sitting, w: Tensor, rotations: Tensor, place: Placement) -> tuple[Tensor, Tensor]:
        """Homogeneous clip coordinates [1, V, 4] and posed vertices in the square's camera [V, 3]."""
        vertices, heads = self.body.pose(self.surface, w, rotations)
        pelvis = heads[self.body.pelvis]
        seen = (vertices - pelvis) @ place.turn.T + place.shift
        projection = square_camera(place, pelvis.detach(), sitting.crop.fov).projection
        return to_clip(seen, projection)[None], seen

    @torch.no_grad()
    def look(self, sitting: Sitting, size: int) -> tuple[Seen, Tensor, Tensor]:
        """Visibility, and the light that explains the photo best."""
        clip, vertices = self.clip(sitting, self.codes["body/shape"], sitting.rotations, sitting.place)
        raster = rasterize(clip, self.surface.faces, (size, size))
        normals = torch.from_numpy(smooth_normals(vertices.double().numpy(), self.surface.faces.numpy())).float()
        shading = harmonics(F.normalize(sample(normals, raster, self.surface.faces), dim=1))
        albedo = sample(self.surface.albedo, raster, self.surface.faces)
        face = raster.face_id.flatten()[raster.pixels]
        labels = self.surface.labels[self.surface.faces[face, 0]]
        return Seen(raster, shading, albedo, labels), clip, normals

    def photo_at(self, sitting: Sitting, seen: Seen) -> tuple[Float[Tensor, "N 3"], Tensor]:
        """Linear colours of the photo at the render's pixels and whether the matte is sure there."""
        square = _resized(sitting.crop.square, seen.raster.face_id.shape[1])
        rows = square.flatten(1).T[seen.raster.pixels]
        sure = rows[:, 3] > 0.98
        return to_linear(rows[:, :3] / rows[:, 3:].clamp(min=1e-3)), sure

    @torch.no_grad()
    def solve_light(self, size: int = 128) -> None:
        """Per photo: grey light by ridge regression of colours on albedo times harmonics, outliers counting less, at
        first those of an even light; then its tint, which has to be asked for: a green shirt is likelier than a green
        lamp."""
        for sitting in self.sittings:
            seen, _, _ = self.look(sitting, size)
            colors, sure = self.photo_at(sitting, seen)
            if int(sure.sum()) < 50:
                sitting.light = torch.zeros(9, 3).index_fill_(0, torch.tensor([0]), 0.8)
                continue
            basis, albedo, colors = seen.shading[sure], seen.albedo[sure], colors[sure]
            light, tint = torch.zeros(9), torch.ones(3)
            flat = albedo * ((colors.mean(1) + 0.01) / (albedo.mean(1) + 0.01)).median()
            weight = 1 / (1 + ((flat - colors).abs().mean(1, keepdim=True) / 0.16) ** 2)
            for _ in range(3):
                bright = (albedo * tint).mean(1, keepdim=True)
                a, b = basis * bright * weight, colors.mean(1) * weight[:, 0]
                ridge = 0.002 * len(a) * float((bright**2).mean()) * torch.tensor([0.0, 1, 1, 1, 3, 3, 3, 3, 3])
                light = torch.linalg.solve(a.T @ a + torch.diag(ridge) + 1e-6 * torch.eye(9), a.T @ b)
                drawn = albedo * (basis @ light).clamp(min=0.02)[:, None]
                w = weight**2 * (drawn**2).mean()
                tint = ((drawn * colors * weight**2).sum(0) + TINT * w.sum()) / (
                    (drawn**2 * weight**2).sum(0) + TINT * w.sum())  # fmt: skip
                tint = tint / tint.mean()
                weight = 1 / (1 + ((drawn * tint - colors).abs().mean(1, keepdim=True) / 0.08) ** 2)
            sitting.light = light[:, None] * tint

    @torch.no_grad()
    def solve_colors(self, size: int = 160) -> None:
        """Every part's palette times what the photos show of it over what was drawn; the light's strength stays."""
        for label, gain in self._gains(size).items():
            self._recolor(self.parts[label], gain)
        self.refresh()

    def _gains(self, size: int) -> dict[int, Float[Tensor, " 3"]]:
        """Linear colours of the photos over those drawn, by part, means over the photos. Where an arm is drawn on
        a shirt, the ratio is the shirt's: pixels count less the farther they are from most, first from no change."""
        ratios: dict[int, list[Tensor]] = {}
        for sitting in self.sittings:
            seen, _, _ = self.look(sitting, size)
            colors, sure = self.photo_at(sitting, seen)
            shaded = seen.albedo * (seen.shading @ _lit(sitting)).clamp(min=0.05)
            for label in range(len(self.parts)):
                at = sure & (seen.labels == label)
                if int(at.sum()) >= LEAST * size**2:
                    ratio = (colors[at] + 0.01).log() - (shaded[at] + 0.01).log()
                    middle = torch.zeros(3)
                    for _ in range(8):
                        weight = (1 + ((ratio - middle) / STRANGE).square().sum(1, keepdim=True)) ** -2
                        middle = (weight * ratio).sum(0) / weight.sum()
                    ratios.setdefault(label, []).append(middle)
        return {label: torch.stack(found).mean(0).clamp(-GAIN, GAIN).exp() for label, found in ratios.items()}

    def _recolor(self, part: str, gain: Float[Tensor, " 3"]) -> None:
        code = self.codes[f"{part}/tex"]
        palette = to_srgb(to_linear(code[0, :3].clamp(0.02, 1)) * gain)
        scale = palette / code[0, :3].clamp(min=0.02)
        code[0, :3] = palette
        if part != "body":
            code[0, 3:6] = (code[0, 3:6] * scale).clamp(-0.2, 1)

    @property
    def parts(self) -> tuple[str, ...]:
        return ("body", *(p for p in PARTS if f"{p}/shape" in self.codes))

    def refresh(self) -> None:
        """Extract the surface of the codes anew."""
        self.surface = surface_of(self.model, self.codes)

    def draw(self, sitting: Sitting, clip: Tensor, vertices: Tensor, size: int) -> Float[Tensor, "1 4 S S"]:
        """The person as the photo would show it, premultiplied; differentiable in the positions, by outlines and by
        shading: how bright a limb is tells how it is turned towards the light, where its outline does not."""
        surface = self.surface
        raster = rasterize(clip, surface.faces, (size, size))
        normals = vertex_normals(vertices, surface.faces)
        looks = sample(torch.cat([surface.albedo, normals], 1), raster, surface.faces)
        shading = harmonics(F.normalize(looks[:, 3:], dim=1)) @ _lit(sitting)
        color = to_srgb(looks[:, :3] * shading.clamp(min=0.02))
        image = to_image(torch.cat([color, torch.ones(len(color), 1)], 1), raster)
        return antialias(image, raster, clip, surface.faces, surface.topology).movedim(3, 1)

    def difference(self, index: int, image: Float[Tensor, "1 4 S S"]) -> Tensor:
        """Mean absolute difference to a photo over all scales, coverage counting thrice; nothing beyond its edges."""
        total = image.new_zeros(())
        steps = [int(t.shape[2]) for t in self.targets[index]]
        for level, picture in enumerate(_pyramid(image)):
            if picture.shape[2] not in steps:
                break
            at = steps.index(picture.shape[2])
            target, valid = self.targets[index][at], self.valid[index][at]
            off = (picture - target).abs() * valid
            off = off * (0.3 + 0.7 * torch.cat([target[:, 3:].expand(-1, 3, -1, -1), torch.ones_like(valid)], 1))
            total = total + (off[:, :3].mean() + off[:, 3:].mean()) * 1.3**level
        return total

    def score(self) -> float:
        """How far the pictures are from the photos now."""
        return sum(map(self.score_of, range(len(self.sittings)))) / len(self.sittings)

    @torch.no_grad()
    def score_of(self, index: int, size: int = 96) -> float:
        sitting = self.sittings[index]
        clip, vertices = self.clip(sitting, self.codes["body/shape"], sitting.rotations, sitting.place)
        return float(self.difference(index, self.draw(sitting, clip, vertices, size)))

    # --- what is sought

    def descend(self, steps: int, size: int, rate: float = 1.0, step: Any = None) -> float:
        """Adam on the body's shape, the joints and the places. Returns the last mean difference."""
        shape = torch.zeros(1, BODY_DIM, requires_grad=True)
        turns = [torch.zeros(len(JOINTS), 3, requires_grad=True) for _ in self.sittings]
        moves = [torch.zeros(6, requires_grad=True) for _ in self.sittings]
        optimiser = torch.optim.Adam([
            {"params": [shape], "lr": 0.05 * rate}, {"params": turns, "lr": 0.02 * rate},
            {"params": moves, "lr": 0.01 * rate},
        ], betas=(0.8, 0.95))  # fmt: skip
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1), 0)
        best, kept = np.inf, None
        for sitting in self.sittings:
            sitting.said = sitting.said or (sitting.rotations, sitting.place.turn)
        for i in range(steps + 1):
            total = PRIORS["shape"] * ((self.codes["body/shape"] + shape) ** 2).mean()
            for n, sitting in enumerate(self.sittings):
                rotations, place = self._moved(sitting, turns[n], moves[n])
                clip, vertices = self.clip(sitting, self.codes["body/shape"] + shape, rotations, place)
                total = total + self.difference(n, self.draw(sitting, clip, vertices, size)) / len(self.sittings)
                total = total + PRIORS["pose"] * self._doubt(sitting, rotations, place)
            if float(total.detach()) < best:
                best = float(total.detach())
                kept = (shape.detach().clone(), *([x.detach().clone() for x in xs] for xs in (turns, moves)))
            if i == steps:
                break
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
            schedule.step()
            if step is not None:
                step((i + 1) / steps)
        assert kept is not None
        with torch.no_grad():
            self.codes["body/shape"] = self.codes["body/shape"] + kept[0]
            for sitting, turn, move in zip(self.sittings, kept[1], kept[2], strict=True):
                sitting.rotations, sitting.place = self._moved(sitting, turn, move)
        return best

    def _doubt(self, sitting: Sitting, rotations: Tensor, place: Placement) -> Tensor:
        """Squared angles from what was said, in the encoder's standard deviations: |R - S|^2 is twice the angle's."""
        assert sitting.said is not None
        joints = (rotations - sitting.said[0])[self.body.at].square().sum((1, 2)) / self.body.doubts[:, 0] ** 2
        return (joints.sum() + (place.turn - sitting.said[1]).square().sum() / DOUBT_TURN**2) / 2

    def _moved(self, sitting: Sitting, turns: Tensor, move: Tensor) -> tuple[Tensor, Placement]:
        joints = _rotation(turns) @ sitting.rotations[self.body.at]
        rotations = sitting.rotations.index_copy(0, torch.tensor(self.body.at), joints)
        place = sitting.place
        depth = place.shift[2].abs()
        shift = place.shift + torch.stack([move[3] * depth * 0.3, move[4] * depth * 0.3, -move[5] * depth])
        # nearer or farther along the line of sight
        shift = shift * torch.stack([1 + move[5], 1 + move[5], torch.ones(())])
        return rotations, Placement(_rotation(move[None, :3])[0] @ place.turn, shift)

    def choose(self, part: str, candidates: Sequence[tuple[Mapping[str, Tensor] | None, float]]) -> None:
        """The best of several codes for a part (None: not worn); each comes with what is added to its score."""
        scores = []
        kept, present = dict(self.codes), self.surface
        for candidate, handicap in candidates:
            codes = {k: v for k, v in kept.items() if not k.startswith(f"{part}/")} | dict(candidate or {})
            self.codes = {k: v.clone() for k, v in codes.items()}
            if codes.keys() == kept.keys() and all(codes[name] is kept[name] for name in kept):
                self.surface = present
            else:
                self.refresh()
            self.solve_part(part)
            scores.append((self.score() + handicap, self.codes, self.surface))
        _, self.codes, self.surface = min(scores, key=lambda s: s[0])

    @torch.no_grad()
    def solve_part(self, part: str, size: int = 96) -> None:
        """The palette of one part from the photos, without drawing it anew: its colours follow linearly enough."""
        label = self.parts.index(part) if part in self.parts else -1
        gain = self._gains(size).get(label)
        if gain is None:
            return
        self._recolor(part, gain)
        mine = (self.surface.labels == label)[:, None]
        self.surface = replace(self.surface, albedo=torch.where(mine, self.surface.albedo * gain, self.surface.albedo))

    def search_cut(self, part: str, spans: Mapping[int, Sequence[float]]) -> None:
        """Try other lengths and widths of a cut garment, number by number."""
        for index, deltas in spans.items():
            present = {name: self.codes[name] for name in (f"{part}/shape", f"{part}/tex")}
            candidates: list[tuple[Mapping[str, Tensor], float]] = [(present, 0.0)]
            for delta in deltas:
                shape = self.codes[f"{part}/shape"].clone()
                shape[0, index] += delta
                candidates.append((present | {f"{part}/shape": shape}, 0.0))
            self.choose(part, candidates)


    def search_length(self, part: str) -> None:
        """Try shorter sleeves or legs of a garment that is worn as it was made."""
        present = {name: self.codes[name] for name in (f"{part}/shape", f"{part}/tex")}
        candidates: list[tuple[Mapping[str, Tensor], float]] = [(present, 0.0)]
        for length in LENGTHS[part]:
            shape = self.codes[f"{part}/shape"].clone()
            shape[0, TRIM.start] = length
            candidates.append((present | {f"{part}/shape": shape}, SHORTER))
        self.choose(part, candidates)
        if not torch.equal(self.codes[f"{part}/shape"], present[f"{part}/shape"]):
            self.search_cut(part, {TRIM.start: (-0.2, 0.2)})


LENGTHS = {"top": (-0.5, 0.0, 0.5), "bottom": (-0.8, -0.3, 0.3)}  # of sleeves and hems, see `cut.borders`
SHORTER = 0.0005  # score that a shorter one must win
# a waist is not among them: tops hide it
CUTS = {"top": {TRIM.start: (-0.6, 0.6), TRIM.start + 1: (-0.6, 0.6), LOOSE: (-0.15, 0.15), THICK: (-0.3, 0.3)},
        "bottom": {TRIM.start: (-0.6, 0.6), LOOSE: (-0.15, 0.15), THICK: (-0.3, 0.3)}}  # fmt: skip


def _lit(sitting: Sitting) -> Float[Tensor, "9 3"]:
    assert sitting.light is not None, "the light is solved for before anything is drawn"
    return sitting.light


def _pyramid(image: Float[Tensor, "1 C S S"]) -> list[Float[Tensor, "1 C s s"]]:
    """From fine to coarse, blurred by a binomial filter before each halving."""
    out = [image]
    kernel = image.new_tensor([1.0, 3, 3, 1]) / 8
    for _ in range(SCALES):
        x = F.pad(out[-1], (1, 1, 1, 1))
        channels = x.shape[1]
        x = F.conv2d(x, kernel.view(1, 1, 1, 4).expand(channels, 1, 1, 4), stride=(1, 2), groups=channels)
        x = F.conv2d(x, kernel.view(1, 1, 4, 1).expand(channels, 1, 4, 1), stride=(2, 1), groups=channels)
        out.append(x)
    return out


def _resized(square: Float[Tensor, "4 S S"], size: int) -> Float[Tensor, "4 s s"]:
    return square if square.shape[1] == size else F.interpolate(square[None], (size, size), mode="area")[0]


def _rotation(turn: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3 3"]:
    """Rotation vectors to matrices (Rodrigues)."""
    angle = (turn.square().sum(1) + 1e-12).sqrt()[:, None, None]
    x, y, z = turn.unbind(1)
    zero = torch.zeros_like(x)
    k = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], 1).view(-1, 3, 3)
    eye = torch.eye(3).to(turn)
    return eye + torch.sin(angle) / angle * k + (1 - torch.cos(angle)) / angle**2 * (k @ k)
