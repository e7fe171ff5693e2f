"""Random numbers are a function of what they are for and where in the run they stand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowtilt.seeding import generator, noise

FEW = settings(deadline=None, max_examples=25)


def numbers(*arguments) -> list[float]:
    return torch.rand(8, generator=generator(*arguments)).tolist()


@FEW
@given(seed=st.integers(0, 2**40), purpose=st.text(max_size=8), position=st.lists(st.integers(-5, 10**9), max_size=3))
def test_equal_arguments_give_equal_numbers(seed, purpose, position):
    assert numbers(seed, purpose, *position) == numbers(seed, purpose, *position)


@pytest.mark.parametrize(
    "other",
    [(1, "rollout", 2, 3), (0, "train", 2, 3), (0, "rollout", 3, 2), (0, "rollout", 2), (0, "rollout", 2, 3, 0), (0, "rollout", 23)],
)
def test_any_differing_argument_gives_other_numbers(other):
    assert not set(numbers(0, "rollout", 2, 3)) & set(numbers(*other))


def test_integers_of_any_kind_name_the_same_place():
    assert numbers(3, "x", 4) == numbers(torch.tensor(3), "x", torch.arange(5)[4])


def test_neighbouring_streams_are_uncorrelated():
    rows = torch.stack([torch.randn(500, generator=generator(0, "rollout", 1, k)) for k in range(30)])
    correlation = torch.corrcoef(rows) - torch.eye(30)
    assert correlation.abs().max() < 5 / 500**0.5  # five standard deviations


def test_the_global_state_is_neither_read_nor_written():
    torch.manual_seed(1)
    before, first = torch.get_rng_state(), noise(0, "rollout", [(1, 2)], (4,))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(noise(0, "rollout", [(1, 2)], (4,)), first)


def test_a_row_of_noise_depends_on_its_own_position_alone():
    positions = [(1, 0, k) for k in range(5)]
    together = noise(7, "rollout", positions, (2, 3))
    assert together.shape == (5, 2, 3) and together.dtype == torch.float32
    assert torch.equal(together[[3, 1]], noise(7, "rollout", [positions[3], positions[1]], (2, 3)))
    assert torch.equal(together, torch.cat([noise(7, "rollout", [p], (2, 3)) for p in positions]))
    assert len({tuple(row.flatten().tolist()) for row in together}) == 5


def test_noise_is_standard_normal():
    drawn = noise(0, "rollout", [(k,) for k in range(100)], (100,)).double()
    assert abs(float(drawn.mean())) < 0.05
    assert float(drawn.var()) == pytest.approx(1, abs=0.07)
    assert float((drawn.abs() < 1).double().mean()) == pytest.approx(0.6827, abs=0.02)


def test_noise_of_no_image_is_empty_and_keeps_its_shape():
    assert noise(0, "rollout", [], (4, 2, 2)).shape == (0, 4, 2, 2)
