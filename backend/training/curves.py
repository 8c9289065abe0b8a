# SPDX-License-Identifier: GPL-3.0-or-later
"""Curves of a run's log as one small picture: `python -m backend.training.curves RUN/get3d --figures frechet --out F`.

Steps to the right, the figure upwards on a logarithmic scale; first and last value are written out.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, MARGIN = 420, 240, 46
INK, LINE, GRID = (30, 30, 30), (178, 60, 40), (222, 222, 222)


def read(path: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by name of the figure, positive values only."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name not in ("step", "time") and value > 0:
                found.setdefault(name, []).append((row["step"], value))
    return found


def plot(title: str, points: Sequence[tuple[int, float]]) -> Image.Image:
    """One curve in its frame."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    steps, values = np.array([p[0] for p in points], float), np.log10([p[1] for p in points])
    low, high = math.floor(values.min() * 5) / 5, math.ceil(values.max() * 5 + 1e-9) / 5
    right, bottom = WIDTH - 14, HEIGHT - 26

    def place(step: float, value: float) -> tuple[float, float]:
        return (MARGIN + (right - MARGIN) * step / max(steps.max(), 1),
                bottom - (bottom - 28) * (value - low) / max(high - low, 1e-9))  # fmt: skip

    for exponent in range(math.floor(low), math.ceil(high) + 1):
        for digit in (1, 2, 5):
            value = exponent + math.log10(digit)
            if low - 1e-9 <= value <= high + 1e-9:
                y = place(0, value)[1]
                draw.line((MARGIN, y, right, y), GRID)
                draw.text((MARGIN - 4, y), f"{10**value:g}", INK, font, anchor="rm")
    draw.line([place(s, v) for s, v in zip(steps, values, strict=True)], LINE, 2)
    draw.text((MARGIN, 6), title, INK, font)
    draw.text((right, 6), f"{points[0][1]:.3g} to {points[-1][1]:.3g}", INK, font, anchor="ra")
    draw.text((right, HEIGHT - 20), f"step {int(steps.max())}", INK, font, anchor="ra")
    return image


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of stages, with log.jsonl")
    parser.add_argument("--figures", nargs="+", required=True, help="which, by their names in the log")
    parser.add_argument("--titles", nargs="+", help="as many, instead of the names")
    parser.add_argument("--columns", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="a .jpg or .png")
    args = parser.parse_args(argv)
    plots, titles = [], iter(args.titles or [])
    for run in args.runs:
        found = read(run / "log.jsonl")
        for name in args.figures:
            if name in found:
                plots.append(plot(next(titles, f"{run.name}: {name}"), found[name]))
    if not plots:
        print(f"None of {', '.join(args.figures)} is in these logs.", file=sys.stderr)
        return 1
    columns = min(args.columns, len(plots))
    sheet = Image.new("RGB", (columns * WIDTH, -(-len(plots) // columns) * HEIGHT), "white")
    for i, picture in enumerate(plots):
        sheet.paste(picture, (i % columns * WIDTH, i // columns * HEIGHT))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.out, quality=88)
    return 0


if __name__ == "__main__":
    sys.exit(main())
