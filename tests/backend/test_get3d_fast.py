# SPDX-License-Identifier: GPL-3.0-or-later
"""The synthesis in bfloat16 differs from float32 by less than its bound; CUDA graphs are tested in tests/gpu."""

from __future__ import annotations

import pytest
import torch

from backend.families.get3d.config import Config
from backend.families.get3d.fast import ERROR, FastSynthesis, error
from backend.families.get3d.networks import Generator


@pytest.mark.parametrize("kind", ["unified", "separate"])
@torch.no_grad()
def test_half_the_bits_stay_within_the_bound(kind: str) -> None:
    torch.manual_seed(0)
    net = Generator(Config.tiny(kind=kind, resolution=32)).eval()
    geo, tex = net.mapping_geo(torch.randn(2, 32)), net.mapping(torch.randn(2, 32))
    points = torch.rand(2, 2000, 3) - 0.5
    exact, fast = net.synthesis(geo, tex), FastSynthesis(net.synthesis)(geo, tex)
    found = error(fast, exact, points)
    assert set(found) == {"planes", "sdf", "color"}
    assert 1e-5 < max(found.values()) < ERROR
    assert fast.texture.dtype == torch.float32
    same = error(FastSynthesis(net.synthesis, torch.float32)(geo, tex), exact, points)
    assert max(same.values()) == 0.0
    assert not FastSynthesis(net.synthesis).graphs
