# SPDX-License-Identifier: GPL-3.0-or-later
"""Images that are sent: who may, how many, what they may be, and that none stays. F13 and F14 as in the list."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backend.photo import album
from backend.photo.album import Album, Folder, ImageStore
from backend.protocol import MAX_IMAGE_BYTES, PopulaceError
from tests.contract import golden
from tests.faults.harness import Backend, new_id, until
from tests.faults.stand_in_worker import SLOW

PICTURE = golden.png(40, 30, (1, 2, 3))
ID = hashlib.sha256(PICTURE).hexdigest()


def head(backend: Backend, kind: str = "image/png") -> dict[str, str]:
    return {**backend.headers, "Content-Type": kind}


def send(backend: Backend, data: bytes = PICTURE) -> dict[str, Any]:
    status, _, said = backend.call("POST", "/v1/images", data, head(backend))
    assert status == 200, said
    return json.loads(said)


def kept(backend: Backend) -> set[str]:
    folder = backend.home / "data" / "images"
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def test_the_same_image_is_kept_once_and_only_for_its_user(backend: Backend) -> None:
    assert send(backend) == send(backend) == {"id": ID, "width": 40, "height": 30}
    assert {path for path in kept(backend) if ID[:8] in path} == {ID}
    folder = backend.home / "data" / "images"
    assert (folder / ID).read_bytes() == PICTURE
    if os.name == "posix":
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((folder / ID).stat().st_mode) == 0o600
    backend.still_works()


@pytest.mark.parametrize("kind", ["text/plain", "application/json", "multipart/form-data; boundary=a", "image/gif",
                                  "application/x-www-form-urlencoded", ""])  # fmt: skip
def test_f03_other_types_are_refused(backend: Backend, kind: str) -> None:
    assert backend.error("POST", "/v1/images", PICTURE, head(backend, kind)) == (422, "invalid_request")


def test_f01_f04_nobody_else_may(backend: Backend) -> None:
    good = head(backend)
    without = {name: value for name, value in good.items() if name != "Authorization"}
    assert backend.error("POST", "/v1/images", PICTURE, without) == (401, "unauthorized")
    assert backend.error("POST", "/v1/images", PICTURE, {**good, "Origin": "null"}) == (403, "forbidden")
    assert backend.error("POST", "/v1/images", PICTURE, {**good, "Host": "evil.example"}) == (403, "forbidden")
    assert backend.error("GET", "/v1/images") == (405, "method_not_allowed")
    assert backend.error("GET", f"/v1/images/{ID}") == (404, "not_found")
    backend.still_works()


def test_f13_what_is_no_image_is_refused_and_not_kept(backend: Backend) -> None:
    before = kept(backend)
    for data in (
        b"",
        b"text " * 99,
        PICTURE[:20],
        b"GIF89a" + bytes(99),
        b"\xff\xd8\xff\xe0",
        golden.png(4, 4, (0, 0, 0)),
    ):
        assert backend.error("POST", "/v1/images", data, head(backend)) == (422, "image_unreadable")
    assert kept(backend) == before
    backend.still_works()


def test_f14_bombs_are_refused_unread(backend: Backend) -> None:
    bomb = PICTURE[:16] + (20_000).to_bytes(4, "big") * 2 + PICTURE[24:]
    memory = backend.server.memory_info().rss
    assert backend.error("POST", "/v1/images", bomb, head(backend)) == (413, "too_large")
    assert backend.server.memory_info().rss - memory < 8 << 20
    backend.still_works()


def test_f07_endless_and_lying_bodies(start: Callable[..., Backend]) -> None:
    backend = start(constants={"backend.server.MAX_IMAGE_BYTES": 1 << 20})
    lines = "".join(f"{name}: {value}\r\n" for name, value in head(backend).items())
    begin = f"POST /v1/images HTTP/1.1\r\n{lines}"
    with backend.raw(f"{begin}Content-Length: {200 << 20}\r\n\r\n".encode()) as sock:
        assert sock.recv(99).startswith(b"HTTP/1.1 413 ")
    with backend.raw(f"{begin}Transfer-Encoding: chunked\r\n\r\n".encode()) as sock:
        said = b""
        try:
            for _ in range(64):
                sock.sendall(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
        except OSError:  # it has hung up
            pass
        try:
            said = sock.recv(99)
        except OSError:
            said = b"HTTP/1.1 413 "  # reset before it could be read
        assert said.startswith(b"HTTP/1.1 413 ")
    with backend.raw(f"{begin}Content-Length: 5000\r\n\r\n".encode() + PICTURE[:50]):
        pass  # gone in the middle
    until(lambda: not kept(backend), "something is left of what was refused")
    backend.still_works()
    assert "Traceback" not in backend.stop()


def test_a_job_needs_the_images_it_names(backend: Backend) -> None:
    missing = {"family": "capsule", "photos": [{"image": "0" * 64}]}
    assert backend.error("POST", "/v1/jobs", {"id": new_id(), "request": missing}) == (422, "image_missing")
    send(backend)
    for request in ({"photos": [{"image": ID, "mask": "1" * 64}]},
                    {"edits": [{"op": "mix", "amount": 0.5, "other": {
                        "latents": {"body/shape": [[0.0] * 8], "body/tex": [[0.0] * 36]},
                        "latent_maps": {"body/photo": "2" * 64}}}]}):  # fmt: skip
        body = {"id": new_id(), "request": {"family": "capsule", **request}}
        assert backend.error("POST", "/v1/jobs", body) == (422, "image_missing")
    assert backend.wait(backend.submit(3, photos=[{"image": ID}]))["state"] == "done"
    for wrong in ({"photos": [{"image": "../../etc/passwd"}]}, {"photos": [{"image": ID.upper()}]},
                  {"photos": [{"image": ID, "url": "x"}]}, {"photos": [{"image": ID}] * 9}, {"pose": "photo"},
                  {"photos": [{"image": ID}], "latents": {"body/shape": [[0.0] * 8]}},
                  {"latent_maps": {"body/photo": ID}}, {"latent_maps": {"body/depth": ID}},
                  {"inversion": {"steps": -1}}, {"inversion": {"seconds": 0}},
                  {"inversion": {"refine": "magic"}}):  # fmt: skip
        body = {"id": new_id(), "request": {"family": "capsule", **wrong}}
        assert backend.error("POST", "/v1/jobs", body) == (422, "invalid_request"), wrong
    backend.still_works()


def test_images_go_with_the_server(start: Callable[..., Backend], tmp_path: Path) -> None:
    backend = start(home=tmp_path / "home")
    send(backend)
    assert kept(backend) == {ID}
    backend.stop()
    assert not (tmp_path / "home" / "data" / "images").exists()


def test_f29_after_a_kill_only_what_waiting_jobs_need_is_left(start: Callable[..., Backend], tmp_path: Path) -> None:
    backend = start(home=tmp_path / "home")
    other = golden.png(50, 60, (9, 9, 9))
    send(backend)
    send(backend, other)
    job = backend.submit(SLOW + 60_000, photos=[{"image": ID}])
    (backend.home / "data" / "images" / ".0.partial").write_bytes(b"half")
    backend.wait(job, "running")
    backend.process.kill()
    backend.process.wait()
    again = start(home=tmp_path / "home")
    assert kept(again) == {ID}
    again.call("DELETE", f"/v1/jobs/{job}")
    assert again.wait(job)["state"] == "cancelled"


@pytest.fixture
def clock() -> list[float]:
    return [1000.0]


def filled(folder: Path, clock: list[float], count: int) -> ImageStore:
    store = ImageStore(folder, lambda: clock[0])
    folder.mkdir()
    for i in range(count):
        incoming = store.incoming()
        incoming.write(golden.png(20 + i, 20, (1, 1, 1)))
        found = incoming.measure()
        assert (found.width, found.height) == (20 + i, 20)
        store.accept(found.id, incoming.size)
        incoming.keep()
        incoming.discard()  # does nothing any more
        clock[0] += 1
    return store


def test_unused_images_go_after_an_hour(tmp_path: Path, clock: list[float]) -> None:
    store = filled(tmp_path / "images", clock, 4)
    first, second, third, last = sorted((path.name for path in store.folder.iterdir()), key=store._used.__getitem__)
    clock[0] += album.MAX_UNUSED_S
    store.need([second])
    gone = [path.name for path in store.stale({third})]
    assert gone == [first, last]
    with pytest.raises(PopulaceError) as caught:
        store.need([second, first])
    assert caught.value.code == "image_missing"
    store.need([second, third])
    clock[0] += 2 * album.MAX_UNUSED_S
    assert len(store.stale(set())) == 1  # what was needed last always stays


def test_too_many_images_push_out_the_oldest(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(album, "MAX_STORE_IMAGES", 3)
    store = filled(tmp_path / "images", clock, 5)
    order = sorted((path.name for path in store.folder.iterdir()), key=store._used.__getitem__)
    assert [path.name for path in store.stale({order[0]})] == order[1:3]
    monkeypatch.setattr(album, "MAX_STORE_BYTES", 1)
    assert [path.name for path in store.stale({order[0]})] == [order[3]]


def test_what_changed_on_the_disk_is_no_photo_any_more(tmp_path: Path) -> None:
    path = tmp_path / ID
    path.write_bytes(PICTURE)
    assert Folder(tmp_path).read(ID) == PICTURE
    own = Album()
    assert own.add(path) == ID
    assert own.paths() == {ID: str(path)}
    path.write_bytes(PICTURE + b"\0")
    for images in (Folder(tmp_path), own):
        with pytest.raises(PopulaceError) as caught:
            images.read(ID)
        assert caught.value.code == "image_missing"
    path.unlink()
    with pytest.raises(PopulaceError):
        Folder(tmp_path).read(ID)
    huge = tmp_path / "huge.png"
    with huge.open("wb") as file:
        file.truncate(MAX_IMAGE_BYTES + 1)
    with pytest.raises(PopulaceError, match="64 MiB") as caught:
        own.add(huge)
    assert caught.value.code == "too_large"
