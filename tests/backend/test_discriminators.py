# SPDX-License-Identifier: GPL-3.0-or-later
"""Discriminators against slow references and closed forms; their gradients against finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from backend.training.discriminators import (
    Discriminator,
    discriminator_loss,
    generator_loss,
    halve,
    minibatch_deviation,
    r1_penalty,
    view_code,
)

F64 = torch.float64


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def small(dims: int = 2, condition: int = 0, group: int = 2) -> Discriminator:
    torch.manual_seed(0)
    size = (16, 8) if dims == 2 else (8, 8, 8)
    return Discriminator(2, size, base=3, limit=4, condition=condition, group=group).double()


@pytest.mark.parametrize("shape", [(2, 3, 8, 6), (1, 2, 4, 6, 8)])
def test_halving_is_a_filter_and_every_second_sample(shape: tuple[int, ...]) -> None:
    x = noise(*shape)
    taps = np.array([1, 3, 3, 1]) / 8
    expected = x.numpy()
    for axis in range(2, len(shape)):
        # output i is taps . input[2 i - 1 .. 2 i + 2]: correlate4 centres its window at the third tap
        expected = ndimage.correlate1d(expected, taps, axis=axis, mode="constant", origin=-1)
        expected = np.take(expected, range(0, shape[axis], 2), axis=axis)
    assert np.allclose(halve(x).numpy(), expected, atol=1e-12)
    flat = halve(torch.ones(1, 1, 16, 16))
    assert torch.allclose(flat[..., 1:-1, 1:-1], torch.ones(6, 6))


def test_minibatch_deviation_is_that_of_loops() -> None:
    x = noise(6, 3, 4, 5)
    found = minibatch_deviation(x, group=3)
    for first in (0, 3):
        sums = [
            math.sqrt(float(np.var([float(x[first + b, c, i, j]) for b in range(3)])) + 1e-8)
            for c in range(3) for i in range(4) for j in range(5)
        ]  # fmt: skip
        assert torch.allclose(found[first : first + 3, 3], torch.full((3, 4, 5), float(np.mean(sums)), dtype=F64))
    assert torch.equal(found[:, :3], x)
    twins = minibatch_deviation(x[:1].expand(4, -1, -1, -1), group=4)[:, 3]
    assert torch.allclose(twins, torch.full_like(twins, 1e-4))  # the square root of the epsilon
    assert minibatch_deviation(x[:5], group=4).shape == (5, 4, 4, 5)  # one group of five


def test_losses_in_closed_form() -> None:
    zero = torch.zeros(3, dtype=F64)
    assert float(generator_loss(zero)) == pytest.approx(math.log(2))
    assert float(discriminator_loss(zero, zero)) == pytest.approx(2 * math.log(2))
    assert float(discriminator_loss(zero + 30, zero - 30)) == pytest.approx(0, abs=1e-9)
    fake = torch.tensor([-40.0], dtype=F64, requires_grad=True)
    generator_loss(fake).backward()
    assert float(fake.grad) == pytest.approx(-1)  # it does not saturate where the critic is sure


def test_r1_of_a_quadratic_is_the_squared_gradient() -> None:
    a = nn.Parameter(noise(5, 5))
    x = noise(4, 5, seed=1).requires_grad_()
    penalty = r1_penalty(((x @ a) * x).sum(1) / 2, x)
    exact = ((x @ (a + a.T) / 2) ** 2).sum(1).mean()
    assert torch.allclose(penalty, exact, rtol=1e-12)
    got, want = torch.autograd.grad(penalty, a)[0], torch.autograd.grad(exact, a)[0]
    assert torch.allclose(got, want)


@pytest.mark.parametrize("dims", [2, 3])
def test_gradients_of_first_and_second_order(dims: int) -> None:
    critic = small(dims, condition=2)
    shape = (2, 2, 16, 8) if dims == 2 else (2, 2, 8, 8, 8)
    x, c = noise(*shape, seed=2).requires_grad_(), noise(2, 2, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(critic, (x, c), fast_mode=True)
    assert torch.autograd.gradgradcheck(critic, (x, c), fast_mode=True)


def test_r1_differentiates_through_the_critic() -> None:
    critic, x = small(), noise(2, 2, 16, 8, seed=4).requires_grad_()

    def penalty() -> Tensor:
        return r1_penalty(critic(x), x)

    for name, parameter in critic.named_parameters():
        (gradient,) = torch.autograd.grad(penalty(), parameter, allow_unused=True)
        direction = noise(*parameter.shape, seed=5)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * 1e-6 * direction)
            values.append(float(penalty().detach()))
            with torch.no_grad():
                parameter.sub_(sign * 1e-6 * direction)
        slope = 0.0 if gradient is None else float((gradient * direction).sum())
        assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-7), name


def test_the_condition_speaks_by_projection() -> None:
    """score(x, c) = score(x, 0) + <phi(x), E c> / sqrt(dim): linear in c but for the embedding's bias."""
    critic, x = small(condition=3), noise(2, 2, 16, 8)
    a, b = noise(2, 3, seed=1), noise(2, 3, seed=2)
    zero = torch.zeros_like(a)
    added = critic(x, a) + critic(x, b) - critic(x, zero)
    assert torch.allclose(critic(x, a + b), added, atol=1e-12)
    assert not torch.allclose(critic(x, a), critic(x, b))


def test_whole_groups_score_the_same_in_any_batch() -> None:
    critic, x = small(group=2), noise(6, 2, 16, 8)
    apart = torch.cat([critic(part) for part in x.split(2)])
    assert torch.allclose(critic(x), apart, atol=1e-12)


def test_activations_keep_their_size_from_end_to_end() -> None:
    """Equalised weights: unit inputs give scores of order one at any width."""
    for base in (8, 64):
        torch.manual_seed(1)
        critic = Discriminator(4, (64, 32), base=base, limit=256, condition=14)
        scores = critic(torch.randn(16, 4, 64, 32), view_code(torch.zeros(16, 3))).detach()
        assert 0.1 < float(scores.std() + scores.mean().abs()) < 10


def test_sizes_that_cannot_be_halved_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be halved"):
        Discriminator(4, (64, 24), base=4)


def test_view_codes_are_periodic_and_tell_framings_apart() -> None:
    views = torch.tensor([[0.3, 0.1, 0], [0.3 + 2 * math.pi, 0.1, 0], [0.3, 0.1, 1]], dtype=F64)
    codes = view_code(views)
    assert codes.shape == (3, 14)
    assert torch.allclose(codes[0], codes[1])
    assert (codes[0, :12] == codes[2, :12]).all()
    assert (codes[0, 12:] != codes[2, 12:]).all()


def test_a_critic_learns_to_tell_noise_from_stripes() -> None:
    torch.manual_seed(0)
    critic = Discriminator(1, (16, 8), base=8, limit=16)
    optimiser = torch.optim.Adam(critic.parameters(), 0.003, betas=(0.0, 0.99))
    stripes = (torch.arange(16) % 2).float().reshape(1, 1, 16, 1).expand(8, 1, 16, 8)
    for step in range(40):
        generator = torch.Generator().manual_seed(step)
        reals = (stripes + 0.3 * torch.randn(8, 1, 16, 8, generator=generator)).requires_grad_()
        scores = critic(reals)
        loss = discriminator_loss(scores, critic(torch.rand(8, 1, 16, 8, generator=generator)))
        if step % 8 == 0:
            loss = loss + 0.05 * r1_penalty(scores, reals)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(scores.detach().mean()) > 1
