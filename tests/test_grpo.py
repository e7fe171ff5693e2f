"""FlowGRPO's loss is PPO's on a Gaussian step, its KL the Gaussian one, and GRPO-Guard does to both what it promises; in float64."""

import math

import pytest
import torch
from forward_cases import along, gradient, policy_and_batch, slopes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowtilt.flow import sigma_schedule
from flowtilt.objectives.batches import TransitionBatch
from flowtilt.objectives.forward import velocity_kl
from flowtilt.objectives.grpo import (
    GRPO,
    grpo_loss,
    guard_log_ratio,
    guard_loss,
    path_kl,
    step_kl,
    stochastic_steps,
    trust_loss,
)
from flowtilt.solvers import log_prob, sde_step

FEW = settings(deadline=None, max_examples=25)
N, SHAPE = 6, (2, 3, 3)
PIXELS = 18
A = torch.tensor([1.0, -0.5, 2.0, -1.5, 0.3, -1.3], dtype=torch.float64)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def both_ways(seed: int = 0) -> Tensor:
    """Noise [N, ...] in which each row has its opposite, so that odd functions of it have mean 0 exactly."""
    half = draw(N // 2, *SHAPE, seed=seed)
    return torch.cat([half, -half])


def step(v: Tensor, kind: str = "flow", s: float = 0.8, s_next: float = 0.6, noise: Tensor | None = None):
    """x', mean and std of one stochastic step from a fixed x."""
    return sde_step(draw(N, *SHAPE, seed=9), v, s, s_next, both_ways() if noise is None else noise, kind)


# the clipped loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flow", "dance", "cps"])
def test_at_ratio_1_the_gradient_is_that_of_reinforce(kind):
    v_old = draw(N, *SHAPE, seed=1)
    x_next, mean_old, std = step(v_old, kind)
    old = log_prob(x_next, mean_old, std)

    def new(v: Tensor) -> Tensor:
        return log_prob(x_next, step(v, kind)[1], std)

    assert torch.equal(grpo_loss(new(v_old), old, A, 1e-4), -A)
    found = gradient(lambda v: grpo_loss(new(v), old, A, 1e-4), v_old)
    torch.testing.assert_close(found, gradient(lambda v: -A * new(v), v_old), rtol=1e-12, atol=0)
    # and in closed form: grad log p = z / (std pixels) for the mean
    by_hand = -A.view(-1, 1, 1, 1) * both_ways() / (std * PIXELS)
    torch.testing.assert_close(gradient(lambda mean: grpo_loss(log_prob(x_next, mean, std), old, A, 1e-4), mean_old), by_hand)


def test_a_constant_on_every_advantage_changes_no_expected_gradient():
    """E[grad log p] = 0: with noise and its opposite the sum is 0 exactly, so a group's mean is a free baseline."""
    v_old = draw(1, *SHAPE, seed=1).expand(N, *SHAPE)
    x = draw(1, *SHAPE, seed=9).expand(N, *SHAPE)
    x_next, mean, std = sde_step(x, v_old, 0.8, 0.6, both_ways())

    def total(advantages: Tensor) -> Tensor:
        return gradient(lambda at: grpo_loss(log_prob(x_next, at, std), log_prob(x_next, mean, std), advantages, 1e-4), mean).sum(0)

    torch.testing.assert_close(total(A + 3), total(A), rtol=0, atol=1e-12)
    assert total(A).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("rho", "advantage", "flows"),
    [(0.7, 1, True), (0.7, -1, False), (1.0, 1, True), (1.0, -1, True), (1.3, 1, False), (1.3, -1, True), (1.1, 1, True), (0.9, -1, True)],
)
def test_the_gradient_ends_outside_the_clip_range_on_the_way_out_only(rho, advantage, flows):
    new, a = torch.tensor([math.log(rho)], dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    found = float(gradient(lambda x: grpo_loss(x, torch.zeros_like(x), a, 0.2), new))
    assert found == pytest.approx(-advantage * rho if flows else 0.0)


@FEW
@given(logs=st.lists(st.floats(-0.5, 0.5), min_size=N, max_size=N), clip=st.floats(0.01, 0.9))
def test_the_loss_is_ppos(logs, clip):
    old = draw(N)
    rho = torch.tensor(logs, dtype=torch.float64).exp()
    expected = torch.maximum(-A * rho, -A * rho.clip(1 - clip, 1 + clip))
    torch.testing.assert_close(grpo_loss(old + rho.log(), old, A, clip), expected, rtol=1e-9, atol=1e-12)
    assert (grpo_loss(old + rho.log(), old, A, clip) >= -A * rho - 1e-12).all()  # a lower bound of what it stands for


def test_the_gradient_is_the_finite_difference_of_the_loss():
    new, old = torch.tensor([-0.3, -0.1, 0.05, 0.1, 0.15, 0.3], dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    direction = draw(N)
    found = gradient(lambda x: grpo_loss(x, old, A, 0.2), new)
    torch.testing.assert_close(along(found, direction), slopes(lambda x: grpo_loss(x, old, A, 0.2), new, direction), rtol=1e-7, atol=1e-9)


def test_the_policy_that_took_the_steps_never_gets_a_gradient():
    new, old = draw(N).requires_grad_(), draw(N, seed=1).requires_grad_()
    mean, mean_old = draw(N, 3).requires_grad_(), draw(N, 3, seed=1).requires_grad_()
    guard = guard_log_ratio(draw(N, 3, seed=2), mean, mean_old, torch.tensor(0.3))
    (grpo_loss(new, old, A, 10.0) + guard_loss(guard, A, 10.0, -0.1)).sum().backward()
    assert old.grad is None and mean_old.grad is None
    assert new.grad is not None and mean.grad is not None


# the KL ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [torch.tensor(0.3), torch.tensor([0.2, 1.0, 3.0, 0.5, 0.1, 2.0]).view(N, 1, 1, 1)])
def test_the_kl_is_that_of_two_normals_averaged_over_pixels(std):
    std = std.double()
    mean, ref = draw(N, *SHAPE), draw(N, *SHAPE, seed=1)
    normals = [torch.distributions.Normal(each, std.expand_as(each)) for each in (mean, ref)]
    torch.testing.assert_close(step_kl(mean, ref, std), torch.distributions.kl_divergence(*normals).mean((1, 2, 3)))


def test_the_kl_has_a_gradient_to_the_policys_mean_and_none_to_the_references():
    mean, ref, std = draw(N, *SHAPE), draw(N, *SHAPE, seed=1).requires_grad_(), torch.tensor(0.3, dtype=torch.float64)
    found = gradient(lambda x: step_kl(x, ref, std), mean)
    torch.testing.assert_close(found, (mean - ref.detach()) / (std**2 * PIXELS))
    direction = draw(N, *SHAPE, seed=2)
    torch.testing.assert_close(along(found, direction), slopes(lambda x: step_kl(x, ref, std), mean, direction), rtol=1e-6, atol=1e-8)
    assert ref.grad is None and (gradient(lambda x: step_kl(x, mean, std), mean) == 0).all()


@pytest.mark.parametrize("s", [0.95, 0.6, 0.2])
def test_the_codes_kl_has_the_noise_without_the_steps_length(s):
    """For the flow step, mu - mu_ref = dt (1 + g^2 (1 - s) / (2 s)) (v - v_ref)."""
    v, v_ref, s_next, eta = draw(N, *SHAPE), draw(N, *SHAPE, seed=1), 0.7 * s, 0.7
    means = [step(each, "flow", s, s_next)[1] for each in (v, v_ref)]
    std, dt = step(v, "flow", s, s_next)[2], s_next - s
    g2 = eta**2 * s / (1 - s)
    torch.testing.assert_close(path_kl(*means, std, dt), (means[0] - means[1]).square().mean((1, 2, 3)) / (2 * g2))
    by_velocity = velocity_kl(v, v_ref) * (dt * (1 + g2 * (1 - s) / (2 * s))) ** 2 / (2 * g2)
    torch.testing.assert_close(path_kl(*means, std, dt), by_velocity)
    each = torch.full((N,), dt, dtype=torch.float64)
    torch.testing.assert_close(path_kl(*means, std, each), by_velocity)


# GRPO-Guard ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [0.02, 0.5, 3.0])
def test_the_guarded_log_ratio_is_the_noise_along_the_move_and_so_of_mean_0_and_one_variance(std):
    mean_old, z, spread = draw(N, *SHAPE), both_ways(), torch.tensor(std, dtype=torch.float64)
    move = 0.01 * draw(1, *SHAPE, seed=2).expand(N, *SHAPE)
    x_next, mean = mean_old + spread * z, mean_old + move
    new, old = (log_prob(x_next, each, spread) for each in (mean, mean_old))
    guarded = guard_log_ratio(x_next, mean, mean_old, spread)
    torch.testing.assert_close(guarded, spread * (new - old + step_kl(mean, mean_old, spread)), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(guarded, (z * move).mean((1, 2, 3)), rtol=1e-9, atol=1e-12)
    assert float(guarded.mean()) == pytest.approx(0, abs=1e-14)  # each noise has its opposite
    assert float((new - old).mean()) == pytest.approx(-float(step_kl(mean, mean_old, spread).mean()))  # which the plain one is not


def test_under_the_old_policy_the_guarded_ratio_has_mean_1_and_the_plain_one_too_little_room_above():
    """10,000 noises; the standard error of a mean log-ratio is about its deviation / 100."""
    z = draw(10_000, *SHAPE, seed=3)
    move, found = 0.5 * draw(1, *SHAPE, seed=2), {}
    for std in (0.3, 1.5):
        spread = torch.tensor(std, dtype=torch.float64)
        new, old = log_prob(spread * z, move.expand_as(z), spread), log_prob(spread * z, torch.zeros_like(z), spread)
        found[std] = guard_log_ratio(spread * z, move.expand_as(z), torch.zeros_like(z), spread)
        assert abs(float(found[std].mean())) < 4 * float(found[std].std()) / 100
        assert float((new - old).mean()) < -4 * float((new - old).std()) / 100
        expected = float(move.square().sum()) / PIXELS**2
        assert float(found[std].var()) == pytest.approx(expected, rel=0.05)
    torch.testing.assert_close(found[0.3], found[1.5])


def test_the_guarded_gradient_is_of_one_size_at_every_step():
    """With mean = x + v dt the gradient for v is A z / pixels, whatever std and dt; FlowGRPO's goes as dt / std."""
    v_old, z, x = draw(N, *SHAPE), both_ways(), draw(N, *SHAPE, seed=4)
    for std, dt in ((0.05, -0.01), (0.4, -0.1), (2.0, -0.5)):
        spread = torch.tensor(std, dtype=torch.float64)
        mean_old = x + v_old * dt
        x_next = mean_old + spread * z

        def guarded(v: Tensor, spread: Tensor = spread, dt: float = dt, mean_old: Tensor = mean_old, x_next: Tensor = x_next) -> Tensor:
            return guard_loss(guard_log_ratio(x_next, x + v * dt, mean_old, spread), A, 1e-4, dt)

        torch.testing.assert_close(gradient(guarded, v_old), A.view(-1, 1, 1, 1) * z / PIXELS, rtol=1e-9, atol=1e-12)


def test_the_guarded_loss_clips_as_the_plain_one():
    logs = torch.tensor([-0.3, -0.1, 0.0, 0.1, 0.3, 0.5], dtype=torch.float64)
    torch.testing.assert_close(guard_loss(logs, A, 0.2, -0.25), 4 * grpo_loss(logs, torch.zeros_like(logs), A, 0.2))
    each = torch.linspace(-0.5, -0.1, N, dtype=torch.float64)
    torch.testing.assert_close(guard_loss(logs, A, 0.2, each), grpo_loss(logs, torch.zeros_like(logs), A, 0.2) / -each)


def test_a_std_for_each_sample_is_each_sample_alone():
    x_next, mean, old = (draw(N, *SHAPE, seed=seed) for seed in range(3))
    stds = torch.linspace(0.1, 2, N, dtype=torch.float64)
    together = guard_log_ratio(x_next, mean, old, stds.view(N, 1, 1, 1))
    for i in range(N):
        row = slice(i, i + 1)
        torch.testing.assert_close(guard_log_ratio(x_next[row], mean[row], old[row], stds[i]), together[row])


def test_the_guarded_log_ratio_keeps_its_digits_in_fp32():
    """Published clip ranges go down to 2e-6: a difference of two fp32 log-densities loses two digits there."""
    x_next, old = draw(N, 16, 16, 16), draw(N, 16, 16, 16, seed=1)
    mean = (old.float() + 1e-4 * draw(N, 16, 16, 16, seed=2).float()).double()
    exact = guard_log_ratio(x_next.float().double(), mean, old.float().double(), torch.tensor(0.3, dtype=torch.float64))
    found = guard_log_ratio(x_next.float(), mean.float(), old.float(), torch.tensor(0.3))
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6 * 1e-3)


# which steps are stochastic --------------------------------------------------------------------------


def test_flow_grpo_trains_every_step_of_the_span():
    assert stochastic_steps(7, steps=10, span=(0, 9)) == range(9)


def test_a_random_window_lies_within_the_span_reaches_every_place_and_depends_on_seed_and_rollout_alone():
    settings = {"steps": 10, "span": (1, 5), "window": "random", "size": 2}
    found = [stochastic_steps(k, seed=0, **settings) for k in range(60)]
    assert set(found) == {range(1, 3), range(2, 4), range(3, 5)}
    assert found == [stochastic_steps(k, seed=0, **settings) for k in range(60)]
    assert found != [stochastic_steps(k, seed=1, **settings) for k in range(60)]


def test_a_sliding_window_moves_by_one_every_so_many_rollouts_and_comes_round():
    found = [stochastic_steps(k, steps=6, span=(0, 5), window="sliding", size=3, every=2) for k in range(8)]
    assert found == [range(0, 3)] * 2 + [range(1, 4)] * 2 + [range(2, 5)] * 2 + [range(0, 3)] * 2


@FEW
@given(data=st.data(), window=st.sampled_from(["random", "sliding"]), rollout=st.integers(0, 10**6))
def test_a_window_has_its_size_and_stays_within_its_span(data, window, rollout):
    steps = data.draw(st.integers(1, 30))
    first = data.draw(st.integers(0, steps - 1))
    end = data.draw(st.integers(first + 1, steps))
    size = data.draw(st.integers(1, end - first))
    found = stochastic_steps(rollout, steps=steps, span=(first, end), window=window, size=size, every=3)
    assert len(found) == size and found[0] >= first and found[-1] < end


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"span": (0, 11)}, "span 0 to 11 does not lie within the 10 steps"),
        ({"span": (-1, 4)}, "span -1 to 4"),
        ({"span": (4, 4)}, "span 4 to 4"),
        ({"span": (2, 5), "window": "random", "size": 4}, "a window of 4 steps does not fit into the 3 from 2 to 5"),
        ({"span": (2, 5), "window": "sliding", "size": 0}, "a window of 0 steps"),
        ({"span": (2, 5), "window": "sliding", "size": 1, "every": 0}, "every must be at least 1"),
        ({"span": (2, 5), "window": "fixed"}, "'fixed' is not one of all, random, sliding"),
    ],
)
def test_a_window_that_does_not_exist_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        stochastic_steps(0, steps=10, **settings)


@pytest.mark.parametrize("kind", ["flow", "dance", "cps"])
def test_every_step_that_a_recipe_may_train_has_a_density(kind):
    sigmas = sigma_schedule(10, 3.0).double()
    trained = range(9 if kind == "cps" else 10)
    x = draw(2, *SHAPE)
    for i in range(10):
        x_next, mean, std = sde_step(x, x, sigmas[i], sigmas[i + 1], draw(2, *SHAPE, seed=1), kind, 0.7, sigma_max=float(sigmas[1]))
        if i in trained:
            assert log_prob(x_next, mean, std).isfinite().all()
        else:
            assert float(std) == 0


# the method -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sde", ["flow", "dance", "cps"])
def test_the_pull_has_the_deviation_that_the_published_weight_belongs_to(sde):
    policy, noised = policy_and_batch(current=0.5, old=0.5, reference=-0.1)
    x, s, s_next = noised.x0, torch.full((4,), 0.6, dtype=torch.float64), torch.full((4,), 0.4, dtype=torch.float64)
    means = {}
    for role in ("current", "reference"):
        _, means[role], std = sde_step(x, policy.velocity(role, x, s, noised.conditioning), s, s_next, torch.zeros_like(x), sde, 0.7, 0.9)
    ours = means["current"].detach()
    batch = TransitionBatch(
        x, ours + std * noised.eps, ours, torch.zeros(4), s, s_next, 0.9, noised.advantages, noised.conditioning, None, 1.0
    )
    _, metrics = GRPO(sde=sde, kl=0.04).loss(policy, batch)
    whole = step_kl(ours, means["reference"], std)
    expected = (s - s_next) * whole if sde == "flow" else whole
    torch.testing.assert_close(metrics["kl"], expected.detach())


# Flow-DPPO --------------------------------------------------------------------------------------------------


def dppo(mean, mean_old, x_next, std, trust):
    new, old = log_prob(x_next, mean, std), log_prob(x_next, mean_old, std)
    return trust_loss(new, old, mean, mean_old, std, A, trust)


def test_where_nothing_has_moved_the_trust_regions_gradient_is_reinforce():
    mean, std = draw(N, *SHAPE), torch.tensor(0.3, dtype=torch.float64)
    x_next = mean + std * draw(N, *SHAPE, seed=1)
    found = gradient(lambda m: dppo(m, mean, x_next, std, 1e-9), mean)
    torch.testing.assert_close(found, gradient(lambda m: -A * log_prob(x_next, m, std), mean))


@pytest.mark.parametrize("far", [True, False])
def test_a_step_that_has_moved_too_far_in_the_direction_of_its_advantage_has_no_gradient(far):
    mean_old, std = draw(N, *SHAPE), torch.tensor(0.3, dtype=torch.float64)
    x_next = mean_old + std * draw(N, *SHAPE, seed=1)
    toward = 0.5 * A.sign().view(-1, 1, 1, 1) * (x_next - mean_old)  # rho above 1 where A > 0, below where A < 0
    trust = float(step_kl(mean_old + toward, mean_old, std).min()) * (0.5 if far else 1e9)
    ahead = gradient(lambda m: dppo(m, mean_old, x_next, std, trust), mean_old + toward)
    assert (ahead == 0).all() == far
    back = gradient(lambda m: dppo(m, mean_old, x_next, std, trust), mean_old - toward)
    assert (back.flatten(1).abs().amax(1) > 0).all()  # never on the way back


@pytest.mark.parametrize("way", [1, -1])
def test_the_trust_regions_distance_is_that_of_the_reversed_move_and_knows_nothing_of_the_noise(way):
    mean_old, std = draw(N, *SHAPE), torch.tensor(0.3, dtype=torch.float64)
    move = 0.1 * torch.nn.functional.normalize(draw(N, PIXELS, seed=2)).view(N, *SHAPE)
    distance = 0.1**2 / PIXELS / (2 * 0.3**2)  # of every row
    seen = set()
    for seed in range(3):
        x_next = mean_old + std * draw(N, *SHAPE, seed=seed + 3)
        mean = mean_old + way * move
        ahead = A * (log_prob(x_next, mean, std) - log_prob(x_next, mean_old, std)) > 0
        for trust, stopped in ((distance * (1 - 1e-6), ahead), (distance * (1 + 1e-6), torch.zeros_like(ahead))):
            found = gradient(lambda m, x=x_next, trust=trust: dppo(m, mean_old, x, std, trust), mean).flatten(1).abs().amax(1)
            assert torch.equal(found == 0, stopped)
        seen.add(tuple(ahead.tolist()))
    assert len(seen) > 1  # unlike the distance, rho knows the noise
