# SPDX-License-Identifier: GPL-3.0-or-later
"""`populace bench`: what a person costs, stage by stage, and what the fast parts save against the plain ones.

Every figure is a median of `repeat` warm runs, except those of the slow twins, which run once. Fast and slow are timed
in one run, on the same field and mesh, so that their ratio means something on a machine that does other things too.

Families whose networks are large would take hours on a CPU: what has taken `PATIENCE` seconds is not repeated, and what
would take longer is left out, and said.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any

import psutil
import torch

from backend import __version__, families, packet, pipeline
from backend.families.base import FamilyModel, HumanField, Latents
from backend.geometry import reference
from backend.geometry.clean import clean
from backend.geometry.simplify import simplify
from backend.geometry.tetgrid import Lattice, extract_surface
from backend.geometry.unwrap import unwrap
from backend.progress import Progress
from backend.protocol import GenerateRequest, PopulaceError
from backend.settings import Settings

GROWTH = (128, 256, 512)
RATIO_GRID = 256
PATIENCE = 120.0  # seconds, of the persons, of each grid, of each slow twin
STEP_PATIENCE = 10.0  # of each step of a family's own

Made = tuple[packet.HumanAsset, dict[str, dict[str, Any]]]
"""A person and the stats of its making, see `pipeline.generate`."""
RATIO_FACES = 30000


def run(request: GenerateRequest, settings: Settings, repeat: int, quick: bool) -> dict[str, Any]:
    """The whole report. `quick` leaves out growth and ratios, which take minutes."""
    with Progress(plain=True) as progress:
        progress.show("loading the model", 0)
        begin = time.perf_counter()
        own = _of_family(request.family)
        try:
            model = families.load(request.family, settings.device, settings)
        except PopulaceError as error:
            if own is None or error.code != "weights_missing":
                raise
            model = own.stand_in(torch.device(families.resolve_device(settings.device)))
        report: dict[str, Any] = {"machine": _machine(model.device), "request": request.model_dump(mode="json"),
                                  "repeat": repeat, "load_s": round(time.perf_counter() - begin, 3),
                                  "random_weights": own is not None and model.weights_sha256 is None}  # fmt: skip
        if own is not None:
            progress.show("the family's networks", 0.02)
            report["networks"] = own.run(model, repeat)
        left_out: list[str] = []
        progress.show("warming up", 0.05)
        first = pipeline.generate(request, model)
        slow = first[1]["seconds"]["total"] > PATIENCE
        progress.show("one person", 0.1)
        report["person"] = _person(request, model, repeat, first if slow else None)
        progress.show("the server", 0.3)
        report["server_ready_s"] = _server_ready(repeat)
        if find_spec("bpy"):
            progress.show("insertion into Blender", 0.35)
            report["insert_s"] = _insert(first[0], repeat)
        if not quick and slow:
            left_out.append(f"growth and ratios, after {first[1]['seconds']['total']:.0f} s for one person")
        elif not quick:
            progress.show("growth with the grid", 0.4)
            report["growth"] = []
            for grid in GROWTH:
                took = report["growth"][-1]["seconds"]["total"] if report["growth"] else 0.0
                if took > PATIENCE / 4:  # one twice as fine takes four times as long and more
                    left_out.append(f"growth at {grid}, after {took:.0f} s for the one before it")
                    break
                report["growth"].append(_growth(request, model, grid, repeat))
            progress.show("ratios to the plain ways", 0.7)
            report["ratios"] = _ratios(request, model, repeat, left_out)
        report["left_out"] = left_out
        progress.show("done", 1)
    return report


def _of_family(name: str) -> Any:
    """The family's own measurements, if it has any: `stand_in(device)`, a model of random weights of the published
    sizes for when the user has none, and `run(model, repeat)`, rows of its steps."""
    where = f"backend.families.{name}.bench"
    return importlib.import_module(where) if find_spec(where) else None


def _person(request: GenerateRequest, model: FamilyModel, repeat: int, only: Made | None = None) -> dict[str, Any]:
    """Medians over different seeds; peak memory is the highest of all runs. `only` is a run that none shall follow."""
    runs, packets, sizes, started = [], [], [], time.perf_counter()
    for i in range(1 if only else repeat):
        if i and time.perf_counter() - started > PATIENCE:
            break
        asset, stats = only or pipeline.generate(request.model_copy(update={"seed": request.seed + i}), model)
        begin = time.perf_counter()
        sizes.append(len(packet.dumps(asset)))
        packets.append(time.perf_counter() - begin)
        runs.append(stats)
    seconds = {stage: _median([r["seconds"][stage] for r in runs]) for stage in runs[0]["seconds"]}
    seconds = {**{stage: s for stage, s in seconds.items() if stage != "total"}, "packet": _median(packets)}
    totals = [r["seconds"]["total"] + p for r, p in zip(runs, packets)]
    return {
        "seconds": {**seconds, "seed to packet": _median(totals)},
        "peak_rss_mib": {stage: max(r["peak_rss_mib"][stage] for r in runs) for stage in runs[0]["peak_rss_mib"]},
        "peak_gpu_mib": {stage: max(r["peak_gpu_mib"][stage] for r in runs) for stage in runs[0]["peak_gpu_mib"]},
        "faces": _median([r["counts"]["faces"] for r in runs]),
        "packet_mb": round(_median(sizes) / 1e6, 2), "runs": len(runs),
    }


def _growth(request: GenerateRequest, model: FamilyModel, grid: int, repeat: int) -> dict[str, Any]:
    """Seconds per stage and field evaluations at one grid resolution, everything else equal."""
    counted = _CountedModel(model)
    request = request.model_copy(update={"grid_resolution": grid})
    runs, started = [], time.perf_counter()
    while len(runs) < min(repeat, 3) and (not runs or time.perf_counter() - started < PATIENCE):
        runs.append(pipeline.generate(request, counted)[1])
    return {
        "grid_resolution": grid,
        "sdf_evaluations": counted.evaluations // len(runs),
        "fine_faces": runs[0]["counts"]["fine_faces"],
        "seconds": {stage: _median([r["seconds"][stage] for r in runs]) for stage in runs[0]["seconds"]},
        "peak_rss_mib": max(max(r["peak_rss_mib"].values()) for r in runs),
    }


@torch.no_grad()
def _ratios(request: GenerateRequest, model: FamilyModel, repeat: int, left_out: list[str]) -> dict[str, Any]:
    """Marching the dense grid against the hierarchical way; xatlas with default options against the atlas."""
    field = model.decode(model.sample(request.seed, request.truncation_psi, request.parameters))[0]
    nodes = Lattice.of(field.bounds, RATIO_GRID, field.focus).cells + 1
    some = torch.zeros(10_000, 3, device=model.device)
    expected = _timed(lambda: field.sdf(some), 2) * math.prod(nodes.tolist()) / len(some)
    if expected > PATIENCE:
        left_out.append(f"ratios at {RATIO_GRID}: the plain way would take {expected:.0f} s")
        return {}
    fast = _timed(lambda: extract_surface(field, RATIO_GRID), repeat)
    dense = _timed(lambda: reference.extract_dense(field, RATIO_GRID), 1)
    found = {"surface": {"grid_resolution": RATIO_GRID, "hierarchical_s": fast, "dense_s": dense,
                         "ratio": round(dense / fast, 1)}}  # fmt: skip
    if find_spec("xatlas"):
        mesh = simplify(clean(extract_surface(field, RATIO_GRID)), RATIO_FACES)
        region = field.region(mesh.points)
        atlas = _timed(lambda: unwrap(mesh, region, request.texture_size), repeat)
        slow = _timed(lambda: reference.unwrap_by_xatlas(mesh), 1)
        found["unwrap"] = {"faces": len(mesh.faces), "atlas_s": atlas, "xatlas_default_s": slow,
                           "ratio": round(slow / atlas, 1)}  # fmt: skip
    return found


class _CountedModel:
    """A model whose fields count how many points `sdf` is asked for."""

    def __init__(self, model: FamilyModel) -> None:
        self._model = model
        self.name, self.device, self.weights_sha256 = model.name, model.device, model.weights_sha256
        self.sample, self.describe, self.edit = model.sample, model.describe, model.edit
        self.evaluations = 0

    def decode(self, latents: Latents, separate: bool = False, **chosen: Any) -> Sequence[HumanField]:
        return [self._counted(field) for field in self._model.decode(latents, separate, **chosen)]

    def _counted(self, field: Any) -> HumanField:
        ask = field.sdf

        def sdf(points: torch.Tensor) -> torch.Tensor:
            self.evaluations += len(points)
            return ask(points)

        field.sdf = sdf
        return field


def _server_ready(repeat: int) -> float:
    """Seconds from starting the process to its ready line."""
    times = []
    for _ in range(min(repeat, 3)):
        with tempfile.TemporaryDirectory() as home:
            command = [sys.executable, "-m", "backend", "serve", "--json", "--stay"]
            begin = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                       env=os.environ | {"POPULACE_HOME": home})  # fmt: skip
            assert process.stdout is not None
            json.loads(process.stdout.readline())
            times.append(time.perf_counter() - begin)
            process.terminate()
            process.wait()
            process.stdout.close()
    return _median(times)


def _insert(asset: packet.HumanAsset, repeat: int) -> float:
    """Seconds of the add-on's insertion, in a process of its own as in life."""
    data = packet.dumps(asset)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_insert_times, data, repeat).result()


def _insert_times(data: bytes, repeat: int) -> float:
    from backend import studio
    from blender_addon.packet import read

    bpy = studio.start()
    human = read(data)
    times = [studio.insert(bpy, human, i, repeat + 1)[0] for i in range(repeat + 1)]
    return _median(times[1:])  # the first also loads Blender's own modules


def _timed(work: Callable[[], object], repeat: int) -> float:
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        work()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return _median(times)


def steps_timed(
    steps: Sequence[tuple[str, Callable[[], object], int]], device: torch.device, patience: float = STEP_PATIENCE
) -> list[dict[str, Any]]:
    """A row for each (name, work, times): seconds, the median of so many warm runs, and resident memory afterwards.
    What is to run once runs cold; no step is repeated after `patience` seconds, and a step without a warm run shows its
    first."""
    rows = []
    for name, work, times in steps:
        seconds: list[float] = []
        while len(seconds) < (times + 1 if times > 1 else 1) and sum(seconds) < patience:
            begin = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        warm = sorted(seconds[1:] or seconds)
        rows.append({"step": name, "seconds": round(warm[len(warm) // 2], 4), "runs": len(warm),
                     "rss_mib": round(psutil.Process().memory_info().rss / 2**20)})  # fmt: skip
    return rows


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 4)


def _machine(device: torch.device) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {"populace": __version__, "torch": torch.__version__, "python": platform.python_version(),
            "platform": platform.platform(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
            "device": str(device), "gpu": gpu, "load_before": load}  # fmt: skip


def as_text(report: dict[str, Any]) -> str:
    machine, person = report["machine"], report["person"]
    lines = [
        f"{machine['platform']}, {machine['cpus']} CPUs, {machine['threads']} threads, device {machine['device']}, "
        f"load {machine['load_before']}",
        f"{report['request']['family']}, {report['request']['grid_resolution']} along the height, "
        f"{report['request']['faces']} faces, {report['request']['texture_size']} px; median of {person['runs']}",
        "", f"{'stage':<16}{'seconds':>9}{'peak MiB':>10}",
    ]  # fmt: skip
    for stage, seconds in person["seconds"].items():
        peak = person["peak_rss_mib"].get(stage)
        lines.append(f"{stage:<16}{seconds:>9.3f}" + (f"{peak:>10.0f}" if peak else ""))
    lines += ["", f"server ready     {report['server_ready_s']:.2f} s"]
    if "insert_s" in report:
        lines.append(f"into Blender     {1000 * report['insert_s']:.0f} ms")
    if "growth" in report:
        lines += ["", f"{'grid':>5}{'evaluations':>13}{'triangles':>11}{'surface s':>11}{'total s':>9}{'MiB':>7}"]
        for row in report["growth"]:
            lines.append(f"{row['grid_resolution']:>5}{row['sdf_evaluations']:>13,}{row['fine_faces']:>11,}"
                         f"{row['seconds']['surface']:>11.3f}{row['seconds']['total']:>9.3f}"
                         f"{row['peak_rss_mib']:>7.0f}")  # fmt: skip
    if "networks" in report:
        kind = "random weights of the published sizes" if report["random_weights"] else "the imported weights"
        lines += ["", f"{report['request']['family']} with {kind}"]
        for row in report["networks"]:
            if "seconds" in row:
                shown = f"{row['seconds']:>9.3f} s{row['rss_mib']:>8.0f} MiB"
            else:
                shown = f"{row['ratio']:>9.1f}x" if "ratio" in row else f"{row['text']:>10}"
            lines.append(f"{row['step']:<36}{shown}")
    for name, row in report.get("ratios", {}).items():
        fast, slow = list(row.items())[1:3]
        lines.append(f"{name}: {slow[0][:-2]} {slow[1]:.2f} s, {fast[0][:-2]} {fast[1]:.3f} s: {row['ratio']}x")
    lines += [f"left out: {what}" for what in report["left_out"]]
    return "\n".join(lines)
