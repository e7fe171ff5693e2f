"""FlowAWR: energies are what the code says, the loss has its minimum at the moved target, and NFT at beta = 1 / clip is a case of it."""

import math

import pytest
import torch
from forward_cases import Case, along, draw, gradient, slopes
from hypothesis import given, settings
from hypothesis import strategies as st

from flowtilt.objectives.awr import AWR, awr_loss, awr_target, energies, sparsemax
from flowtilt.objectives.forward import x0_error
from flowtilt.objectives.nft import nft_loss, optimality

FEW = settings(deadline=None, max_examples=25)
ROWS = st.lists(st.floats(-5, 5), min_size=2, max_size=12)


@FEW
@given(values=ROWS, temperature=st.floats(0.3, 3))
def test_exponential_energies_are_k_softmax_less_one(values, temperature):
    a = torch.tensor(values)
    found = energies(a, torch.zeros(len(a)), temperature=temperature, clip=1e9)
    expected = torch.tensor([math.exp(x / temperature) for x in a.tolist()], dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected / expected.mean() - 1, rtol=1e-5, atol=1e-5)
    assert (found >= -1).all()


@FEW
@given(values=ROWS, kind=st.sampled_from(["exponential", "sparsemax"]))
def test_unclipped_energies_sum_to_zero_in_each_group_and_clipped_ones_stay_within(values, kind):
    a, groups = torch.tensor(values * 2), torch.arange(2).repeat_interleave(len(values))
    whole = energies(a, groups, kind, clip=1e9)
    assert whole.view(2, -1).sum(1).abs().max() < 1e-4
    torch.testing.assert_close(energies(a, groups, kind, clip=0.7), whole.clamp(-0.7, 0.7))


@pytest.mark.parametrize("kind", ["exponential", "linear", "sparsemax"])
@pytest.mark.parametrize("gate", [False, True])
def test_a_flat_group_and_a_single_image_have_no_energy_and_a_missing_one_changes_nobody(kind, gate):
    a = torch.tensor([0.0, 0.0, 0.0, 1.0, math.nan, -1.0, 0.0])
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    found = energies(a, groups, kind, gate=gate)
    assert found[[0, 1, 2, 6]].abs().max() < 1e-6 and found[4].isnan()
    torch.testing.assert_close(found[[3, 5]], energies(a[[3, 5]], torch.zeros(2), kind, gate=gate))


@FEW
@given(values=ROWS)
def test_a_high_temperature_times_the_energy_is_the_centred_advantage(values):
    a = torch.tensor(values)
    a = a - a.mean()
    found = 1e4 * energies(a, torch.zeros(len(a)), temperature=1e4, clip=1e9)
    torch.testing.assert_close(found, energies(a, torch.zeros(len(a)), "linear", clip=1e9), atol=5e-2, rtol=1e-2)


def test_the_gate_divides_shares_by_their_own_spread_but_not_by_less_than_its_floor():
    a = torch.tensor([1.0, -1.0, 0.5, -0.5])
    share = (a.double().softmax(0) - 0.25).float()
    torch.testing.assert_close(energies(a, torch.zeros(4), gate=True), share / (share.std(correction=0) + 1e-4), rtol=1e-5, atol=1e-6)
    tiny = 1e-3 * a
    share = (tiny.double().softmax(0) - 0.25).float()
    torch.testing.assert_close(energies(tiny, torch.zeros(4), gate=True), share / 1e-2, rtol=1e-4, atol=1e-6)


@FEW
@given(values=ROWS)
def test_sparsemax_is_the_nearest_point_of_the_simplex(values):
    z = torch.tensor(values, dtype=torch.float64)
    p = sparsemax(z)
    assert (p >= 0).all() and float(p.sum()) == pytest.approx(1)
    others = torch.eye(len(z), dtype=torch.float64)  # (z - p) (q - p) <= 0 for every corner q says that no point is nearer
    assert ((others - p) @ (z - p)).max() < 1e-9


def test_an_energy_of_one_is_flow_matching_of_zero_stays_and_of_minus_one_is_the_mirror_image():
    case = draw()
    one = torch.ones(len(case.t), dtype=torch.float64)
    torch.testing.assert_close(
        awr_loss(case.v, case.v_old, case.v_target, case.t, one, adaptive=False), x0_error(case.v, case.v_target, case.t, False)
    )
    torch.testing.assert_close(awr_loss(case.v, case.v_old, case.v_target, case.t, one), x0_error(case.v, case.v_target, case.t))
    assert awr_loss(case.v_old, case.v_old, case.v_target, case.t, 0 * one).abs().max() == 0
    torch.testing.assert_close(awr_target(case.v_old, case.v_target, -one), 2 * case.v_old - case.v_target)


@FEW
@given(seed=st.integers(0, 99), adaptive=st.booleans())
def test_the_gradient_vanishes_at_the_target_and_is_the_finite_difference_elsewhere(seed, adaptive):
    case, direction = draw(seed), draw(seed + 100).v
    energy = 4 * case.r - 2
    target = awr_target(case.v_old, case.v_target, energy)
    at_target = gradient(lambda v: awr_loss(v, case.v_old, case.v_target, case.t, energy, adaptive=adaptive), target)
    assert at_target.abs().max() < 1e-12
    if not adaptive:  # the weight is held, so its finite difference would see it move
        found = gradient(lambda v: awr_loss(v, case.v_old, case.v_target, case.t, energy, adaptive=False), case.v)
        differences = slopes(lambda v: awr_loss(v, case.v_old, case.v_target, case.t, energy, adaptive=False), case.v, direction)
        torch.testing.assert_close(along(found, direction), differences, rtol=1e-5, atol=1e-8)


def gradients(case: Case, a, clip: float, beta: float, adaptive: bool):
    nft = gradient(
        lambda v: nft_loss(v, case.v_old, case.v_target, case.t, optimality(a, clip), beta=beta, clip=clip, adaptive=adaptive), case.v
    )
    energy = a.clamp(-clip, clip) / (clip * beta)
    awr = gradient(lambda v: clip * beta * awr_loss(v, case.v_old, case.v_target, case.t, energy, adaptive=adaptive), case.v)
    return nft, awr


@FEW
@given(seed=st.integers(0, 99), beta=st.floats(0.1, 2), clip=st.floats(0.5, 8))
def test_nft_without_its_weight_is_awr_with_energy_a_over_c_beta(seed, beta, clip):
    case = draw(seed)
    nft, awr = gradients(case, 10 * case.r - 5, clip, beta, adaptive=False)
    torch.testing.assert_close(nft, awr, rtol=1e-7, atol=1e-9)


def test_at_beta_1_over_clip_the_energy_is_the_advantage_itself_and_with_the_weight_the_two_differ():
    case = draw()
    a = 8 * case.r - 4
    plain, awr = gradients(case, a, 5.0, 0.2, adaptive=False)
    torch.testing.assert_close(plain, awr, rtol=1e-7, atol=1e-9)
    nft, awr = gradients(case, a, 5.0, 0.2, adaptive=True)
    assert (nft - awr).abs().max() > 1e-3


def test_where_the_policies_agree_both_methods_have_one_gradient_whatever_beta():
    case = draw()
    case.v_old, a = case.v, 8 * case.r - 4
    # both are A times a pull of v to its target; AWR's factor 2 of the square is NFT's, too
    awr = gradient(lambda v: awr_loss(v, case.v_old, case.v_target, case.t, a), case.v)
    for beta in (0.2, 1.0):
        nft = gradient(lambda v, b=beta: nft_loss(v, case.v_old, case.v_target, case.t, optimality(a), beta=b), case.v)
        torch.testing.assert_close(nft, awr, rtol=1e-6, atol=1e-9)


def test_the_exact_direction_of_the_tilted_optimum_without_a_weight():
    """A discrete x0 | x_t: regression on v_old + E d ends at v_old + (v* - v_old) E[W | x_t] / mean W, v* that of the tilted law."""
    rng = torch.Generator().manual_seed(0)
    d, a = torch.randn(200, 3, generator=rng, dtype=torch.float64), torch.randn(200, generator=rng, dtype=torch.float64)
    posterior = torch.rand(200, generator=rng, dtype=torch.float64)
    posterior = posterior / posterior.sum()
    v_old = posterior @ d
    weight, group_mean = a.exp(), 1.7
    regressed = v_old + posterior @ ((weight / group_mean - 1)[:, None] * (d - v_old))
    tilted = (posterior * weight) @ d / (posterior @ weight)
    torch.testing.assert_close(regressed - v_old, (tilted - v_old) * (posterior @ weight) / group_mean)


def test_the_method_trains_on_energies():
    a, groups = torch.tensor([2.0, 0.0, -2.0, 9.0, 0.0, -9.0]), torch.tensor([0, 0, 0, 1, 1, 1])
    found = AWR(energy="exponential").prepare(a, groups)
    torch.testing.assert_close(found, energies(a.clamp(-5, 5), groups))
