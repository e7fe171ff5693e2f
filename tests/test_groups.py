"""CRD and DGPO: closed forms of their losses, and updates that do not depend on micro-batches."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import QUICK, quick
from forward_cases import along, draw, gradient, policy_and_batch, slopes
from hypothesis import given, settings
from hypothesis import strategies as st

from flowtilt import Trainer
from flowtilt.config import load_recipe
from flowtilt.io.files import read_lines
from flowtilt.objectives.elbo import elbo, par_loss
from flowtilt.objectives.groups import (
    CRD,
    DGPO,
    centring_weights,
    crd_loss,
    dgpo_loss,
    group_sums,
    matching_error,
    normalised_error,
)

FEW = settings(deadline=None, max_examples=25)
GROUPS = torch.tensor([0, 0, 1, 1])


def column(values):
    return group_sums(values[:, None], GROUPS)[:, 0]


@pytest.mark.parametrize("temperature", [None, 0.3, -0.3, 1e-3, -1e-3])
def test_centring_weights_sum_to_one_in_each_group_and_prefer_the_best_or_the_worst(temperature):
    a = torch.tensor([0.2, 0.8, 0.5, 0.5], dtype=torch.float64)
    q = centring_weights(a, GROUPS, temperature)
    torch.testing.assert_close(column(q), torch.ones(4, dtype=torch.float64))
    assert q[2] == q[3] and (q[1] - q[0]).sign() == (0 if temperature is None else math.copysign(1, temperature))


@pytest.mark.parametrize("form", ["mse", "bce"])
@FEW
@given(seed=st.integers(0, 99), shift=st.floats(-3, 3))
def test_a_constant_on_all_implicit_rewards_or_on_all_a_changes_nothing(form, seed, shift):
    case = draw(seed)
    reward, a = case.r, case.t
    plain = crd_loss(reward, column(reward) / 2, a, column(a) / 2, beta=0.7, form=form)
    torch.testing.assert_close(crd_loss(reward + shift, column(reward) / 2 + shift, a, column(a) / 2, beta=0.7, form=form), plain)
    torch.testing.assert_close(crd_loss(reward, column(reward) / 2, a + shift, column(a) / 2 + shift, beta=0.7, form=form), plain)


@pytest.mark.parametrize("beta", [0.2, 1.0, 3.0])
def test_where_the_policies_agree_crds_gradient_is_the_centred_advantage_times_that_of_the_error_and_bces_an_eighth(beta):
    case = draw()
    advantages = 8 * case.r - 4
    a, centred = advantages / 10 + 0.5, advantages - column(advantages) / 2
    old = normalised_error(case.v, case.v_target)

    def loss(v, form):
        reward = old - normalised_error(v, case.v_target)
        return crd_loss(reward, column(reward.detach()) / 2, a, column(a) / 2, beta=beta, form=form)

    error = gradient(lambda v: normalised_error(v, case.v_target), case.v)
    mse = gradient(lambda v: loss(v, "mse"), case.v)
    torch.testing.assert_close(mse, centred.view(-1, 1, 1, 1) * error, rtol=1e-6, atol=1e-9)
    bce = gradient(lambda v: loss(v, "bce"), case.v)
    # sigma(x) - 1/2 = x / 4 near 0, against the square's 2 x
    torch.testing.assert_close(8 * bce, mse, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("form", ["mse", "bce"])
def test_crd_is_at_rest_where_the_centred_implicit_reward_is_the_centred_a_over_beta(form):
    a = torch.tensor([0.1, 0.9, 0.4, 0.6], dtype=torch.float64)
    centre = column(a) / 2
    at_rest = gradient(lambda reward: crd_loss(reward, torch.zeros(4), a, centre, beta=2.0, form=form), (a - centre) / 2)
    assert at_rest.abs().max() < 1e-12


def test_par_with_its_advantage_and_its_gain_centred_is_crd_whose_beta_is_the_level():
    """ELBO - ELBO_old = t R. A group has one t; R and a less their group's means, and rho = 1, are all that CRD adds."""
    case, t = draw(), 0.4
    a = (8 * case.r - 4) / 10 + 0.5
    old, elbo_old = normalised_error(case.v_old, case.v_target), elbo(case.v_old, case.v_target, t)
    gain = (elbo(case.v, case.v_target, t) - elbo_old).detach()

    def par(v):
        centred = a - column(a) / 2 + column(gain) / 2
        return 10 / t * par_loss(elbo(v, case.v_target, t), elbo_old, centred, ratio=False)

    def crd(v):
        reward = old - normalised_error(v, case.v_target)
        return crd_loss(reward, column(reward.detach()) / 2, a, column(a) / 2, beta=t)

    torch.testing.assert_close(par(case.v), crd(case.v))
    torch.testing.assert_close(gradient(par, case.v), gradient(crd, case.v))


def dgpo(v, case, a, beta, clip_range=1e9):
    moved = (matching_error(v, case.v_target) - matching_error(case.v_old, case.v_target)).detach()
    preference = beta / 2 * column(a * moved)
    old = matching_error(case.v_old, case.v_target)
    return dgpo_loss(matching_error(v, case.v_target), old, a, preference, clip_range=clip_range)


@FEW
@given(seed=st.integers(0, 99), beta=st.floats(0.1, 20))
def test_dgpos_gradient_without_the_clip_is_that_of_minus_log_sigmoid_of_the_groups_preference(seed, beta):
    case, direction = draw(seed), draw(seed + 1).v
    a = 4 * case.r - 2

    def preference(v):
        moved = matching_error(v, case.v_target) - matching_error(case.v_old, case.v_target)
        s = beta / 2 * column(a * moved)
        return -(2 / beta) * torch.nn.functional.logsigmoid(-s)[[0, 2]]  # one term a group

    found = along(gradient(lambda v: dgpo(v, case, a, beta), case.v), direction).view(2, 2).sum(1)
    torch.testing.assert_close(found, slopes(preference, case.v, direction), rtol=1e-5, atol=1e-8)


def test_dgpo_begins_at_one_half_and_a_small_beta_is_half_the_linear_gradient():
    case = draw()
    a = 4 * case.r - 2
    linear = gradient(lambda v: a * matching_error(v, case.v_target), case.v)
    torch.testing.assert_close(gradient(lambda v: dgpo(v, case, a, 1e-9), case.v), linear / 2, rtol=1e-6, atol=1e-9)
    case.v_old = case.v
    torch.testing.assert_close(gradient(lambda v: dgpo(v, case, a, 50.0), case.v), linear / 2)


def test_dgpo_of_a_pair_is_diffusion_dpo_with_the_same_beta():
    case = draw()
    a, beta = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64), 3.0

    def dpo(v):
        moved = matching_error(v, case.v_target) - matching_error(case.v_old, case.v_target)
        return -torch.nn.functional.logsigmoid(-beta / 2 * (moved[[0, 2]] - moved[[1, 3]]))

    ours = gradient(lambda v: dgpo(v, case, a, beta), case.v)
    torch.testing.assert_close(beta / 2 * ours, gradient(dpo, case.v), rtol=1e-6, atol=1e-9)


def test_a_constant_on_the_errors_of_a_group_whose_advantages_sum_to_zero_leaves_dgpos_preference_alone():
    rng = torch.Generator().manual_seed(0)
    measured = {name: torch.rand(4, 3, generator=rng, dtype=torch.float64) for name in DGPO.measures}
    a = torch.tensor([1.5, -1.5, 0.4, -0.4], dtype=torch.float64)
    constant = torch.tensor([[3.0, 0.1, -2.0], [7.0, -0.5, 1.0]], dtype=torch.float64)[GROUPS]  # of a group and a time

    def preference(advantages, more):
        return DGPO().complete(measured | {"error": measured["error"] + more}, advantages, GROUPS)["preference"]

    torch.testing.assert_close(preference(a, constant), preference(a, 0.0))
    assert (preference(a + 0.1, constant) - preference(a + 0.1, 0.0)).abs().min() > 0.1


@pytest.mark.parametrize(
    ("advantage", "moved", "stops"), [(1, 0.02, True), (1, -0.02, False), (-1, -0.02, True), (-1, 0.02, False), (1, 0.005, False)]
)
def test_an_image_stops_counting_once_it_has_moved_far_enough_in_the_direction_of_its_advantage(advantage, moved, stops):
    error = torch.tensor([0.5 - math.log(1 + moved)], dtype=torch.float64)
    found = gradient(
        lambda e: dgpo_loss(e, torch.tensor([0.5]), torch.tensor([float(advantage)]), torch.tensor([0.0]), clip_range=0.01), error
    )
    assert (found == 0).all() == stops


@pytest.mark.parametrize("method", [CRD(), CRD(centring=0.5), DGPO()])
def test_what_completes_a_group_depends_on_that_group_alone(method):
    rng = torch.Generator().manual_seed(0)
    measured = {name: torch.rand(4, 3, generator=rng) for name in method.measures}
    advantages = torch.randn(4, generator=rng)
    both = method.complete(measured, advantages, GROUPS)
    first = method.complete({name: values[:2] for name, values in measured.items()}, advantages[:2], GROUPS[:2])
    for name, values in both.items():
        assert values.shape == (4, 3)
        torch.testing.assert_close(values[:2], first[name])


@pytest.mark.parametrize("method", [CRD(kl=0.0), CRD(kl=0.0, form="bce"), DGPO(kl=0.0, clip_range=10.0)])
def test_equal_images_that_share_noise_and_level_have_no_gradient_though_the_old_policy_and_the_base_lag(method):
    policy, batch = policy_and_batch(current=0.5, old=0.2, reference=-0.1)
    first = torch.tensor([0, 0, 2, 2])

    def slope(eps):
        a = torch.tensor([0.9, -0.9, 0.4, -0.4], dtype=torch.float64)
        alike = replace(batch, x0=batch.x0[first], eps=eps, t=batch.t[first], advantages=a)
        measured = {name: value[:, None] for name, value in method.measure(policy, alike).items()}
        given = {name: value[:, 0] for name, value in (measured | method.complete(measured, a, GROUPS)).items()}
        loss, _ = method.loss(policy, replace(alike, given=given))
        return torch.autograd.grad(loss.sum(), policy.weights["current"])[0].abs()

    assert slope(batch.eps[first]) < 1e-12 and slope(batch.eps) > 1e-3


KINDS = {"crd": ["objective.reference_guidance=2"], "dgpo": [], "dgpo old": ["objective.compare=old", "objective.kl=0"]}


@pytest.mark.parametrize("kind", KINDS)
def test_a_micro_batch_changes_no_result_and_the_plan_counts_the_passes(kind, tmp_path):
    found = []
    for size in (64, 5):
        name = f"objective.type={kind.split()[0]}"
        run = tmp_path / str(size)
        recipe = quick(run, name, *[item for item in QUICK if item.startswith("objective.")], *KINDS[kind], f"micro_batch={size}")
        Trainer(recipe).run()
        lines = read_lines(run / "metrics.jsonl")
        found.append([lines[0][name] for name in ("loss", "grad_norm")])
        assert lines[-1]["network_evaluations"] == sum(recipe.objective.passes(recipe, step).evaluations for step in (1, 2))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("objective.shared=noise", "objective.shared: crd compares images at the same noise level"),
        ("objective.row_share=0.5", "objective.row_share: images of a prompt that share"),
        ("optimizer.steps_per_rollout=30", "optimizer.steps_per_rollout: crd trains whole prompts"),
    ],
)
def test_what_would_split_groups_is_refused(override, said):
    with pytest.raises(Exception, match=said):
        load_recipe("playground", ["objective.type=crd", "objective.times=stratified", "objective.times_per_image=2", override])
