# SPDX-License-Identifier: GPL-3.0-or-later
"""The main road: a request becomes latents, latents a field, the field a textured mesh. Read `generate` first."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from scipy.sparse import coo_array, csgraph

from backend import __version__, checks, families, shape_keys
from backend.edits import choose_latents, words_ignored
from backend.families.base import FamilyModel, HumanField, Latents, Step, no_step
from backend.geometry.bake import bake
from backend.geometry.clean import clean
from backend.geometry.envelope import envelope
from backend.geometry.mesh import Textures, TriMesh, vertex_normals
from backend.geometry.simplify import simplify
from backend.geometry.tetgrid import extract_surface
from backend.geometry.unwrap import unwrap
from backend.packet import HumanAsset, Part, RigArrays
from backend.photo import hidden, people_in
from backend.photo.album import Images
from backend.poses import own_rows
from backend.protocol import GenerateRequest, PopulaceError
from backend.render.thumbnail import thumbnail
from backend.shape_keys import ShapeKey

# Share of each stage in the whole, as measured on a CPU; it only shapes the progress bar.
STAGES = {"sample": 0.02, "decode": 0.1, "surface": 0.4, "clean": 0.06, "simplify": 0.06, "unwrap": 0.06,
          "bake": 0.18, "shape keys": 0.02, "encode": 0.1}  # fmt: skip
PHOTO_STAGES = {"photo": 0.05, "invert": 0.5}  # where there are photos; the others share what is left
_LED_TO_LATENTS = ("latents", "latent_maps", "photos", "inversion", "prompt", "edits")  # of a request
PIECE = 0.4  # of the largest piece's volume from which on another one belongs to an object: the second shoe
MIN_FACES = 100  # of one object at a coarse level of detail
HANDLE_FACES = 25  # that each handle of the surface needs at least; with fewer the shape would have to pay for them
MIN_TEXTURE = 256


@torch.no_grad()
def generate(
    request: GenerateRequest, model: FamilyModel, step: Step = no_step, images: Images | None = None
) -> tuple[HumanAsset, dict[str, dict[str, Any]]]:
    """Run one request. `step(stage, fraction of the whole)` reports progress, raises `Cancelled` to stop; `images` are
    those that the request names.

    Returns the person, the same for the same request on the same device, and the run's stats: seconds, peak memory
    and counts per stage. Raises `invalid_latents`, `invalid_request`, `empty_surface`, and of photos `image_missing`,
    `image_unreadable`, `too_large`, `no_person_found`, `mask_needed`.
    """
    clock = _Clock(step, PHOTO_STAGES if request.photos else {})
    seen = None
    if request.photos:
        checks.check(request)
        with clock.stage("photo"):
            photos = people_in.read(request, images, clock.step)
        with clock.stage("invert"):
            seen = people_in.encode(photos, request, model, clock.step)
    with clock.stage("sample"):
        maps = people_in.maps_of(request, images)
        latents = choose_latents(request, model, maps, None if seen is None else seen.encoded.latents)
        painters = hidden.editors(request, model.device) if latents.maps else []
    with clock.stage("decode"):
        chosen = families.of_decoding(request.family, request.parameters) if request.parameters else {}
        fields = model.decode(latents, separate=request.separate, **chosen)
        pose, own = people_in.pose_of(request, seen)
        if own and (rig := next((field.rig for field in fields if field.rig is not None), None)):
            own_rows(rig, own)  # bones that there are not are told before the work
    clock.parts, clock.lods = len(fields), request.lods
    pieces = PIECE if request.separate else 1.0
    fine = []
    for field in fields:
        with clock.stage("surface"):
            raw = _surface(field, request, clock.step)
        with clock.stage("clean"):
            fine.append(clean(raw, pieces))
    total = sum(len(mesh.faces) for mesh in fine)
    made, coarse = [], list(fine)
    for lod in range(request.lods):
        size = texture_size(request, lod)
        for i, (field, mesh) in enumerate(zip(fields, fine)):
            density = field.region_density
            with clock.stage("simplify"):
                budget = face_budget(request, lod, len(mesh.faces) / total)
                if budget < HANDLE_FACES * _handles(coarse[i]):
                    coarse[i] = envelope(field, request.grid_resolution, pieces, clock.step) or coarse[i]
                importance = None if density is None else density[field.region(coarse[i].points)]
                coarse[i] = simplify(coarse[i], budget, importance)
            with clock.stage("unwrap"):
                flat = unwrap(coarse[i], field.region(coarse[i].points), size, request.unwrap, density)
            with clock.stage("bake"):
                textures = bake(field, mesh, flat, size, clock.step, pbr=request.maps == "pbr")
                made.append((field, lod, flat, textures))
    if painters:
        with clock.stage("refine"):
            made = hidden.paint(made, model, latents, request.separate, painters, clock.step)
    with clock.stage("shape keys"):
        meshes = [(field, mesh) for field, _, mesh, _ in made]
        keys = shape_keys.make(request.shape_keys, latents, model, meshes, request.separate, clock.step)
    with clock.stage("encode"):
        asset = _assemble(made, keys, latents, request, model)
        if seen is not None:
            asset = replace(asset, meta={**asset.meta, "photo": seen.facts(asset, _heights(made)[0])})
        recipe = {**asset.meta["recipe"], "pose": pose, "joint_rotations": {k: list(q) for k, q in own.items()} or None}
        asset = replace(asset, meta={**asset.meta, "recipe": recipe}).in_pose(pose, own)
    clock.counts |= {"fine_faces": total, "faces": asset.meta["stats"]["faces"]}
    return asset, clock.stats()


def _handles(mesh: TriMesh) -> int:
    """Of a closed surface in one piece; of one in n pieces, n - 1 less than there are."""
    return 1 - (len(mesh.vertices) - len(mesh.faces) // 2) // 2


def face_budget(request: GenerateRequest, lod: int, share: float) -> int:
    """Triangles of an object that makes up `share` of the person: a quarter per level, never too few for a shape."""
    return max(round(request.faces * share / 4**lod), min(MIN_FACES, round(request.faces * share)))


def texture_size(request: GenerateRequest, lod: int) -> int:
    """Pixels: half per level."""
    return max(request.texture_size >> lod, MIN_TEXTURE)


def _surface(field: HumanField, request: GenerateRequest, step: Step) -> TriMesh:
    try:
        own = getattr(field, "extract", None)
        return (own or partial(extract_surface, field))(request.grid_resolution, step)
    except PopulaceError as error:
        if error.code != "empty_surface":
            raise
        raise PopulaceError("empty_surface", f"Seed {request.seed}: {error.message}", error.hint) from None


def _assemble(
    made: Sequence[tuple[HumanField, int, TriMesh, Textures]],
    keys: Mapping[str, ShapeKey],
    latents: Latents,
    request: GenerateRequest,
    model: FamilyModel,
) -> HumanAsset:
    """Arrays for the packet: the lowest point of the person on the floor, maps encoded, facts written down."""
    floor, top = _heights(made)
    height = top - floor
    drop = np.array([0, floor, 0], np.float32)
    rise = _rise(made, keys, floor)
    offsets = [_numpy(torch.stack([key.moves[i] for key in keys.values()]), np.float32) + rise
               for i in range(len(made) if keys else 0)]  # fmt: skip
    textures = [textures for *_, textures in made]
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:  # zlib releases the interpreter lock
        maps = ([t.base_color for t in textures], [t.normal for t in textures], [t.orm for t in textures])
        colors, normals, orms = map(list, [pool.map(_png, pixels) for pixels in maps])
    parts, facts = [], []
    for i, (field, lod, mesh, _) in enumerate(made):
        assert mesh.uvs is not None
        assert mesh.face_uvs_idx is not None
        skin = field.skin(mesh.points) if field.rig is not None else None
        parts.append(Part(
            vertices=_numpy(mesh.vertices, np.float32) - drop, faces=_numpy(mesh.faces, np.int32),
            normals=_numpy(vertex_normals(mesh.vertices.double(), mesh.faces), np.float32),
            uvs=_numpy(mesh.uvs, np.float32), face_uvs_idx=_numpy(mesh.face_uvs_idx, np.int32),
            base_color_png=colors[i], normal_png=normals[i] or None, orm_png=orms[i] or None,
            skin_indices=_numpy(skin[0], np.int32) if skin else None,
            skin_weights=_numpy(skin[1], np.float32) if skin else None,
            shape_keys=offsets[i] if keys else None,
        ))  # fmt: skip
        facts.append({"name": f"{field.name}_LOD{lod}" if lod else field.name, "lod": lod,
                      **mesh_facts(parts[-1].faces, len(parts[-1].vertices)),
                      "vertices": len(parts[-1].vertices)})  # fmt: skip
    rig = next((field.rig for field, *_ in made if field.rig is not None), None)
    arrays = None
    if rig is not None:
        arrays = RigArrays(_numpy(rig.heads, np.float32) - drop, _numpy(rig.tails, np.float32) - drop,
                           np.array(rig.parents, np.int32))  # fmt: skip
        if joints := [key.joints for key in keys.values() if key.joints is not None]:
            arrays = replace(arrays, key_heads=_numpy(torch.stack(joints), np.float32) + rise)
    ignored, asked = words_ignored(request), request.model_dump(mode="json")
    from_photos = {"photos": len(request.photos), "inversion": asked["inversion"]} if request.photos else {}
    meta = {
        "parts": facts,
        "bones": list(rig.names) if rig else [],
        **({"shape_keys": list(keys)} if keys else {}),
        "attributes": {**model.describe(latents), "height_m": round(height, 4)},
        # With the latents of the packet the recipe makes this person again, so what led to them stands aside.
        "recipe": {**{k: v for k, v in asked.items() if k not in _LED_TO_LATENTS},
                   "version": __version__, "weights_sha256": model.weights_sha256},
        **({"asked": {"prompt": request.prompt, "edits": asked["edits"]} | from_photos}
           if request.prompt or request.edits or request.photos else {}),
        **({"words_ignored": ignored} if ignored else {}),
        "stats": {"faces": sum(fact["faces"] for fact in facts if fact["lod"] == 0),
                  "closed": all(fact["closed"] for fact in facts)},
    }  # fmt: skip
    picture = thumbnail([(mesh, textures.base_color) for _, lod, mesh, textures in made if lod == 0])
    codes = {k: _numpy(v, np.float32) for k, v in latents.codes.items()}
    shown = {name: _png(pixels) for name, pixels in latents.maps.items()}
    return HumanAsset(tuple(parts), codes, arrays, meta, picture, shown)


def _heights(made: Sequence[tuple[HumanField, int, TriMesh, Textures]]) -> tuple[float, float]:
    """Of the lowest and the highest vertex, in person space."""
    heights = [float(y) for _, lod, mesh, _ in made if lod == 0 for y in mesh.vertices[:, 1].aminmax()]
    return min(heights), max(heights)


def _rise(
    made: Sequence[tuple[HumanField, int, TriMesh, Textures]], keys: Mapping[str, ShapeKey], floor: float
) -> np.ndarray[Any, Any]:
    """How far each key lifts everything f32 [K, 1, 3], so that at it the lowest point of the person is on the floor."""
    lows = [min(float((mesh.vertices + moved)[:, 1].min())
                for (_, lod, mesh, _), moved in zip(made, key.moves) if lod == 0)
            for key in keys.values()]  # fmt: skip
    return np.array([[0, floor - low, 0] for low in lows], np.float32).reshape(-1, 1, 3)


def mesh_facts(faces: np.ndarray[Any, Any], vertex_count: int) -> dict[str, Any]:
    """Faces, connected components, and whether the surface is closed: every directed edge once, with its reverse."""
    edges = np.stack([faces, np.roll(faces, -1, 1)], 2).reshape(-1, 2).astype(np.int64)
    forward = np.sort(edges[:, 0] * vertex_count + edges[:, 1])
    backward = np.sort(edges[:, 1] * vertex_count + edges[:, 0])
    closed = bool((forward == backward).all() and (np.diff(forward) > 0).all())
    graph = coo_array((np.ones(len(edges), bool), (edges[:, 0], edges[:, 1])), shape=(vertex_count, vertex_count))
    return {"faces": len(faces), "closed": closed, "components": int(csgraph.connected_components(graph, False)[0])}


def _png(pixels: torch.Tensor | None) -> bytes:
    """The file's bytes, none of a map that was not made."""
    if pixels is None:
        return b""
    out = io.BytesIO()
    Image.fromarray(_numpy(pixels, np.uint8)).save(out, "PNG", compress_level=1)
    return out.getvalue()


def _numpy(tensor: torch.Tensor, dtype: Any) -> np.ndarray[Any, Any]:
    return tensor.detach().cpu().numpy().astype(dtype)


class _Clock:
    """Turns fractions of stages into a monotone fraction of the whole; measures seconds and peak memory per stage."""

    def __init__(self, step: Step, before: Mapping[str, float]) -> None:
        """`before`: shares of stages that come before all others and take them from the whole."""
        self._report = step
        self._shares = {name: share * (1 - sum(before.values())) for name, share in STAGES.items()} | dict(before)
        self._shares["refine"] = 0.0  # seldom, and as long as a diffusion model takes
        self._stage = ""
        self._share = 0.0  # of the current stage in the whole
        self._done = 0.0  # what all finished stages made up
        self._told = 0.0
        self.parts = self.lods = 1
        self.seconds: dict[str, float] = {}
        self.peak_rss_mib: dict[str, float] = {}
        self.peak_gpu_mib: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Everything inside belongs to this stage; from "surface" to "bake" they run once per part or more."""
        self._stage = next(iter(people_in.STAGES)) if name == "invert" else name
        runs = {"surface": self.parts, "clean": self.parts}
        runs |= dict.fromkeys(("simplify", "unwrap", "bake"), self.parts * self.lods)
        self._share = self._shares[name] / runs.get(name, 1)
        self.step(name, 0.0)
        _reset_peak_rss()
        if on_gpu := torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        yield
        if on_gpu:
            torch.cuda.synchronize()
            mib = torch.cuda.max_memory_allocated() / 2**20
            self.peak_gpu_mib[name] = round(max(self.peak_gpu_mib.get(name, 0.0), mib), 1)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
        self.peak_rss_mib[name] = max(self.peak_rss_mib.get(name, 0.0), _peak_rss_mib())
        self.step(name, 1.0)
        self._done += self._share

    def step(self, stage: str, fraction: float) -> None:
        """What the stages call: `fraction` of the current stage, under whatever name they give it; those of the
        inversion are reported under their own."""
        if self._stage in people_in.STAGES and stage in people_in.STAGES:
            self._stage = stage
        whole = self._done + self._share * min(max(fraction, 0.0), 1.0)
        self._told = min(max(self._told, whole), 1.0)  # sums of shares differ in their last digit
        self._report(self._stage, self._told)

    def stats(self) -> dict[str, dict[str, Any]]:
        return {
            "seconds": {name: round(s, 4) for name, s in self.seconds.items()} | {
                "total": round(sum(self.seconds.values()), 4)},
            "peak_rss_mib": {name: round(mib, 1) for name, mib in self.peak_rss_mib.items()},
            "peak_gpu_mib": self.peak_gpu_mib,
            "counts": self.counts,
        }  # fmt: skip


def _reset_peak_rss() -> None:
    """Start the kernel's high-water mark anew (proc(5), clear_refs, value 5); Linux only."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _peak_rss_mib() -> float:
    """Most resident memory since the reset, on Linux; elsewhere what is resident now."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 1024
    return psutil.Process().memory_info().rss / 2**20
