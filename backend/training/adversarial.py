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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from backend.families.base import Latents, seeded_normal
from backend.families.people.config import BODY_DIM, PARTS, Z_DIM
from backend.families.people.model import PeopleField, PeopleModel, PeopleNetworks
from backend.networks.triplane import Volume
from backend.render.volume import Guide, Rendered, camera_rays, guide_from, render_guided, render_uniform
from backend.training import checkpoint
from backend.training.discriminators import (
    KINDS,
    Discriminator,
    discriminator_loss,
    generator_loss,
    r1_penalty,
    view_code,
)
from backend.training.loop import Phase
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
class Settings:
    """One size of the stage. Rates and weights were chosen on `tiny` and `small`; `base` is untested."""

    height: int = 64  # of pictures; width is 3/4 of it
    low_factor: int = 1  # the guiding picture is so much smaller
    coarse: int = 48  # samples of its rays
    beta: float = 0.004  # metres: softness of surfaces
    batch: int = 4
    base: int = 16  # channels of the critics at full size, and the most
    limit: int = 64
    volume: int = 8  # cells along the side of feature volumes
    pool: int = 64  # real people that are rendered
    train: tuple[str, ...] = ("mapping", "tex")  # of "mapping", "tex", "shape"
    rate_mapping: float = 1e-4
    rate_planes: float = 2e-3
    rate_shape: float = 2e-4
    rate_critic: float = 2e-3
    gamma: float = 1.0  # of R1
    r1_every: int = 16
    weight_mask: float = 0.5
    weight_volume: float = 0.1
    prior_code: float = 1.0
    prior_volume: float = 1.0
    prior_depth: float = 10.0  # per metre
    prior_normal: float = 0.5  # per radian
    prior_every: int = 4  # steps between depth and normal losses, which need the frozen model's picture
    weight_up: float = 0.0
    psi: float = 1.0
    augment: float = 0.3  # probability of a shift and of a cut-out
    half_life: float = 2000.0  # of the moving average, in samples
    clip: float = 10.0
    warm_up: int = 100  # steps in which only the critics learn: fresh ones would lead good weights astray


SIZES = {
    "tiny": Settings(height=32, batch=2, base=8, limit=16, pool=12, coarse=32, half_life=50, warm_up=4),
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


def mapped(model: PeopleModel, z: Mapping[str, Tensor], truncation_psi: float) -> Latents:
    """`model.sample` as a differentiable function of z and of the mapping networks."""

    def through(name: str, condition: Tensor) -> Tensor:
        return model.networks.mappings[name.replace("/", "_")](z[name], condition, truncation_psi)

    codes = {"body/shape": through("body/shape", z["body/shape"].new_zeros(1, 0))}
    attributes = model.networks.attributes(codes["body/shape"])
    codes["body/tex"] = through("body/tex", attributes)
    condition = torch.cat([attributes, codes["body/tex"][:, :3]], 1)
    for part in PARTS:
        shape = through(f"{part}/shape", condition)
        if shape[0, -1] > 0:
            codes[f"{part}/shape"] = shape
            codes[f"{part}/tex"] = through(f"{part}/tex", condition)
    return Latents(model.name, codes)


def trainable(networks: PeopleNetworks, kinds: Sequence[str]) -> dict[str, dict[str, nn.Parameter]]:
    """Parameters by kind ("mapping", "tex", "shape") and name; the body's mapping stays: its people are measured."""
    found: dict[str, dict[str, nn.Parameter]] = {k: {} for k in kinds}
    for name, parameter in networks.named_parameters():
        words = name.split(".")
        kind = "mapping" if words[0] == "mappings" else words[2] if words[0] == "parts" else ""
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


def augment(pictures: Tensor, views: Tensor, keys: Sequence[Sequence[int]], p: float) -> tuple[Tensor, Tensor]:
    """Mirrored people seen from the mirrored side (half of them), shifts by up to an eighth and cut-outs of a third
    with probability p: DiffAugment (Zhao et al. 2020). White comes in from outside. Differentiable."""
    height, width = pictures.shape[2:]
    out, angles = [], views.clone()
    for i, (picture, key) in enumerate(zip(pictures, keys, strict=True)):
        rng = np.random.default_rng(key)
        flip, shift, cut = rng.random(3) < (0.5, p, p)
        dy, dx = (int(rng.integers(-s // 8, s // 8 + 1)) for s in (height, width))
        top, left = int(rng.integers(height - height // 3 + 1)), int(rng.integers(width - width // 3 + 1))
        if flip:
            picture = picture.flip(2)
            angles[i, 0] = -angles[i, 0]
        if shift:
            empty = picture.new_tensor([1.0, 1.0, 1.0, -1.0])[:, None, None]
            pad = functional.pad(picture - empty, (width // 8,) * 2 + (height // 8,) * 2) + empty
            picture = pad[:, height // 8 + dy : height // 8 + dy + height, width // 8 + dx : width // 8 + dx + width]
        if cut:
            keep = torch.ones(height, width, device=picture.device)
            keep[top : top + height // 3, left : left + width // 3] = 0
            picture = picture * keep
        out.append(picture)
    return torch.stack(out), angles


def angle_between(a: Float[Tensor, "N 3"], b: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
    """Radians between unit vectors, with a gradient also where they agree: 2 asin(|a - b| / 2)."""
    return 2 * torch.asin(((a - b).square().sum(1) + 1e-8).sqrt().div(2).clamp(max=0.999))


# --- the stage --------------------------------------------------------------------------------------------------------


class AdversarialStage:
    """See `loop.Stage`."""

    def __init__(
        self, model: PeopleModel, reals: Reals, settings: Settings, seed: int = 0,
        name: Literal["adversarial", "superres"] = "adversarial",
    ) -> None:  # fmt: skip
        """`model` is trained in place (call `finish` to put the averages in); what it was is the anchor."""
        self.name, self.settings, self.seed, self.reals = name, settings, seed, reals
        self.batch, self.device = settings.batch, model.device
        self.size = (settings.height, round(settings.height * ASPECT))
        self.model = model
        self.teacher = PeopleModel(copy.deepcopy(model.networks), model.facts, model.device, None)
        self.kinds = trainable(model.networks, settings.train)
        self.learned = {k: v for group in self.kinds.values() for k, v in group.items()}
        for parameter in self.learned.values():
            parameter.requires_grad_(True)
        self.average = checkpoint.MovingAverage(self.learned, settings.half_life)
        generator_state = torch.get_rng_state()
        torch.manual_seed(seed)
        common = {"base": settings.base, "limit": settings.limit, "group": 2}
        self.critics = nn.ModuleDict({
            "picture": Discriminator(4, self.size, condition=14, **common),
            "mask": Discriminator(1, self.size, condition=14, **common),
            "volume": Discriminator(4, (settings.volume,) * 3, condition=len(VOLUMES), **common),
        }).to(self.device)  # fmt: skip
        torch.set_rng_state(generator_state)
        rates = {"mapping": settings.rate_mapping, "tex": settings.rate_planes, "shape": settings.rate_shape}
        self.generator_optimiser = torch.optim.Adam(
            [{"params": list(self.kinds[k].values()), "lr": rates[k]} for k in settings.train], betas=(0.0, 0.99)
        )
        self.critic_optimiser = torch.optim.Adam(self.critics.parameters(), settings.rate_critic, betas=(0.0, 0.99))
        self.low_picture: Tensor | None = None

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

    def _fakes(
        self, step: int, samples: range, anchored: bool = True
    ) -> tuple[list[PeopleField], Tensor, Tensor, dict[str, Tensor]]:
        """Fields, pictures [2 N, 4, H, W] (all bodies first), views, and the anchors' losses if wanted."""
        s = self.settings
        fields, pictures, views = [], [], []
        anchors: dict[str, list[Tensor]] = {"code": [], "volume": [], "depth": [], "normal": [], "up": []}
        look_back = anchored and step % s.prior_every == 0
        for i in samples:
            z = draw_z([self.seed, step, i], self.device)
            latents = mapped(self.model, z, s.psi)
            with torch.no_grad():
                before = mapped(self.teacher, z, s.psi)
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
        means = {k: torch.stack(v).mean() for k, v in anchors.items() if v}
        return fields, torch.stack(pictures)[order], all_views, means

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

    # --- steps ---

    def phases(self, step: int, samples: range) -> Iterator[Phase]:
        kept: dict[str, Any] = {}

        def generator() -> tuple[Tensor, dict[str, float]]:
            s = self.settings
            fields, pictures, views, anchors = self._fakes(step, samples)
            volumes, boxes = self._volumes(fields, step, samples)
            kept.update(pictures=pictures.detach(), views=views, volumes=volumes.detach(), boxes=boxes)
            shown, angles = augment(pictures, views, self._keys(step, samples, 4), s.augment)
            code = view_code(angles)
            adversarial = (
                generator_loss(self._score("picture", shown, code))
                + s.weight_mask * generator_loss(self._score("mask", shown[:, 3:], code))
                + s.weight_volume * generator_loss(self._score("volume", volumes, boxes))
            )
            weights = {"code": s.prior_code, "volume": s.prior_volume, "depth": s.prior_depth * s.prior_every,
                       "normal": s.prior_normal * s.prior_every, "up": s.weight_up}  # fmt: skip
            total = adversarial + sum(weights[k] * v for k, v in anchors.items())
            return total, {k: float(v.detach()) for k, v in anchors.items()} | {"fool": float(adversarial.detach())}

        def critic() -> tuple[Tensor, dict[str, float]]:
            s = self.settings
            reals, real_views = self.reals.draw([[self.seed, step, i, 5] for i in samples], self.device)
            lazily = step % s.r1_every == 0
            keys = self._keys(step, samples, 6)
            shown, angles = augment(kept["pictures"], kept["views"], keys, s.augment)
            true, true_angles = augment(reals, real_views, self._keys(step, samples, 7), s.augment)
            with torch.no_grad():
                real_volumes = self._teacher_volumes(step, samples)
            loss, figures = torch.zeros((), device=self.device), {}
            for name, weight, fake, real, codes in (
                ("picture", 1.0, shown, true, (view_code(angles), view_code(true_angles))),
                ("mask", 1.0, shown[:, 3:], true[:, 3:], (view_code(angles), view_code(true_angles))),
                ("volume", 1.0, kept["volumes"], real_volumes, (kept["boxes"], kept["boxes"])),
            ):
                real = real.detach().requires_grad_(lazily)
                scores = self._score(name, real, codes[1], exact=lazily)
                of_fakes = self._score(name, fake, codes[0])
                loss = loss + weight * discriminator_loss(scores, of_fakes)
                if lazily:
                    penalty = r1_penalty(scores, real)
                    loss = loss + s.gamma / 2 * s.r1_every * penalty
                    figures[f"{name}_r1"] = float(penalty.detach())
                figures[f"{name}_real"], figures[f"{name}_fake"] = (
                    float(scores.detach().mean()),
                    float(of_fakes.detach().mean()),
                )
            return loss, figures

        if step < self.settings.warm_up:
            with torch.no_grad():
                fields, pictures, views, _ = self._fakes(step, samples, anchored=False)
                volumes, boxes = self._volumes(fields, step, samples)
            kept.update(pictures=pictures, views=views, volumes=volumes, boxes=boxes)
        else:
            self.critics.requires_grad_(False)
            yield Phase("generator", self.generator_optimiser, generator, self.settings.clip)
        self.critics.requires_grad_(True)
        yield Phase("critic", self.critic_optimiser, critic, self.settings.clip)

    def _keys(self, step: int, samples: range, purpose: int) -> list[list[int]]:
        return [[self.seed, step, i, purpose, k] for k in range(len(KINDS)) for i in samples]

    def _score(self, name: str, x: Tensor, condition: Tensor, exact: bool = False) -> Tensor:
        """bf16 on CUDA, unless a gradient of the gradient is wanted."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda" and not exact):
            return self.critics[name](x, condition).float()

    def _volumes(self, fields: Sequence[PeopleField], step: int, samples: range) -> tuple[Tensor, Tensor]:
        boxes = torch.tensor([self._box(step, i) for i in samples])
        volumes = [volume_of(f, VOLUMES[int(b)], self.settings.volume) for f, b in zip(fields, boxes, strict=True)]
        return torch.stack(volumes), functional.one_hot(boxes, len(VOLUMES)).float().to(self.device)

    def _teacher_volumes(self, step: int, samples: range) -> Tensor:
        """Volumes of other people of the frozen model, in the boxes of this step's fakes."""
        fields = [self.teacher.decode(mapped(self.teacher, draw_z([self.seed, step, i, 8], self.device), 1.0))[0]
                  for i in samples]  # fmt: skip
        return self._volumes(fields, step, samples)[0]

    def after(self, step: int) -> dict[str, float]:
        self.average.update(self.batch, (step + 1) * self.batch)
        return {}

    # --- state ---

    def state(self) -> dict[str, Tensor]:
        return (
            checkpoint.with_prefix("generator", self.learned)
            | checkpoint.with_prefix("average", self.average.values)
            | checkpoint.with_prefix("critics", self.critics.state_dict())
            | checkpoint.with_prefix("generator_adam", checkpoint.pack_optimiser(self.generator_optimiser))
            | checkpoint.with_prefix("critic_adam", checkpoint.pack_optimiser(self.critic_optimiser))
        )

    def restore(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in checkpoint.under_prefix("generator", state).items():
                self.learned[name].copy_(value)
        self.average.load(checkpoint.under_prefix("average", state))
        self.critics.load_state_dict(checkpoint.under_prefix("critics", state))
        checkpoint.unpack_optimiser(self.generator_optimiser, checkpoint.under_prefix("generator_adam", state))
        checkpoint.unpack_optimiser(self.critic_optimiser, checkpoint.under_prefix("critic_adam", state))

    @torch.no_grad()
    def show(self, count: int, key: int = 0) -> tuple[Float[Tensor, "2N 4 H W"], Float[Tensor, "2N 3"]]:
        """Pictures of `count` people of the averaged weights, all bodies first, and their views."""
        pictures, views = [], []
        with self.average.in_place():
            for i in range(count):
                scene = PeopleScene(self.model.decode(mapped(self.model, draw_z([key, i, 9], self.device), 1.0))[0])
                seen = random_views([key, i, 10])
                pictures.append(torch.stack([picture_of(self.render(scene, v, self.size)[0], self.size) for v in seen]))
                views.append(torch.from_numpy(seen))
        return torch.stack(pictures, 1).flatten(0, 1), torch.stack(views, 1).flatten(0, 1)

    def sheet(self, count: int = 6) -> np.ndarray:
        """Rows: bodies and heads of the model, bodies and heads of real people."""
        fakes, _ = self.show(count)
        reals, _ = self.reals.draw([[0, i, 11] for i in range(count)], self.device)
        rows = [row for source in (fakes, reals) for row in source[:, :3].split(count)]
        image = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
        return ((image.clamp(-1, 1) + 1) * 127.5 + 0.5).to(torch.uint8).permute(1, 2, 0).cpu().numpy()

    @torch.no_grad()
    def finish(self) -> PeopleModel:
        """The model with the averaged weights in place."""
        for name, parameter in self.learned.items():
            parameter.copy_(self.average.values[name])
            parameter.requires_grad_(False)
        return self.model


def _code_prior(latents: Latents, before: Latents) -> Tensor:
    """Mean over the codes of |w - w0|^2 / |w0|^2; a part that is worn by only one of the two does not count."""
    both = [k for k in latents.codes if k in before.codes]
    gaps = [(latents.codes[k] - before.codes[k]).square().sum() / before.codes[k].square().sum().clamp(min=1e-6)
            for k in both]  # fmt: skip
    return torch.stack(gaps).mean()


def _soft(picture: Float[Tensor, "4 h w"]) -> Tensor:
    """Low-passed, so that one sample per pixel and the mean of many compare."""
    return functional.avg_pool2d(functional.pad(picture[None], (1, 1, 1, 1), mode="replicate"), 3, stride=1)[0]
