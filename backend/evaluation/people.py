# SPDX-License-Identifier: GPL-3.0-or-later
"""`populace eval`: a seed family against sampled people of the test split, which training never saw.

Who is compared (all seeds are in the report): generated people of seeds 0, 1, 2, ...; test people, the first seeds of
the test split; training people, the first seeds of the training split. Training against test people, two sets of the
same distribution, gives every figure its `floor`: what a perfect generator would get.

Portraits are made in turn, one generated, one test, one training person, so that a time box leaves equal sets; those in
the cache folder are taken from there, so a killed run goes on where it was.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from backend import __version__
from backend.evaluation import features, images, lightfield, measure, metrics, parts, shapes
from backend.evaluation.command import NEED_KIT, SECTIONS
from backend.evaluation.portraits import GRID, VIEWS, Portrait, cached, generated, stack
from backend.evaluation.rebuild import Reality, rebuild
from backend.evaluation.reconstruct import Steps
from backend.families.base import FamilyInfo, FamilyModel, Latents, Step, no_step
from backend.protocol import PopulaceError

Array = np.ndarray[Any, Any]
PORTRAITS = {"renders", "shapes", "novelty", "health"}  # sections that need many people
BANK = 64  # samples that reconstructions start from, of seeds a million on
SHARE = 0.6  # of the time box that goes to portraits
HERE = Path(__file__).parent


class Reference(Protocol):
    """Where people to compare with come from."""

    def seeds(self, split: str, count: int) -> Sequence[int]: ...

    def portrait(self, seed: int) -> Portrait: ...

    def reality(self, seed: int) -> Reality:
        """Everything that a reconstruction of this person is told and measured by."""
        ...


@dataclass(frozen=True)
class Options:
    """What to measure, on how many."""

    count: int = 500  # people in each set
    only: Sequence[str] = SECTIONS
    minutes: float = math.inf  # time box
    cache: Path | None = None
    truncation_psi: float = 1.0
    seed: int = 0  # of the first generated person
    grid: int = GRID
    swaps: int = 25  # pairs
    few: int = 25  # people for heights, labels and sliders; a third of them is measured
    objects: int = 100  # people taken apart
    reconstructions: int = 20
    steps: Steps = field(default_factory=Steps)
    inception: Path | None = None


@dataclass
class Sets:
    """Portraits of the three sets."""

    generated: list[Portrait] = field(default_factory=list)
    test: list[Portrait] = field(default_factory=list)
    train: list[Portrait] = field(default_factory=list)


def run(
    model: FamilyModel, info: FamilyInfo, reference: Reference | None, options: Options, step: Step = no_step
) -> dict[str, Any]:
    """The report. Sections that the family cannot answer are None and say why in `notes`. Only sections of
    `command.NEED_KIT` need a reference."""
    begin = time.monotonic()
    wanted = [s for s in SECTIONS if s in set(options.only)]
    if unknown := set(options.only) - set(SECTIONS):
        raise PopulaceError("invalid_request", f"There is no section {min(unknown)!r}.", f"Use: {', '.join(SECTIONS)}.")
    seeds = {"generated": [options.seed + i for i in range(options.count)]}
    if reference is not None and NEED_KIT & set(wanted):
        seeds |= {split: list(reference.seeds(split, options.count)) for split in ("test", "train")}
    report: dict[str, Any] = {
        "version": __version__, "family": model.name, "weights_sha256": model.weights_sha256,
        "truncation_psi": options.truncation_psi, "grid": options.grid, "asked": options.count, "notes": [],
    }  # fmt: skip
    sets = Sets()
    if PORTRAITS & set(wanted):
        sets = _portraits(model, reference, options, seeds, begin, step)
        report["counts"] = {name: len(getattr(sets, name)) for name in seeds}
        report["seeds"] = {name: [seeds[name][0], seeds[name][len(getattr(sets, name)) - 1]] for name in seeds}
        report["seconds_per_person"] = {name: _median([p.facts["seconds"] for p in getattr(sets, name)])
                                        for name in seeds}  # fmt: skip
        if len(sets.generated) < options.count:
            report["notes"].append(f"the time box ended at {len(sets.generated)} of {options.count} people per set")
    few = [model.sample(s, options.truncation_psi, {}) for s in seeds["generated"][: max(options.few, options.swaps)]]

    def left() -> bool:
        return time.monotonic() - begin < 60 * options.minutes

    tasks: dict[str, Callable[[], Any]] = {
        "renders": lambda: renders(sets, options.inception),
        "shapes": lambda: shape_figures(sets),
        "novelty": lambda: novelty(sets),
        "health": lambda: health_figures(sets.generated),
        "height": lambda: parts.height_error(model, few[: options.few]),
        "swap": lambda: parts.swap_locality(model, _pairs(model, few, options), grid=options.grid),
        "labels": lambda: parts.label_iou(model, few[: options.few], options.grid),
        "attributes": lambda: parts.sliders(model, info.attributes, few[: options.few]),
        "sliders": lambda: measure.slider_effects(model, info.attributes, few[: max(3, options.few // 3)]),
        "objects": lambda: measure.object_pieces(
            model, [model.sample(options.seed + i, options.truncation_psi, {}) for i in range(options.objects)],
            options.grid),
        "reconstruction": lambda: reference and _reconstructions(model, reference, seeds["test"], options, left, step),
    }
    seconds = {"portraits": round(time.monotonic() - begin, 1)}
    for i, name in enumerate(wanted):
        step(name, 0.6 + 0.3 * i / len(wanted))
        start = time.monotonic()
        report[name] = None
        if why := _impossible(name, model, info, sets, left()):
            report["notes"].append(f"{name}: {why}")
        else:
            report[name] = tasks[name]()
            if not report[name]:
                report["notes"].append(f"{name}: the family {model.name!r} does not offer what this needs")
        seconds[name] = round(time.monotonic() - start, 1)
    report["seconds"] = seconds
    return report


def _impossible(name: str, model: FamilyModel, info: FamilyInfo, sets: Sets, left: bool) -> str:
    if name in PORTRAITS and len(sets.generated) < 5:
        return "fewer than five people per set"
    if name in ("height", "attributes", "sliders") and not (hasattr(model, "describe") and hasattr(model, "edit")):
        return f"the family {model.name!r} does not describe its people"
    if name == "height" and "height_m" not in {a.name for a in info.attributes}:
        return f"the family {model.name!r} does not know heights"
    return "" if left or name in PORTRAITS else "no time was left"


# --- portraits --------------------------------------------------------------------------------------------------------


def _portraits(
    model: FamilyModel,
    reference: Reference | None,
    options: Options,
    seeds: dict[str, list[int]],
    begin: float,
    step: Step,
) -> Sets:
    folders: dict[str, Path | None] = dict.fromkeys(seeds)
    if options.cache:
        root = HERE.parent
        own = [HERE / "portraits.py", HERE / "lightfield.py", HERE / "reference.py"]
        family = sorted((root / "families" / model.name).glob("*.py")) + sorted((root / "geometry").glob("*.py"))
        mark = f"{model.name}-{(model.weights_sha256 or 'none')[:12]}-{_digest(own + family)}"
        folders["generated"] = options.cache / f"{mark}-psi{options.truncation_psi}-grid{options.grid}"
        for split in ("test", "train"):
            folders[split] = options.cache / f"reference-{_digest(own + sorted((root / 'training').glob('*.py')))}"

    def make(name: str, seed: int) -> Portrait:
        if name != "generated" and reference is not None:
            return reference.portrait(seed)
        return generated(model, model.sample(seed, options.truncation_psi, {}), options.grid)

    sets = Sets()
    for i in range(options.count):
        if i >= 5 and time.monotonic() - begin > SHARE * 60 * options.minutes:
            break
        step("people", 0.6 * i / options.count)
        for name in seeds:
            seed, folder = seeds[name][i], folders[name]
            path = folder / f"{seed:08d}.npz" if folder else None
            getattr(sets, name).append(cached(path, lambda name=name, seed=seed: make(name, seed)))
    return sets


def _digest(files: Sequence[Path]) -> str:
    """Of the code that makes portraits: older ones are not taken for those of newer code."""
    whole = hashlib.sha256()
    for path in files:
        whole.update(path.read_bytes())
    return whole.hexdigest()[:12]


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 3)


# --- sections ---------------------------------------------------------------------------------------------------------


def renders(sets: Sets, inception: Path | None = None) -> dict[str, Any]:
    """FID, KID, precision and recall of base colour per view and of normals (front), and sliced Wasserstein distances
    x 1000 of the front view; each with its floor."""
    name, extract = features.extractor(inception)
    out: dict[str, Any] = {"features": name}
    for key, source, view in [(v, "pictures", i) for i, v in enumerate(VIEWS)] + [("normals", "normals", 0)]:
        pictures = [torch.from_numpy(stack(s, source)[:, view]).permute(0, 3, 1, 2).float() / 255
                    for s in (sets.generated, sets.test, sets.train)]  # fmt: skip
        raw = [extract(p).double().numpy() for p in pictures]
        scale = features.Scale.of(np.concatenate(raw[1:]))
        g, r, t = (scale(x) for x in raw)
        whole = [scale.whole(x) for x in raw]
        precision, recall = metrics.precision_recall(*_matrices(g, r))
        best = metrics.precision_recall(*_matrices(t, r))
        out[key] = {
            "fid": metrics.frechet_distance(g, r), "fid_floor": metrics.frechet_distance(t, r),
            "kid": metrics.kernel_distance(*whole[:2]), "kid_floor": metrics.kernel_distance(*whole[1:]),
            "precision": precision, "recall": recall, "precision_floor": best[0], "recall_floor": best[1],
        }  # fmt: skip
        if key == "front":
            found = [images.sliced_wasserstein(p, pictures[1]) for p in (pictures[0], pictures[2])]
            out["swd_x1000"] = {str(k): 1000 * v for k, v in found[0].items()}
            out["swd_x1000_floor"] = {str(k): 1000 * v for k, v in found[1].items()}
    out["fid"] = float(np.mean([out[view]["fid"] for view in VIEWS]))
    out["fid_floor"] = float(np.mean([out[view]["fid_floor"] for view in VIEWS]))
    return out


def _matrices(a: Array, b: Array) -> tuple[Array, Array, Array]:
    return metrics.euclidean(a, a), metrics.euclidean(a, b), metrics.euclidean(b, b)


def shape_figures(sets: Sets) -> dict[str, Any]:
    """Coverage, minimum matching distance and 1-NNA by Chamfer distance (metres) and by light fields."""
    points = [stack(s, "points") for s in (sets.generated, sets.test, sets.train)]
    fields = [stack(s, "silhouettes").astype(np.float64) for s in (sets.generated, sets.test, sets.train)]

    def by_light(a: Array, b: Array | None = None) -> Array:
        return lightfield.light_field_distance(a, a if b is None else b, aligned=True)

    out = {}
    for name, (g, r, t), between in (("chamfer", points, shapes.pairwise_chamfer), ("light_field", fields, by_light)):
        rr = between(r)
        found = {"": (between(g), between(g, r)), "_floor": (between(t), between(t, r))}
        out[name] = {}
        for suffix, (own, cross) in found.items():
            out[name] |= {
                f"coverage{suffix}": metrics.coverage(cross),
                f"mmd{suffix}": metrics.minimum_matching_distance(cross),
                f"one_nna{suffix}": metrics.one_nearest_neighbour_accuracy(own, cross, rr),
            }
    return out


def novelty(sets: Sets) -> dict[str, float]:
    """Chamfer distance to the nearest training person, median and lowest 5 %: of generated people, of test people, and
    of training people among themselves. Copies would be nearer than strangers are: at `copy_mm`, which is how far two
    drawings of points from one surface are apart."""
    train = stack(sets.train, "points")
    out = {}
    for name, people in (("generated", sets.generated), ("test", sets.test), ("train", None)):
        if people is None:
            found = metrics.nearest(shapes.pairwise_chamfer(train), itself=True)
        else:
            found = metrics.nearest(shapes.pairwise_chamfer(stack(people, "points"), train))
        out[f"{name}_mm"] = float(np.median(found)) * 1000
        out[f"{name}_mm_5_percent"] = float(np.quantile(found, 0.05)) * 1000
    return out | {"copy_mm": 1000 * float(np.median([shapes.resampling_distance(points) for points in train]))}


def health_figures(people: Sequence[Portrait]) -> dict[str, float]:
    """Shares of generated people; the mesh is that of the portrait, after cleaning and before simplification."""
    facts = [p.facts for p in people]
    crossing = [f["self_intersections"] for f in facts]
    heights = [f["height_m"] for f in facts]
    return {
        "closed": float(np.mean([f["closed"] for f in facts])),
        "one_component": float(np.mean([f["components"] == 1 for f in facts])),
        "pieces_before_cleaning_median": float(np.median([f["pieces"] for f in facts])),
        "genus_median": float(np.median([f["genus"] for f in facts if f["closed"]] or [-1])),
        "no_self_intersections": float(np.mean([c == 0 for c in crossing])),
        "self_intersections_median": float(np.median(crossing)),
        "faces_median": float(np.median([f["faces"] for f in facts])),
        "height_m_low": float(np.min(heights)), "height_m_median": float(np.median(heights)),
        "height_m_high": float(np.max(heights)),
    }  # fmt: skip


def _pairs(model: FamilyModel, few: Sequence[Latents], options: Options) -> list[tuple[Latents, Latents]]:
    """Neighbours among those who wear a top."""
    wearing = [latents for latents in few if any(name.startswith("top/") for name in latents.codes)]
    return list(zip(wearing, wearing[1:] + wearing[:1]))[: options.swaps] if len(wearing) > 1 else []


def _reconstructions(
    model: FamilyModel,
    reference: Reference,
    seeds: Sequence[int],
    options: Options,
    left: Callable[[], bool],
    step: Step,
) -> dict[str, Any] | None:
    """Means over people, and each person's figures."""
    bank = [model.sample(1_000_000 + i, 1.0, {}) for i in range(BANK)]
    rows = []
    for i, seed in enumerate(seeds[: options.reconstructions]):
        if rows and not left():
            break
        step("reconstruction", 0.9 + 0.1 * i / options.reconstructions)
        rows.append({"seed": seed, **rebuild(model, reference.reality(seed), bank, options.steps, options.grid)})
    numbers = [k for k, v in rows[0].items() if isinstance(v, float)] if rows else []
    means = {k: float(np.mean([row[k] for row in rows])) for k in numbers}
    shared = {p for row in rows for p in row["label_iou"]}
    means_iou = {p: float(np.mean([row["label_iou"][p] for row in rows if p in row["label_iou"]])) for p in shared}
    return {"people": len(rows), **means, "label_iou": dict(sorted(means_iou.items())), "each": rows} if rows else None
