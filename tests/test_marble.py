"""MARBLE: the direction that no reward opposes, its closed forms, and the mixture of advantages that has it."""

import json
from itertools import accumulate

import pytest
import torch
from conftest import QUICK, quick, two_blocks
from forward_cases import draw, gradient
from ranks import together

from flowtilt import Trainer, load_recipe
from flowtilt.advantages import advantages_by_reward
from flowtilt.build import build_objective
from flowtilt.cli import main
from flowtilt.errors import UserError
from flowtilt.io.files import read_lines
from flowtilt.objectives.batches import TrainingBatch
from flowtilt.objectives.forward import Velocities
from flowtilt.objectives.marble import common_descent
from flowtilt.plan.passes import passes_of
from flowtilt.training.balance import Balance


def products_of(vectors):
    return vectors @ vectors.T


@pytest.mark.parametrize("number", [2, 3, 5])
def test_the_optimum_is_a_common_descent_direction(number):
    for seed in range(20):
        vectors = torch.randn(number, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        vectors /= vectors.norm(dim=1, keepdim=True)
        alpha = common_descent(products_of(vectors))
        g = alpha @ vectors
        assert alpha.min() >= 0 and float(alpha.sum()) == pytest.approx(1)
        along = vectors @ g
        assert (along >= g @ g - 1e-8).all()
        torch.testing.assert_close(along[alpha > 1e-6], (g @ g).expand(int((alpha > 1e-6).sum())), atol=1e-8, rtol=0)


def test_two_gradients_have_the_closed_form_and_unit_ones_a_half_each():
    a, b = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.tensor([[1.0], [3.0]])
    share = (((b - a) @ b) / ((a - b) @ (a - b))).clamp(0, 1)
    torch.testing.assert_close(common_descent(products_of(torch.stack([a, b]))), torch.stack([share, 1 - share]))
    units = torch.stack([a / a.norm(), b / b.norm()])
    torch.testing.assert_close(common_descent(products_of(units)), torch.tensor([0.5, 0.5], dtype=torch.float64))


def test_orthonormal_gradients_weigh_alike():
    torch.testing.assert_close(common_descent(torch.eye(4)), torch.full((4,), 0.25, dtype=torch.float64))


def test_gradients_that_cancel_or_are_equal_have_an_answer():
    cancel = torch.tensor([[1.0, 0.0], [-0.5, 3**0.5 / 2], [-0.5, -(3**0.5) / 2]], dtype=torch.float64)
    torch.testing.assert_close(common_descent(products_of(cancel)), torch.full((3,), 1 / 3, dtype=torch.float64))
    assert float((common_descent(products_of(cancel)) @ cancel).norm()) < 1e-8
    equal = torch.ones(3, 3)
    assert float(common_descent(equal).sum()) == pytest.approx(1)


# the mixture


@pytest.mark.parametrize("kind", ["nft", "awm", "awr", "epg", "pepg", "par"])
def test_the_gradient_of_a_mixture_of_advantages_is_the_mixture_of_gradients(kind):
    """So one backward pass serves all rewards; weights sum to 1, and no advantage is clipped."""
    case, own = draw(), load_recipe(f"playground{'' if kind == 'nft' else '-' + kind}").objective
    objective = build_objective(own)
    rng = torch.Generator().manual_seed(1)
    advantages = torch.randn(3, len(case.t), generator=rng, dtype=torch.float64)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)

    def at(a):
        batch = TrainingBatch(case.x0, case.eps, case.t, a, None)
        return gradient(lambda v: objective.sample_loss(Velocities(v, case.v_old, None, case.v_target), batch)[0], case.v)

    torch.testing.assert_close(at(weights @ advantages), torch.einsum("k,k...->...", weights, torch.stack([at(a) for a in advantages])))


def test_the_weighed_mixture_points_where_no_reward_gets_worse():
    rng = torch.Generator().manual_seed(2)
    own = torch.randn(3, 12, generator=rng) * torch.tensor([[1.0], [30.0], [0.01]])
    own[2] -= 0.02 * own[0]
    rest = torch.randn(12, generator=rng)
    balance = Balance(["a", "b", "c"])

    def of(weights):
        g = rest + (weights.float() @ own)
        return [g[:5], g[5:]]

    assert balance.due(0)
    balance.solve(0, of)
    assert not balance.due(9) and balance.due(10)
    mixed = balance.weights().float() @ own
    unit = own / own.norm(dim=1, keepdim=True)
    assert (unit @ mixed > -1e-6 * mixed.norm()).all()
    told = balance.metrics()
    assert sum(told[f"marble/alpha/{name}"] for name in "abc") == pytest.approx(1)
    assert told["marble/norm/b"] == pytest.approx(float(own[1].norm()), rel=1e-4)

    again = Balance(["a", "b", "c"])
    again.load(json.loads(json.dumps(balance.state())))
    torch.testing.assert_close(again.weights(), balance.weights(), rtol=0, atol=0)
    assert again.metrics() == told and not again.due(9)


def test_a_reward_without_a_gradient_is_left_out_and_the_others_go_on():
    own = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    balance = Balance(["a", "b", "flat"])
    balance.solve(0, lambda w: [w.float() @ own])
    torch.testing.assert_close(balance.weights(), torch.tensor([2 / 3, 1 / 3, 0.0], dtype=torch.float64))


def test_advantages_of_each_reward_compare_within_groups_and_take_the_weights_sign():
    scores = {
        "a": torch.tensor([1.0, 2.0, 5.0, 7.0]),
        "b": torch.tensor([3.0, 1.0, torch.nan, torch.nan]),
        "watched": torch.zeros(4),
    }
    groups = torch.tensor([0, 0, 1, 1])
    found = advantages_by_reward(scores, {"a": 1.0, "b": -1.0, "watched": 0.0}, torch.tensor([1.0, 1.0, 1.0, torch.nan]), groups, "none")
    torch.testing.assert_close(found[:3], torch.tensor([[-0.5, -1.0], [0.5, 1.0], [-1.0, 0.0]]))
    assert found[3].isnan().all()


# in a run


def colours(folder):
    (folder / "colours.py").write_text(
        "def red(images, prompts):\n    return images[:, 0].mean((1, 2))\n"
        "def green(images, prompts):\n    return images[:, 1].mean((1, 2))\n"
        "def blue(images, prompts):\n    return images[:, 2].mean((1, 2)) - images[:, 0].mean((1, 2))\n"
    )
    own = [f"rewards.{name}={folder}/colours.py:{name}" for name in ("red", "green", "blue")]
    return [*own, "rewards.playground=0", "combine=marble", "evaluate.every=0", "evaluate.images=4", "optimizer.steps_per_rollout=5"]


def test_a_run_costs_what_the_plan_says_a_resumed_one_has_its_bits_and_two_ranks_its_weights(tmp_path):
    mine = colours(tmp_path)
    recipe = quick(tmp_path / "whole", *mine, "rollouts=4")
    Trainer(recipe).run()
    lines = read_lines(tmp_path / "whole" / "metrics.jsonl")
    assert [line["network_evaluations"] for line in lines] == list(accumulate(passes_of(recipe, step).evaluations for step in range(1, 5)))
    for line in lines:
        assert sum(line[f"marble/alpha/{name}"] for name in ("red", "green", "blue")) == pytest.approx(1)
    # ten updates lie between two solutions, so every other rollout has a new one
    alphas = [line["marble/alpha/red"] for line in lines]
    assert alphas[0] == alphas[1] != alphas[2] == alphas[3]

    Trainer(quick(tmp_path / "parts", *mine, "rollouts=3")).run()
    Trainer(quick(tmp_path / "parts", *mine, "rollouts=4"), resume=tmp_path / "parts").run()
    both = [sorted((tmp_path / name / "checkpoints").iterdir())[-1] for name in ("whole", "parts")]
    assert (both[0] / "current.safetensors").read_bytes() == (both[1] / "current.safetensors").read_bytes()

    words = ["train", "playground", *QUICK, two_blocks(), *mine, "rollouts=1", f"run={tmp_path}/two"]
    done = together(2, main, words, folder=tmp_path / "ranks")
    assert done.codes == [0, 0], done.stderr[-2000:]
    (two,) = read_lines(tmp_path / "two" / "metrics.jsonl")
    names = ["loss", "grad_norm", *(f"marble/{kind}/{name}" for kind in ("alpha", "norm") for name in ("red", "green", "blue"))]
    assert [two[name] for name in names] == pytest.approx([lines[0][name] for name in names], rel=1e-4)


@pytest.mark.parametrize(
    ("recipe", "overrides", "words"),
    [
        ("playground", ["combine=marble"], "only one has a weight"),
        ("playground", ["combine=marble", "rewards.playground_smooth=0.5"], "rewards.playground_smooth: .* finds the weights itself"),
        ("playground-crd", ["combine=marble", "rewards.playground_smooth=1"], "does not go with crd"),
    ],
)
def test_what_can_not_be_weighed_is_refused(recipe, overrides, words):
    with pytest.raises(UserError, match=words):
        load_recipe(recipe, overrides)
