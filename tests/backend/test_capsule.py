# SPDX-License-Identifier: GPL-3.0-or-later
"""The analytic family: its answers are the yardstick of the other tests, so they are checked by other means here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from backend.families import capsule
from backend.families.capsule.model import REGIONS, STRIPE_M, load

MODEL = load(torch.device("cpu"))


def field(seed=0, **parameters):
    (one,) = MODEL.decode(MODEL.sample(seed, 1.0, parameters))
    return one


def test_distance_of_a_rounded_cone_is_the_distance_to_its_densely_sampled_balls():
    one = field(3)
    torch.manual_seed(3)
    points = torch.rand(400, 3, dtype=torch.float64) * 2 - torch.tensor([1.0, 0.0, 1.0])
    t = torch.linspace(0, 1, 4001, dtype=torch.float64)[:, None]
    best = torch.full((len(points),), torch.inf, dtype=torch.float64)
    for (a, b), (r0, r1) in zip(one.ends.double(), one.radii.double()):
        centres = a + t * (b - a)
        best = torch.minimum(best, (torch.cdist(points, centres) - (r0 + t[:, 0] * (r1 - r0))).amin(1))
    torch.testing.assert_close(one.sdf(points), best, atol=1e-6, rtol=0)


def test_single_capsule_has_the_textbook_distance_and_unit_gradient():
    one = field(5, single=True)
    radius, top = one.radii[0, 0].double(), one.ends[0, 1, 1].double()
    generator = torch.Generator().manual_seed(5)
    points = torch.rand(1000, 3, generator=generator, dtype=torch.float64) * 2.0 - torch.tensor([1.0, 0.0, 1.0])
    on_axis = points.clone()
    on_axis[:, (0, 2)] = 0
    on_axis[:, 1] = torch.minimum(points[:, 1].clamp_min(radius), top)
    torch.testing.assert_close(one.sdf(points), (points - on_axis).norm(dim=1) - radius, atol=1e-9, rtol=0)
    points.requires_grad_()
    (gradient,) = torch.autograd.grad(one.sdf(points).sum(), points)
    torch.testing.assert_close(gradient.norm(dim=1), torch.ones(1000, dtype=torch.float64), atol=1e-6, rtol=0)
    assert one.rig is None


def test_seeds_repeat_and_differ():
    assert torch.equal(field(7).ends, field(7).ends)
    assert not torch.equal(field(7).ends, field(8).ends)
    assert torch.equal(MODEL.sample(7, 0.0, {}).codes["body/shape"], torch.zeros(1, 8))


@pytest.mark.parametrize("seed", range(8))
def test_person_stands_on_the_floor_inside_its_bounds(seed):
    one = field(seed)
    low, high = one.bounds
    assert low[1] == pytest.approx(-0.03, abs=1e-6)
    assert 1.4 < float(high[1]) < 2.0
    edge = torch.rand(2, 3, 500, 3) * (high - low) + low  # side, axis
    for axis in range(3):
        edge[0, axis, :, axis], edge[1, axis, :, axis] = low[axis], high[axis]
    assert (one.sdf(edge.reshape(-1, 3)) > 0.02).all()


def test_regions_colours_and_skin():
    one = field(1)
    middle = one.ends.mean(1)
    assert [REGIONS[i] for i in one.region(middle)].count("head") == 2
    joints = one.rig.names.index("hand.L"), one.rig.names.index("hand.R")
    assert [REGIONS[i] for i in one.region(middle[list(joints)])] == ["arm.L", "arm.R"]
    assert middle[joints[0], 0] > 0 > middle[joints[1], 0]
    above = middle + torch.tensor([0.0, 2 * STRIPE_M, 0.0])
    same = one.region(above) == one.region(middle)
    assert torch.equal(one.color(above)[same], one.color(middle)[same])
    bones, weights = one.skin(middle)
    assert torch.equal(bones[:, 0], torch.arange(len(middle)))
    torch.testing.assert_close(weights.sum(1), torch.ones(len(middle)))
    assert all(parent < i for i, parent in enumerate(one.rig.parents))


def test_info_needs_no_torch_and_describes_the_parameter():
    import subprocess
    import sys

    code = "import sys, backend.families.capsule; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert capsule.INFO.parameters["single"]["type"] == "boolean"
    assert np.isfinite(field(2**53 - 1).ends.numpy()).all()
