# SPDX-License-Identifier: GPL-3.0-or-later
"""Training of the photo encoder on the family's own people: figures first, then photos of them without end.

What is asked for is what is known: rotations, places of joints, codes. No photo of a real person is needed. A sample's
randomness comes from (seed, index) alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from backend import poses
from backend.families.people.config import BROW, CLOTH, IRIS, LOOSE, OWN, PARTS, PLAIN, SCALE, SKIN, THICK, TRIM
from backend.families.people.encoder import JOINTS, SIZE, PhotoEncoder, joint_rotations, to_rotation, to_six
from backend.families.people.model import READER, PeopleModel
from backend.photo.posing import forward_kinematics
from backend.training.checkpoint import MovingAverage, pack_optimiser, under_prefix, unpack_optimiser, with_prefix
from backend.training.loop import Phase
from backend.training.photos import (
    CALM,
    Figure,
    make_figure,
    random_light,
    random_person,
    random_rotations,
    random_view,
    stand,
    take,
)

FIRST = 1 << 30  # seed of the first figure: nobody's person is trained on by chance


def make_figures(model: PeopleModel, folder: Path, count: int, first: int = FIRST) -> list[Path]:
    """Figure files in `folder`, those that are missing made now (half a second each)."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:06d}.safetensors" for i in range(count)]
    for i, path in enumerate(paths):
        if not path.exists():
            part = path.with_suffix(".part")
            make_figure(model, random_person(model, first + i)).save(part)
            part.replace(path)
    return paths


class Photos(Dataset):
    """Sample i: a random figure in a random pose under a random light, with all that the encoder should say."""

    def __init__(self, figures: list[Path], seed: int) -> None:
        self.figures, self.seed = figures, seed

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.seed, index])
        figure = Figure.load(self.figures[int(rng.integers(len(self.figures)))])
        rotations = random_rotations(rng, figure.bones, CALM if rng.random() < 0.6 else 1.0)
        vertices = stand(figure, rotations)
        framed, floor = vertices, -1.0
        if rng.random() < 0.08:  # cut off by the lower edge of the photo
            floor = vertices[:, 1].min() + rng.uniform(0.1, 0.5) * np.ptp(vertices[:, 1])
            framed = vertices[vertices[:, 1] > floor]
        view = random_view(rng, framed)
        image = take(figure, rotations, view, random_light(rng), SIZE, 2, vertices)
        if framed is not vertices:
            camera = (framed - view.c2w[:3, 3]) @ view.c2w[:3, :3]
            low = (camera[:, 1] / -camera[:, 2]).min() / math.tan(view.fov / 2)
            image[round((1 - low) / 2 * SIZE) :] = 0
        square = _worn_matte(rng, torch.from_numpy(image).movedim(2, 0))
        names = list(figure.bones.names)
        pelvis = figure.bones.heads[names.index("pelvis")]
        turn = torch.from_numpy(view.c2w[:3, :3].T).float()
        shift = turn @ torch.from_numpy(pelvis - view.c2w[:3, 3]).float()
        across = -2 * shift[2] * math.tan(view.fov / 2)
        place = torch.stack([2 * shift[0] / across, 2 * shift[1] / across, across.log()])
        matrices = torch.from_numpy(poses.to_matrices(rotations)).float()
        codes = {name: torch.from_numpy(code[0]) for name, code in figure.codes.items()}
        for part in PARTS:
            if f"{part}/shape" not in codes:
                codes |= {f"{part}/{kind}": torch.zeros(32) for kind in ("shape", "tex")}
        return {"square": (square * 255).to(torch.uint8), "fov": torch.tensor([view.fov]), "turn": turn,
                "place": place, "rotations": matrices, "heads": torch.from_numpy(figure.bones.heads),
                **codes}  # fmt: skip


def _worn_matte(rng: np.random.Generator, image: Float[Tensor, "4 S S"]) -> Float[Tensor, "4 S S"]:
    """Premultiplied, as sharp as photos are, with a matte as good as mattes are."""
    color, alpha = image[:3] * image[3:], image[3:]
    both = torch.cat([color, alpha])[None]
    if rng.random() < 0.5:
        scale = rng.uniform(0.45, 1.0)
        both = F.interpolate(F.interpolate(both, scale_factor=scale, mode="area"), both.shape[2:], mode="bilinear")
    grow = rng.random()
    if grow < 0.15:  # a rim of background
        wide = F.max_pool2d(both[:, 3:], 3, 1, 1)
        rim = torch.from_numpy(rng.uniform(0, 1, 3)).float()[None, :, None, None]
        both = torch.cat([both[:, :3] + (wide - both[:, 3:]) * rim, wide], 1)
    elif grow < 0.3:  # a rim that is lost
        narrow = -F.max_pool2d(-both[:, 3:], 3, 1, 1)
        both = torch.cat([both[:, :3] * narrow / both[:, 3:].clamp(min=1e-3), narrow], 1)
    gain = torch.from_numpy(rng.normal(1, 0.04, 3)).float()[None, :, None, None]
    return torch.cat([both[:, :3] * gain, both[:, 3:]], 1)[0].clamp(0, 1)


@dataclass(frozen=True)
class Settings:
    batch: int = 32
    rate: float = 1.2e-3
    steps: int = 3000  # over which the rate falls to nothing
    half_life: float = 3000  # of the average that is exported, in samples
    workers: int = 1


class EncoderStage:
    """See `loop.Stage`."""

    def __init__(self, model: PeopleModel, figures: list[Path], settings: Settings, seed: int) -> None:
        self.name, self.batch, self.settings, self.seed = "encoder", settings.batch, settings, seed
        torch.manual_seed(seed)
        self.model, self.device = model, model.device
        self.network = PhotoEncoder(model.facts).to(device=self.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.optimiser = torch.optim.AdamW(self.network.parameters(), settings.rate, weight_decay=0.02)
        self.average = MovingAverage(dict(self.network.named_parameters()), settings.half_life)
        self.photos = Photos(figures, seed)
        body: Any = model.networks.body_shape
        flat = body.basis[:, : model.facts["body_anchors"]].flatten(1)
        self.energy = flat @ flat.T / model.facts["body_anchors"]  # w' G w: mean squared displacement, m^2
        bones = model.facts["bones"]
        self.at = torch.tensor([bones.index(name) for name in JOINTS], device=self.device)
        self.pelvis = bones.index("pelvis")
        self._queue: tuple[int, Iterator[dict[str, Tensor]]] | None = None

    def before(self) -> dict[str, float]:
        return {}

    def phases(self, step: int, samples: range) -> Iterator[Phase]:
        share = 0.5 * (1 + math.cos(math.pi * min(step / self.settings.steps, 1)))
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.rate * (0.01 + 0.99 * share) * min(1, (step + 1) / 100)
        batch = {k: v.to(self.device) for k, v in self._next(step, samples).items()}
        self.network.train()
        yield Phase("encoder", self.optimiser, lambda: self.loss(batch), clip=2.0)

    def _next(self, step: int, samples: range) -> dict[str, Tensor]:
        """This step's photos, made ahead by other processes."""
        if self._queue is None or self._queue[0] != step:
            order = _Order(step, self.batch, samples)
            self._queue = step, iter(DataLoader(self.photos, batch_sampler=order, num_workers=self.settings.workers,
                                                worker_init_fn=_one_thread))  # fmt: skip
        batch = next(self._queue[1])
        self._queue = step + 1, self._queue[1]
        return batch

    def loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        square = (batch["square"].float() / 255).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16):  # the photos are noisier than its rounding
            said = self.network(square, batch["fov"])
        terms = self.terms({k: v.float() for k, v in said.items()}, batch)
        return sum(terms.values(), start=torch.zeros((), device=self.device)), {
            k: float(v.detach()) for k, v in terms.items()}  # fmt: skip

    def terms(self, said: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All losses, weighted so that each is of the order of one at first."""
        turn, joints = to_rotation(said["turn"]), joint_rotations(said["joints"])
        full = batch["rotations"].clone()
        full[:, self.at] = joints
        parents = self.model.parents
        _, places = forward_kinematics(full, batch["heads"], parents)
        _, wanted = forward_kinematics(batch["rotations"], batch["heads"], parents)
        away = [((p - p[:, self.pelvis, None]) @ r.transpose(1, 2))[:, self.at]
                for p, r in ((places, turn), (wanted, batch["turn"]))]  # fmt: skip
        out = {
            "turn": 2 * F.mse_loss(to_six(turn), to_six(batch["turn"])),
            "joints": 10 * F.mse_loss(joints, batch["rotations"][:, self.at]),
            "places": 6 * (away[0] - away[1]).norm(dim=2).mean(),
            "place": 4 * F.smooth_l1_loss(said["place"], batch["place"], beta=0.05),
        }
        delta = said["body/shape"] - batch["body/shape"]
        out["shape"] = 10 * (torch.einsum("bi,ij,bj->b", delta, self.energy, delta) + 1e-6).sqrt().mean()
        out["likely"] = 0.1 * F.mse_loss(said["body/shape"], batch["body/shape"])
        tex = batch["body/tex"]
        out["skin"] = 4 * (said["body/palette"] - tex[:, :6]).abs().mean()
        for name, at in (("skin", SKIN), ("brow", BROW), ("iris", IRIS)):
            logits = said[f"body/{name}"]
            out["skin"] = out["skin"] + 0.05 * F.cross_entropy(logits, tex[:, at][:, : logits.shape[1]].argmax(1))
        for part in PARTS:
            out[part] = self._part_terms(part, said, batch)
        return out

    def _part_terms(self, part: str, said: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        shape, tex = batch[f"{part}/shape"], batch[f"{part}/tex"]
        worn = (shape[:, -1] > 0).float()
        items = shape[:, : said[f"{part}/item"].shape[1]].argmax(1)
        looks = tex[:, OWN : PLAIN + 1].argmax(1)

        def mean(values: Tensor, share: Tensor = worn) -> Tensor:
            return (values * share).sum() / len(share)

        total = 0.3 * F.binary_cross_entropy_with_logits(said[f"{part}/worn"][:, 0], worn)
        total = total + 0.2 * mean(F.cross_entropy(said[f"{part}/item"], items, reduction="none"))
        total = total + 0.1 * mean(F.cross_entropy(said[f"{part}/looks"], looks, reduction="none"))
        total = total + 2 * mean((said[f"{part}/palette"][:, :3] - tex[:, :3]).abs().mean(1))
        total = total + 0.5 * mean((said[f"{part}/palette"][:, 3:] - tex[:, 3:6]).abs().mean(1))
        total = total + 0.05 * mean((said[f"{part}/scale"][:, 0] - tex[:, SCALE]) ** 2)
        if part in CLOTH:
            cut = torch.cat([shape[:, TRIM], shape[:, [THICK, LOOSE]]], 1)
            is_cut = worn * (items == said[f"{part}/item"].shape[1] - 1)
            total = total + 0.3 * mean((said[f"{part}/cut"] - cut).abs().mean(1), is_cut)
        return total

    def after(self, step: int) -> dict[str, float]:
        self.average.update(self.batch, (step + 1) * self.batch)
        return {}

    def state(self) -> dict[str, Tensor]:
        return {**with_prefix("network", self.network.state_dict()), **with_prefix("average", self.average.values),
                **with_prefix("optimiser", pack_optimiser(self.optimiser))}  # fmt: skip

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.network.load_state_dict(under_prefix("network", state))
        self.average.load(under_prefix("average", state))
        unpack_optimiser(self.optimiser, under_prefix("optimiser", state))

    def sheet(self) -> np.ndarray | None:
        return None

    def export(self, path: Path) -> None:
        """Write what `people.model` loads: averaged parameters, running statistics, half precision."""
        from safetensors.torch import save_file

        with self.average.in_place():
            state = {f"{READER}{k}": v.detach().cpu().clone() for k, v in self.network.state_dict().items()}
        half = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in state.items()}
        part = path.with_suffix(".part")
        save_file(dict(sorted(half.items())), part, {"encoder": self.model.weights_sha256 or ""})
        part.replace(path)


class _Order:
    """Indices of the batches from a step on."""

    def __init__(self, step: int, batch: int, samples: range) -> None:
        self.step, self.batch, self.samples = step, batch, samples

    def __iter__(self) -> Iterator[list[int]]:
        step = self.step
        while True:
            yield [step * self.batch + i for i in self.samples]
            step += 1


def _one_thread(_: Any) -> None:
    torch.set_num_threads(1)
