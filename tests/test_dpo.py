"""DPO's loss in closed form, and what of a rollout becomes a pair. In float64."""

import math
from functools import partial

import pytest
import torch
from forward_cases import along, gradient, slopes
from hypothesis import given, settings
from hypothesis import strategies as st

from flowtilt.flow import add_noise, velocity_target
from flowtilt.methods.dpo import OfflineDPOSettings, OnlineDPOSettings, winner_gets_worse
from flowtilt.models.conditioning import Conditioning
from flowtilt.models.levels import Levels
from flowtilt.objectives.batches import draw_times
from flowtilt.objectives.dpo import METRICS, NoisedPairs, PairBatch, dpo_loss, pair_loss, preference
from flowtilt.training.dpo.offline import order
from flowtilt.training.dpo.online import best_and_worst

FEW = settings(deadline=None, max_examples=30)
N, SHAPE = 4, (2, 3, 3)
errors = st.floats(0, 3)
betas = st.floats(0.1, 100)


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


def draw(seed):
    return torch.randn(N, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# the loss --------------------------------------------------------------------------------------------


@FEW
@given(w=errors, rejected=errors, beta=betas)
def test_at_the_reference_the_loss_is_log_2_and_its_slopes_are_a_quarter_of_beta(w, rejected, beta):
    e_w, e_l = column(w), column(rejected)
    assert float(dpo_loss(e_w, e_w, e_l, e_l, beta)) == pytest.approx(math.log(2))
    assert float(gradient(lambda e: dpo_loss(e, e_w, e_l, e_l, beta), e_w)) == pytest.approx(beta / 4)
    assert float(gradient(lambda e: dpo_loss(e_w, e_w, e, e_l, beta), e_l)) == pytest.approx(-beta / 4)


@FEW
@given(errors, errors, errors, errors, betas)
def test_swapped_images_flip_delta_and_their_losses_differ_by_the_margin(w, w_ref, lost, lost_ref, beta):
    values = [column(e) for e in (w, w_ref, lost, lost_ref)]
    swapped = [*values[2:], *values[:2]]
    delta = preference(*values)
    torch.testing.assert_close(preference(*swapped), -delta)
    # -log sigmoid(m) + log sigmoid(-m) = -m
    torch.testing.assert_close(dpo_loss(*values, beta) - dpo_loss(*swapped, beta), beta / 2 * delta, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_the_finite_difference_of_the_loss(seed):
    e_w, e_w_ref, e_l, e_l_ref, way = torch.rand(5, N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for loss, at in ((lambda e: dpo_loss(e, e_w_ref, e_l, e_l_ref, 3.0), e_w), (lambda e: dpo_loss(e_w, e_w_ref, e, e_l_ref, 3.0), e_l)):
        torch.testing.assert_close(along(gradient(loss, at), way), slopes(loss, at, way), rtol=1e-6, atol=1e-8)


def test_the_references_errors_get_no_gradient():
    values = [torch.rand(N, dtype=torch.float64).requires_grad_() for _ in range(4)]
    dpo_loss(*values, 3.0).sum().backward()
    assert [value.grad is not None for value in values] == [True, False, True, False]


def test_a_large_difference_neither_overflows_nor_stops_the_gradient():
    e_w = torch.tensor([1e4]).requires_grad_()
    loss = dpo_loss(e_w, torch.zeros(1), torch.zeros(1), torch.zeros(1), 5000.0)
    loss.sum().backward()
    assert float(loss.detach()) == pytest.approx(2500e4) and e_w.grad is not None and float(e_w.grad) == pytest.approx(2500)


# of a policy -----------------------------------------------------------------------------------------


class Scaled:
    """The reference's velocity is x_t; the current one's a weight times that."""

    def __init__(self, weight):
        self.weight, self.asked = torch.tensor(weight, dtype=torch.float64, requires_grad=True), []

    def velocity(self, role, x, t, conditioning):
        self.asked.append((role, len(x), torch.is_grad_enabled()))
        return self.weight * x if role == "current" else x


def batch(chosen=None, rejected=None, weight=None):
    given = Conditioning({"c": torch.zeros(1, 2)}, torch.zeros(N, dtype=torch.long))
    t = column(0.1, 0.4, 0.7, 1.0)
    return PairBatch(
        draw(0) if chosen is None else chosen,
        draw(1) if rejected is None else rejected,
        draw(2),
        t,
        torch.ones(N, dtype=torch.float64) if weight is None else weight,
        given,
    )


def by_hand(policy, one, beta, hold):
    losses = []
    for k in range(N):
        e = {}
        for name, x0 in (("w", one.chosen[k]), ("l", one.rejected[k])):
            x_t, target = add_noise(x0[None], one.eps[k][None], one.t[k]), velocity_target(x0, one.eps[k])
            for role, factor in (("current", policy.weight), ("reference", 1.0)):
                e[name, role] = (factor * x_t[0] - target).square().mean()
        delta = e["w", "current"] - e["w", "reference"] - e["l", "current"] + e["l", "reference"]
        losses.append(one.weight[k] * (torch.log1p(torch.exp(beta / 2 * delta)) + hold * e["w", "current"]))
    return torch.stack(losses)


def test_the_loss_of_a_policy_is_the_formula_written_out_and_both_images_pass_at_once():
    policy, one = Scaled(1.3), batch(weight=column(1, 2, 0.5, 3))
    found, metrics = pair_loss(policy, one, OnlineDPOSettings(beta=2.0, hold_winner=0.7))
    torch.testing.assert_close(found, by_hand(policy, one, 2.0, 0.7))
    ours, theirs = (torch.autograd.grad(loss.sum(), policy.weight)[0] for loss in (found, by_hand(policy, one, 2.0, 0.7)))
    torch.testing.assert_close(ours, theirs)
    assert policy.asked == [("current", 2 * N, True), ("reference", 2 * N, False)]
    assert sorted(metrics) == sorted(METRICS) and all(value.shape == (N,) and not value.requires_grad for value in metrics.values())


def test_equal_images_teach_nothing():
    policy, same = Scaled(1.3), draw(0)
    loss, metrics = pair_loss(policy, batch(same, same), OnlineDPOSettings(beta=50.0))
    torch.testing.assert_close(loss, torch.full((N,), math.log(2), dtype=torch.float64))
    loss.sum().backward()
    assert float(policy.weight.grad) == pytest.approx(0, abs=1e-12) and not metrics["accuracy"].any()


def test_the_winners_own_error_is_told_beside_a_loss_that_falls():
    """A policy that unlearns both, the rejected image faster, has a loss below log 2 and a winner that got worse."""
    chosen = draw(0)
    policy, one = Scaled(2.0), batch(chosen, 3 * chosen)
    loss, metrics = pair_loss(policy, one, OnlineDPOSettings(beta=2.0))
    rows = metrics["winner_worse"] > 0
    assert rows.any() and (loss.detach()[rows & (metrics["margin"] > 0)] < math.log(2)).all()
    held, _ = pair_loss(policy, one, OnlineDPOSettings(beta=2.0, hold_winner=1.0))
    torch.testing.assert_close(held - loss, metrics["winner_error"])


@pytest.mark.parametrize(("size", "lengths"), [(1, [1] * 8), (2, [1] * 8), (5, [2] * 4), (16, [8]), (99, [8])])
def test_micro_batches_hold_whole_pairs_and_change_no_loss(size, lengths):
    one, policy, o = batch(), Scaled(1.3), OnlineDPOSettings(beta=2.0)
    pair = torch.arange(N).repeat_interleave(2)
    rows = NoisedPairs(one.chosen, one.rejected, one.weight, one.conditioning, pair, one.t.repeat(2), one.eps.repeat(2, 1, 1, 1))
    micros = list(rows.micro_batches(size))
    assert [len(micro) for micro in micros] == lengths
    together = pair_loss(policy, next(rows.micro_batches(99)), o)[0]
    torch.testing.assert_close(torch.cat([pair_loss(policy, micro, o)[0] for micro in micros]), together)


# what is compared ------------------------------------------------------------------------------------


def test_of_each_prompt_the_best_meets_the_worst_and_ties_are_left_out():
    nan = math.nan
    scores = torch.tensor([[0, 2, 1, -1], [3, 3, 3, 3], [nan, 5, nan, 4], [nan, nan, nan, 7], [nan] * 4, [1, 1, 0, 0]])
    found = best_and_worst(scores.flatten().float(), 4)
    assert found.tolist() == [[1, 3], [9, 11], [20, 22]]


@FEW
@given(st.lists(st.floats(-5, 5), min_size=12, max_size=12), st.floats(0.1, 9), st.floats(-9, 9))
def test_the_unit_of_a_reward_does_not_matter(values, scale, offset):
    scores = torch.tensor(values, dtype=torch.float64).round(decimals=3)
    assert torch.equal(best_and_worst(scores, 4), best_and_worst((scores * scale + offset).round(decimals=9), 4))


@pytest.mark.parametrize("number", [3, 7])
def test_every_epoch_meets_every_pair_once_in_an_order_of_its_own(number):
    whole = order(0, 0, 6 * number, number)
    epochs = [whole[k : k + number] for k in range(0, len(whole), number)]
    assert all(sorted(epoch) == list(range(number)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) > 1
    assert [k for position in range(0, len(whole), 2) for k in order(0, position, 2, number)] == whole  # a function of the place
    assert order(1, 0, 60, 60) != order(0, 0, 60, 60)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_logit_normal_times_have_its_quantiles(shift):
    t = draw_times("logit_normal", 20_000, torch.empty(0), partial(Levels.fixed(shift).at, steps=10), torch.Generator().manual_seed(0))
    u = t / (shift - (shift - 1) * t)
    for quantile, normal in ((0.1587, -1.0), (0.5, 0.0), (0.8413, 1.0)):
        assert float(u.logit().quantile(quantile)) == pytest.approx(normal, abs=0.04)
    assert (t > 0).all() and (t <= 1).all()


# the guard -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [OnlineDPOSettings(), OfflineDPOSettings(pairs="p.jsonl")])
def test_a_guard_tells_where_the_winner_gets_worse(settings):
    (guard,) = settings.guards().values()
    worse = guard.check({"winner_worse": 0.03, "winner_error": 0.53})
    assert worse is not None and "0.03 above the reference's (0.5)" in worse
    for healthy in ({"winner_worse": 0.02, "winner_error": 0.52}, {"winner_worse": -0.1, "winner_error": 0.4}, {}):
        assert winner_gets_worse(healthy) is None
