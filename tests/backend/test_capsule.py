# SPDX-License-Identifier: GPL-3.0-or-later
"""The analytic family: its answers are the yardstick of the other tests, so they are checked by other means here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from backend.families import capsule
from backend.families.base import Latents
from backend.families.capsule.model import REGIONS, STRIPE_M, load
from backend.protocol import PopulaceError

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


@pytest.mark.parametrize("seed", range(6))
def test_attributes_are_exact_and_independent(seed):
    before = MODEL.sample(seed, 1.0, {})
    said = MODEL.describe(before)
    (one,) = MODEL.decode(before)
    assert said["height_m"] == pytest.approx(float((one.ends[..., 1] + one.radii).max()), abs=1e-6)
    assert said["top_color"] == pytest.approx(one.palette[REGIONS.index("torso"), 0].tolist(), abs=1e-6)
    wanted = {"height_m": 1.95, "weight": 0.9, "top_color": [0.75, 0.5, 0.0], "bottom_color": [0.125, 0.25, 1.0]}
    for name, value in wanted.items():
        after = MODEL.describe(MODEL.edit(before, {name: value}))
        assert after[name] == pytest.approx(value, abs=1e-3 if "color" in name else 1e-6)
        assert all(after[k] == (v if isinstance(v, str) else pytest.approx(v, abs=1e-6))
                   for k, v in said.items() if k != name)  # fmt: skip
    together = MODEL.describe(MODEL.edit(before, wanted))
    assert all(together[k] == pytest.approx(v, abs=1e-3) for k, v in wanted.items())
    assert together["pattern"] == "stripes"


def test_attributes_reach_their_bounds_for_every_person():
    bounds = {a.name: (a.low, a.high) for a in capsule.INFO.attributes if a.kind == "number"}
    for sign in (-9.0, 9.0):
        codes = MODEL.sample(0, 1.0, {}).codes | {"body/shape": torch.full((1, 8), sign)}
        for name, ends in bounds.items():
            for value in ends:
                said = MODEL.describe(MODEL.edit(Latents("capsule", codes), {name: value}))
                assert said[name] == pytest.approx(value, abs=1e-6)


def test_plain_people_stay_plain_when_coloured():
    plain = MODEL.edit(MODEL.sample(3, 1.0, {}), {"pattern": "plain", "top_color": [1.0, 0.0, 0.0]})
    assert MODEL.describe(plain)["pattern"] == "plain"
    (one,) = MODEL.decode(plain)
    chest = torch.tensor([[0.0, 1.15, 0.0], [0.0, 1.25, 0.0]])
    torch.testing.assert_close(one.color(chest), torch.tensor([[1.0, 0, 0]] * 2), atol=1e-3, rtol=0)
    assert MODEL.describe(MODEL.edit(plain, {"pattern": "stripes"}))["pattern"] == "stripes"


def test_single_capsule_has_no_attributes_and_mixed_up_codes_are_refused():
    single = MODEL.sample(0, 1.0, {"single": True})
    assert MODEL.describe(single) == {}
    with pytest.raises(PopulaceError, match="no attributes"):
        MODEL.edit(single, {"weight": 1})
    with pytest.raises(PopulaceError, match="neither"):
        MODEL.decode(Latents("capsule", {**single.codes, **MODEL.sample(0, 1.0, {}).codes}))


def test_info_lists_the_codes_that_sampling_gives():
    for parameters in ({}, {"single": True}):
        codes = MODEL.sample(1, 1.0, parameters).codes
        assert {name: (1, capsule.INFO.codes[name].size) for name in codes} == {n: c.shape for n, c in codes.items()}
    assert capsule.INFO.parts == ("body", "single")
