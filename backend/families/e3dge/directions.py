# SPDX-License-Identifier: GPL-3.0-or-later
"""Editing directions: vectors in the spaces of w along which people smile or grow older.

The authors publish one .npy per attribute and space. Others are learned from people that somebody, or a classifier, has
sorted into two heaps: the normal of the plane between them (Shen et al. 2020, InterFaceGAN).

    python -m backend.families.e3dge.directions OUT.safetensors smiling=RENDERER.npy,DECODER.npy ...
    populace weights import --name e3dge_directions --licence S-Lab-1.0 OUT.safetensors
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from backend import tensors
from backend.families.e3dge import DIRECTIONS
from backend.protocol import PopulaceError

STEPS, RATE, DECAY = 300, 0.5, 1e-3  # of the logistic regression


def learn(codes: Float[np.ndarray, "N W"], labels: Bool[np.ndarray, " N"]) -> Float[np.ndarray, " W"]:
    """The unit normal of the best plane between people with and without an attribute, pointing to those with it:
    logistic regression on whitened codes. Times the codes' deviation along it, so that 1 is one standard deviation of
    people. Raises `invalid_request` unless both heaps hold somebody."""
    if labels.all() or not labels.any():
        raise PopulaceError("invalid_request", "A direction needs people of both kinds.", "Label some of each.")
    mean, deviation = codes.mean(0), codes.std(0) + 1e-8
    x, y = ((codes - mean) / deviation).astype(np.float64), np.where(labels, 1.0, 0.0)
    share = np.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum())  # both heaps count alike
    normal, bias = np.zeros(x.shape[1]), 0.0
    for _ in range(STEPS):
        error = (1 / (1 + np.exp(-(x @ normal + bias))) - y) * share
        normal -= RATE * (x.T @ error + DECAY * normal)
        bias -= RATE * error.sum()
    found = normal / deviation
    found /= np.linalg.norm(found)
    return (found * (codes @ found).std()).astype(np.float32)


def pack(directions: Mapping[str, Mapping[str, Float[np.ndarray, " W"]]]) -> bytes:
    """A safetensors file of directions: by attribute, then "renderer" and "decoder"."""
    arrays = {f"direction.{name}.{space}": np.ascontiguousarray(vector, np.float32).reshape(-1)
              for name, spaces in directions.items() for space, vector in spaces.items()}  # fmt: skip
    return b"".join(tensors.dump_tensors(arrays, {"title": "Editing directions for E3DGE"}))


def main(arguments: Sequence[str]) -> int:
    """Pack published .npy files. They hold numbers only: pickled content is refused."""
    out, found = Path(arguments[0]), {}
    for argument in arguments[1:]:
        name, _, files = argument.partition("=")
        if name not in DIRECTIONS or files.count(",") != 1:
            print(
                f"{argument}: not NAME=RENDERER.npy,DECODER.npy with a name of {', '.join(DIRECTIONS)}", file=sys.stderr
            )
            return 2
        loaded = [np.load(file, allow_pickle=False) for file in files.split(",")]
        found[name] = dict(zip(("renderer", "decoder"), loaded, strict=True))
    out.write_bytes(pack(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
