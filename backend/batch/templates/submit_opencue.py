# SPDX-License-Identifier: GPL-3.0-or-later
"""Send a batch of people to OpenCue: one frame per shard, then one manifest. Needs opencue-pyoutline.

    python submit_opencue.py plan.jsonl --out /shared/crowd --shards 8 --show testing --shot crowd
"""

from __future__ import annotations

import argparse
import getpass
import shlex

import outline
import outline.cuerun
from outline.modules.shell import Shell


def main() -> None:
    parser = argparse.ArgumentParser(description="Send a batch of people to OpenCue.")
    parser.add_argument("plan", help="one request per line, see: populace batch --help")
    parser.add_argument("--out", required=True, help="folder of all shards, the same path on every machine")
    parser.add_argument("--shards", type=int, default=8, help="frames to split the plan into (default: 8)")
    parser.add_argument("--preset", default="none", choices=("none", "unreal", "unity", "godot"))
    parser.add_argument("--populace", default="populace", help="the command on the machines (default: populace)")
    parser.add_argument("--show", default="testing")
    parser.add_argument("--shot", default="crowd")
    parser.add_argument("--user", default=getpass.getuser())
    args = parser.parse_args()

    shared = [*shlex.split(args.populace), "batch", args.plan, "--out", args.out, "--preset", args.preset]
    job = outline.Outline("populace", shot=args.shot, show=args.show, user=args.user)
    shards = Shell("shards", type="Render", range=f"1-{args.shards}", chunk=1,
                   command=[*shared, "--shard", f"#IFRAME#/{args.shards}", "--resume", "--json"])  # fmt: skip
    manifest = Shell("manifest", type="Util", range="1", command=[*shared, "--merge"])
    job.add_layer(shards)
    job.add_layer(manifest)
    manifest.depend_all(shards)
    outline.cuerun.launch(job, use_pycuerun=False)


if __name__ == "__main__":
    main()
