"""EPG, PEPG and PAR are policy gradients on the lower bound: their gradients by hand, where they agree, where they vanish; in float64."""

import pytest
import torch
from forward_cases import SHAPE, N, along, draw, gradient, policy_and_batch, slopes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowtilt.flow import add_noise
from flowtilt.objectives.elbo import EPG, PAR, PEPG, elbo, epg_loss, par_loss, pepg_loss
from flowtilt.objectives.forward import x0_error
from flowtilt.objectives.grpo import grpo_loss
from flowtilt.objectives.nft import nft_loss, optimality

FEW = settings(deadline=None, max_examples=25)
LOSSES = [epg_loss, pepg_loss, par_loss]


def numbers(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """ELBO, old ELBO and advantages, [8] each."""
    rng = torch.Generator().manual_seed(seed)
    new, off, advantages = torch.randn(3, 8, generator=rng, dtype=torch.float64)
    return -new.abs(), -new.abs() + 0.4 * off, advantages


def column(a: Tensor) -> Tensor:
    return a.view(-1, 1, 1, 1)


# the lower bound -------------------------------------------------------------------------------------


def test_the_lower_bound_is_minus_the_error_and_at_most_0():
    case = draw()
    found = elbo(case.v, case.v_target, case.t)
    torch.testing.assert_close(found, -x0_error(case.v, case.v_target, case.t))
    assert found.shape == (N,) and (found < 0).all()
    assert (elbo(case.v_target, case.v_target, case.t) == 0).all()


def test_its_gradient_is_the_finite_difference_with_the_weight_held():
    case, direction = draw(), draw(1).v
    weight = (column(case.t) * (case.v - case.v_target)).abs().mean((1, 2, 3))

    def held(v: Tensor) -> Tensor:
        return -(column(case.t) * (v - case.v_target)).square().mean((1, 2, 3)) / weight

    found = gradient(lambda v: elbo(v, case.v_target, case.t), case.v)
    torch.testing.assert_close(along(found, direction), slopes(held, case.v, direction), rtol=1e-6, atol=1e-9)


# the losses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [True, False])
@FEW
@given(seed=st.integers(0, 999))
def test_the_losses_are_their_formulas(ratio, seed):
    new, old, a = numbers(seed)
    d = new - old
    rho = d.exp() if ratio else torch.ones_like(d)
    torch.testing.assert_close(epg_loss(new, old, a, ratio=ratio), -rho * a * new)
    torch.testing.assert_close(pepg_loss(new, old, a, ratio=ratio), -rho * (a - d) * new)
    torch.testing.assert_close(par_loss(new, old, a, ratio=ratio), 0.5 * rho * (a - d) ** 2)


@pytest.mark.parametrize("ratio", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_the_gradients_are_the_finite_differences_with_what_is_stopped_held(seed, ratio):
    new, old, a = numbers(seed)
    direction = numbers(seed + 10)[2]
    d = new - old
    rho = d.exp() if ratio else torch.ones_like(d)
    held = {epg_loss: lambda x: -rho * a * x, pepg_loss: lambda x: -rho * (a - d) * x, par_loss: lambda x: rho * (a - (x - old)) ** 2 / 2}
    for loss, written in held.items():
        found = gradient(lambda x, loss=loss: loss(x, old, a, ratio=ratio), new)
        torch.testing.assert_close(along(found, direction), slopes(written, new, direction), rtol=1e-7, atol=1e-9)


@FEW
@given(seed=st.integers(0, 999), ratio=st.booleans())
def test_pepg_and_par_are_one_gradient(seed, ratio):
    new, old, a = numbers(seed)
    torch.testing.assert_close(*(gradient(lambda x, loss=loss: loss(x, old, a, ratio=ratio), new) for loss in (pepg_loss, par_loss)))


def test_both_rest_where_the_bound_has_moved_by_the_advantage_and_epg_goes_on():
    _, old, a = numbers()
    there = old + a
    assert (par_loss(there, old, a) < 1e-30).all()
    for loss in (pepg_loss, par_loss):
        torch.testing.assert_close(gradient(lambda x, loss=loss: loss(x, old, a), there), torch.zeros_like(a), rtol=0, atol=1e-14)
    torch.testing.assert_close(gradient(lambda x: epg_loss(x, old, a), there), -a.exp() * a)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("ratio", [True, False])
def test_where_the_policies_agree_each_is_the_plain_policy_gradient(loss, ratio):
    new, _, a = numbers()
    torch.testing.assert_close(gradient(lambda x: loss(x, new, a, ratio=ratio), new), -a)


def test_there_epg_is_diffusionnft_too():
    case = draw()
    advantages = torch.tensor([-4.0, -1.0, 0.5, 3.0], dtype=torch.float64)
    r = optimality(advantages, 5.0)
    nft = gradient(lambda v: nft_loss(v, case.v, case.v_target, case.t, r, beta=0.4, clip=5.0), case.v)
    old = elbo(case.v, case.v_target, case.t)
    torch.testing.assert_close(gradient(lambda v: epg_loss(elbo(v, case.v_target, case.t), old, advantages), case.v), nft)


def test_there_epg_on_advantages_that_tanh_bounds_is_v_grpo():
    """V-GRPO is PPO with a likelihood that is the mean over four pairs (t, eps) which a group shares; EPG has the four as rows."""
    case, rng = draw(), torch.Generator().manual_seed(1)
    eps, t = torch.randn(4, *SHAPE, generator=rng, dtype=torch.float64), torch.rand(4, generator=rng, dtype=torch.float64)
    x_t = [add_noise(case.x0, eps[j].expand(N, *SHAPE), t[j]) for j in range(4)]
    a = 3 * torch.tensor([-9.0, -1.0, 0.5, 3.0], dtype=torch.float64).div(3).tanh()

    def bounds(w: Tensor) -> list[Tensor]:
        """Of each pair, [N]; a policy with one weight an image."""
        return [elbo(column(w) * x_t[j], eps[j] - case.x0, t[j]) for j in range(4)]

    now = torch.full((N,), 0.5, dtype=torch.float64)
    old = bounds(now)
    v_grpo = gradient(lambda w: grpo_loss(torch.stack(bounds(w)).mean(0), torch.stack(old).mean(0), a, 6e-3), now)
    epg = gradient(lambda w: torch.stack([epg_loss(new, of, a) for new, of in zip(bounds(w), old, strict=True)]).mean(0), now)
    torch.testing.assert_close(epg, v_grpo)
    assert v_grpo.abs().min() > 1e-3


@pytest.mark.parametrize("loss", LOSSES)
def test_a_constant_on_every_advantage_changes_no_expected_gradient_where_the_policy_is_the_mean_of_its_targets(loss):
    """Targets in opposite pairs around v: the sum over a pair is 0 exactly, so a group's mean is a free baseline."""
    case = draw()
    v = case.v[:1].expand(N, *SHAPE)
    half = draw(1).v[: N // 2]
    targets, t = v + torch.cat([half, -half]), torch.full((N,), 0.6, dtype=torch.float64)
    old = elbo(v, targets, t)

    def total(a: Tensor) -> Tensor:
        return gradient(lambda x: loss(elbo(x, targets, t), old, a), v).sum(0)

    torch.testing.assert_close(total(case.advantages + 3), total(case.advantages), rtol=0, atol=1e-12)
    assert total(case.advantages).abs().max() > 1e-3


@pytest.mark.parametrize("loss", LOSSES)
def test_the_old_policy_never_gets_a_gradient(loss):
    new, old, a = numbers()
    new.requires_grad_(), old.requires_grad_()
    loss(new, old, a).sum().backward()
    assert old.grad is None and new.grad is not None


# the method ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [True, False])
@pytest.mark.parametrize(("method", "loss"), [(EPG, epg_loss), (PEPG, pepg_loss), (PAR, par_loss)])
def test_the_method_is_its_loss_on_scaled_advantages(method, loss, ratio):
    policy, batch = policy_and_batch(current=0.5, old=0.2)
    found, metrics = method(scale=0.1, ratio=ratio, consistency=0.7, kl=0.0, old_policy="linear").loss(policy, batch)
    x_t = add_noise(batch.x0, batch.eps, batch.t)
    new, old = (elbo(policy.velocity(role, x_t, batch.t, batch.conditioning), batch.eps - batch.x0, batch.t) for role in ("current", "old"))
    torch.testing.assert_close(found, loss(new, old, 0.1 * (batch.advantages + 0.7), ratio=ratio))
    torch.testing.assert_close(metrics["log_ratio"], (new - old).abs().detach())
