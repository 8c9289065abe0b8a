# SPDX-License-Identifier: GPL-3.0-or-later
"""The three stages of E3DGE's training on small networks: losses fall, what is frozen stays so bit for bit."""

from __future__ import annotations

import pytest
import torch

from backend.families.e3dge import training
from backend.families.e3dge.config import Config
from backend.families.e3dge.inversion import E3dge
from backend.families.e3dge.training import LEARNING, WEIGHTS, Learner, Stage


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> E3dge:
    monkeypatch.setattr(training, "POINTS", 128)
    torch.manual_seed(0)
    made = E3dge(Config.tiny())
    made.average(300, torch.randn(300, 16))
    made.local.start_at_zero()
    with torch.no_grad():
        made.generator.field.sigma_linear.weight.mul_(0.1)  # about as steep as a distance
    return made.eval()


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("stage", ["1", "2.1", "2.2"])
def test_losses_fall_and_the_generator_stays_bit_for_bit(net: E3dge, stage: Stage) -> None:
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    pair = training.pairs(net, 2, random())
    learner = Learner(net, stage, rate=2e-3)
    told = [learner.step(pair, random(1)) for _ in range(12)]
    assert told[0].keys() == {name for name in WEIGHTS[stage] if name not in ("perceptual", "identity")} | {"sum"}
    main = {"1": "sum", "2.1": "sum", "2.2": "picture"}[stage]  # of the frozen aligner the losses stay
    assert min(losses[main] for losses in told[-3:]) < 0.9 * told[0][main]
    changed = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    learning = LEARNING[stage]
    assert changed
    assert all(name.startswith(learning) for name in changed)
    for part in learning:
        assert any(name.startswith(part) for name in changed)


def test_one_photo_is_overfitted_by_the_encoder(net: E3dge) -> None:
    pair = training.pairs(net, 2, random(3))
    learner = Learner(net, "1", rate=2e-3)
    codes = [learner.step(pair, random(1))["codes"] for _ in range(30)]
    assert codes[-1] < 0.75 * codes[0]


def test_swapping_both_views_and_back_gives_the_same_loss(net: E3dge) -> None:
    with torch.no_grad():
        net.local.local_feat_to_tex_modulations_linear.fc_1.weight.normal_()
    pair = training.pairs(net, 2, random(), samples=6)
    one = training.losses(net, "2.2", pair, random(), 6)
    other = training.losses(net, "2.2", pair.swapped(), random(), 6)
    back = training.losses(net, "2.2", pair.swapped().swapped(), random(), 6)
    for name in one:
        torch.testing.assert_close(one[name], other[name])
        assert torch.equal(one[name], back[name])


def test_perceptual_and_identity_losses_are_asked_with_pictures_of_the_decoder(net: E3dge) -> None:
    asked = []

    def compare(made: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
        asked.append((made.shape, true.shape))
        return (made - true).abs().mean((1, 2, 3))

    pair = training.pairs(net, 2, random())
    found = training.losses(net, "2.1", pair, random(), perceptual=compare, identity=compare)
    assert {"perceptual", "identity"} <= found.keys()
    assert asked == [((2, 3, 64, 64), (2, 3, 64, 64))] * 2


def test_second_poses_leave_the_first_by_the_spread(net: E3dge) -> None:
    still, far = (training.pairs(net, 2, random(), spread) for spread in (0.0, 1.0))
    assert torch.equal(still.sides[0].cameras.angles, still.sides[1].cameras.angles)
    assert not torch.equal(far.sides[0].cameras.angles, far.sides[1].cameras.angles)
    assert torch.equal(still.sides[0].photo, far.sides[0].photo)


def test_modulation_learns_at_a_fifth_of_the_rate(net: E3dge) -> None:
    usual, slow = Learner(net, "2.2").optimizer.param_groups
    assert slow["lr"] == pytest.approx(0.2 * usual["lr"])
    assert sum(p.numel() for p in slow["params"]) == sum(
        p.numel() for p in net.local.local_feat_to_tex_modulations_linear.parameters()
    )
