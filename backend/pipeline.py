# SPDX-License-Identifier: GPL-3.0-or-later
"""The main road: a request becomes latents, latents a field, the field a textured mesh. Read `generate` first."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from scipy.sparse import coo_array, csgraph

from backend import __version__, families
from backend.families.base import FamilyModel, HumanField, Latents, Step, no_step
from backend.geometry.bake import bake
from backend.geometry.clean import clean
from backend.geometry.mesh import Textures, TriMesh, vertex_normals
from backend.geometry.simplify import simplify
from backend.geometry.tetgrid import extract_surface
from backend.geometry.unwrap import unwrap
from backend.packet import HumanAsset, Part, RigArrays
from backend.protocol import GenerateRequest, PopulaceError

# Share of each stage in the whole, as measured on a CPU; it only shapes the progress bar.
STAGES = {"sample": 0.02, "decode": 0.1, "surface": 0.4, "clean": 0.06, "simplify": 0.06, "unwrap": 0.06,
          "bake": 0.2, "encode": 0.1}  # fmt: skip


@torch.no_grad()
def generate(
    request: GenerateRequest, model: FamilyModel, step: Step = no_step
) -> tuple[HumanAsset, dict[str, dict[str, Any]]]:
    """Run one request. `step(stage, fraction of the whole)` reports progress, raises `Cancelled` to stop.

    Returns the person, the same for the same request on the same device, and the run's stats: seconds, peak memory
    and counts per stage. Raises `invalid_latents`, `invalid_request` and `empty_surface`.
    """
    clock = _Clock(step)
    with clock.stage("sample"):
        latents = choose_latents(request, model)
    with clock.stage("decode"):
        fields = model.decode(latents)
    clock.parts = len(fields)
    fine = []
    for field in fields:
        with clock.stage("surface"):
            raw = _surface(field, request, clock.step)
        with clock.stage("clean"):
            fine.append(clean(raw))
    total = sum(len(mesh.faces) for mesh in fine)
    made = []
    for field, mesh in zip(fields, fine):
        with clock.stage("simplify"):
            density = field.region_density
            importance = None if density is None else density[field.region(mesh.points)]
            coarse = simplify(mesh, round(request.faces * len(mesh.faces) / total), importance)
        with clock.stage("unwrap"):
            region = field.region(coarse.points)
            coarse = unwrap(coarse, region, request.texture_size, request.unwrap, density)
        with clock.stage("bake"):
            made.append((field, coarse, bake(field, mesh, coarse, request.texture_size, clock.step)))
    with clock.stage("encode"):
        asset = _assemble(made, latents, request, model)
    clock.counts |= {"fine_faces": total, "faces": sum(len(part.faces) for part in asset.parts)}
    return asset, clock.stats()


def choose_latents(request: GenerateRequest, model: FamilyModel) -> Latents:
    """The latents of the seed, with the request's own codes in place of some. Raises `invalid_latents`."""
    families.check_parameters(model.name, request.parameters)
    latents = model.sample(request.seed, request.truncation_psi, request.parameters)
    codes = dict(latents.codes)
    for name, rows in (request.latents or {}).items():
        if name not in codes:
            raise PopulaceError(
                "invalid_latents", f"The family {model.name!r} has no latents called {name!r}.",
                f"It has: {', '.join(sorted(codes))}."
            )  # fmt: skip
        shape = tuple(codes[name].shape)
        if {len(row) for row in rows} != {shape[1]} or len(rows) != shape[0]:
            sizes = "x".join(map(str, (len(rows), len(rows[0]))))
            raise PopulaceError(
                "invalid_latents", f"Latents {name!r} are {sizes} numbers instead of {shape[0]}x{shape[1]}.",
                "Send latents of a person of the same family and version."
            )  # fmt: skip
        codes[name] = torch.tensor(rows, dtype=torch.float32, device=codes[name].device)
        if not torch.isfinite(codes[name]).all():
            raise PopulaceError("invalid_latents", f"Latents {name!r} are too large for float32.", "Send smaller ones.")
    return Latents(latents.family, codes)


def _surface(field: HumanField, request: GenerateRequest, step: Step) -> TriMesh:
    try:
        return extract_surface(field, request.grid_resolution, step)
    except PopulaceError as error:
        if error.code != "empty_surface":
            raise
        raise PopulaceError("empty_surface", f"Seed {request.seed}: {error.message}", error.hint) from None


def _assemble(
    made: Sequence[tuple[HumanField, TriMesh, Textures]], latents: Latents, request: GenerateRequest, model: FamilyModel
) -> HumanAsset:
    """Arrays for the packet: the lowest point of the person on the floor, maps encoded, facts written down."""
    floor = min(float(mesh.vertices[:, 1].min()) for _, mesh, _ in made)
    height = max(float(mesh.vertices[:, 1].max()) for _, mesh, _ in made) - floor
    drop = np.array([0, floor, 0], np.float32)
    maps = [m for _, _, textures in made for m in (textures.base_color, textures.normal)]
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:  # zlib releases the interpreter lock
        pngs = list(pool.map(_png, maps))
    parts, facts = [], []
    for i, (field, mesh, _) in enumerate(made):
        assert mesh.uvs is not None
        assert mesh.face_uvs_idx is not None
        skin = field.skin(mesh.points) if field.rig is not None else None
        parts.append(Part(
            vertices=_numpy(mesh.vertices, np.float32) - drop, faces=_numpy(mesh.faces, np.int32),
            normals=_numpy(vertex_normals(mesh.vertices, mesh.faces), np.float32),
            uvs=_numpy(mesh.uvs, np.float32), face_uvs_idx=_numpy(mesh.face_uvs_idx, np.int32),
            base_color_png=pngs[2 * i], normal_png=pngs[2 * i + 1],
            skin_indices=_numpy(skin[0], np.int32) if skin else None,
            skin_weights=_numpy(skin[1], np.float32) if skin else None,
        ))  # fmt: skip
        facts.append({"name": field.name, **mesh_facts(parts[-1].faces, len(parts[-1].vertices)),
                      "vertices": len(parts[-1].vertices)})  # fmt: skip
    rig = next((field.rig for field, _, _ in made if field.rig is not None), None)
    arrays = None
    if rig is not None:
        arrays = RigArrays(_numpy(rig.heads, np.float32) - drop, _numpy(rig.tails, np.float32) - drop,
                           np.array(rig.parents, np.int32))  # fmt: skip
    meta = {
        "parts": facts,
        "bones": list(rig.names) if rig else [],
        "attributes": {"height_m": round(height, 4)},
        "recipe": {**request.model_dump(mode="json", exclude={"latents"}), "version": __version__,
                   "weights_sha256": model.weights_sha256},
        "stats": {"faces": sum(fact["faces"] for fact in facts), "closed": all(fact["closed"] for fact in facts)},
    }  # fmt: skip
    return HumanAsset(tuple(parts), {k: _numpy(v, np.float32) for k, v in latents.codes.items()}, arrays, meta)


def mesh_facts(faces: np.ndarray[Any, Any], vertex_count: int) -> dict[str, Any]:
    """Faces, connected components, and whether the surface is closed: every directed edge once, with its reverse."""
    edges = np.stack([faces, np.roll(faces, -1, 1)], 2).reshape(-1, 2).astype(np.int64)
    forward = np.sort(edges[:, 0] * vertex_count + edges[:, 1])
    backward = np.sort(edges[:, 1] * vertex_count + edges[:, 0])
    closed = bool((forward == backward).all() and (np.diff(forward) > 0).all())
    graph = coo_array((np.ones(len(edges), bool), (edges[:, 0], edges[:, 1])), shape=(vertex_count, vertex_count))
    return {"faces": len(faces), "closed": closed, "components": int(csgraph.connected_components(graph, False)[0])}


def _png(pixels: torch.Tensor) -> bytes:
    out = io.BytesIO()
    Image.fromarray(_numpy(pixels, np.uint8)).save(out, "PNG", compress_level=1)
    return out.getvalue()


def _numpy(tensor: torch.Tensor, dtype: Any) -> np.ndarray[Any, Any]:
    return tensor.detach().cpu().numpy().astype(dtype)


class _Clock:
    """Turns fractions of stages into a monotone fraction of the whole; measures seconds and peak memory per stage."""

    def __init__(self, step: Step) -> None:
        self._report = step
        self._stage = ""
        self._share = 0.0  # of the current stage in the whole
        self._done = 0.0  # what all finished stages made up
        self._told = 0.0
        self.parts = 1
        self.seconds: dict[str, float] = {}
        self.peak_rss_mib: dict[str, float] = {}
        self.peak_gpu_mib: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Everything inside belongs to this stage; stages after "decode" and before "encode" run once per part."""
        self._stage = name
        self._share = STAGES[name] / (1 if name in ("sample", "decode", "encode") else self.parts)
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
        """What the stages call: `fraction` of the current stage, under whatever name they give it."""
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
