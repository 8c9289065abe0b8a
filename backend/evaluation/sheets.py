# SPDX-License-Identifier: GPL-3.0-or-later
"""Pictures that say what a model is worth: `python -m backend.evaluation.sheets --out weights_manifest/pictures`.

Everything as it comes, from consecutive seeds; nothing is chosen.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from backend import families, pipeline, poses
from backend.families.base import FamilyModel
from backend.packet import HumanAsset
from backend.photo.album import Album
from backend.protocol import GenerateRequest, PopulaceError, parse_request
from backend.render.shade import Maps, render_sheet
from backend.settings import Settings

HEIGHT = 380  # pixels of a tile
SWAPPED = ("hair", "top", "bottom", "shoes")
SHEETS = ("people", "interpolation", "swaps", "poses")
POSED = ("standing_4", "contrapposto", "arms_down", "walking", "sitting", "waving")


def tiles(asset: HumanAsset, views: Sequence[str], height: int = HEIGHT) -> np.ndarray:
    """One row of views of a person u8 [height, W, 3], in the pose that it has."""
    part = asset.parts[0]
    vertices = part.vertices
    if asset.rig is not None and asset.rig.rotations is not None and part.skin_indices is not None:
        vertices = poses.skin(vertices, part.skin_indices, part.skin_weights, asset.rig, asset.rig.rotations,
                              asset.rig.translation)  # fmt: skip

    def image(png: bytes) -> torch.Tensor:
        with Image.open(io.BytesIO(png)) as opened:
            return torch.from_numpy(np.asarray(opened.convert("RGB"), np.float32) / 255)

    maps = Maps(torch.from_numpy(part.uvs.copy()), torch.from_numpy(part.face_uvs_idx.astype(np.int64)),
                image(part.base_color_png), None if part.normal_png is None else image(part.normal_png))  # fmt: skip
    faces = torch.from_numpy(part.faces.astype(np.int64))
    return render_sheet([(torch.from_numpy(np.ascontiguousarray(vertices, np.float32)), faces, maps)], views, height)


def grid(rows: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Pictures of one size side by side, `columns` to a row."""
    blank = np.full_like(rows[0], 255)
    full = [*rows, *[blank] * (-len(rows) % columns)]
    return np.concatenate([np.concatenate(full[i : i + columns], 1) for i in range(0, len(full), columns)], 0)


class Sheets:
    """The sheets of one family."""

    def __init__(self, model: FamilyModel, family: str) -> None:
        self.model, self.family = model, family

    def _made(self, **request: Any) -> HumanAsset:
        asked: GenerateRequest = parse_request({"family": self.family, **request})
        return pipeline.generate(asked, self.model)[0]

    def people(self, count: int = 24) -> np.ndarray:
        """Seeds 0, 1, 2, ...: front, back, face."""
        return grid([tiles(self._made(seed=s), ("front", "back", "face"), 300) for s in range(count)], 4)

    def interpolation(self, steps: int = 7) -> np.ndarray:
        """From one person to another: everything, the shapes alone, the textures alone."""
        rows = []
        for kinds in (["shape", "tex"], ["shape"], ["tex"]):
            for i in range(steps):
                mix = {"op": "mix", "other": {"seed": 5}, "amount": i / (steps - 1), "kinds": kinds}
                rows.append(tiles(self._made(seed=4, edits=[mix]), ("front",)))
        return grid(rows, steps)

    def swaps(self, donors: int = 4) -> np.ndarray:
        """One person; below, one part at a time from four others."""
        rows = [tiles(self._made(seed=1), ("front",))]
        rows += [tiles(self._made(seed=10 + d), ("front",)) for d in range(donors)]
        for part in SWAPPED:
            rows.append(np.full_like(rows[0], 255))
            for d in range(donors):
                take = {"op": "part", "parts": [part], "other": {"seed": 10 + d}}
                try:
                    rows.append(tiles(self._made(seed=1, edits=[take]), ("front",)))
                except PopulaceError as error:  # a donor without the part
                    if error.code not in ("invalid_request", "invalid_latents"):
                        raise
                    rows.append(np.full_like(rows[0], 255))
        return grid(rows, 1 + donors)

    def poses(self, people: int = 4) -> np.ndarray:
        """Poses of the library."""
        return grid([tiles(self._made(seed=s, pose=p), ("three_quarter",)) for s in range(people) for p in POSED],
                    len(POSED))  # fmt: skip

    def inversions(self, count: int = 12, steps: int = 60) -> np.ndarray:
        """Photos of people nobody trained on, as `evaluation.inversion` takes them; then what the road makes of each:
        in the photo's pose from before and behind, walking, and with another top, heavier."""
        from backend.evaluation.inversion import make_case
        from backend.families.people.model import PeopleModel

        assert isinstance(self.model, PeopleModel)
        rows = []
        for i in range(count):
            case, album = make_case(self.model, i), Album()
            rgba = case.photos[0].rgba
            photo: dict[str, Any] = {"image": album.add(_png(rgba[..., :3]))}
            if not case.matted:
                photo["mask"] = album.add(_png(rgba[..., 3]))
            asked = parse_request({"family": self.family, "photos": [photo], "inversion": {"steps": steps}})
            found = pipeline.generate(asked, self.model, images=album)[0]
            again = {"latents": {k: v.tolist() for k, v in found.latents.items()},
                     "latent_maps": {name: album.add(data) for name, data in found.maps.items()}}  # fmt: skip
            other = [{"op": "reroll", "seed": 7, "lock": [p for p in self._parts(found) if p != "top"]},
                     {"op": "set", "values": {"weight": 0.85}}]  # fmt: skip
            views = [tiles(found, ("front", "back"))]
            for request in ({"pose": "walking"}, {"pose": "standing_4", "edits": other}):
                asked = parse_request({"family": self.family, **again, **request})
                views.append(tiles(pipeline.generate(asked, self.model, images=album)[0], ("three_quarter",)))
            rows.append(np.concatenate([_framed(rgba[..., :3], case.photos[0].box), *views], 1))
        width = max(row.shape[1] for row in rows)
        rows = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
        return grid(rows, 2)

    @staticmethod
    def _parts(asset: HumanAsset) -> list[str]:
        return list(dict.fromkeys(name.partition("/")[0] for name in asset.latents))


def _png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(out, "PNG")
    return out.getvalue()


def _framed(photo: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """The photo about the person, as tall as a tile, two thirds as wide."""
    left, top, right, bottom = box
    half = 0.55 * max(bottom - top, 1.5 * (right - left))
    x, y = (left + right) / 2, (top + bottom) / 2
    cut = Image.fromarray(photo).crop((round(x - half / 1.5), round(y - half), round(x + half / 1.5), round(y + half)))
    return np.asarray(cut.resize((round(HEIGHT / 1.5), HEIGHT), Image.Resampling.LANCZOS))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--family", default="people")
    parser.add_argument("--only", nargs="+", choices=(*SHEETS, "inversions"), default=SHEETS)
    args = parser.parse_args(argv)
    settings = Settings.load()
    sheets = Sheets(families.load(args.family, settings.device, settings), args.family)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        picture = getattr(sheets, name)()
        Image.fromarray(picture).save(args.out / f"{args.family}_{name}.jpg", quality=82)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
