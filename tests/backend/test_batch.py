# SPDX-License-Identifier: GPL-3.0-or-later
"""Batches: plans, shards, resuming after every kind of end, and the same files however the work was split."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend import __main__ as cli
from backend.batch import item as work
from backend.batch import plan, results, runner
from backend.batch.plan import Item, Spread
from backend.batch.runner import Log, Outcome, Shard, Stop
from backend.protocol import PopulaceError, parse_request

SMALL = {"family": "capsule", "grid_resolution": 32, "faces": 600, "texture_size": 512, "maps": "color"}
LINES = [{**SMALL, "seed": 1, "count": 9}, {**SMALL, "id": "guard", "seed": 40, "formats": ["obj", "glb", "packet"]},
         {**SMALL, "id": "twin", "seed": 2, "count": 2, "preset": "godot"}]  # fmt: skip


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "plan.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in LINES) + "\n\n")
    return path


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POPULACE_HOME", str(tmp_path / "home"))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers are a thread of this process, which starts at once."""
    import numba
    import torch

    threads = torch.get_num_threads(), numba.get_num_threads()
    monkeypatch.setattr(runner, "local", lambda processes: lambda: ThreadPoolExecutor(1))
    yield
    work._model.cache_clear()
    torch.set_num_threads(threads[0])
    numba.set_num_threads(threads[1])


def batch(written: Path, out: Path, *more: str) -> int:
    return cli.main(["batch", str(written), "--out", str(out), "--device", "cpu", "--processes", "1", *more])


def events(out: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for log in sorted((out / "logs").iterdir()) for line in log.read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


# --------------------------------------------------------------------------------------------------------------- plans


def test_a_plan_is_people_with_ids_formats_and_presets(written: Path) -> None:
    items = plan.read(written, ("obj",))
    assert [item.id for item in items[:9]] == [f"person_{seed:06d}" for seed in range(1, 10)]
    assert [item.id for item in items[9:]] == ["guard", "twin_0000", "twin_0001"]
    assert [item.request.seed for item in items] == [*range(1, 10), 40, 2, 3]
    assert [item.formats for item in items[8:11]] == [("obj",), ("obj", "glb", "packet"), ("obj",)]
    assert plan.read(written, preset="unreal")[0].formats == ("fbx",)
    assert len({item.digest for item in items}) == 12
    assert all(Item.from_json(json.loads(json.dumps(item.to_json()))).digest == item.digest for item in items)


def test_every_bad_line_is_named_before_anything_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ['{"seed": 1}', "{", '{"seed": -1}', '{"sed": 1}', '{"id": "../x"}', '{"id": "Con"}',
             '{"formats": ["gif"]}', '{"pose": "flying"}', '{"seed": 1}', "[]", '{"seed": 9, "count": 0}']  # fmt: skip
    (tmp_path / "plan.jsonl").write_text("\n".join(lines))
    assert batch(tmp_path / "plan.jsonl", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "10 bad lines" in said
    for number, what in ((2, "not JSON"), (3, "seed:"), (4, "sed:"), (5, "id:"), (6, "Windows"), (7, "formats"),
                         (8, "no pose called 'flying'"), (9, "line 1"), (10, "not a JSON object"),
                         (11, "count:")):  # fmt: skip
        (line,) = [line for line in said.splitlines() if line.strip().startswith(f"line {number}:")]
        assert what in line
    assert not (tmp_path / "out").exists()
    for text in ("", "\n\n"):
        (tmp_path / "plan.jsonl").write_text(text)
        assert batch(tmp_path / "plan.jsonl", tmp_path / "out") == 2
    assert batch(tmp_path / "none.jsonl", tmp_path / "out") == 2


def test_ids_that_differ_only_in_case_are_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.jsonl").write_text('{"id": "Guard"}\n{"id": "guard"}')
    with pytest.raises(PopulaceError, match="line 2: its id 'guard' is that of line 1"):
        plan.read(tmp_path / "plan.jsonl")


def test_a_written_plan_has_exact_shares_and_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--count", "40", "--seed", "7", "--spread", "words=woman:60,man:40", "--spread",
               "age_years=30..70", "--spread", "pose=walking:1,rest:3", "--spread", "top_color=red,teal",
               "--format", "glb,obj", "--preset", "unity"]  # fmt: skip
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    assert cli.main(command) == 0
    assert capsys.readouterr().out == text
    (tmp_path / "plan.jsonl").write_text(text)
    items = plan.read(tmp_path / "plan.jsonl")
    asked = [item.request.model_dump() for item in items]
    assert [item.request.seed for item in items] == list(range(7, 47))
    assert {(item.formats, item.preset) for item in items} == {(("glb", "obj"), "unity")}
    assert Counter(request["pose"] for request in asked) == {"walking": 10, "rest": 30}
    assert Counter(request["edits"][0]["text"] for request in asked) == {"woman": 24, "man": 16}
    ages = sorted(request["edits"][1]["values"]["age_years"] for request in asked)
    assert all(30 + i <= age <= 31 + i for i, age in enumerate(ages)), "one in each fortieth of the range"
    colors = Counter(tuple(request["edits"][1]["values"]["top_color"]) for request in asked)
    assert sorted(colors.values()) == [20, 20]
    assert cli.main(["plan", "--spread", "nose=1..2"]) == 2
    assert cli.main(["plan", "--spread", "height_m=1..9", "--count", "3"]) == 2


@given(st.integers(1, 300), st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.integers(0, 2**53 - 1))
def test_shares_are_off_by_less_than_one(count: int, weights: list[float], seed: int) -> None:
    spread = Spread("words", tuple(f"w{i}" for i in range(len(weights))), tuple(weights))
    drawn = Counter(spread.draw(count, seed))
    assert drawn.total() == count
    assert all(abs(drawn[f"w{i}"] - count * w / sum(weights)) < 1 for i, w in enumerate(weights))


@given(st.integers(0, 200), st.integers(1, 30))
def test_shards_share_the_plan(count: int, shards: int) -> None:
    items: Any = list(range(count))
    parts = [Shard(i, shards).of(items) for i in range(1, shards + 1)]
    assert sorted(item for part in parts for item in part) == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "/3", "1/", "1/0", "a/b", "1/1000000"])
def test_wrong_shards(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["batch", "plan.jsonl", "--out", "out", "--shard", text])
    assert "the number of this shard" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- running


@pytest.mark.usefixtures("here")
def test_f38_any_split_gives_the_same_files(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, split = tmp_path / "whole", tmp_path / "split"
    assert batch(written, whole) == 0
    assert f"{whole / 'manifest.json'}: 12 of 12 people" in capsys.readouterr().out
    for shard in ("2/3", "3/3", "1/3"):
        assert not (split / "manifest.json").exists()
        assert batch(written, split, "--shard", shard, "--json") == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert Counter(line["event"] for line in said) == {"start": 3, "done": 12, "end": 3}
    manifest = (whole / "manifest.json").read_bytes()
    assert (split / "manifest.json").read_bytes() == manifest
    listed = json.loads(manifest)
    assert [person["id"] for person in listed["items"]] == [item.id for item in plan.read(written)]
    for person in listed["items"]:
        for name, about in person["files"].items():
            for out in (whole, split):
                path = results.folder(out, person["id"]) / name
                assert (path.stat().st_size, results.sha256(path)) == (about["bytes"], about["sha256"])
    guard = next(person for person in listed["items"] if person["id"] == "guard")
    assert set(guard["files"]) == {"guard.glb", "guard.safetensors", "guard/human.mtl", "guard/human.obj",
                                   "guard/0_human_base_color.png"}  # fmt: skip
    assert not (whole / ".partial").exists()


@pytest.mark.usefixtures("here")
def test_what_is_there_is_kept_damaged_made_again_and_never_overwritten_unasked(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert batch(written, out, "--shard", "1/4", "--dry-run") == 0
    assert "12 people in the plan, 3 in this shard, 3 to be made" in capsys.readouterr().out
    assert batch(written, out, "--shard", "1/4") == 0
    assert batch(written, out, "--shard", "1/4") == 2
    assert "Add --resume" in capsys.readouterr().err
    cut, flipped = (results.folder(out, name) / f"{name}.glb" for name in ("person_000001", "person_000005"))
    right, times = flipped.read_bytes(), {p: p.stat().st_mtime_ns for p in (out / "items").iterdir()}
    cut.write_bytes(cut.read_bytes()[:-1])
    flipped.write_bytes(right[:-9] + bytes([right[-9] ^ 1]) + right[-8:])
    assert batch(written, out, "--shard", "1/4", "--resume") == 0
    assert "1 people made, 2 kept" in capsys.readouterr().out
    assert batch(written, out, "--shard", "1/4", "--resume", "--verify") == 0
    assert "1 people made, 2 kept" in capsys.readouterr().out
    assert flipped.read_bytes() == right
    assert results.folder(out, "person_000009").stat().st_mtime_ns == times[results.folder(out, "person_000009")]
    assert batch(written, out, "--shard", "1/4", "--overwrite") == 0
    assert "3 people made, 0 kept" in capsys.readouterr().out
    assert batch(written, out, "--merge") == 3
    assert len(json.loads((out / "manifest.json").read_text())["missing"]) == 9


@pytest.mark.usefixtures("here")
def test_f25_a_full_disk_is_seen_before_and_during(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=70 << 20))
        assert batch(written, tmp_path / "out") == 7
        assert "12 people need about 0.0 GB, 0.1 GB are free" in capsys.readouterr().err
    assert not (tmp_path / "out" / "items").exists()
    with monkeypatch.context() as full:
        full.setattr("backend.interchange.write", fail(OSError(28, "No space left on device")))
        assert batch(written, tmp_path / "out") == 7
    assert len(events(tmp_path / "out", "failed")) == 1, "everybody would meet it: the run ends"
    assert batch(written, tmp_path / "out", "--resume", "--shard", "1/12") == 0


def fail(error: Exception) -> Callable[..., Any]:
    def failing(*_: Any) -> Any:
        raise error

    return failing


@pytest.mark.usefixtures("here")
def test_f39_one_that_fails_is_tried_again_and_told_and_the_others_go_on(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from backend import pipeline

    tries: Counter[int] = Counter()
    generate = pipeline.generate

    def sometimes(request: Any, model: Any, step: Any, images: Any) -> Any:
        tries[request.seed] += 1
        if request.seed == 8 and tries[8] <= 2:
            raise RuntimeError("odd")
        if request.seed == 5:
            raise PopulaceError("empty_surface", "Seed 5 has no surface.")
        if request.seed == 7 and tries[7] == 1:
            raise RuntimeError("odd")
        return generate(request, model, step, images)

    monkeypatch.setattr(pipeline, "generate", sometimes)
    out = tmp_path / "out"
    assert batch(written, out) == 3
    said = capsys.readouterr()
    assert "10 people made, 0 kept, 2 failed" in said.out
    assert "person_000005: Seed 5 has no surface." in said.err
    assert (tries[8], tries[5], tries[7]) == (2, 1, 2), "what would fail the same way again is not tried again"
    assert batch(written, out, "--resume") == 3
    monkeypatch.setattr(pipeline, "generate", generate)
    assert batch(written, out, "--resume") == 0
    assert not json.loads((out / "manifest.json").read_text())["missing"]


@pytest.mark.usefixtures("here")
def test_f40_a_folder_that_is_away_for_a_while(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from backend import interchange

    write, away = interchange.write, [OSError(116, "Stale file handle")] * 3
    pauses: list[float] = []

    def writing(*args: Any) -> Any:
        if away:
            raise away.pop()
        return write(*args)

    monkeypatch.setattr(interchange, "write", writing)
    monkeypatch.setattr(work.time, "sleep", pauses.append)
    assert batch(written, tmp_path / "out", "--shard", "1/12") == 0
    assert pauses == [1, 2, 4]
    assert sum(work.PAUSES_S) > 30


class Deaths(Executor):
    """A pool whose workers take a moment, and all die when a poisonous person is begun."""

    def __init__(self, poison: set[str], log: list[str]) -> None:
        self.poison, self.log = poison, log
        self.under_way: set[Future[Any]] = set()
        self.lock = threading.Lock()
        self.is_broken = False

    def submit(self, fn: Any, /, task: dict[str, Any]) -> Any:  # type: ignore[override]
        name, future = task["item"]["id"], Future()
        with self.lock:
            if self.is_broken:
                raise BrokenExecutor
            self.log.append(name)
            self.under_way.add(future)
            if name in self.poison:
                self.is_broken = True
                for lost in self.under_way:
                    lost.set_exception(BrokenExecutor())
                self.under_way.clear()
        threading.Timer(0.01, self.end, (future, {"id": name, "seconds": 0.0, "files": []})).start()
        return future

    def end(self, future: Future[Any], answer: dict[str, Any]) -> None:
        with self.lock:
            if future in self.under_way:
                self.under_way.remove(future)
                future.set_result(answer)

    def shutdown(self, wait: bool = True, **_: Any) -> None:
        pass


def people(count: int) -> list[Item]:
    return [Item(f"p{i}", parse_request({**SMALL, "seed": i}), ("glb",), "none") for i in range(count)]


@pytest.mark.parametrize("width", [1, 4])
def test_f28_a_worker_that_dies_costs_nobody_but_its_person(width: int, tmp_path: Path) -> None:
    log: list[str] = []
    heard: list[dict[str, Any]] = []
    outcome = runner.run(people(10), tmp_path, "cpu", lambda: Deaths({"p2"}, log), width, 2,
                         Log(tmp_path, Shard(), heard.append), Stop())  # fmt: skip
    assert (outcome.made, set(outcome.failed)) == (9, {"p2"})
    assert outcome.failed["p2"].code == "worker_crashed"
    assert Counter(line["event"] for line in heard) == {"done": 9, "retry": 2, "failed": 1}
    begun = Counter(log)
    assert begun["p2"] == 3 + (width > 1), "first with others, then alone, until it has failed often enough"
    assert sum(begun.values()) - begun["p2"] <= 9 + width - 1, "only those beside it, the first time, were begun twice"


def test_a_signal_ends_it_after_those_under_way(tmp_path: Path) -> None:
    stop, seen = Stop(), []

    def hear(line: dict[str, Any]) -> None:
        seen.append(line["event"])
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with stop.listening():
        outcome = runner.run(people(8), tmp_path, "cpu", lambda: Deaths(set(), []), 1, 1,
                             Log(tmp_path, Shard(), hear), stop)  # fmt: skip
    assert outcome == Outcome(made=2, interrupted=signal.SIGTERM)


# ----------------------------------------------------------------------------------------------------- real processes


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_f28_killed_and_stopped_and_resumed_gives_the_same_files(written: Path, tmp_path: Path) -> None:
    """With worker processes: kill -9 in the middle leaves no process, SIGTERM ends in order, and nothing differs."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    command = [sys.executable, "-m", "backend", "batch", str(written), "--device", "cpu", "--resume", "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for how, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        running = subprocess.Popen([*command, str(out), "--processes", "2"], env=environment, stderr=subprocess.DEVNULL)
        before = len(list(out.glob("items/*")))
        wait_for(lambda before=before: len(list(out.glob("items/*"))) >= before + 3)
        children = psutil.Process(running.pid).children(recursive=True)
        running.send_signal(how)
        assert running.wait(60) == code
        assert not psutil.wait_procs(children, 20)[1], "no worker outlives its parent"
        assert len(list(out.glob("items/*"))) < 12
    assert subprocess.run([*command, str(out), "--processes", "1"], env=environment, timeout=120).returncode == 0
    assert subprocess.run([*command, str(whole), "--processes", "1"], env=environment, timeout=120).returncode == 0
    assert (out / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()
    assert not (out / ".partial").exists()
    assert max(Counter(line["id"] for line in events(out, "done")).values()) == 1, "nobody was made twice"
    assert len(events(out, "interrupted")) == 1


def wait_for(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s
        time.sleep(0.01)


def _models_loaded() -> int:
    """Runs in a worker of a cluster."""
    from backend.batch import item

    return item._model.cache_info().currsize


def test_two_workers_of_a_dask_cluster_make_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight people, dealt out to two processes, against the same plan made in one: manifests equal to the byte, and
    with them the hash of every file."""
    distributed = pytest.importorskip("distributed")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plan = tmp_path / "eight.jsonl"
    plan.write_text(json.dumps({**SMALL, "seed": 1, "count": 8}) + "\n")
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert batch(plan, whole) == 0
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        command = ["batch", str(plan), "--out", str(out), "--device", "cpu", "--dask", cluster.scheduler_address]
        assert cli.main(command) == 0
        with distributed.Client(cluster, set_as_default=False) as client:
            assert list(client.run(_models_loaded).values()) == [1, 1], "both worked"
    assert (out / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()
    assert len(json.loads((out / "manifest.json").read_text())["items"]) == 8
    assert cli.main([*command, "--resume", "--shard", "1/1"]) == 2, "the cluster is gone"


@pytest.mark.parametrize("address", ["tcp://10.0.0.1:8786", "tcp://farm:8786", "10.0.0.1:8786", "http://127.0.0.1:1"])
def test_a_scheduler_in_the_open_is_refused(
    address: str, written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["batch", str(written), "--out", str(tmp_path / "out"), "--dask", address]
    assert cli.main(command) == 2
    assert "tls://" in capsys.readouterr().err


def test_files_are_made_anew_when_other_weights_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_file = tmp_path / "plan.jsonl"
    plan_file.write_text('{"seed": 1}\n', encoding="utf-8")
    digests = []
    for name in ("one", "other"):
        monkeypatch.setenv("POPULACE_DATA_DIR", str(tmp_path / name))
        digests.append(plan.read(plan_file)[0].digest)
        (tmp_path / "other" / "weights").mkdir(parents=True, exist_ok=True)
        (tmp_path / "other" / "weights" / "user.json").write_text('{"use": {"people": "get3d"}}', encoding="utf-8")
    assert digests[0] != digests[1]
    monkeypatch.setenv("POPULACE_DATA_DIR", str(tmp_path / "one"))
    assert plan.read(plan_file)[0].digest == digests[0]
