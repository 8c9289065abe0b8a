# SPDX-License-Identifier: GPL-3.0-or-later
"""How near is the person of a photo to the one who was photographed? Measured on sampled people nobody trained on.

Every figure is taken twice: of what the encoder says at first glance, and after the fit. The person is compared in the
pose of the photo, after the rigid motion and scale that bring the surfaces together (a photo knows no metres). Pictures
are squares about the person on grey; new views are in flat colours. `psnr_db` is over the whole square, `person_db`
over the pixels that either of both people covers. Both people then get the same edit (`EDIT`) and are compared again:
an edit that holds in every view leaves the pictures as near as they were.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.spatial import cKDTree
from torch.nn import functional

from backend.evaluation.features import extractor
from backend.evaluation.images import psnr, ssim
from backend.families.base import Encoded, Latents, PersonPhoto
from backend.families.people.config import PARTS
from backend.families.people.model import PeopleModel
from backend.geometry.bake import smooth_normals
from backend.latents import keep_maps
from backend.photo.matting import find
from backend.protocol import Inversion, PopulaceError
from backend.settings import Settings
from backend.training.photos import (
    Figure,
    View,
    make_figure,
    random_background,
    random_light,
    random_person,
    random_rotations,
    random_view,
    stand,
    take,
    view_from,
)

FIRST = 1 << 31  # seed of the first person: training begins elsewhere
PHOTO, SQUARE = 768, 256  # pixels
VIEWS = 8  # new ones, around the person, the photo's own left out
GREY = 0.5
SAMPLES, DENSE = 8000, 200_000  # points of a surface that ask, and that answer: these lie 3 mm apart
FINE = 128  # cells of the surfaces that are compared
EDIT = {"top_color": (0.1, 0.45, 0.35), "bottom_color": (0.55, 0.3, 0.15), "weight": 1.0}

Array = np.ndarray


@dataclass(frozen=True)
class Case:
    """One person, photographed once or more."""

    figure: Figure
    rotations: Float[Array, "J 4"]  # of the first photo
    views: list[View]
    photos: list[PersonPhoto]
    matted: bool  # the matte was found, not supplied


def make_case(model: PeopleModel, index: int, photos: int = 1) -> Case:
    """Every other person stands before a plain wall and is cut out of it; the others before clutter, with a mask. A
    first photo is from before, give or take; later ones go around. A wall that cannot be told apart gets a mask."""
    rng = np.random.default_rng([FIRST, index])
    figure = make_figure(model, random_person(model, FIRST + index), FINE)
    matted, shots, views, first = index % 2 == 0, [], [], None
    for n in range(photos):
        rotations = random_rotations(rng, figure.bones)
        first = rotations if first is None else first
        vertices = stand(figure, rotations)
        view = random_view(rng, vertices, rng.normal(0, 0.4) + 2 * math.pi * n / photos)
        views.append(View(view.c2w, 2 * math.atan(1.3 * math.tan(view.fov / 2))))
        image = take(figure, rotations, views[-1], random_light(rng), PHOTO, 2, vertices)
        wall = random_background(rng, PHOTO, plain=matted)
        rgb = image[..., :3] * image[..., 3:] + wall * (1 - image[..., 3:])
        rgba = np.dstack([rgb, np.ones(rgb.shape[:2])])
        photo = (rgba.clip(0, 1) * 255 + 0.5).astype(np.uint8)
        mask = (image[..., 3] * 255 + 0.5).astype(np.uint8)
        try:
            found = find(photo, None if matted else mask)
        except PopulaceError:
            matted, found = False, find(photo, mask)
        shots.append(found)
    assert first is not None
    return Case(figure, first, views, shots, matted)


@dataclass(frozen=True)
class Asked:
    """What is measured of everybody. Without `pictures` only surfaces and garments, in a third of the time; the
    photos' colours are not laid."""

    photos: int = 1
    steps: int = 60  # of the fit
    pictures: bool = True


def run(
    model: PeopleModel, count: int, asked: Asked | None = None, workers: int = 1, cache: Path | None = None,
    show: Callable[[str, float], None] = lambda name, fraction: None,
) -> dict[str, Any]:  # fmt: skip
    """All figures: medians and means over `count` people, at first glance ("encoder") and fitted ("fit"). Several
    `workers` are processes of a thread each. Whoever is in the folder `cache` is not measured again."""
    asked = asked or Asked()
    if cache is not None:
        cache = cache / f"photos-{_fingerprint(model)}-{asked.photos}-{asked.steps}-{asked.pictures:d}"
        cache.mkdir(parents=True, exist_ok=True)
    found = []
    with contextlib.ExitStack() as stack:
        if workers > 1:
            pool = stack.enter_context(ProcessPoolExecutor(workers, get_context("spawn")))
            measure_one = functools.partial(_measure_here, model.device.type, asked=asked, cache=cache)
            answers = pool.map(measure_one, range(count))
        else:
            answers = (_measure_kept(model, i, asked, cache) for i in range(count))
        for i, answer in enumerate(answers):
            found.append(answer)
            show("photos", (i + 1) / count)
    each = {name: [one[name] for one in found if name in one] for name in ("encoder", "fit")}
    report: dict[str, Any] = {"people": count, "photos": asked.photos, "steps": asked.steps,
                              "cut_out_by_us": sum(one["matted"] for one in found)}  # fmt: skip
    for name, rows in each.items():
        if rows:
            report[name] = {key: round(float(np.mean([row[key] for row in rows])), 4) for key in rows[0]}
            report[name]["chamfer_mm_median"] = round(float(np.median([row["chamfer_mm"] for row in rows])), 2)
            report[name]["each"] = rows
    report["better_after_fit"] = _share_better(each)
    if found:
        report["peak_memory_mib"] = max(one["peak_memory_mib"] for one in found)
    return report


def _fingerprint(model: PeopleModel) -> str:
    """Of the people's weights and of the encoder, which has a file of its own."""
    digest = hashlib.sha256((model.weights_sha256 or "").encode())
    for tensor in model.encoder.state_dict().values() if model.encoder is not None else ():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


@functools.cache
def _own_model(device: str) -> PeopleModel:
    """Of a worker."""
    from backend import families

    torch.set_num_threads(1)
    model = families.load("people", device, Settings.load(device=device))
    assert isinstance(model, PeopleModel)
    return model


def _measure_here(device: str, index: int, asked: Asked, cache: Path | None) -> dict[str, Any]:
    return _measure_kept(_own_model(device), index, asked, cache)


def _measure_kept(model: PeopleModel, index: int, asked: Asked, cache: Path | None) -> dict[str, Any]:
    path = cache / f"{index:05d}.json" if cache is not None else None
    if path is not None and path.exists():
        return json.loads(path.read_text("utf-8"))
    answer = measure(model, index, asked)
    if path is not None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(answer), "utf-8")
        part.replace(path)
    return answer


def measure(model: PeopleModel, index: int, asked: Asked) -> dict[str, Any]:
    """One person: {"encoder": figures, "fit": figures, "matted", "peak_memory_mib" of this process till now}."""
    case = make_case(model, index, asked.photos)
    looks = looks_of(model, case) if asked.pictures else None
    out: dict[str, Any] = {"matted": case.matted}
    for name, number in (("encoder", 0), ("fit", asked.steps)) if asked.steps else (("encoder", 0),):
        seconds = {}
        if not number and asked.pictures:  # the encoder alone, without the maps that are laid from the photo
            begin = time.perf_counter()
            model.encode(case.photos, Inversion(steps=0, texture=False))
            seconds["codes_seconds"] = time.perf_counter() - begin
        begin = time.perf_counter()
        encoded = model.encode(case.photos, Inversion(steps=number, texture=asked.pictures))
        seconds["seconds"] = time.perf_counter() - begin
        out[name] = _measure(model, case, encoded, looks) | seconds
    out["peak_memory_mib"] = 0
    if sys.platform != "win32":
        import resource

        out["peak_memory_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return out


@functools.cache
def _features() -> Callable[[torch.Tensor], torch.Tensor]:
    return extractor(None)[1]


def _share_better(each: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """Share of people whose figure the fit did not worsen."""
    pairs = list(zip(each["encoder"], each["fit"], strict=False))
    lower = ("chamfer_mm", "normal_deg")
    keys = [key for key in (*lower, "input_psnr_db", "new_psnr_db") if pairs and key in pairs[0][0]]
    return {key: round(float(np.mean([a[key] >= b[key] if key in lower else a[key] <= b[key] for a, b in pairs])), 3)
            for key in keys}  # fmt: skip


@dataclass(frozen=True)
class Looks:
    """How the one who was photographed looks from the new views."""

    views: list[View]
    faces: list[View]  # of the head
    pictures: list[Array]
    heads: list[Array]
    edited: list[Array]  # the pictures with EDIT


def looks_of(model: PeopleModel, case: Case) -> Looks:
    truth = stand(case.figure, case.rotations)
    first = math.atan2(*(case.views[0].c2w[:3, 3] - truth.mean(0))[[0, 2]])
    angles = [first + 2 * math.pi * n / (VIEWS + 1) for n in range(1, VIEWS + 1)]
    views = [view_from(truth, angle, 0.05) for angle in angles]
    crown = truth[case.figure.points[:, 1] > 1.42]
    faces = [view_from(crown, angle, 0.0, distance=2.5) for angle in angles if math.cos(angle - first) > 0.3]
    person = Latents("people", {k: torch.from_numpy(v) for k, v in case.figure.codes.items()})
    edited = _edited(model, person)
    return Looks(
        views, faces, _pictures(case.figure, truth, views), _pictures(case.figure, truth, faces, SQUARE // 2),
        _pictures(edited, stand(edited, case.rotations), views),
    )  # fmt: skip


def _pictures(figure: Figure, at: Array, views: Sequence[View], size: int = SQUARE) -> list[Array]:
    """In flat colours, already posed."""
    return [take(figure, np.zeros((0, 4)), view, None, size, 2, at) for view in views]


def _edited(model: PeopleModel, person: Latents) -> Figure:
    """With EDIT, as far as it concerns what they wear."""
    values = {k: v for k, v in EDIT.items() if k.removesuffix("_color") not in PARTS
              or f"{k.removesuffix('_color')}/shape" in person.codes}  # fmt: skip
    return make_figure(model, keep_maps(person, model.edit(person, values)), FINE)


def _measure(model: PeopleModel, case: Case, encoded: Encoded, looks: Looks | None) -> dict[str, float]:
    """Without `looks` no pictures."""
    mine = make_figure(model, encoded.latents, FINE)
    rotations = np.array([encoded.rotations[bone] for bone in mine.bones.names])
    truth, ours = stand(case.figure, case.rotations), stand(mine, rotations)
    scale, turn, shift = align(ours, truth)

    def placed(vertices: Array) -> Array:
        return (scale * vertices @ turn.T + shift).astype(np.float32)

    out = surface_error(placed(ours), mine.faces, truth, case.figure.faces)
    out["garments"] = _same_garments(model, encoded, case.figure)
    if looks is None:
        return out
    c2w = np.array(encoded.camera["c2w"])
    out |= _from_the_photo(case, mine, ours, c2w, float(encoded.camera["fov_y_rad"]))
    pictures = _pictures(mine, placed(ours), looks.views)
    out |= {f"new_{k}": v for k, v in _compare(pictures, looks.pictures, _features()).items()}
    out["face_db"] = float(np.mean(_psnrs(_pictures(mine, placed(ours), looks.faces, SQUARE // 2), looks.heads)))
    edited = _edited(model, encoded.latents)
    after = _psnrs(_pictures(edited, placed(stand(edited, rotations)), looks.views), looks.edited)
    lost = [a - b for a, b in zip(_psnrs(pictures, looks.pictures), after, strict=True)]
    # "edit_drop_db": what the view that suffers most has lost against the people without the edit
    return out | {"edited_psnr_db": float(np.mean(after)), "edit_drop_db": max(lost)}


def _from_the_photo(case: Case, mine: Figure, ours: Array, c2w: Array, fov: float) -> dict[str, float]:
    """The photo, and our person in the light that explains it, from where we think the camera is."""
    from backend.families.people.fit import harmonics
    from backend.render.shade import to_linear, to_srgb

    photo = case.photos[0].rgba.astype(np.float32) / 255
    view = View(c2w, fov)
    flat = torch.from_numpy(take(mine, np.zeros((0, 4)), view, None, PHOTO, 1, ours))
    normals = torch.from_numpy(smooth_normals(ours.astype(np.float64), mine.faces)).float()
    shown = Figure(**{**mine.__dict__, "colors": ((normals * 0.5 + 0.5) * 255).to(torch.uint8).numpy()})
    normal = torch.from_numpy(take(shown, np.zeros((0, 4)), view, None, PHOTO, 1, ours))[..., :3] * 2 - 1
    normal = functional.normalize(normal.reshape(-1, 3), dim=1) @ torch.from_numpy(c2w[:3, :3]).float()
    target = torch.from_numpy(photo)
    both = ((flat[..., 3] > 0.9) & (target[..., 3] > 0.98)).flatten()
    linear, wanted = to_linear(flat[..., :3]).reshape(-1, 3), to_linear(target[..., :3]).reshape(-1, 3)
    basis = harmonics(normal)
    bright = linear.mean(1, keepdim=True)
    a, b = (basis * bright)[both], wanted.mean(1)[both]
    light = torch.linalg.lstsq(a.T @ a + 1e-3 * torch.eye(9), a.T @ b).solution if len(a) else torch.zeros(9)
    lit = to_srgb(linear * (basis @ light).clamp(min=0.02)[:, None]).view(*flat.shape[:2], 3)
    left, top, right, bottom = case.photos[0].box
    side = int(1.1 * max(right - left, bottom - top) / 2)
    x, y = (left + right) // 2, (top + bottom) // 2

    def square(image: torch.Tensor) -> Array:
        padded = functional.pad(image.movedim(2, 0), (side,) * 4)
        cut = padded[:, y : y + 2 * side, x : x + 2 * side]
        return functional.interpolate(cut[None], (SQUARE, SQUARE), mode="area")[0].movedim(0, 2).numpy()

    drawn, seen = square(torch.cat([lit, flat[..., 3:]], 2)), square(target)
    return {f"input_{k}": v for k, v in _compare([drawn], [seen], None).items()}


def _on_grey(*people: Sequence[Array]) -> list[torch.Tensor]:
    return [torch.from_numpy(np.stack([p[..., :3] * p[..., 3:] + GREY * (1 - p[..., 3:]) for p in pictures]))
            .movedim(3, 1).float() for pictures in people]  # fmt: skip


def _psnrs(mine: Sequence[Array], theirs: Sequence[Array]) -> list[float]:
    """Of each straight RGBA picture on grey."""
    return [psnr(x[None], y[None]) for x, y in zip(*_on_grey(mine, theirs), strict=True)]


def _compare(
    mine: Sequence[Array], theirs: Sequence[Array], features: Callable[[torch.Tensor], torch.Tensor] | None
) -> dict[str, float]:
    """Straight RGBA pictures on grey."""
    a, b = _on_grey(mine, theirs)
    either = torch.from_numpy(np.stack([np.maximum(p[..., 3], q[..., 3]) > 0.5
                                        for p, q in zip(mine, theirs, strict=True)]))  # fmt: skip
    out = {"psnr_db": float(np.mean(_psnrs(mine, theirs))), "person_db": psnr(a, b, either),
           "ssim": float(ssim(a, b).mean())}  # fmt: skip
    if features is not None:
        x, y = features(a), features(b)
        out["feature_distance"] = float((x - y).norm(dim=1).mean() / y.norm(dim=1).mean())
    return out


def _same_garments(model: PeopleModel, encoded: Encoded, figure: Figure) -> float:
    """Share of the parts that are the same item, or alike not worn."""
    same = 0
    for part in PARTS:
        names = []
        for codes in (encoded.latents.codes, {k: torch.from_numpy(v) for k, v in figure.codes.items()}):
            worn = f"{part}/shape" in codes
            names.append(
                model.describe_part(part, {k: v for k, v in codes.items() if k.startswith(part)}) if worn else ""
            )
        same += names[0] == names[1]
    return same / len(PARTS)


def align(points: Float[Array, "N 3"], target: Float[Array, "M 3"], rounds: int = 25) -> tuple[float, Array, Array]:
    """Scale, rotation and shift that bring `points` onto `target`: iterated closest points both ways, each round in
    closed form (Umeyama 1991), from equal middles and sizes."""
    rng = np.random.default_rng(0)
    a = points[rng.permutation(len(points))[:3000]].astype(np.float64)
    b = target[rng.permutation(len(target))[:3000]].astype(np.float64)
    scale = float(np.sqrt(((b - b.mean(0)) ** 2).sum(1).mean() / ((a - a.mean(0)) ** 2).sum(1).mean()))
    best: tuple[float, float, Array, Array] | None = None
    for start in (0.0, math.pi / 4, -math.pi / 4):
        c, s = math.cos(start), math.sin(start)
        turn = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
        found = (scale, turn, b.mean(0) - scale * turn @ a.mean(0))
        tree = cKDTree(b)
        for _ in range(rounds):
            moved = found[0] * a @ found[1].T + found[2]
            there, back = tree.query(moved)[1], cKDTree(moved).query(b)[1]
            found = _similarity(np.concatenate([a, a[back]]), np.concatenate([b[there], b]))
        moved = found[0] * a @ found[1].T + found[2]
        error = float(tree.query(moved)[0].mean())
        if best is None or error < best[0]:
            best = (error, *found)
    assert best is not None
    return best[1:]


def _similarity(a: Array, b: Array) -> tuple[float, Array, Array]:
    """Umeyama 1991: scale, rotation, shift with the least squared error."""
    x, y = a - a.mean(0), b - b.mean(0)
    u, d, vt = np.linalg.svd(y.T @ x / len(a))
    sign = np.diag([1, 1, np.sign(np.linalg.det(u @ vt))])
    turn = u @ sign @ vt
    scale = float((d * np.diag(sign)).sum() / (x**2).sum(1).mean())
    return scale, turn, b.mean(0) - scale * turn @ a.mean(0)


def surface_error(a: Array, a_faces: Array, b: Array, b_faces: Array) -> dict[str, float]:
    """Chamfer distance (mean of both directions, mm) and the angle between normals there, degrees: points drawn by
    area, each to the nearest of many on the other surface."""
    rng = np.random.default_rng(0)
    (p, m), (q, n) = _draw(a, a_faces, DENSE, rng), _draw(b, b_faces, DENSE, rng)
    to_b, at_b = cKDTree(q).query(p[:SAMPLES])
    to_a, at_a = cKDTree(p).query(q[:SAMPLES])
    cosine = np.concatenate([(m[:SAMPLES] * n[at_b]).sum(1), (n[:SAMPLES] * m[at_a]).sum(1)]).clip(-1, 1)
    return {"chamfer_mm": 500 * float(to_b.mean() + to_a.mean()),
            "normal_deg": float(np.degrees(np.arccos(cosine)).mean())}  # fmt: skip


def _draw(vertices: Array, faces: Array, count: int, rng: np.random.Generator) -> tuple[Array, Array]:
    corners = vertices[faces].astype(np.float64)
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area = np.linalg.norm(cross, axis=1)
    face = rng.choice(len(faces), count, p=area / area.sum())
    u, v = np.sqrt(rng.random(count))[:, None], rng.random(count)[:, None]
    points = (1 - u) * corners[face, 0] + u * (1 - v) * corners[face, 1] + u * v * corners[face, 2]
    return points, cross[face] / np.maximum(area[face], 1e-20)[:, None]
