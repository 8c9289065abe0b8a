# SPDX-License-Identifier: GPL-3.0-or-later
"""The synthesis in half the bits, and on CUDA without the launches in between.

Convolutions run in bfloat16 (channels last, as everywhere here): its exponents are float32's, so nothing overflows that
the networks' clamp lets pass. What the planes add up to, and everything that reads them, stays float32. On CUDA the
whole of it is recorded once per batch size as a graph and replayed: at one shape at a time the launches are most of it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from backend.families.get3d.networks import Decoded, Synthesis

# Largest difference to float32 that is allowed of planes, values and colours: root mean square, of float32's own. Small
# networks with random weights show half of it.
ERROR = 0.02
_WARM_UP = 3  # runs before a recording, in which libraries choose their ways


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    ws_geo: Tensor
    ws_tex: Tensor
    decoded: Decoded


class FastSynthesis:
    """Codes to fields as `Synthesis` does, without gradients. `graphs` is left to itself on CUDA and nowhere else."""

    def __init__(self, synthesis: Synthesis, dtype: torch.dtype = torch.bfloat16, graphs: bool | None = None) -> None:
        self.synthesis, self.dtype = synthesis, dtype
        self.device = next(synthesis.parameters()).device
        self.graphs = self.device.type == "cuda" if graphs is None else graphs
        self._recorded: dict[int, _Recorded] = {}

    @torch.no_grad()
    def __call__(self, ws_geo: Float[Tensor, "B L W"], ws_tex: Float[Tensor, "B M W"]) -> Decoded:
        if not self.graphs:
            return self._run(ws_geo, ws_tex)
        if len(ws_geo) not in self._recorded:
            self._recorded[len(ws_geo)] = self._record(ws_geo, ws_tex)
        found = self._recorded[len(ws_geo)]
        found.ws_geo.copy_(ws_geo)
        found.ws_tex.copy_(ws_tex)
        found.graph.replay()
        return _mapped(found.decoded, torch.clone)  # the next replay writes over what the graph owns

    def _run(self, ws_geo: Tensor, ws_tex: Tensor) -> Decoded:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False):
            decoded = self.synthesis(ws_geo, ws_tex)
        return _mapped(decoded, torch.Tensor.float)

    def _record(self, ws_geo: Tensor, ws_tex: Tensor) -> _Recorded:
        ws_geo, ws_tex = ws_geo.clone(), ws_tex.clone()
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                self._run(ws_geo, ws_tex)
        torch.cuda.current_stream(self.device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            decoded = self._run(ws_geo, ws_tex)
        return _Recorded(graph, ws_geo, ws_tex, decoded)


def _mapped(decoded: Decoded, change) -> Decoded:
    return dataclasses.replace(
        decoded, geometry=tuple(change(x) for x in decoded.geometry), texture=change(decoded.texture),
        geo_rows=[change(w) for w in decoded.geo_rows], tex_rows=[change(w) for w in decoded.tex_rows],
        color_row=change(decoded.color_row),
    )  # fmt: skip


@torch.no_grad()
def error(fast: Decoded, exact: Decoded, points: Float[Tensor, "B N 3"]) -> dict[str, float]:
    """Root mean square of the differences, of the exact one's own: planes, values, colours."""

    def relative(a: Tensor, b: Tensor) -> float:
        return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())

    planes = max(relative(a, b) for a, b in zip((*fast.geometry, fast.texture), (*exact.geometry, exact.texture)))
    return {"planes": planes, "sdf": relative(fast.sdf(points), exact.sdf(points)),
            "color": relative(fast.color(points), exact.color(points))}  # fmt: skip
