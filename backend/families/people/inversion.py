# SPDX-License-Identifier: GPL-3.0-or-later
"""Photos of one person -> codes, pose and photo maps. Read `encode` first.

The encoder answers at once; the fit draws the person and moves what it can until the picture is the photo's; what the
photos then show is laid on the person, in canonical space.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from backend import poses
from backend.families.base import Encoded, Latents, PersonPhoto, Step, no_step
from backend.families.people import pose_search
from backend.families.people.config import CLOTH, PARTS
from backend.families.people.encoder import (
    JOINTS,
    PhotoEncoder,
    crop,
    fov_of,
    joint_rotations,
    mirrored,
    placement,
    write_codes,
    write_part,
)
from backend.families.people.fit import CUTS, Fit, Sitting, Surface, harmonics, surface_of
from backend.families.people.photo_maps import BODY_BOX, BOXES, HEAD_BOX, Canvas
from backend.geometry.bake import smooth_normals
from backend.networks.volumes import Volume
from backend.render.rasterize import rasterize, sample
from backend.render.shade import to_linear, to_srgb

if TYPE_CHECKING:
    from backend.families.people.model import PeopleModel

FITTED = 192  # pixels of the square that is fitted
LIKELY = 0.04  # items less likely than this are not tried
TRIED = 3  # items of a part
FLIP = 0.25  # share of the score that turning about must win
DOUBT = 0.002  # score that an item must win for each e-fold by which it is less likely
FINE = 128  # cells of the surface that photos are laid on
ASTRAY = 0.7  # log colours between a pixel and its part's from which on it may be another part's
GRAZING, FRONTAL = 0.12, 0.45  # cosines between which a photo's pixels gain weight


class Options(Protocol):
    """`protocol.Inversion`."""

    @property
    def steps(self) -> int: ...
    @property
    def seconds(self) -> float | None: ...
    @property
    def texture(self) -> bool: ...
    @property
    def delight(self) -> bool: ...
    @property
    def symmetric(self) -> bool: ...


@torch.no_grad()
def encode(
    model: PeopleModel, encoder: PhotoEncoder, photos: Sequence[PersonPhoto], options: Options, step: Step = no_step
) -> Encoded:
    """The person of one or more photos. `rotations` and `camera` are of the first one; `camera` is in the space of
    the person in this pose, the pelvis where it is in rest. With a time box the answer depends on the machine."""
    until = time.monotonic() + (options.seconds or math.inf)
    step("encode", 0.0)
    said = [_ask(encoder, photo) for photo in photos]
    fit = _start(model, photos, said)
    step("encode", 1.0)
    if options.steps:
        with torch.enable_grad(), _repeatable():
            _refine(fit, said, options.steps, until, step)
    scores = _scores(fit)
    maps = {}
    if options.texture:
        maps = lay_photos(fit, photos, options.delight, options.symmetric, step)
    first = fit.sittings[0]
    quaternions = poses.to_quaternions(first.rotations.numpy())
    rotations = {bone: (float(q[0]), float(q[1]), float(q[2]), float(q[3]))
                 for bone, q in zip(model.bones, quaternions, strict=True)}  # fmt: skip
    return Encoded(Latents("people", fit.codes, maps), rotations, _camera(fit, photos[0]), scores)


def _ask(encoder: PhotoEncoder, photo: PersonPhoto) -> dict[str, Tensor]:
    """The mean of what the encoder says of the square and of the mirrored one: its errors are not the same."""
    seen = crop(photo)
    said = encoder(torch.stack([seen.square, seen.square.flip(2)]), torch.full((2, 1), seen.fov))
    straight, turned = ({name: value[i : i + 1].float() for name, value in said.items()} for i in (0, 1))
    return {name: (straight[name] + value) / 2 for name, value in mirrored(turned).items()}


def _start(model: PeopleModel, photos: Sequence[PersonPhoto], said: Sequence[Mapping[str, Tensor]]) -> Fit:
    """What the encoder says: codes by the mean of all photos, pose and place of each."""
    codes = write_codes(_agreed(said), model.facts)
    at = torch.tensor([model.bones.index(name) for name in JOINTS])
    sittings, usual = [], pose_search.relaxed(model)
    for photo, answer in zip(photos, said, strict=True):
        seen = crop(photo, FITTED)
        rotations = usual.index_copy(0, at, joint_rotations(answer["joints"])[0])
        sittings.append(Sitting(seen, rotations, placement(answer, seen.fov)))
    fit = Fit(model, codes, sittings)
    fit.solve_light()
    _face_about(fit)
    return fit


def _face_about(fit: Fit) -> None:
    """Outlines do not tell front from back: whoever explains the photo better turned about, is turned about."""
    about = torch.diag(torch.tensor([-1.0, 1, -1]))
    for n, sitting in enumerate(fit.sittings):
        kept = replace(sitting), fit.score_of(n)
        sitting.rotations = pose_search.mirrored(sitting.rotations, fit.model.bones)
        sitting.place = replace(sitting.place, turn=sitting.place.turn @ about)
        fit.solve_light()
        if fit.score_of(n) > (1 - FLIP) * kept[1]:
            fit.sittings[n] = kept[0]
    fit.solve_light()


def _agreed(said: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([answer[name] for answer in said]).mean(0) for name in said[0]}


def _refine(fit: Fit, said: Sequence[Mapping[str, Tensor]], steps: int, until: float, step: Step) -> None:
    """Which pose it is; place and pose, garments, cuts, then everything finely. Every stage starts only while there is
    time. `steps` are those after the search of the pose, which takes an eighth of them for every pose it fits."""
    agreed = _agreed(said)
    few, first, second = max(1, round(steps / 8)), round(0.45 * steps), round(0.25 * steps)

    def late() -> bool:
        return time.monotonic() > until

    def within(low: float, high: float) -> Callable[[float], None]:
        def report(fraction: float) -> None:
            step("fit", low + (high - low) * fraction)
            if late():
                raise _Late

        return report

    try:
        fit.descend(few, FITTED // 2, 1.0, within(0.0, 0.05))
        fit.solve_light()
        fit.solve_colors()
        pose_search.search(fit, few, FITTED // 2, within(0.05, 0.15))
        fit.descend(first, FITTED // 2, 1.0, within(0.15, 0.3))
        fit.solve_light()
        fit.solve_colors()
        for n, part in enumerate(PARTS):
            if late():
                return
            fit.choose(part, _candidates(fit, agreed, part))
            step("fit", 0.3 + 0.2 * (n + 1) / len(PARTS))
        fit.solve_light()
        for n, part in enumerate(CLOTH):
            if f"{part}/shape" in fit.codes and not late():
                if _is_cut(fit, part):
                    fit.search_cut(part, CUTS[part])
                else:
                    fit.search_length(part)
            step("fit", 0.5 + 0.1 * (n + 1))
        fit.solve_colors()
        fit.descend(second, FITTED // 2, 0.6, within(0.7, 0.8))
        fit.refresh()
        fit.solve_light()
        fit.descend(steps - first - second, FITTED, 0.4, within(0.8, 1.0))
        fit.solve_light()
        fit.solve_colors()
    except _Late:
        return


@contextlib.contextmanager
def _repeatable() -> Iterator[None]:
    """Several threads add up gradients in any order, and a fit of many steps makes other people of that; within, they
    take turns."""
    was, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned)


class _Late(Exception):
    """The time is over."""


def _is_cut(fit: Fit, part: str) -> bool:
    items = len(fit.model.facts["items"][part])
    return float(fit.codes[f"{part}/shape"][0, items]) > 0.5


def _candidates(fit: Fit, said: Mapping[str, Tensor], part: str) -> list[tuple[dict[str, Tensor] | None, float]]:
    """Codes of a part worth trying, the present ones first, each with a handicap by how unlikely it is."""
    present = {k: v for k, v in fit.codes.items() if k.startswith(f"{part}/")}
    worn = float(torch.sigmoid(said[f"{part}/worn"]))
    shares = torch.softmax(said[f"{part}/item"][0], 0).tolist()
    mine = int(present[f"{part}/shape"][0, : len(shares)].argmax()) if present else -1
    likely = [(share * worn, item) for item, share in enumerate(shares) if fit.model.facts["items"][part]]
    likely = sorted(likely, reverse=True)[:TRIED]
    chances = [(1 - worn, None)] if mine < 0 else [(shares[mine] * worn, mine)]
    chances += [(chance, item) for chance, item in likely if chance > LIKELY and item != mine]
    chances += [(1 - worn, None)] if mine >= 0 and 1 - worn > LIKELY else []
    best = max(chance for chance, _ in chances)
    return [
        (None if item is None else present if item == mine else write_part(part, said, fit.model.facts, item),
         DOUBT * math.log(best / max(chance, 1e-3)))
        for chance, item in chances
    ]  # fmt: skip


def _scores(fit: Fit) -> dict[str, float]:
    """Overlap of outlines and likeness of colours within them, means over the photos."""
    overlaps, errors = [], []
    for sitting in fit.sittings:
        clip, vertices = fit.clip(sitting, fit.codes["body/shape"], sitting.rotations, sitting.place)
        image = fit.draw(sitting, clip, vertices, FITTED)[0] * sitting.crop.seen
        target = sitting.crop.square
        mine, theirs = image[3] > 0.5, target[3] > 0.5
        both = mine & theirs
        overlaps.append(float(both.sum()) / max(float((mine | theirs).sum()), 1.0))
        errors.append(float(((image[:3] - target[:3])[:, both] ** 2).mean()) if both.any() else 1.0)
    psnr = -10 * math.log10(max(sum(errors) / len(errors), 1e-8))
    return {"mask_iou": round(sum(overlaps) / len(overlaps), 4), "psnr_db": round(psnr, 2)}


def _camera(fit: Fit, photo: PersonPhoto) -> dict[str, object]:
    """The photo's own camera, in the person's space."""
    sitting = fit.sittings[0]
    _, heads = fit.body.rest(fit.surface, fit.codes["body/shape"])
    turn = sitting.crop.turn @ sitting.place.turn
    shift = sitting.crop.turn @ sitting.place.shift
    c2w = torch.eye(4)
    c2w[:3, :3] = turn.T
    c2w[:3, 3] = heads[fit.body.pelvis] - turn.T @ shift
    height, width = photo.rgba.shape[:2]
    return {"c2w": c2w.tolist(), "fov_y_rad": fov_of(photo), "width": width, "height": height}


def lay_photos(
    fit: Fit, photos: Sequence[PersonPhoto], delight: bool, symmetric: bool, step: Step = no_step
) -> dict[str, UInt8[Tensor, "H W 4"]]:
    """What the photos show of each part, as maps named PART/photo."""
    step("project", 0.0)
    surface = surface_of(fit.model, fit.codes, FINE)
    coarse, fit.surface = fit.surface, surface
    facing = fit.model.networks.body_field.facing(surface.points)  # pyright: ignore[reportCallIssue]
    like_face = [i for i, part in enumerate(fit.parts) if part in ("hair", "accessory", "shoes")]
    canvases = {part: Canvas() for part in fit.parts}
    for n, (sitting, photo) in enumerate(zip(fit.sittings, photos, strict=True)):
        clip, vertices = fit.clip(sitting, fit.codes["body/shape"], sitting.rotations, sitting.place)
        normals = torch.from_numpy(smooth_normals(vertices.double().numpy(), surface.faces.numpy())).float()
        for box in (BODY_BOX, HEAD_BOX):
            window = _window(box, surface.points, clip)
            if window is None:
                continue
            matrix, size = window
            raster = rasterize(clip @ matrix.T, surface.faces, (size, size))
            looks = sample(torch.cat([surface.points, facing, normals, vertices], 1), raster, surface.faces)
            points, faces_out, normal, seen = looks.split(3, 1)
            normal = F.normalize(normal, dim=1)
            cosine = -(normal * F.normalize(seen, dim=1)).sum(1)
            rgb, matte = _pixels(sitting, photo, seen)
            t = ((cosine - GRAZING) / (FRONTAL - GRAZING)).clamp(0, 1)
            weight = t * t * (3 - 2 * t) * (matte > 0.97)
            if delight and sitting.light is not None:
                shading = (harmonics(normal) @ sitting.light).clamp(min=0.15)
                rgb = to_srgb(to_linear(rgb) / shading)
            face = raster.face_id.flatten()[raster.pixels]
            label = surface.labels[surface.faces[face, 0]]
            weight = weight * ~_astray(to_linear(rgb), surface, label, like_face)
            for i, part in enumerate(fit.parts):
                at = (label == i) & (weight > 0.01)
                if at.any():
                    canvases[part].lay(points[at], F.normalize(faces_out[at], dim=1), rgb[at], weight[at], box)
        step("project", 0.2 + 0.6 * (n + 1) / len(fit.sittings))
    fit.surface = coarse
    maps = {f"{part}/photo": picture for part, canvas in canvases.items()
            if (picture := canvas.finish(symmetric)) is not None}  # fmt: skip
    step("project", 1.0)
    return maps


def _astray(
    colors: Float[Tensor, "N 3"], surface: Surface, label: Int[Tensor, " N"], like_face: Sequence[int]
) -> Bool[Tensor, " N"]:
    """Pixels that clearly have another part's colour: a hand before the shirt that the fit has put elsewhere. Skin may
    have the colours of the parts `like_face`: brows look like hair."""
    means = torch.stack([surface.albedo[surface.labels == i].median(0).values if bool((surface.labels == i).any())
                         else torch.full((3,), 9.0) for i in range(int(surface.labels.max()) + 1)])  # fmt: skip
    off = torch.cdist((colors + 0.02).log(), (means + 0.02).log())
    own = off.gather(1, label[:, None])[:, 0]
    off = off.scatter(1, label[:, None], torch.inf)
    for i in like_face:
        off[label == 0, i] = torch.inf
    return (own > ASTRAY) & (off.amin(1) < 0.4 * own)


def _window(box: Volume, points: Tensor, clip: Tensor) -> tuple[Tensor, int] | None:
    """A turn of clip space that fills the picture with what lies in a box, and its pixels: two for each texel."""
    inside = (box.local(points).abs() < 1).all(1)
    if not inside.any():
        return None
    ndc = clip[0, inside, :2] / clip[0, inside, 3:]
    low, high = ndc.amin(0), ndc.amax(0)
    centre, half = (low + high) / 2, float((high - low).max()) / 2 * 1.02
    matrix = torch.eye(4)
    matrix[0, 0] = matrix[1, 1] = 1 / half
    matrix[0, 3], matrix[1, 3] = (-centre / half).tolist()
    texel = dict(BOXES)[box][0].texel
    return matrix, int(min(1400, max(256, 1.3 * 2 * max(box.half_size) / texel)))


def _pixels(
    sitting: Sitting, photo: PersonPhoto, seen: Float[Tensor, "N 3"]
) -> tuple[Float[Tensor, "N 3"], Float[Tensor, " N"]]:
    """Colours and matte of the photo where points of the square's camera appear in it; matte 0 beyond its edges."""
    rays = seen @ sitting.crop.turn.T
    height, width = photo.rgba.shape[:2]
    focal = 0.5 * height / math.tan(fov_of(photo) / 2)
    x = rays[:, 0] / -rays[:, 2] * focal / (width / 2)
    y = -rays[:, 1] / -rays[:, 2] * focal / (height / 2)
    rgba = torch.from_numpy(photo.rgba.copy()).float().movedim(2, 0)[None] / 255
    # pixels at the outline have the background's colour in them
    alpha = -F.max_pool2d(-rgba[:, 3:], 5, 1, 2)
    found = F.grid_sample(torch.cat([rgba[:, :3], alpha], 1), torch.stack([x, y], 1)[None, None], align_corners=False)
    rows = found[0, :, 0].T
    return rows[:, :3], rows[:, 3]
