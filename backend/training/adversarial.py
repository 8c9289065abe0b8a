# SPDX-License-Identifier: GPL-3.0-or-later
"""The adversarial stages: pictures of the model's people against pictures of sampled people.

fakes   volume renders of `decode(mapped(z))` in person space: body and head, 11 guided samples per ray
critics of colour with silhouette, of the silhouette alone (GET3D), and of small volumes of distance and colour
        (Get3DHuman), whose reals are volumes of the distilled model's own people
anchors to the distilled weights for the same z: codes (latent prior), volumes, depth and normals (Get3DHuman sec. 6.3)

What learns: mapping networks, colour planes and, if asked, shapes. `superres` looks at four times the side: the frozen
model's small picture guides where and which parts to sample, and the large one, reduced, must stay the small one
(SemanticHuman-HD, stage 2).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from backend.families.base import Latents, seeded_normal
from backend.families.people.config import BODY_DIM, PARTS, Z_DIM
from backend.families.people.model import PeopleField, PeopleModel, PeopleNetworks
from backend.networks.volumes import Volume
from backend.render.volume import Guide, Rendered, camera_rays, guide_from, render_guided, render_uniform
from backend.training import gan
from backend.training.discriminators import KINDS
from backend.training.people_scene import PeopleScene, part_distances
from backend.training.views import ASPECT, FRAMES, Reals, camera_of, random_views

VOLUMES = (
    Volume("face", (0.0, 1.545, 0.04), (0.12, 0.165, 0.15)),
    Volume("hair", (0.0, 1.50, 0.0), (0.18, 0.27, 0.20)),
    Volume("chest", (0.0, 1.25, 0.03), (0.27, 0.25, 0.20)),
    Volume("hips", (0.0, 0.92, 0.03), (0.27, 0.22, 0.20)),
    Volume("shin", (0.12, 0.40, 0.03), (0.13, 0.35, 0.15)),
    Volume("foot", (0.14, 0.10, 0.08), (0.13, 0.15, 0.18)),
)
"""Boxes in canonical space that the feature-volume critic looks into."""

TRUNCATION = 0.03  # metres: distances in feature volumes are cut off there
CODE_NAMES = ("body/shape", "body/tex", *(f"{p}/{k}" for p in PARTS for k in ("shape", "tex")))


@dataclass(frozen=True)
class Settings(gan.Settings):
    """One size of the stage. Rates and weights are first guesses: stable over some hundred steps on a CPU, not tuned,
    and `base` has not run. Let `populace eval` decide whether a stage made the weights better."""

    height: int = 64  # of pictures; width is 3/4 of it
    low_factor: int = 1  # the guiding picture is so much smaller
    coarse: int = 48  # samples of its rays
    beta: float = 0.0015  # metres: softness of surfaces; with more, skin 4 mm under cloth shines through
    volume: int = 8  # cells along the side of feature volumes
    pool: int = 64  # real people that are rendered
    train: tuple[str, ...] = ("mapping", "tex")  # of "mapping", "tex", "shape"
    rate_mapping: float = 1e-4  # also of small networks that read planes
    rate_planes: float = 2e-3
    rate_shape: float = 2e-4
    prior_code: float = 1.0
    prior_volume: float = 1.0
    prior_depth: float = 10.0  # per metre
    prior_normal: float = 0.5  # per radian
    prior_every: int = 4  # steps between depth and normal losses, which need the frozen model's picture
    weight_up: float = 0.0
    psi: float = 1.0
    sheet: int = 6  # people on a sample sheet


SIZES = {
    "tiny": Settings(height=32, batch=4, base=8, limit=16, pool=12, coarse=32, half_life=50, warm_up=4),
    "small": Settings(pool=600, volume=16, base=24, limit=128),
    "base": Settings(height=256, low_factor=2, batch=16, base=32, limit=512, pool=20000, volume=32, half_life=10000,
                     rate_planes=1e-3, gamma=10.0, warm_up=1000),
}  # fmt: skip


def superres(settings: Settings) -> Settings:
    """The same at four times the side, guided; only colours learn."""
    return dataclasses.replace(
        settings, height=4 * settings.height, low_factor=4, base=max(8, settings.base // 2), train=("tex",),
        weight_up=1.0, rate_planes=0.5 * settings.rate_planes, gamma=4 * settings.gamma,
        batch=max(2, settings.batch // 2), pool=max(8, settings.pool // 4),
    )  # fmt: skip


# --- latents ----------------------------------------------------------------------------------------------------------


def draw_z(key: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """Standard normal z by code name, a function of the key."""
    person = int(np.random.default_rng([*key, 1]).integers(2**53))
    return {n: torch.from_numpy(seeded_normal(person, n, (1, BODY_DIM if n == "body/shape" else Z_DIM))).to(device)
            for n in CODE_NAMES}  # fmt: skip


KINDS_OF = {"mappings": "mapping", "textures": "tex", "body_tex": "tex", "shapes": "shape"}


def trainable(networks: PeopleNetworks, kinds: Sequence[str]) -> dict[str, dict[str, nn.Parameter]]:
    """Parameters by kind ("mapping", "tex", "shape") and name; the body's mapping stays: its people are measured."""
    found: dict[str, dict[str, nn.Parameter]] = {k: {} for k in kinds}
    for name, parameter in networks.named_parameters():
        kind = KINDS_OF.get(name.partition(".")[0], "")
        if kind in found and not name.startswith("mappings.body_shape."):
            found[kind][name] = parameter
    return found


# --- what critics see -------------------------------------------------------------------------------------------------


def picture_of(seen: Rendered, size: tuple[int, int]) -> Float[Tensor, "4 H W"]:
    """Colour on white and silhouette, in -1..1."""
    image = torch.cat([seen.rgb + (1 - seen.mask)[:, None], seen.mask[:, None]], 1).clamp(0, 1)
    return image.T.reshape(4, *size) * 2 - 1


def volume_of(field: PeopleField, box: Volume, cells: int) -> Float[Tensor, "4 R R R"]:
    """Truncated distance to the outer surface in units of the truncation, and colour near it (0 elsewhere)."""
    device = field.bounds.device
    line = (torch.arange(cells, device=device) + 0.5) / cells * 2 - 1
    local = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3)
    points = (local * local.new_tensor(box.half_size)) @ local.new_tensor(box.axes) + local.new_tensor(box.centre)
    distance = part_distances(field, points).amin(1).clamp(-TRUNCATION, TRUNCATION) / TRUNCATION
    near = 1 - distance.detach().abs()
    at = (near > 0).nonzero().squeeze(1)
    colors = points.new_zeros(len(points), 3).index_copy(0, at, (field.color(points[at]) * 2 - 1) * near[at, None])
    return torch.cat([distance[:, None], colors], 1).T.reshape(4, cells, cells, cells)


def angle_between(a: Float[Tensor, "N 3"], b: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
    """Radians between unit vectors, with a gradient also where they agree: 2 asin(|a - b| / 2)."""
    return 2 * torch.asin(((a - b).square().sum(1) + 1e-8).sqrt().div(2).clamp(max=0.999))


# --- the stage --------------------------------------------------------------------------------------------------------


class AdversarialStage(gan.Game):
    """See `loop.Stage`."""

    def __init__(
        self, model: PeopleModel, reals: Reals, settings: Settings, seed: int = 0,
        name: Literal["adversarial", "superres"] = "adversarial",
    ) -> None:  # fmt: skip
        """`model` is trained in place (call `finish` to put the averages in); what it was is the anchor."""
        self.name, self.settings, self.pool = name, settings, reals
        self.model = model
        self.teacher = PeopleModel(copy.deepcopy(model.networks), model.facts, model.device, None)
        kinds = trainable(model.networks, settings.train)
        rates = {"mapping": settings.rate_mapping, "tex": settings.rate_planes, "shape": settings.rate_shape}
        groups = []
        for kind, parameters in kinds.items():
            planes = {k: v for k, v in parameters.items() if v.ndim > 2}
            groups += [(planes, rates[kind]), ({k: v for k, v in parameters.items() if k not in planes},
                                               settings.rate_mapping)]  # fmt: skip
        size = (settings.height, round(settings.height * ASPECT))
        super().__init__(settings, groups, size, (settings.volume, len(VOLUMES)), model.device, seed)

    # --- fakes ---

    def render(
        self, scene: PeopleScene, view: np.ndarray, size: tuple[int, int], guide: PeopleScene | None = None,
        normals: bool = False,
    ) -> tuple[Rendered, Guide, Rendered]:  # fmt: skip
        """A picture through 11 guided samples, its guide, and the small picture that guided (without gradient), which
        is of `guide` if given."""
        s = self.settings
        guide = guide or scene
        camera = camera_of(view, scene.joint("head"))
        low_size = (size[0] // s.low_factor, size[1] // s.low_factor)
        with torch.no_grad():
            low = render_uniform(
                guide, camera_rays(camera, low_size, guide.bounds), s.coarse, s.beta, colors=bool(s.weight_up)
            )
            rays = camera_rays(camera, size, scene.bounds)
            length = float((rays.far - rays.near).clamp(min=0).amax())
            wide = 2 * FRAMES[KINDS[int(view[2])]][0] / low_size[0]
            at = guide_from(low, low_size, size, reach=max(length / s.coarse, wide, 3 * s.beta))
            if guide is not scene and guide.parts != scene.parts:
                at = dataclasses.replace(at, asked=at.asked.new_ones(len(at.asked), len(scene.parts)))
        return render_guided(scene, rays, at, s.beta, normals), at, low

    def fakes(self, step: int, samples: range, anchored: bool = True) -> gan.Fakes:
        s = self.settings
        fields, pictures, views = [], [], []
        anchors: dict[str, list[Tensor]] = {"code": [], "volume": [], "depth": [], "normal": [], "up": []}
        look_back = anchored and step % s.prior_every == 0
        for i in samples:
            z = draw_z([self.seed, step, i], self.device)
            latents = self.model.mapped(z, s.psi)
            with torch.no_grad():
                before = self.teacher.mapped(z, s.psi)
                worn = Latents(before.family, {k: v for k, v in before.codes.items() if k in latents.codes})
                old = self.teacher.decode(worn)[0]
            anchors["code"].append(_code_prior(latents, before))
            field = self.model.decode(latents)[0]
            scene = PeopleScene(field)
            guide = PeopleScene(old) if s.weight_up or look_back else None
            seen = random_views([self.seed, step, i, 2])
            for view in seen:
                out, at, low = self.render(scene, view, self.size, guide if s.weight_up else None, look_back)
                pictures.append(picture_of(out, self.size))
                if look_back and guide is not None:
                    depth, normal = self._compare(guide, scene, view, at, out)
                    anchors["depth"].append(depth)
                    anchors["normal"].append(normal)
                if s.weight_up:
                    small = picture_of(low, (self.size[0] // s.low_factor, self.size[1] // s.low_factor))
                    large = functional.avg_pool2d(pictures[-1], s.low_factor)
                    anchors["up"].append((_soft(large) - _soft(small)).abs().mean())
            if anchored:
                box = VOLUMES[self._box(step, i)]
                with torch.no_grad():
                    target = volume_of(old, box, s.volume)
                anchors["volume"].append((volume_of(field, box, s.volume) - target).abs().mean())
            fields.append(field)
            views.append(torch.from_numpy(seen))
        kinds = len(KINDS)
        order = [n * kinds + k for k in range(kinds) for n in range(len(samples))]
        all_views = torch.cat(views)[order].to(self.device)
        weights = {"code": s.prior_code, "volume": s.prior_volume, "depth": s.prior_depth * s.prior_every,
                   "normal": s.prior_normal * s.prior_every, "up": s.weight_up}  # fmt: skip
        losses = {k: (weights[k], torch.stack(v).mean()) for k, v in anchors.items() if v}
        return gan.Fakes(torch.stack(pictures)[order], all_views, *self._volumes(fields, step, samples), losses)

    @torch.no_grad()
    def reals(self, step: int, samples: range) -> tuple[Tensor, Tensor, Tensor]:
        """Volumes are those of other people of the frozen model."""
        fields = [self.teacher.decode(self.teacher.mapped(draw_z([self.seed, step, i, 8], self.device), 1.0))[0]
                  for i in samples]  # fmt: skip
        pictures, views = self.pool.draw([[self.seed, step, i, 5] for i in samples], self.device)
        return pictures, views, self._volumes(fields, step, samples)[0]

    def _compare(
        self, guide: PeopleScene, scene: PeopleScene, view: np.ndarray, at: Guide, out: Rendered
    ) -> tuple[Tensor, Tensor]:
        """Mean difference of depth (metres, cut off at 5 cm) and of normals (radians) to the frozen model's picture,
        over the pixels that both see; divided by the number of pixels so that batches of any split agree."""
        rays = camera_rays(camera_of(view, scene.joint("head")), self.size, scene.bounds)
        with torch.no_grad():
            if guide.parts != scene.parts:
                at = dataclasses.replace(at, asked=at.asked.new_ones(len(at.asked), len(guide.parts)))
            old = render_guided(guide, rays, at, self.settings.beta, normals=True)
        both = ((old.mask > 0.9) & (out.mask > 0.9)).to(out.depth)
        assert out.normal is not None
        assert old.normal is not None
        depth = ((out.depth - old.depth).abs().clamp(max=0.05) * both).mean()
        return depth, (angle_between(out.normal, old.normal) * both).mean()

    def _box(self, step: int, sample: int) -> int:
        return int(np.random.default_rng([self.seed, step, sample, 3]).integers(len(VOLUMES)))

    def _volumes(self, fields: Sequence[PeopleField], step: int, samples: range) -> tuple[Tensor, Tensor]:
        boxes = torch.tensor([self._box(step, i) for i in samples])
        volumes = [volume_of(f, VOLUMES[int(b)], self.settings.volume) for f, b in zip(fields, boxes, strict=True)]
        return torch.stack(volumes), functional.one_hot(boxes, len(VOLUMES)).float().to(self.device)

    @torch.no_grad()
    def show(self, count: int, key: int = 0) -> tuple[Float[Tensor, "2N 4 H W"], Float[Tensor, "2N 3"]]:
        """Pictures of `count` people of the averaged weights, all bodies first, and their views."""
        pictures, views = [], []
        with self.average.in_place():
            for i in range(count):
                scene = PeopleScene(self.model.decode(self.model.mapped(draw_z([key, i, 9], self.device), 1.0))[0])
                seen = random_views([key, i, 10])
                pictures.append(torch.stack([picture_of(self.render(scene, v, self.size)[0], self.size) for v in seen]))
                views.append(torch.from_numpy(seen))
        return torch.stack(pictures, 1).flatten(0, 1), torch.stack(views, 1).flatten(0, 1)

    def sheet(self) -> np.ndarray:
        """Rows: bodies and heads of the model, bodies and heads of real people."""
        count = self.settings.sheet
        fakes, _ = self.show(count)
        reals, _ = self.pool.draw([[0, i, 11] for i in range(count)], self.device)
        rows = [row for source in (fakes, reals) for row in source[:, :3].split(count)]
        image = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
        return ((image.clamp(-1, 1) + 1) * 127.5 + 0.5).to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def _code_prior(latents: Latents, before: Latents) -> Tensor:
    """Mean over the codes of |w - w0|^2 / |w0|^2; a part that is worn by only one of the two does not count."""
    both = [k for k in latents.codes if k in before.codes]
    gaps = [(latents.codes[k] - before.codes[k]).square().sum() / before.codes[k].square().sum().clamp(min=1e-6)
            for k in both]  # fmt: skip
    return torch.stack(gaps).mean()


def _soft(picture: Float[Tensor, "4 h w"]) -> Tensor:
    """Low-passed, so that one sample per pixel and the mean of many compare."""
    return functional.avg_pool2d(functional.pad(picture[None], (1, 1, 1, 1), mode="replicate"), 3, stride=1)[0]
