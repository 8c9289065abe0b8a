# SPDX-License-Identifier: GPL-3.0-or-later
"""`python -m backend.training`: make the training set, train for a given time, write the weights."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Returns 0; raises FileNotFoundError when the asset folder is none."""
    parser = argparse.ArgumentParser(prog="populace train", description=__doc__)
    parser.add_argument("--kit", type=Path, required=True, help="a MakeHuman or MPFB data folder")
    parser.add_argument("--resume", type=Path, required=True, metavar="DIR", help="run folder, made or continued")
    parser.add_argument("--minutes", type=float, default=60, help="training time; data and export come on top")
    parser.add_argument("--only", nargs="*", default=(), help="networks, such as top.shape body.tex")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export", type=Path, help="write the weights file here when done")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    import torch

    from backend.training import people, people_data, people_export

    if options.threads:
        torch.set_num_threads(options.threads)
    data = options.resume / "data"
    if not (data / "items.json").exists():
        people_data.build(options.kit, data, seed=options.seed)
    if options.minutes > 0:
        people.train_all(data, options.resume / "nets", options.minutes, tuple(options.only), options.seed)
    if options.export:
        people_export.export(data, options.resume / "nets", options.export, seed=options.seed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
