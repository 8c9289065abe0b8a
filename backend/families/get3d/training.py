# SPDX-License-Identifier: GPL-3.0-or-later
"""GET3D's training (Gao et al. 2022, sec. 3.2 and appendix B) from a folder of renders, as a `loop.Stage`.

    z -> w -> fields -> mesh --rasterise--> points --texture field--> colour, silhouette --> two critics

    generator  softplus(-D_rgb) + softplus(-D_mask) + 0.01 cross entropy of signs + mean |sdf| of shapes without surface
               (and with FlexiCubes 0.5 L_dev + 0.1 mean squared weight)
    critics    softplus(D(fake)) + softplus(-D(real)) each, and every 16 steps 16 gamma/2 |gradient at reals|^2

What is ours: fakes are seen by cameras of the folder; one set of fakes serves both sides of a step; the colour outside
of shapes, a bias, starts at the reals' background; the reals' masks are their coverage, as the fakes' are antialiased;
a step with a gradient that is not finite is given up (`loop`) instead of having those numbers replaced.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from backend.evaluation.features import SMALLEST, Target, enlarged
from backend.families.base import seeded_normal
from backend.families.get3d import surfaces
from backend.families.get3d.config import Config
from backend.families.get3d.discriminator import DualDiscriminator
from backend.families.get3d.networks import Decoded, Generator, mixed_rows
from backend.families.get3d.surfaces import FAR, NEAR, Shapes, Surfacer
from backend.protocol import PopulaceError
from backend.render.camera import Camera, perspective
from backend.render.gaussian_light import random_light
from backend.training import checkpoint
from backend.training.discriminators import discriminator_loss, generator_loss, r1_penalty
from backend.training.loop import Phase
from backend.training.renders import Renders
from backend.training.renders_blender import looking_at

MEAN_DECAY = 0.998  # of the mean w
AIMED = 1e-3  # units by which a camera may miss the origin
_MEASURED_AT_ONCE = 8


@dataclass(frozen=True)
class Settings:
    """One size of training. The defaults are those of the published runs at 1024 pixels; `gamma` is the cars'."""

    config: Config = field(default_factory=Config)
    batch: int = 32
    grid: int = 90  # cells along a side of the lattice
    base: int = 32768  # channels of the critics, as of the generator
    limit: int = 512
    gamma: float = 40.0
    gamma_mask: float | None = None  # None: the same
    rate: float = 0.002
    r1_every: int = 16
    mixing: float = 0.9  # share of shapes whose rows come of two codes
    measured: int = 512  # pictures of a Frechet distance
    measure_every: int = 2000  # steps

    @property
    def half_life(self) -> float:
        """Of the moving average, in samples: 10 000 at a batch of 32."""
        return self.batch * 10_000 / 32


SIZES = {
    "tiny": Settings(Config.tiny(resolution=16, base=256, limit=16, features=8, color_features=8, tet_res=8), 4, 8,
                     base=256, limit=16, gamma=1.0, measured=16, measure_every=4),
    "small": Settings(Config(z_dim=64, w_dim=64, mapping_layers=4, resolution=32, base=1024, limit=64, features=16,
                             color_features=16, tet_res=24), 4, 24, base=512, limit=64, gamma=1.0,
                      measured=256, measure_every=250),
    "base": Settings(),
}  # fmt: skip


@dataclass(frozen=True)
class Fakes:
    """What the generator made of one step's samples."""

    pictures: Float[Tensor, "B 4 R R"]  # colour in -1..1, antialiased coverage in 0..1
    cameras: Float[Tensor, "B 2"]
    shapes: Shapes


class Get3dStage:
    """See `loop.Stage`."""

    name = "get3d"

    def __init__(
        self, renders: Renders, settings: Settings, seed: int = 0, device: torch.device | None = None, rank: int = 0
    ) -> None:
        """`rank` 0 measures. Raises PopulaceError("invalid_request") if the pictures are not GET3D's."""
        self.settings, self.seed, self.rank = settings, seed, rank
        self.batch, self.device = settings.batch, device or torch.device("cpu")
        self.size = renders.size
        if renders.lens.fov_y is None:
            raise PopulaceError("invalid_request", f"The renders in {renders.folder} are orthographic.",
                                "GET3D wants perspective ones: populace renders --for get3d.")  # fmt: skip
        if renders.size & (renders.size - 1):
            raise PopulaceError("invalid_request", f"Pictures of {renders.size} pixels cannot be halved down to 4.",
                                "Render 32, 64, ... 1024 pixels.")  # fmt: skip
        for view in renders.views:
            _check_aim(view.file(), view.c2w)
        self.pool, self.reference = renders.part(False), renders.part(True)
        if not self.pool.items or not self.reference.items:
            raise PopulaceError("invalid_request", f"{len(renders.items)} items are too few: one in eight, by name, is "
                                "kept to measure with.", "Render more, some dozens at least.")  # fmt: skip
        self.projection = perspective(renders.lens.fov_y, 1.0, NEAR, FAR).to(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.generator = Generator(settings.config)
            self.critics = DualDiscriminator(renders.size, settings.base, settings.limit, settings.config.clamp)
        with torch.no_grad():
            self.generator.synthesis.to_rgb.bias.fill_(-1.0)
        self.generator.to(self.device)
        self.critics.to(self.device)
        self.surfacer = Surfacer(settings.config, settings.grid, self.device)
        self.learned = dict(self.generator.named_parameters())
        self.average = checkpoint.MovingAverage(self.learned, settings.half_life)
        self.generator_optimiser = _adam(self.generator, settings.rate, 4)
        self.critic_optimiser = _adam(self.critics, settings.rate, settings.r1_every)
        self._measure: Target | None = None

    # --- what is seen ---

    def codes(self, key: Sequence[int]) -> tuple[Float[Tensor, "1 Z"], Float[Tensor, "1 Z"]]:
        """z of shape and texture, a function of the key."""
        person = int(np.random.default_rng([*key]).integers(2**53))
        shape = (1, self.settings.config.z_dim)
        geo, tex = (torch.from_numpy(seeded_normal(person, n, shape)).to(self.device) for n in ("shape", "tex"))
        return geo, tex

    def rows(self, step: int, samples: range) -> tuple[Float[Tensor, "B L W"], Float[Tensor, "B M W"]]:
        """w of a step's samples, styles mixed in most of them."""
        z = [self.codes([self.seed, step, i, 0]) for i in samples]
        other = [self.codes([self.seed, step, i, 1]) for i in samples]
        out = []
        for k, mapping in enumerate((self.generator.mapping_geo, self.generator.mapping)):
            ws, more = mapping(torch.cat([a[k] for a in z])), mapping(torch.cat([a[k] for a in other]))
            mixed = []
            for i, one, two in zip(samples, ws, more, strict=True):
                rng = np.random.default_rng([self.seed, step, i, 2, k])
                cut = int(rng.integers(1, len(one))) if rng.random() < self.settings.mixing else len(one)
                mixed.append(mixed_rows(one[None], two[None], cut))
            out.append(torch.cat(mixed))
        return out[0], out[1]

    def see(
        self, decoded: Decoded, c2w: Float[Tensor, "B 4 4"], keys: Sequence[Sequence[int]]
    ) -> tuple[Float[Tensor, "B 4 R R"], Shapes]:
        """Pictures of the shapes by one camera each, and their meshes. With materials the light is a function of the
        keys."""
        shapes = self.surfacer(decoded)
        mvp = Camera(c2w, self.projection.expand(len(c2w), 4, 4)).mvp
        lights = [random_light([*key]) for key in keys] if self.settings.config.material else []
        colors, masks = surfaces.see(decoded, shapes, mvp[:, None], self.size, c2w[:, None, :3, 3], lights)
        return torch.cat([colors[:, 0], masks[:, 0]], 1), shapes

    def fakes(self, step: int, samples: range) -> Fakes:
        rngs = [np.random.default_rng([self.seed, step, i, 3]) for i in samples]
        c2w = torch.from_numpy(np.stack([self.pool.views[rng.integers(len(self.pool.views))].c2w for rng in rngs]))
        geo, tex = self.rows(step, samples)
        keys = [[self.seed, step, i, 5] for i in samples]
        pictures, shapes = self.see(self.generator.synthesis(geo, tex), c2w.to(self.device), keys)
        return Fakes(pictures, angles(c2w).to(self.device), shapes)

    def reals(self, step: int, samples: range) -> tuple[Float[Tensor, "B 4 R R"], Float[Tensor, "B 2"]]:
        rngs = [np.random.default_rng([self.seed, step, i, 4]) for i in samples]
        views = [self.pool.views[rng.integers(len(self.pool.views))] for rng in rngs]
        pictures = torch.stack([as_seen(self.pool.rgba(view)) for view in views])
        return pictures.to(self.device), angles(torch.from_numpy(np.stack([v.c2w for v in views]))).to(self.device)

    # --- the game ---

    def before(self) -> dict[str, float]:
        return {"frechet": self.frechet()}

    def phases(self, step: int, samples: range) -> Iterator[Phase]:
        s, kept = self.settings, []

        def generator() -> tuple[Tensor, dict[str, float]]:
            fakes = self.fakes(step, samples)
            kept.append(fakes)
            rgb, mask = self._scores(fakes.pictures, fakes.cameras)
            game = generator_loss(rgb[:, 0]) + generator_loss(mask[:, 0])
            shapes = fakes.shapes
            figures = {"fool": float(game.detach()), "cross": float(shapes.cross.detach()),
                       "empty": float(shapes.empty.detach())}  # fmt: skip
            return game + shapes.regulariser(), figures

        def critic() -> tuple[Tensor, dict[str, float]]:
            lazily = step % s.r1_every == 0
            (fakes,) = kept
            reals, cameras = self.reals(step, samples)
            reals.requires_grad_(lazily)
            of_fakes = self._scores(fakes.pictures.detach(), fakes.cameras)
            of_reals = self._scores(reals, cameras, exact=lazily)
            gammas = (s.gamma, s.gamma if s.gamma_mask is None else s.gamma_mask)
            loss, figures = torch.zeros((), device=self.device), {}
            for name, real, fake, gamma in zip(("rgb", "mask"), of_reals, of_fakes, gammas, strict=True):
                loss = loss + discriminator_loss(real[:, 0], fake[:, 0])
                figures |= {f"{name}_real": float(real.detach().mean()), f"{name}_fake": float(fake.detach().mean())}
                if lazily:
                    penalty = r1_penalty(real[:, 0], reals)
                    loss = loss + s.r1_every * gamma / 2 * penalty
                    figures[f"{name}_r1"] = float(penalty.detach())
            return loss, figures

        self.critics.requires_grad_(False)
        yield Phase("generator", self.generator_optimiser, generator)
        self.critics.requires_grad_(True)
        yield Phase("critic", self.critic_optimiser, critic)

    def _scores(self, pictures: Tensor, cameras: Tensor, exact: bool = False) -> tuple[Tensor, Tensor]:
        """bf16 on CUDA, unless a gradient of the gradient is wanted."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda" and not exact):
            rgb, mask = self.critics(pictures, cameras)
        return rgb.float(), mask.float()

    @torch.no_grad()
    def after(self, step: int) -> dict[str, float]:
        z = [self.codes([self.seed, step, i, 0]) for i in range(self.batch)]  # of all processes
        for k, mapping in enumerate((self.generator.mapping_geo, self.generator.mapping)):
            mapping.w_avg.lerp_(mapping(torch.cat([a[k] for a in z]))[:, 0].mean(0), 1 - MEAN_DECAY)
        self.average.update(self.batch, (step + 1) * self.batch)
        if self.rank == 0 and (step + 1) % self.settings.measure_every == 0:
            return {"frechet": self.frechet()}
        return {}

    # --- how good it is ---

    @torch.no_grad()
    def show(self, keys: Sequence[Sequence[int]], c2w: Float[Tensor, "N 4 4"]) -> Float[Tensor, "N 4 R R"]:
        """The averaged weights' shapes of these keys, styles not mixed, full variety."""
        out = []
        with self.average.in_place():
            for start in range(0, len(keys), _MEASURED_AT_ONCE):
                part = slice(start, start + _MEASURED_AT_ONCE)
                z = [self.codes(key) for key in keys[part]]
                decoded = self.generator(torch.cat([a for a, _ in z]), torch.cat([b for _, b in z]))
                out.append(self.see(decoded, c2w[part].to(self.device), keys[part])[0].cpu())
        return torch.cat(out)

    @torch.no_grad()
    def frechet(self) -> float:
        """Frechet distance between pictures of made shapes and those of items that training does not see, by the same
        cameras, in the features of `evaluation.features`: compare it with itself only."""
        count = min(self.settings.measured, len(self.reference.views))
        chosen = np.random.default_rng(0).permutation(len(self.reference.views))[:count]
        views = [self.reference.views[i] for i in chosen]
        if self._measure is None:
            self._measure = Target(on_white(torch.stack([as_seen(self.reference.rgba(v)) for v in views])))
        made = self.show([[0, i, 9] for i in range(count)], torch.from_numpy(np.stack([v.c2w for v in views])))
        return self._measure.distance(on_white(made))

    def sheet(self, columns: int = 8) -> np.ndarray:
        """Eight shapes from three sides, and below them real ones."""
        radius = float(np.linalg.norm(self.pool.views[0].c2w[:3, 3]))
        keys, rows = [[0, i, 10] for i in range(columns)], []
        for azimuth in (0.0, math.pi / 2, math.pi):
            c2w = torch.from_numpy(looking_at(np.zeros(3), azimuth, 0.15, radius)).float().expand(columns, 4, 4)
            rows.append(on_white(self.show(keys, c2w), self.size))
        views = self.pool.views[:: max(1, len(self.pool.views) // columns)][:columns]
        reals = on_white(torch.stack([as_seen(self.pool.rgba(view)) for view in views]), self.size)
        rows.append(functional.pad(reals, (0, 0, 0, 0, 0, 0, 0, columns - len(reals)), value=1.0))
        image = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
        return (image * 255 + 0.5).to(torch.uint8).permute(1, 2, 0).numpy()

    # --- what is kept ---

    def state(self) -> dict[str, Tensor]:
        return (
            checkpoint.with_prefix("generator", self.generator.state_dict())
            | checkpoint.with_prefix("average", self.average.values)
            | checkpoint.with_prefix("critics", self.critics.state_dict())
            | checkpoint.with_prefix("generator_adam", checkpoint.pack_optimiser(self.generator_optimiser))
            | checkpoint.with_prefix("critic_adam", checkpoint.pack_optimiser(self.critic_optimiser))
        )

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.generator.load_state_dict(checkpoint.under_prefix("generator", state))
        self.average.load(checkpoint.under_prefix("average", state))
        self.critics.load_state_dict(checkpoint.under_prefix("critics", state))
        checkpoint.unpack_optimiser(self.generator_optimiser, checkpoint.under_prefix("generator_adam", state))
        checkpoint.unpack_optimiser(self.critic_optimiser, checkpoint.under_prefix("critic_adam", state))

    @torch.no_grad()
    def averaged(self) -> Generator:
        """The generator to keep: averaged weights, and the mean codes that go with them."""
        with torch.device("meta"):
            made = Generator(self.settings.config)
        state = {k: v.detach().cpu().clone() for k, v in self.generator.state_dict().items()}
        made.load_state_dict(state | {k: v.cpu().clone() for k, v in self.average.values.items()}, assign=True)
        z = torch.from_numpy(seeded_normal(0, "w_avg", (10_000, self.settings.config.z_dim)))
        for mapping in (made.mapping, made.mapping_geo):
            mapping.w_avg.copy_(mapping(z)[:, 0].double().mean(0))
        return made


def _check_aim(name: str, c2w: Float[np.ndarray, "4 4"]) -> None:
    eye, back = c2w[:3, 3], c2w[:3, 2]
    if np.linalg.norm(np.cross(eye, back)) > AIMED * max(1.0, float(np.linalg.norm(eye))) or eye @ back <= 0:
        raise PopulaceError(
            "invalid_request", f"The camera of {name} does not look at the origin.",
            "GET3D's critics know a camera by two angles: put the object's middle and every camera's aim there."
        )  # fmt: skip


def angles(c2w: Float[Tensor, "B 4 4"]) -> Float[Tensor, "B 2"]:
    """(azimuth, polar angle) in radians as GET3D counts them: position = r (sin t cos c, cos t, sin t sin c) with
    c = -azimuth - pi/2; azimuth in 0..2 pi."""
    x, y, z = functional.normalize(c2w[:, :3, 3], dim=1).unbind(1)
    azimuth = (-torch.atan2(z, x) - math.pi / 2) % (2 * math.pi)
    return torch.stack([azimuth, torch.acos(y.clamp(-1, 1))], 1)


def as_seen(rgba: Int[np.ndarray, "R R 4"]) -> Float[Tensor, "4 R R"]:
    """A real picture as critics see it: colour in -1..1 where it is more than half covered, -1 elsewhere; coverage."""
    image = torch.from_numpy(rgba).permute(2, 0, 1).float()
    colors = torch.where(image[3] > 127.5, image[:3] / 127.5 - 1, -1.0)
    return torch.cat([colors, image[3:] / 255])


def on_white(pictures: Float[Tensor, "N 4 R R"], least: int = SMALLEST) -> Float[Tensor, "N 3 S S"]:
    """In 0..1, enlarged to `least` pixels if they are smaller."""
    mask = pictures[:, 3:].clamp(0, 1)
    return enlarged((pictures[:, :3].clamp(-1, 1) + 1) / 2 * mask + 1 - mask, least)


def _adam(module: nn.Module, rate: float, every: int) -> torch.optim.Adam:
    """With the correction for a regulariser that only runs now and then (StyleGAN2, appendix B)."""
    share = every / (every + 1)
    return torch.optim.Adam(module.parameters(), rate * share, (0.0, 0.99**share), 1e-8)


def at_size(name: str, **changes: object) -> Settings:
    """The settings of a size by name, some of them changed."""
    return replace(SIZES[name], **changes)  # type: ignore[arg-type]
