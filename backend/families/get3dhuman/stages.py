# SPDX-License-Identifier: GPL-3.0-or-later
"""Get3DHuman's training from a folder of renders, stage by stage (`loop.Stage`): teacher, shape, texture, refine.

    teacher   the prior network on pictures, depth, normals; what is inside and its colours at points (PIFu's losses)
    shape     V_s of a person's code against the teacher's V_s of the picture (`training.Distiller`)
    texture   V_t likewise, the shape's branch frozen
    refine    pictures traced from the teacher's field of a picture against the picture: LSGAN on patches of two scales,
              feature matching, and differences of wavelet moduli in place of VGG19's features, whose weights are not
              ours. Generators make such fields too, but not yet that person's of a code

Not published, hence ours: sizes, rates, weights of the losses, how long. Batch normalisation keeps the statistics of
the process that writes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from backend.evaluation.features import gabor, modulus
from backend.evaluation.images import shrink
from backend.families.get3dhuman import colors, losses
from backend.families.get3dhuman.config import Config
from backend.families.get3dhuman.likeness import Likeness, Volumes, of_field, of_people
from backend.families.get3dhuman.networks import Get3DHuman, RefineNet, decode_shape, decode_texture
from backend.families.get3dhuman.people import People
from backend.families.get3dhuman.reading import Reader
from backend.families.get3dhuman.teacher import Prior, Teacher
from backend.families.get3dhuman.tracer import trace_quickly
from backend.families.get3dhuman.training import BETAS, PATH_EVERY, R1_EVERY, RATE, WEIGHTS, Batch, Branch, Distiller
from backend.training import checkpoint
from backend.training.loop import Phase
from backend.training.renders import Item

REMEMBERED = 1 << 30  # bytes of the teacher's volumes that are kept
HALF_LIFE = 10_000 / 32  # steps, of the generators' moving averages, which are what is measured, shown and kept
MATCHING = 10.0  # weight of feature matching, and of the moduli


@dataclass(frozen=True)
class Settings:
    """One size of training."""

    config: Config
    residues: int = 9  # of the normals' network
    batch: int = 8
    points: int = 10_000  # of a person and step
    rate_teacher: float = 1e-3
    rate_refine: float = RATE / 4
    critic_width: int = 64  # of the patches' critics
    measure_every: int = 1000
    measured: int = 32  # people that training does not see
    pictures: int = 512  # of a Frechet distance
    weights: losses.Weights = WEIGHTS


SIZES = {
    "tiny": Settings(Config(z_dim=32, w_dim=8, channel_base=128, channel_max=8, feature_channels=4, stem=8, volume=8,
                            groups=2, shape_widths=(8, 6, 5), texture_widths=(8, 8, 6, 5), refine_width=2,
                            discriminator_max=8), 1, 2, 64, rate_refine=RATE, critic_width=4, measure_every=2,
                     measured=2, pictures=12, weights=losses.Weights(r1_gamma=1.0)),
    "small": Settings(Config(z_dim=64, w_dim=64, channel_base=1024, channel_max=48, feature_channels=16, stem=16,
                             volume=32, groups=8, shape_widths=(64, 32, 16), texture_widths=(64, 64, 32, 16),
                             refine_width=8, discriminator_max=48), 2, 8, 1024, rate_refine=RATE, critic_width=16,
                      measure_every=400, measured=24, pictures=160, weights=losses.Weights(r1_gamma=1.0)),
    "base": Settings(Config()),
}  # fmt: skip


class _Stage:
    """What all four have in common; see `loop.Stage`."""

    name: str

    def __init__(self, people: People, settings: Settings, seed: int, device: torch.device, rank: int) -> None:
        self.people, self.seed, self.device, self.rank = people, seed, device, rank
        self.settings = replace(settings, config=replace(settings.config, resolution=people.size))
        self.batch = settings.batch
        self.train = [i for i in people.items if not i.held_out]
        self.unseen = [i for i in people.items if i.held_out]
        self.test = self.unseen[: settings.measured]
        self.modules: dict[str, nn.Module] = {}
        self.optimisers: dict[str, torch.optim.Optimizer] = {}

    def drawn(self, step: int, samples: range) -> list[Item]:
        at = [int(np.random.default_rng([self.seed, step, i]).integers(len(self.train))) for i in samples]
        return [self.train[i] for i in at]

    def points(self, kind: str, items: list[Item], key: list[int]) -> tuple[Tensor, Tensor]:
        """Points and what is true there, of every item; `kind` is "occupancy" or "colors"."""
        found = [getattr(self.people, kind)(item, self.settings.points, np.random.default_rng([*key, i]))
                 for i, item in enumerate(items)]  # fmt: skip
        return (torch.stack([p for p, _ in found]).to(self.device),
                torch.stack([v for _, v in found]).to(self.device))  # fmt: skip

    def before(self) -> dict[str, float]:
        return self._measured() | {f"bound/{name}": value for name, value in self.bounds().items()}

    def after(self, step: int) -> dict[str, float]:
        return self._measured() if self.rank == 0 and (step + 1) % self.settings.measure_every == 0 else {}

    def _measured(self) -> dict[str, float]:
        return {f"test/{name}": value for name, value in self.measure().items()} if self.test else {}

    def measure(self) -> dict[str, float]:
        raise NotImplementedError

    def bounds(self) -> dict[str, float]:
        """What the best that can be would measure."""
        return {}

    def sheet(self) -> np.ndarray | None:
        return None

    def state(self) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            out |= checkpoint.with_prefix(name, module.state_dict())
        for name, optimiser in self.optimisers.items():
            out |= checkpoint.with_prefix(f"{name}_adam", checkpoint.pack_optimiser(optimiser))
        return out

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for name, module in self.modules.items():
            module.load_state_dict(checkpoint.under_prefix(name, state))
        for name, optimiser in self.optimisers.items():
            checkpoint.unpack_optimiser(optimiser, checkpoint.under_prefix(f"{name}_adam", state))


class TeacherStage(_Stage):
    """The prior network."""

    name = "teacher"

    def __init__(self, people: People, settings: Settings, seed: int, device: torch.device, rank: int = 0) -> None:
        super().__init__(people, settings, seed, device, rank)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.teacher = Teacher(self.settings.config, settings.residues).to(device).train()
        self.modules = {"teacher": self.teacher}
        self.optimisers = {"teacher": torch.optim.Adam(self.teacher.parameters(), settings.rate_teacher)}

    def terms(self, items: list[Item], key: list[int]) -> dict[str, Tensor]:
        seen = self.people.seen(items).to(self.device)
        prior = self.teacher(seen.picture, seen.mask)
        logits = self.teacher.mask(seen.picture)
        inside, truth = self.points("occupancy", items, [*key, 0])
        places, rgb = self.points("colors", items, [*key, 1])
        shape, texture = prior.shape_volume, prior.texture_volume
        found = decode_texture(self.teacher.mlp_texture, shape.detach(), texture, places)
        entropy = functional.binary_cross_entropy(truth, truth)  # nothing is gained below
        occupancy = functional.binary_cross_entropy(decode_shape(self.teacher.mlp_shape, shape, inside), truth)
        return {
            "mask": functional.binary_cross_entropy_with_logits(logits, seen.mask.to(logits)),
            "normal": losses.normal_loss(prior.normal, seen.normal, seen.mask),
            "depth": losses.depth_loss(prior.depth, seen.depth),
            "occupancy": occupancy - entropy,
            "color": losses.agreement(found, rgb),
        }

    def phases(self, step: int, samples: range) -> Iterator[Phase]:
        def loss() -> tuple[Tensor, dict[str, float]]:
            terms = self.terms(self.drawn(step, samples), [self.seed, step, samples.start])
            weighted = {**terms, "depth": 10 * terms["depth"], "color": 3 * terms["color"]}
            return torch.stack(list(weighted.values())).sum(), {k: float(v.detach()) for k, v in terms.items()}

        yield Phase("teacher", self.optimisers["teacher"], loss, clip=10.0)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        self.teacher.eval()
        found = {name: float(term) for name, term in self.terms(self.test, [0, 0]).items()}
        self.teacher.train()
        return found


class Priors:
    """What a trained teacher makes of the people of a folder; kept where it fits."""

    def __init__(self, people: People, teacher: Teacher, device: torch.device) -> None:
        self.people, self.device = people, device
        self.teacher = teacher.to(device).eval().requires_grad_(False)
        config = people.size
        size = 4 * (2 * teacher.filter_shape.l0.out_channels * ((config // 2 + 1) // 2) ** 2 + 5 * config**2)
        self._most, self._kept = REMEMBERED // size, {}

    @torch.no_grad()
    def __call__(self, items: list[Item]) -> Prior:
        missing = [item for item in dict.fromkeys(i.name for i in items) if item not in self._kept]
        by_name = {item.name: item for item in items}
        fresh: dict[str, tuple[Tensor, ...]] = {}
        for name in missing:  # one by one: bits must not depend on company, or resumed runs would differ
            seen = self.people.seen([by_name[name]]).to(self.device)
            prior = self.teacher(seen.picture, seen.mask)
            parts = (prior.mask, prior.normal, prior.depth, prior.shape_volume, prior.texture_volume)
            fresh[name] = tuple(part[0].cpu() for part in parts)
        if fresh:
            self._kept |= dict(list(fresh.items())[: max(0, self._most - len(self._kept))])
        rows = [self._kept.get(item.name) or fresh[item.name] for item in items]
        return Prior(*(torch.stack(part).to(self.device) for part in zip(*rows, strict=True)))


class DistillStage(_Stage):
    """One branch of the student."""

    def __init__(
        self, people: People, settings: Settings, student: Get3DHuman, teacher: Teacher, branch: Branch, seed: int,
        device: torch.device, rank: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(people, settings, seed, device, rank)
        self.name = branch
        self.priors = Priors(people, teacher, device)
        self.student = student.to(device)
        self.distiller = Distiller(self.student, teacher, branch, settings.weights, seed)
        self.learned = {name: p for name, p in self.student.named_parameters()
                        if p.requires_grad and not name.startswith("Dis_")}  # fmt: skip
        self.average = checkpoint.MovingAverage(self.learned, self.batch * HALF_LIFE)
        self.modules = {"student": self.student}
        self.optimisers = {"generator": self.distiller.generator_step, "critic": self.distiller.critic_step}

    def batch_of(self, items: list[Item], key: list[int]) -> Batch:
        prior, size = self.priors(items), self.settings.config.z_dim
        random = torch.Generator().manual_seed(int(np.random.default_rng(key).integers(2**62)))
        depths = self.people.seen(items).depth  # the renders' own: they surely have a surface
        points = [losses.surface_points(depth[0], self.settings.points, random) for depth in depths]
        z = {b: torch.stack([self.people.z(i, size, b) for i in items]).to(self.device) for b in ("shape", "texture")}
        return Batch(z["shape"], z["texture"], prior, torch.stack(points).clamp(-0.999, 0.999).to(self.device))

    def phases(self, step: int, samples: range) -> Iterator[Phase]:
        d, kept = self.distiller, []
        batch = self.batch_of(self.drawn(step, samples), [self.seed, step, samples.start, 0])
        d.random.manual_seed(int(np.random.default_rng([self.seed, step, samples.start, 1]).integers(2**62)))

        def generator() -> tuple[Tensor, dict[str, float]]:
            loss, terms, fake = d.generator_loss(batch)
            kept.append(fake.detach())
            return loss, {name: float(term.detach()) for name, term in terms.items()}

        def path() -> tuple[Tensor, dict[str, float]]:
            return d.path_loss(batch), {}

        def critic() -> tuple[Tensor, dict[str, float]]:
            return d.critic_loss(batch.prior, kept[0], step % R1_EVERY == 0), {}

        yield Phase("generator", d.generator_step, generator)
        if step % PATH_EVERY == 0:
            yield Phase("path", d.generator_step, path)
        yield Phase("critic", d.critic_step, critic)

    def after(self, step: int) -> dict[str, float]:
        self.average.update(self.batch, (step + 1) * self.batch)
        return super().after(step)

    @cached_property
    def likeness(self) -> Likeness:
        return Likeness(self.people, self.unseen, self.distiller.branch, self.settings.pictures)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The same terms for people whose pictures training does not see, from their codes; the Frechet distance of
        people of random codes."""
        mean = self.distiller.backbone.mapping.w_avg.clone()
        with self.average.in_place():
            self.distiller.random.manual_seed(0)
            terms = self.distiller.generator_loss(self.batch_of(self.test, [0, 0]))[1]
            made = self.volumes(*self.random_codes(len(self.likeness)))
            frechet = self.likeness.distance(self.student, made)
        self.distiller.backbone.mapping.w_avg.copy_(mean)
        return {name: float(term) for name, term in terms.items()} | {"frechet": frechet}

    @torch.no_grad()
    def bounds(self) -> dict[str, float]:
        """Frechet distances of real people whom training sees, and of what the teacher makes of their pictures."""
        if not self.unseen:
            return {}
        learned = self.train[: len(self.likeness)]
        priors = (self.priors([item]) for item in learned)
        made = ((prior.shape_volume[0], prior.texture_volume[0]) for prior in priors)
        found = {"real": self.likeness.of_real(learned)}
        if len(learned) == len(self.likeness):
            found["teacher"] = self.likeness.distance(self.student, made)
        return found

    def random_codes(self, count: int) -> tuple[Float[Tensor, "B Z"], Float[Tensor, "B Z"]]:
        """Of shape and texture, always the same."""
        random, size = torch.Generator().manual_seed(0), self.settings.config.z_dim
        one, two = torch.randn(2, count, size, generator=random).to(self.device)
        return one, two

    @torch.no_grad()
    def volumes(self, z_shape: Float[Tensor, "B Z"], z_texture: Float[Tensor, "B Z"]) -> Iterator[Volumes]:
        """Of people of these codes; without V_t while the shape is learned."""
        student = self.student
        for one, two in zip(z_shape.split(self.batch), z_texture.split(self.batch)):
            picture, shape = student.shape_features(student.backbone_shape.mapping(one))
            if self.distiller.branch == "shape":
                yield from ((volume, None) for volume in shape)
            else:
                yield from zip(shape, student.texture_features(student.backbone_texture.mapping(two), picture)[1])

    def state(self) -> dict[str, Tensor]:
        return (super().state() | checkpoint.with_prefix("average", self.average.values)
                | {"path_mean": self.distiller.path_mean})  # fmt: skip

    def restore(self, state: Mapping[str, Tensor]) -> None:
        super().restore({k: v for k, v in state.items() if k != "path_mean"})
        self.average.load(checkpoint.under_prefix("average", state))
        self.distiller.path_mean = state["path_mean"]

    @torch.no_grad()
    def sheet(self, columns: int = 6) -> np.ndarray:
        """Rows: people that training does not see; the field of the teacher's volumes of them, traced; that of their
        codes; that of random codes, and the same from behind. Shapes by their normals."""
        items, look = (self.unseen or self.train)[:columns], self.distiller.branch
        batch, size = self.batch_of(items, [0, 0]), self.people.size
        made = [zip(batch.prior.shape_volume, batch.prior.texture_volume),
                self.volumes(batch.z_shape, batch.z_texture), self.volumes(*self.random_codes(len(items)))]
        rows = [of_people(self.people.seen(items), look)]
        with self.average.in_place():
            for i, people in enumerate(made):
                angles = (0.0, math.pi) if i == 2 else (0.0,)
                pictures = [of_field(self.student, volumes, look, size, angles).cpu() for volumes in people]
                rows += torch.stack(pictures, 1)
        image = torch.cat([torch.cat(list(row), 2) for row in rows], 1).clamp(0, 1)
        return (image * 255 + 0.5).to(torch.uint8).permute(1, 2, 0).numpy()


@torch.no_grad()
def traced(
    networks: Get3DHuman | Teacher, shape: Float[Tensor, "C h w"], texture: Float[Tensor, "C h w"], size: int
) -> Float[Tensor, "3 R R"]:
    """The front of the field of two volumes, colours on white: what the refine net gets."""
    occupancy = Reader(networks.mlp_shape, shape)
    color = Reader(networks.mlp_texture, torch.cat([shape, texture]))
    view = trace_quickly(lambda p: occupancy(p)[:, 0], size, 0.0, shape)
    return colors.paint(view, color).movedim(2, 0)


class PatchCritic(nn.Module):
    """pix2pixHD's critic (Wang et al. 2018): 3 strided layers, one more, a score per patch. Returns all features."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        sizes = [inputs, width, 2 * width, 4 * width]
        layers = [nn.Sequential(nn.Conv2d(inputs, width, 4, 2, 2), nn.LeakyReLU(0.2))]
        for a, b, stride in ((sizes[1], sizes[2], 2), (sizes[2], sizes[3], 2), (sizes[3], 8 * width, 1)):
            layers.append(nn.Sequential(nn.Conv2d(a, b, 4, stride, 2), nn.InstanceNorm2d(b), nn.LeakyReLU(0.2)))
        self.layers = nn.ModuleList([*layers, nn.Conv2d(8 * width, 1, 4, 1, 2)])

    def forward(self, x: Tensor) -> list[Tensor]:
        out = []
        for layer in self.layers:
            x = layer(x)
            out.append(x)
        return out


class RefineStage(_Stage):
    """The refine net on what the teacher makes of people's pictures, which is what generators learn to make."""

    name = "refine"

    def __init__(
        self, people: People, settings: Settings, teacher: Teacher, seed: int, device: torch.device, rank: int = 0
    ) -> None:
        super().__init__(people, settings, seed, device, rank)
        self.priors = Priors(people, teacher, device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.refine = RefineNet(self.settings.config.refine_width).to(device).train()
            self.critics = nn.ModuleList(PatchCritic(6, settings.critic_width) for _ in range(2)).to(device)
        self.modules = {"refine": self.refine, "critics": self.critics}
        self.optimisers = {
            "refine": torch.optim.Adam(self.refine.parameters(), settings.rate_refine, BETAS),
            "critics": torch.optim.Adam(self.critics.parameters(), settings.rate_refine, BETAS),
        }
        self._drawn: dict[str, Tensor] = {}
        self._filters = gabor().to(device)

    @torch.no_grad()
    def pairs(self, items: list[Item]) -> tuple[Float[Tensor, "B 3 R R"], Float[Tensor, "B 3 R R"]]:
        """Pictures traced from the field, and the people's own; 0..1 on white."""
        for item in items:
            if item.name not in self._drawn:
                prior = self.priors([item])
                shape, texture = prior.shape_volume[0], prior.texture_volume[0]
                self._drawn[item.name] = traced(self.priors.teacher, shape, texture, self.people.size).cpu()
        seen = self.people.seen(items)
        real = torch.where(seen.mask, (seen.picture + 1) / 2, 1.0)
        return torch.stack([self._drawn[i.name] for i in items]).to(self.device), real.to(self.device)

    def judged(self, drawn: Tensor, picture: Tensor) -> list[list[Tensor]]:
        both = torch.cat([drawn, picture], 1) * 2 - 1
        return [critic(functional.avg_pool2d(both, 1 << i)) for i, critic in enumerate(self.critics)]

    def moduli(self, picture: Tensor) -> list[Tensor]:
        """|picture * wavelet| on three octaves: where edges are, and of what kind."""
        out = []
        for _ in range(3):
            out.append(modulus(picture, self._filters))
            picture = shrink(picture)
        return out

    def terms(self, drawn: Tensor, real: Tensor, made: Tensor) -> dict[str, Tensor]:
        fake, true = self.judged(drawn, made), self.judged(drawn, real)
        matching = [(a - b.detach()).abs().mean() for x, y in zip(fake, true) for a, b in zip(x[:-1], y[:-1])]
        moduli = [(a - b).abs().mean() for a, b in zip(self.moduli(made), self.moduli(real))]
        return {
            "fool": torch.stack([(1 - scores[-1]).square().mean() for scores in fake]).mean(),
            "matching": torch.stack(matching).sum() / len(fake), "moduli": torch.stack(moduli).sum(),
            "difference": (made - real).abs().mean(),
        }  # fmt: skip

    def phases(self, step: int, samples: range) -> Iterator[Phase]:
        drawn, real = self.pairs(self.drawn(step, samples))
        kept: list[Tensor] = []

        def generator() -> tuple[Tensor, dict[str, float]]:
            made = self.refine(drawn)
            kept.append(made.detach())
            terms = self.terms(drawn, real, made)
            loss = terms["fool"] + MATCHING * (terms["matching"] + terms["moduli"]) + terms["difference"]
            return loss, {name: float(term.detach()) for name, term in terms.items()}

        def critic() -> tuple[Tensor, dict[str, float]]:
            true, fake = self.judged(drawn, real), self.judged(drawn, kept[0])
            parts = [(1 - t[-1]).square().mean() + f[-1].square().mean() for t, f in zip(true, fake)]
            return torch.stack(parts).mean() / 2, {}

        yield Phase("refine", self.optimisers["refine"], generator, clip=10.0)
        yield Phase("critic", self.optimisers["critics"], critic, clip=10.0)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """With the statistics of each picture alone, as the family runs it; "before": what it gets, unrefined."""
        drawn, real = self.pairs(self.test)
        terms = self.terms(drawn, real, self._alone(drawn))
        return {name: float(term) for name, term in terms.items()} | {"before": float((drawn - real).abs().mean())}

    def _alone(self, drawn: Float[Tensor, "B 3 R R"]) -> Float[Tensor, "B 3 R R"]:
        self.refine.eval()
        made = torch.cat([self.refine(one) for one in drawn.split(1)])
        self.refine.train()
        return made

    @torch.no_grad()
    def sheet(self, columns: int = 6) -> np.ndarray:
        """Rows: traced, refined, the picture; of people that training does not see."""
        drawn, real = self.pairs((self.test or self.train)[:columns])
        image = torch.cat([torch.cat(list(row), 2) for row in (drawn, self._alone(drawn), real)], 1).clamp(0, 1)
        return (image * 255 + 0.5).to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def finished(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The generators that the stage of a branch, whose `state` this is, leaves behind: the averages."""
    return checkpoint.under_prefix("student", state) | checkpoint.under_prefix("average", state)


@torch.no_grad()
def settle(student: Get3DHuman) -> None:
    """The mean codes that go with the final mappings: moving averages of a short run still remember its start."""
    for branch in (student.backbone_shape, student.backbone_texture):
        mapping = branch.mapping
        z = torch.randn(10_000, mapping.fc0.weight.shape[1], generator=torch.Generator().manual_seed(0))
        mapping.w_avg.copy_(mapping(z.to(mapping.w_avg))[:, 0].double().mean(0))


def facts_of(settings: Settings, size: str, seed: int, people: People, name: str) -> dict[str, Any]:
    """What a run's folder remembers."""
    return {"stage": name, "size": size, "seed": seed, "resolution": people.size, "items": len(people.items),
            "batch": settings.batch}  # fmt: skip
