# SPDX-License-Identifier: GPL-3.0-or-later
"""`populace adapt`: weights of one's own from others and two texts, by CLIP."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from backend.options import positive, seed
from backend.protocol import PopulaceError

FAMILIES = ("get3d",)
PARTS = ("texture", "geometry", "both")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", choices=FAMILIES, default="get3d")
    parser.add_argument("--from", dest="source", required=True, metavar="TEXT", help='what is made now: "a chair"')
    parser.add_argument("--text", required=True, help='what shall be made: "a wooden chair"')
    parser.add_argument("--name", required=True, help="of the new weights: lower-case letters, digits and _")
    parser.add_argument("--weights", help="to begin with (default: those that the family uses)")
    parser.add_argument("--part", choices=PARTS, default="both", help="what learns (default: both)")
    parser.add_argument("--steps", type=positive, default=300, help="default: 300")
    parser.add_argument("--batch", type=positive, default=2, help="shapes of a step (default: 2)")
    parser.add_argument("--views", type=positive, default=8, help="pictures of a shape (default: 8)")
    parser.add_argument("--size", type=positive, default=224, help="of pictures, pixels (default: 224)")
    parser.add_argument("--cells", type=positive, default=64, help="of the surfaces' lattice (default: 64)")
    parser.add_argument("--seed", type=seed, default=0, help="of codes and cameras (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")


def run(args: argparse.Namespace) -> None:
    """Raises PopulaceError."""
    import torch

    from backend import families, weight_files, weights
    from backend.families.get3d import adapt
    from backend.families.get3d.model import load, metadata_of
    from backend.networks import clip as clips
    from backend.progress import Progress
    from backend.settings import Settings
    from backend.tensors import dump_tensors

    data_dir = Settings.load().data_dir
    device = torch.device(families.resolve_device(args.device))
    begun = weights.locate(args.weights or args.family, data_dir)
    clip, tokenizer = clips.load(weights.locate("clip", data_dir), device)
    texts = [clips.padded([tokenizer(text, clip.config.context)], device) for text in (args.source, args.text)]
    model = load(device, begun)
    settings = adapt.Settings(part=args.part, steps=args.steps, batch=args.batch, views=args.views, size=args.size,
                              cells=args.cells, seed=args.seed)  # fmt: skip
    if args.name in {manifest.name for manifest in weights.manifests()}:
        raise PopulaceError("invalid_request", f"Weights called {args.name!r} ship with Populace.",
                            "Choose another name.")  # fmt: skip
    with Progress() as progress:
        made = adapt.adapt(model.generator, clip, (texts[0], texts[1]), settings, progress.show)
    few = made.directions[: max(1, len(made.directions) // 10)], made.directions[-max(1, len(made.directions) // 10) :]
    first, last = (sum(part) / len(part) for part in few)
    arrays = {name: tensor.cpu().numpy() for name, tensor in made.generator.state_dict().items()}
    notes = metadata_of(made.generator.config) | {"title": f"GET3D, {args.text}"[:80]}
    source = weights.find(begun.name, data_dir)
    origin = (f"Adapted by populace adapt from {begun.name} (SHA-256 {begun.sha256}): {args.source!r} to "
              f"{args.text!r}, {args.part}, {args.steps} steps, seed {args.seed}, with CLIP.")  # fmt: skip
    with tempfile.TemporaryDirectory(dir=data_dir) as folder:
        path = Path(folder) / f"{args.name}.safetensors"
        path.write_bytes(b"".join(dump_tensors(arrays, notes)))
        weight_files.import_file(path, args.name, source.licence, data_dir, provenance=origin)
    print(f"{args.name}: the pictures' way points along the texts' with a cosine of {last:.2f} (at first {first:.2f})",
          file=sys.stderr)  # fmt: skip
    print(f"to use them: populace weights use {args.name} --for {args.family}")
