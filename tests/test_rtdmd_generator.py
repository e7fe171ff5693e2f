"""RTDMD's generator: one cotangent per call, and which steps SubGRPO trains."""

import math
from collections import Counter

import pytest
import torch
from forward_cases import gradient
from test_rtdmd_maths import ETA, SHAPE, N, draw
from torch import Tensor

from flowtilt.flow import per_sample
from flowtilt.objectives.rtdmd import (
    distribution_matching_gradient,
    kappa,
    renoise,
    subgrpo_steps,
    surrogate,
)
from flowtilt.solvers import log_prob, sde_step
from flowtilt.training.rtdmd.reinforce import SubGRPO

# one cotangent a call of the generator ---------------------------------------------------------------


class Net(torch.nn.Module):
    """A generator of 40 weights."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(3, 5).double(), torch.nn.Linear(5, 3).double()
        for seed, weight in enumerate(self.parameters()):
            weight.data = 0.5 * draw(*weight.shape, seed=seed)

    def forward(self, x: Tensor, sigma: float) -> Tensor:
        return self.down(torch.tanh(self.up(x) + sigma))


def gradients(net: Net, *losses: Tensor) -> list[Tensor]:
    """Of several losses, each sent back by itself."""
    net.zero_grad()
    for loss in losses:
        loss.backward()
    return [weight.grad.clone() for weight in net.parameters() if weight.grad is not None]


def step_cotangent(x_next: Tensor, mean: Tensor, advantages: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Of A l with l = -mean (x' - mu)^2, negated, at ratio 1: -A 2 (x' - mu) / D d mu / d v."""
    return -per_sample(advantages, mean) * 2 * (x_next - mean) / mean[0].numel() * -kappa(sigma, sigma_next, ETA).double()


def test_the_surrogates_gradient_is_the_cotangent():
    v, cotangent = draw(N, *SHAPE), draw(N, *SHAPE, seed=1).requires_grad_()
    assert surrogate(v, cotangent).shape == (N,)
    assert torch.equal(gradient(lambda x: surrogate(x, cotangent), v), cotangent.detach())
    assert cotangent.grad is None


@pytest.mark.parametrize(("sigma", "s"), [(0.9, 0.75), (0.5, 0.0)])
def test_matching_through_the_surrogate_is_matching_through_the_graph(sigma, s):
    """Against the paper's own loss, 1/2 mean (x_s - sg(x_s - g))^2, and in micro-batches."""
    net, (x, z, n, v_t, v_f) = Net(), draw(5, 6, 3).unbind()
    x_s = sde_step(x, net(x, sigma), sigma, s, z, "cps", ETA)[0]
    held = x_s.detach()
    x_t, _, _ = renoise(held, s, 0.9, n)
    g = distribution_matching_gradient(held, x_t, v_t, v_f, s, 0.9, z)
    direct = gradients(net, 0.5 * (x_s - (x_s - g).detach()).square().mean())
    cotangent = -kappa(sigma, s, ETA).double() * g / g.numel()
    torch.testing.assert_close(gradients(net, surrogate(net(x, sigma), cotangent).sum()), direct, rtol=1e-6, atol=1e-12)
    in_parts = [surrogate(net(x[rows], sigma), cotangent[rows]).sum() for rows in torch.arange(6).split(4)]
    torch.testing.assert_close(gradients(net, *in_parts), direct, rtol=1e-6, atol=1e-12)


def test_a_policy_step_through_the_surrogate_is_reinforce():
    """l = -mean (x' - mu)^2 is log p times 2 std^2, and its gradient is (2 / D) rho kappa times the noise that was drawn."""
    net, (x, z), a = Net(), draw(2, 6, 3).unbind(), draw(6, seed=5)
    sigma, s = 0.75, 0.5
    x_next, mean, std = sde_step(x, net(x, sigma), sigma, s, z, "cps", ETA)
    x_next = x_next.detach()
    ell = -(x_next - mean).square().flatten(1).mean(1)
    direct = gradients(net, (-a * (ell - ell.detach()).exp()).sum())
    cotangent = step_cotangent(x_next, mean.detach(), a, sigma, s)
    torch.testing.assert_close(gradients(net, surrogate(net(x, sigma), cotangent).sum()), direct, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(cotangent, per_sample(a, z) * 2 / 3 * std * kappa(sigma, s, ETA).double() * z)
    of_density = gradients(net, (-a * log_prob(x_next, sde_step(x, net(x, sigma), sigma, s, z, "cps", ETA)[1], std) * 2 * std**2).sum())
    torch.testing.assert_close(of_density, direct)


def test_the_last_step_has_nothing_for_a_policy_gradient():
    net, (x, z) = Net(), draw(2, 6, 3).unbind()
    x_next, mean, std = sde_step(x, net(x, 0.5), 0.5, 0.0, z, "cps", ETA)
    ell = -(x_next.detach() - mean).square().mean()
    assert float(std) == 0 and float(ell.detach()) == 0
    assert all((found == 0).all() for found in gradients(net, ell))


# which steps -----------------------------------------------------------------------------------------


def test_steps_of_subgrpo_are_a_fair_draw_without_the_last():
    drawn = [subgrpo_steps(k, 4, seed=3) for k in range(1500)]
    assert drawn == [subgrpo_steps(k, 4, 2, 3) for k in range(1500)]
    assert drawn != [subgrpo_steps(k, 4, seed=4) for k in range(1500)]
    counts = Counter(drawn)
    assert set(counts) == {(0, 1), (0, 2), (1, 2)}
    assert all(abs(count - 500) < 5 * math.sqrt(1500 * 2 / 9) for count in counts.values())


def test_all_stochastic_steps_may_be_trained_and_no_more():
    assert subgrpo_steps(7, 4, 3, seed=0) == (0, 1, 2) and subgrpo_steps(7, 2, 1, seed=0) == (0,)
    for steps, number in ((4, 4), (4, 0), (2, 2), (1, 1)):
        with pytest.raises(ValueError, match=f"{steps} steps have {steps - 1} stochastic"):
            subgrpo_steps(0, steps, number, seed=0)


def test_advantages_of_the_second_stage_are_whitened_once_more_over_the_rollout():
    a = torch.tensor([0.5, -0.5, math.nan, 0.1, -0.1, 0.3])
    found = SubGRPO(2).prepare(a, torch.tensor([0, 0, 1, 1, 1, 1]))
    known = found[~found.isnan()]
    assert found.isnan().tolist() == a.isnan().tolist()
    assert float(known.mean()) == pytest.approx(0, abs=1e-6) and float(known.std(correction=0)) == pytest.approx(1, abs=1e-3)
