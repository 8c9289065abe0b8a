# SPDX-License-Identifier: GPL-3.0-or-later
"""Job files for farms: all of them call the shard command that `populace batch` understands, once per shard."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from backend import __main__ as cli
from backend.batch import farm


def test_all_templates_ship_and_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for name in farm.TEMPLATES:
        assert cli.main(["farm", name]) == 0
        text = capsys.readouterr().out
        assert text == farm.template(name)
        assert text.partition("\n")[0].endswith("SPDX-License-Identifier: GPL-3.0-or-later")
        assert {"batch", "--shard", "--resume", "--merge", "--preset"} <= set(text.replace('"', " ").replace(
            ",", " ").replace("[", " ").replace("]", " ").replace(")", " ").split())  # fmt: skip


def test_openjd_template_keeps_to_the_schema() -> None:
    openjd = pytest.importorskip("openjd.model")
    kind = openjd.DocumentType.YAML
    raw = openjd.document_string_to_object(document=farm.template("openjd"), document_type=kind)
    template = openjd.decode_job_template(template=raw)
    assert [step.name for step in template.steps] == ["Shards", "Manifest"]


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_flamenco_job_has_a_task_per_shard_then_the_manifest() -> None:
    """Compiled as Flamenco does, with its `author` played by a few lines."""
    script = farm.template("flamenco") + """
const author = {
    Task: (name, type) => ({name, type, commands: [], dependencies: [],
        addCommand(c) { this.commands.push(c); }, addDependency(t) { this.dependencies.push(t.name); }}),
    Command: (name, parameters) => ({name, parameters}),
};
const tasks = [];
const settings = Object.fromEntries(JOB_TYPE.settings.map((s) => [s.key, s.default]));
Object.assign(settings, {plan: "/plan.jsonl", out: "/out", shards: 3});
compileJob({settings, addTask: (task) => tasks.push(task)});
console.log(JSON.stringify(tasks));
"""
    done = subprocess.run(["node", "-e", script], capture_output=True, text=True, check=True, timeout=60)
    tasks = json.loads(done.stdout)
    assert [task["name"] for task in tasks] == ["shard-1", "shard-2", "shard-3", "manifest"]
    assert tasks[3]["dependencies"] == ["shard-1", "shard-2", "shard-3"]
    for task in tasks:
        (command,) = task["commands"]
        assert (command["name"], command["parameters"]["exe"]) == ("exec", "populace")
        args = cli._parser().parse_args(command["parameters"]["args"])
        assert (args.plan, args.out) == (Path("/plan.jsonl"), Path("/out"))
        assert args.merge if task is tasks[3] else args.resume and str(args.shard) == f"{task['name'][-1]}/3"


def test_opencue_script_is_python() -> None:
    names = {node.attr for node in ast.walk(ast.parse(farm.template("opencue"))) if isinstance(node, ast.Attribute)}
    assert {"Outline", "add_layer", "depend_all", "launch"} <= names
