# SPDX-License-Identifier: GPL-3.0-or-later
"""The whole backend as users run it: command line, real socket, real worker, capsule people."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image, ImageDraw

from backend import __version__, families, packet
from tests.faults.harness import REPOSITORY, Backend, new_id

HAS_BPY = importlib.util.find_spec("bpy") is not None
COMMAND = ["-m", "backend", "serve", "--json", "--device", "cpu"]
SMALL = {"grid_resolution": 48, "faces": 2000, "texture_size": 512}
TINY = {"grid_resolution": 16, "faces": 500, "texture_size": 512, "parameters": {"single": True}}


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    made = Backend(tmp_path_factory.mktemp("home"), command=COMMAND).wait_ready()
    yield made
    assert "Traceback" not in made.stop()
    assert made.process.returncode == 0


@pytest.fixture(scope="module")
def person(backend: Backend) -> tuple[str, bytes]:
    """A job that is done, and its packet."""
    job_id = backend.submit(5, **SMALL)
    status = backend.wait(job_id)
    assert status["state"] == "done", status
    return job_id, backend.result(job_id)


def test_server_needs_no_torch() -> None:
    code = "import sys, backend.server, backend.__main__; sys.exit('torch' in sys.modules or 'bpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_ready_line_and_runtime_file(backend: Backend) -> None:
    assert set(backend.said) == {"port", "pid", "runtime_file"}
    assert backend.said["pid"] == backend.process.pid
    runtime = json.loads((backend.home / "run" / "backend.json").read_text())
    assert set(runtime) == {"protocol", "version", "pid", "port", "token", "started"}
    assert len(runtime["token"]) >= 43  # 256 bits


def test_second_start_finds_the_first(backend: Backend) -> None:
    second = Backend(backend.home, command=COMMAND)
    assert second.wait_ready().said == backend.said
    assert second.process.wait(60) == 0
    second.stop()


def test_seed_to_closed_person_over_the_socket(backend: Backend, person: tuple[str, bytes]) -> None:
    asset = packet.loads(person[1])
    (part,) = asset.parts
    mesh = trimesh.Trimesh(part.vertices, part.faces, process=False)
    assert mesh.is_watertight
    assert mesh.is_winding_consistent
    assert mesh.volume > 0.02  # cubic metres
    assert len(part.faces) == pytest.approx(2000, rel=0.02)
    assert part.vertices[:, 1].min() == 0
    assert asset.meta["recipe"]["seed"] == 5
    stats = backend.get(f"/v1/jobs/{person[0]}/stats")
    assert {"sample", "surface", "bake", "total", "write"} <= set(stats["seconds"])


def test_same_seed_same_bytes_and_events(backend: Backend, person: tuple[str, bytes]) -> None:
    client = new_id()
    with backend.events(client) as events:
        job_id = backend.submit(5, client, **SMALL)
        seen = []
        for event in events:
            assert event["id"] == job_id
            seen.append(event)
            if event["state"] not in ("queued", "running"):
                break
    assert seen[-1]["state"] == "done"
    fractions = [event["fraction"] for event in seen]
    assert fractions == sorted(fractions)
    assert {"surface", "bake"} <= {event["stage"] for event in seen}
    assert any(event["eta_s"] is not None for event in seen)
    assert backend.result(job_id) == person[1]


def test_glb(backend: Backend, person: tuple[str, bytes]) -> None:
    status, headers, data = backend.call("GET", f"/v1/jobs/{person[0]}/result?format=glb")
    assert (status, headers["content-type"]) == (200, "model/gltf-binary")
    assert data == packet.to_glb(packet.loads(person[1]))
    (mesh,) = trimesh.load(io.BytesIO(data), file_type="glb").geometry.values()
    vertices = packet.loads(person[1]).parts[0].vertices
    assert np.allclose(mesh.bounds, [vertices.min(0), vertices.max(0)], atol=1e-6)
    assert backend.error("GET", f"/v1/jobs/{person[0]}/result?format=exe") == (422, "invalid_request")


def test_obj_is_a_zip_with_its_textures(backend: Backend, person: tuple[str, bytes]) -> None:
    status, headers, data = backend.call("GET", f"/v1/jobs/{person[0]}/result?format=obj")
    assert (status, headers["content-type"]) == (200, "application/zip")
    assert headers["content-disposition"] == f'attachment; filename="person-{person[0][:8]}.zip"'
    assert backend.call("GET", f"/v1/jobs/{person[0]}/result?format=obj")[2] == data, "the same bytes again"
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        names = set(archive.namelist())
        obj, mtl = archive.read("human.obj").decode(), archive.read("human.mtl").decode()
    assert {line.split()[-1] for line in mtl.splitlines() if line.startswith(("map_", "norm "))} <= names
    part = packet.loads(person[1]).parts[0]
    points = np.array([line.split()[1:] for line in obj.splitlines() if line.startswith("v ")], float)
    assert np.allclose(points, part.vertices, atol=1e-5)
    _, _, unreal = backend.call("GET", f"/v1/jobs/{person[0]}/result?format=obj&preset=unreal")
    with zipfile.ZipFile(io.BytesIO(unreal)) as archive:
        lines = archive.read("human.obj").decode().splitlines()
    tall = np.array([line.split()[1:] for line in lines if line.startswith("v ")], float)
    assert np.ptp(tall[:, 2]) == pytest.approx(100 * np.ptp(points[:, 1]), rel=1e-4), "centimetres, Z up"
    for wrong in ("format=obj&lod=1", "format=obj&preset=quake"):
        assert backend.error("GET", f"/v1/jobs/{person[0]}/result?{wrong}") == (422, "invalid_request")


@pytest.mark.skipif(not HAS_BPY, reason="needs the bpy module")
def test_blenders_formats_through_the_server(backend: Backend, person: tuple[str, bytes]) -> None:
    _, _, data = backend.call("GET", f"/v1/jobs/{person[0]}/result?format=fbx&preset=unity")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.read("human.fbx").startswith(b"Kaydara FBX Binary")
    status, headers, data = backend.call("GET", f"/v1/jobs/{person[0]}/result?format=blend")
    assert (status, headers["content-type"]) == (200, "application/x-blender")
    assert data[:4] in (b"\x28\xb5\x2f\xfd", b"BLEN"), "zstd or plain"


def test_without_blenders_module_its_formats_say_what_to_do(tmp_path: Path) -> None:
    """A server whose Python finds no bpy."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'bpy' else find(name, *a)\n"
    )
    made = Backend(tmp_path / "home", command=COMMAND, environment={"PYTHONPATH": str(tmp_path)}).wait_ready()
    try:
        job_id = made.submit(5, **TINY)
        assert made.wait(job_id)["state"] == "done"
        for form in ("usd", "fbx", "blend"):
            status, _, data = made.call("GET", f"/v1/jobs/{job_id}/result?format={form}")
            error = json.loads(data)
            assert (status, error["code"]) == (422, "invalid_request")
            assert f"Writing {form} needs Blender" in error["message"]
            assert "glb or obj" in error["hint"]
        assert made.call("GET", f"/v1/jobs/{job_id}/result?format=obj")[0] == 200
    finally:
        made.stop()


def test_f16_latents_of_another_family(backend: Backend) -> None:
    for latents in ({"nobody/shape": [[0.0]]}, {"body/shape": [[0.0]]}, {"body/shape": [[1e300] * 8]}):
        request = {"family": "capsule", "seed": 5, "latents": latents, **SMALL}
        assert backend.error("POST", "/v1/jobs", {"id": new_id(), "request": request}) == (422, "invalid_latents")
    half = {"single/shape": [[0.0, 0.0]]}  # only the model can tell that more is missing
    failed = backend.wait(backend.submit(5, latents=half, **SMALL))
    assert (failed["state"], failed["error"]["code"]) == ("failed", "invalid_latents")
    assert backend.wait(backend.submit(6, **TINY))["state"] == "done"


def test_edits_words_pose_and_levels_of_detail(backend: Backend) -> None:
    edits = [{"op": "mix", "other": {"seed": 6}, "amount": 0.5}, {"op": "set", "values": {"weight": 0.75}}]
    job_id = backend.submit(5, edits=edits, prompt="1.8 m, beard", pose="sitting", lods=2, separate=True, **SMALL)
    assert backend.wait(job_id)["state"] == "done"
    asset = packet.loads(backend.result(job_id))
    assert asset.meta["attributes"]["weight"] == pytest.approx(0.75, abs=1e-5)
    assert asset.meta["words_ignored"] == ["beard"]
    for lod in range(2):
        status, _, data = backend.call("GET", f"/v1/jobs/{job_id}/result?format=glb&lod={lod}")
        assert (status, data) == (200, packet.to_glb(asset, lod))
    assert backend.error("GET", f"/v1/jobs/{job_id}/result?format=glb&lod=2") == (422, "invalid_request")
    for wrong in ({"edits": [{"op": "fly"}]}, {"edits": [{"op": "remove", "parts": ["nose"]}]}, {"lods": 0},
                  {"edits": [{"op": "set", "values": {"height_m": 9}}]}, {"edits": edits * 33},
                  {"pose": "flying"}):  # fmt: skip
        body = {"id": new_id(), "request": {"family": "capsule", **wrong}}
        assert backend.error("POST", "/v1/jobs", body) == (422, "invalid_request")


def test_families_publish_what_can_be_asked_for(backend: Backend) -> None:
    found = {family["name"]: family for family in backend.get("/v1/families")}
    capsule = found["capsule"]
    assert capsule["parts"] == ["body", "single"]
    assert capsule["codes"]["body/shape"] == {"size": 8, "normal": True, "rows": 1}
    height = next(a for a in capsule["attributes"] if a["name"] == "height_m")
    assert (height["kind"], height["low"], height["high"], height["unit"]) == ("number", 1.5, 1.95, "m")
    assert found["people"]["parts"] == ["body", "shoes", "bottom", "top", "hair", "accessory"]
    assert {"rest", "sitting"} <= set(capsule["poses"])


def test_a_photo_becomes_a_person_and_is_made_again_from_the_packet(backend: Backend) -> None:
    photo = Image.new("RGBA", (200, 300))
    draw = ImageDraw.Draw(photo)
    draw.ellipse((80, 20, 120, 65), (200, 150, 120, 255))
    draw.rectangle((65, 60, 135, 170), (180, 30, 30, 255))
    draw.rectangle((70, 170, 130, 280), (30, 40, 90, 255))

    def send(data: bytes) -> str:
        status, _, said = backend.call("POST", "/v1/images", data, {**backend.headers, "Content-Type": "image/png"})
        assert status == 200
        return json.loads(said)["id"]

    out = io.BytesIO()
    photo.save(out, "PNG")
    asked = {"photos": [{"image": send(out.getvalue())}], "inversion": {"steps": 2}, **SMALL, "maps": "color"}
    job_id = backend.submit(0, **asked)
    assert backend.wait(job_id)["state"] == "done"
    asset = packet.loads(backend.result(job_id))
    assert asset.meta["photo"]["box"] == [65, 20, 136, 281]
    assert asset.rig is not None
    assert asset.rig.rotations is not None
    recipe = {k: v for k, v in asset.meta["recipe"].items() if k not in ("version", "weights_sha256", "family", "seed")}
    again = backend.submit(
        99, latents={name: rows.tolist() for name, rows in asset.latents.items()},
        latent_maps={name: send(png) for name, png in asset.maps.items()}, **recipe,
    )  # fmt: skip
    assert backend.wait(again)["state"] == "done"
    made = packet.loads(backend.result(again))
    assert made.parts[0].base_color_png == asset.parts[0].base_color_png
    assert np.array_equal(made.parts[0].vertices, asset.parts[0].vertices)
    empty = io.BytesIO()
    Image.new("RGBA", (200, 300)).save(empty, "PNG")
    failed = backend.wait(backend.submit(0, photos=[{"image": send(empty.getvalue())}], **TINY))
    assert (failed["state"], failed["error"]["code"]) == ("failed", "no_person_found")


def test_cancel_between_steps(backend: Backend) -> None:
    job_id = backend.submit(5, grid_resolution=512, faces=200_000, texture_size=4096)
    backend.wait(job_id, "running")
    worker = backend.worker()
    assert backend.call("DELETE", f"/v1/jobs/{job_id}")[0] == 200
    assert backend.wait(job_id)["state"] == "cancelled"
    assert backend.worker() == worker  # it listened
    assert backend.wait(backend.submit(6, **TINY))["state"] == "done"


def test_f24_killed_worker_is_replaced(backend: Backend, person: tuple[str, bytes]) -> None:
    job_id = backend.submit(5, **SMALL)
    backend.wait(job_id, "running", "done")
    backend.worker().kill()
    assert backend.wait(job_id)["state"] == "done"
    assert backend.result(job_id) == person[1]


def test_lists(backend: Backend) -> None:
    health = backend.get("/v1/health")
    assert (health["version"], health["device"], health["pid"]) == (__version__, "cpu", backend.process.pid)
    assert [family["name"] for family in backend.get("/v1/families")] == [info.name for info in families.infos()]
    assert [found["name"] for found in backend.get("/v1/weights") if found["here"]] == [
        "people", "people_encoder", "sifu"]  # fmt: skip
    assert len(backend.get("/v1/jobs")) >= len(backend.get("/v1/jobs?client=test")) >= 1


def test_openapi_page_is_whole(backend: Backend) -> None:
    page = backend.get("/v1/openapi.json")
    assert {(path, method) for path, methods in page["paths"].items() for method in methods} == {
        ("/v1/health", "get"), ("/v1/families", "get"), ("/v1/weights", "get"), ("/v1/jobs", "get"),
        ("/v1/jobs", "post"), ("/v1/jobs/{job_id}", "get"), ("/v1/jobs/{job_id}", "delete"),
        ("/v1/jobs/{job_id}/result", "get"), ("/v1/jobs/{job_id}/stats", "get"), ("/v1/events", "get"),
        ("/v1/worker/restart", "post"), ("/v1/shutdown", "post"), ("/v1/images", "post"),
    }  # fmt: skip
    schemas = page["components"]["schemas"]
    assert {"JobRequest", "GenerateRequest", "JobStatus", "Health", "Error"} <= set(schemas)
    assert schemas["GenerateRequest"]["additionalProperties"] is False
    assert schemas["GenerateRequest"]["properties"]["seed"]["maximum"] == 2**53 - 1
