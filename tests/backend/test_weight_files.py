# SPDX-License-Identifier: GPL-3.0-or-later
"""Weights are fetched only when agreed to, go on where they stopped, and count only when whole (F19-F22)."""

from __future__ import annotations

import hashlib
import http.server
import json
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backend import __main__, packet, weight_files, weights, weights_command
from backend.protocol import PopulaceError

DATA = b"".join(packet.dump_tensors({"a": np.arange(50_000, dtype=np.float32)}, {"title": "Ours"}))
REVISION = "0123456789abcdef0123456789abcdef01234567"


class _Hub(http.server.BaseHTTPRequestHandler):
    """Serves `server.data` as a hub does; `server.faults` are what goes wrong, one per request, then nothing."""

    server: Any

    def do_GET(self) -> None:
        server, data = self.server, self.server.data
        server.asked.append((self.path, self.headers.get("Range"), self.headers.get("Authorization")))
        fault = server.faults.pop(0) if server.faults else ""
        if isinstance(fault, int):
            self.send_error(fault)
            return
        if fault == "redirect":
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{server.server_port}/elsewhere")
            self.end_headers()
            return
        asked = self.headers.get("Range", "bytes=0-")
        first = int(asked.split("=")[1][:-1]) if fault != "no range" else 0
        body = data[first:]
        self.send_response(206 if first else 200)
        if first:
            shown = first + 1 if fault == "other part" else first
            self.send_header("Content-Range", f"bytes {shown}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(10**12 if fault == "endless" else len(body)))
        self.end_headers()
        if fault == "flipped":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault == "endless":
            body += b"x" * 5_000_000
        if isinstance(fault, float):
            body = body[: int(len(body) * fault)]
        try:
            self.wfile.write(body)
        except ConnectionError:
            server.turned_away += 1

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.data, server.asked, server.faults, server.turned_away = DATA, [], [], 0
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(weight_files, "PAUSE_S", 0.0)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def manifest(tmp_path: Path) -> weights.Manifest:
    folder = tmp_path / "manifest"
    folder.mkdir()
    (folder / "tiny.toml").write_text(
        'name = "tiny"\ntitle = "Tiny"\nlicence = "RAIL"\nlicence_url = "https://example.org"\nprovenance = "here"\n'
        'embedded = false\nlicence_text = "Do no harm."\n[[files]]\npath = "w.safetensors"\n'
        f'size = {len(DATA)}\nsha256 = "{hashlib.sha256(DATA).hexdigest()}"\n'
        f'repository = "someone/model"\nrevision = "{REVISION}"\n'
    )
    return weights.manifests(folder)[0]


def fetch(manifest: weights.Manifest, tmp_path: Path, **options: Any) -> int:
    weight_files.accept(manifest, tmp_path)
    return weight_files.fetch(manifest, tmp_path, **options)


def whole(manifest: weights.Manifest, tmp_path: Path) -> bool:
    path = manifest.location(manifest.files[0], tmp_path)
    return path.is_file() and path.read_bytes() == DATA and not path.with_name(f"{path.name}.part").exists()


def test_nothing_is_asked_for_before_the_licence_is_accepted(hub: Any, manifest: Any, tmp_path: Path) -> None:
    with pytest.raises(PopulaceError, match="not accepted") as caught:
        weight_files.fetch(manifest, tmp_path)
    assert caught.value.hint.endswith("populace weights accept tiny.")
    assert hub.asked == []
    told: list[float] = []
    assert fetch(manifest, tmp_path, step=lambda name, fraction: told.append(fraction)) == len(DATA)
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert whole(manifest, tmp_path)
    assert hub.asked == [(f"/someone/model/resolve/{REVISION}/w.safetensors", None, None)]  # no token over http
    record = json.loads((tmp_path / "weights/user.json").read_text())["accepted"]["tiny"]
    assert record["sha256"] == hashlib.sha256(b"Do no harm.").hexdigest()
    assert record["licence"] == "RAIL"
    assert record["date"].startswith("20")
    assert fetch(manifest, tmp_path) == 0  # what is here is not fetched again
    assert len(hub.asked) == 1


def test_another_licence_text_has_to_be_accepted_anew(manifest: Any, tmp_path: Path) -> None:
    weight_files.accept(manifest, tmp_path)
    assert weight_files.is_accepted(manifest, tmp_path)
    path = manifest.folder / "tiny.toml"
    path.write_text(path.read_text().replace("Do no harm.", "Do no harm, ever."))
    assert not weight_files.is_accepted(weights.manifests(manifest.folder)[0], tmp_path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_f20_a_broken_connection_is_taken_up_again(hub: Any, manifest: Any, tmp_path: Path, share: float) -> None:
    hub.faults = [share]
    assert fetch(manifest, tmp_path) == len(DATA)
    assert whole(manifest, tmp_path)
    assert [asked[1] for asked in hub.asked] == [None, f"bytes={int(len(DATA) * share)}-"]


def test_f20_a_download_that_was_stopped_goes_on_later(hub: Any, manifest: Any, tmp_path: Path) -> None:
    part = manifest.location(manifest.files[0], tmp_path).with_name("w.safetensors.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(DATA[:1000])
    assert fetch(manifest, tmp_path) == len(DATA) - 1000
    assert whole(manifest, tmp_path)


@pytest.mark.parametrize("faults", [[0.5, "no range"], [0.5, "other part"], [500, 503], ["flipped"], [0.5, "flipped"],
                                    ["endless"], ["redirect"], [0.5, 416]], ids=str)  # fmt: skip
def test_f20_whatever_goes_wrong_the_hash_decides(hub: Any, manifest: Any, tmp_path: Path, faults: list[Any]) -> None:
    hub.faults = list(faults)
    fetch(manifest, tmp_path)
    assert whole(manifest, tmp_path)
    assert not any(token for _, _, token in hub.asked)


def test_f20_what_never_comes_right_is_an_error_and_nothing_is_left(hub: Any, manifest: Any, tmp_path: Path) -> None:
    hub.faults = ["flipped"] * 2
    with pytest.raises(PopulaceError, match="not the file") as caught:
        fetch(manifest, tmp_path)
    assert caught.value.code == "weights_corrupt"
    assert [p.name for p in (tmp_path / "weights/tiny").iterdir() if not p.name.startswith(".")] == []
    hub.faults = [500] * weight_files.ATTEMPTS
    with pytest.raises(PopulaceError, match="answers 500") as caught:
        fetch(manifest, tmp_path)
    assert "kept" in caught.value.hint
    hub.faults = [403]
    with pytest.raises(PopulaceError, match="sign in"):
        fetch(manifest, tmp_path)


def test_f21_two_that_want_the_same_file_load_it_once(hub: Any, manifest: Any, tmp_path: Path) -> None:
    weight_files.accept(manifest, tmp_path)
    threads = [threading.Thread(target=weight_files.fetch, args=(manifest, tmp_path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert whole(manifest, tmp_path)
    assert len(hub.asked) == 1


def test_f22_offline_is_respected(hub: Any, manifest: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PopulaceError, match="HF_HUB_OFFLINE"):
        fetch(manifest, tmp_path)
    assert hub.asked == []


def test_f25_a_full_disk_is_known_first(
    hub: Any, manifest: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "SPARE_BYTES", 1 << 60)
    with pytest.raises(PopulaceError, match="are needed") as caught:
        fetch(manifest, tmp_path)
    assert caught.value.code == "out_of_disk"
    assert hub.asked == []


def test_import_use_and_remove(manifest: Any, tmp_path: Path) -> None:
    source = tmp_path / "mine.safetensors"
    source.write_bytes(DATA)
    made = weight_files.import_file(source, "mine", "CC-BY-4.0", tmp_path, manifest.folder)
    assert (made.title, made.licence, made.imported) == ("Ours", "CC-BY-4.0", True)
    assert weights.locate("mine", tmp_path, manifest.folder).sha256 == hashlib.sha256(DATA).hexdigest()
    with pytest.raises(PopulaceError, match="is missing"):
        weights.locate("tiny", tmp_path, manifest.folder)
    weight_files.use("mine", "tiny", tmp_path, manifest.folder)
    assert weights.locate("tiny", tmp_path, manifest.folder).name == "mine"
    assert weight_files.remove("mine", tmp_path, manifest.folder) >= len(DATA)
    assert weights.replacements(tmp_path) == {}
    assert [m.name for m in weights.manifests(manifest.folder, tmp_path)] == ["tiny"]


def test_import_brings_what_the_manifest_names(hub: Any, manifest: Any, tmp_path: Path) -> None:
    source = tmp_path / "stick.safetensors"
    source.write_bytes(DATA)
    assert weight_files.import_file(source, "tiny", "", tmp_path, manifest.folder) == manifest
    assert whole(manifest, tmp_path)
    source.write_bytes(DATA[:-1] + b"x")
    with pytest.raises(PopulaceError, match="none of the files of 'tiny'"):
        weight_files.import_file(source, "tiny", "", tmp_path, manifest.folder)


@pytest.mark.parametrize(
    ("data", "name", "says"),
    [(pickle.dumps([1]), "mine", "not a safetensors"), (DATA[:-9], "mine", "not a safetensors"), (b"", "mine", "size"),
     (DATA, "../x", "cannot be a name"), (DATA, "", "cannot be a name"), (DATA, "CON", "cannot be a name")],
    ids=["pickle", "truncated", "empty", "path", "none", "capitals"],
)  # fmt: skip
def test_f19_what_is_no_weights_is_not_imported(
    manifest: Any, tmp_path: Path, data: bytes, name: str, says: str
) -> None:
    source = tmp_path / "x.safetensors"
    source.write_bytes(data)
    with pytest.raises(PopulaceError, match=says):
        weight_files.import_file(source, name, "", tmp_path, manifest.folder)
    assert not (tmp_path / "weights").exists()


def test_embedded_weights_stay(tmp_path: Path) -> None:
    with pytest.raises(PopulaceError, match="part of Populace"):
        weight_files.remove("people", tmp_path)
    with pytest.raises(PopulaceError, match="not to be downloaded"):
        weight_files.fetch(weights.find("people", tmp_path), tmp_path)


def test_command_line(
    hub: Any, manifest: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POPULACE_HOME", str(tmp_path / "home"))
    for call in (weights.manifests, weights.find, weight_files.import_file, weight_files.use, weight_files.remove):
        defaults = call.__defaults__ or ()
        other = tuple(manifest.folder if value == weights.MANIFEST_FOLDER else value for value in defaults)
        monkeypatch.setattr(call, "__defaults__", other)
    assert __main__.main(["weights", "fetch", "tiny"]) == 2  # nobody is there to agree
    assert "--yes" in capsys.readouterr().err
    monkeypatch.setattr(weights_command, "_end_with_stdin", lambda: None)  # it would wait for pytest's own
    assert __main__.main(["weights", "--leash", "fetch", "tiny", "--yes"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert events[-1] == {"event": "done", "result": {"name": "tiny", "bytes": len(DATA)}}
    assert {e["event"] for e in events[:-1]} == {"progress"}
    assert __main__.main(["weights", "list", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["here"], row["accepted"], row["source"]) == (True, True, "someone/model")
    assert __main__.main(["weights", "licence", "tiny"]) == 0
    assert capsys.readouterr().out == "Do no harm.\n"
    source = tmp_path / "mine.safetensors"
    source.write_bytes(DATA)
    assert __main__.main(["weights", "import", str(source), "--name", "mine"]) == 0
    assert __main__.main(["weights", "use", "mine", "--for", "tiny"]) == 0
    assert __main__.main(["weights", "list"]) == 0
    assert "Used for tiny." in capsys.readouterr().out
    assert __main__.main(["weights", "remove", "mine"]) == 0
    assert "0.2 MB freed" in capsys.readouterr().out
