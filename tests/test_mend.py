"""MEND: what an improvement is, which one is accepted, and that a run of it learns, resumes and agrees over ranks."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from conftest import quick
from ranks import together
from test_resume import contents

from flowtilt import Trainer, UserError
from flowtilt.cli import main
from flowtilt.config import load_recipe
from flowtilt.flow import predict_x0
from flowtilt.io.files import read_lines
from flowtilt.objectives.mend import accepted, adapted_tau, ceilings, mend_loss, moved, raised_floor, row_weights
from flowtilt.plan.passes import passes_of
from flowtilt.runs.folder import open_run


def mending(folder, *overrides):
    own = ['objective={type="mend",improve={light=10.0}}', "optimizer.lr=1e-2", "rollout.steps=4", 'evaluate.rewards=["light"]']
    return quick(folder, *own, "rollouts=4", *overrides)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_move_has_its_length_along_the_gradient_and_none_where_there_is_no_gradient():
    x, gradient = numbers(3, 4, 2, 2), numbers(3, 4, 2, 2, seed=1) * 1e-6
    gradient[2] = 0
    off = moved(x, gradient, 0.2) - x
    assert off.square().flatten(1).mean(1).sqrt()[:2].tolist() == pytest.approx([0.2, 0.2], rel=1e-5)
    assert torch.cosine_similarity(off[:2].flatten(1), gradient[:2].flatten(1)).tolist() == pytest.approx([1, 1])
    assert torch.equal(off[2], torch.zeros_like(off[2]))


def test_the_ceiling_is_the_groups_quantile_or_the_floor_which_never_falls():
    rewards, groups = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 10.0, 11.0]), torch.tensor([0] * 5 + [1] * 2)
    assert ceilings(rewards, groups, 0.75, -1.0).tolist() == pytest.approx([3.0] * 5 + [10.75] * 2)
    assert ceilings(rewards, groups, 0.75, 5.0).tolist() == pytest.approx([5.0] * 5 + [10.75] * 2)
    assert raised_floor(None, torch.tensor([1.0, 2.0, 9.0])) == 2.0
    assert raised_floor(2.0, torch.tensor([3.0])) == pytest.approx(2.1)
    assert raised_floor(2.0, torch.tensor([-5.0])) == 2.0


def test_what_is_accepted_is_best_by_its_definition():
    rewards, tried = numbers(40), numbers(3, 40, seed=1)
    squares, kappa = numbers(3, 40, seed=2).square(), numbers(40, seed=3)
    found = accepted(rewards, tried, squares, kappa, 0.7)
    for n in range(40):
        values = [min(float(tried[j, n]), float(kappa[n])) - float(squares[j, n]) / 1.4 for j in range(3)]
        best = max(range(3), key=lambda j: values[j])
        assert int(found[n]) == (best if values[best] > min(float(rewards[n]), float(kappa[n])) else -1)
    assert (found[rewards >= kappa] == -1).all() and (found >= 0).any()
    assert (accepted(rewards, tried, squares + 1e-3, kappa, 1e-9) == -1).all()


def test_tau_goes_where_the_share_that_accepts_is_right():
    assert [adapted_tau(1.0, share) for share in (0.1, 0.3, 0.6, 0.9)] == [1.5, 1.0, 1.0, 1 / 1.5]


def test_the_loss_is_that_of_the_denoiser_and_least_where_the_move_was_made():
    x, v, v_old, d = (numbers(2, 4, 3, 3, seed=k) for k in range(4))
    sigma = 0.3
    wanted = (predict_x0(x, v, sigma) - predict_x0(x, v_old, sigma) - d).square().flatten(1).mean(1)
    assert torch.allclose(mend_loss(v, v_old, d, sigma), wanted, atol=1e-6)
    assert mend_loss(v_old - d / sigma, v_old, d, sigma).abs().max() < 1e-12
    v.requires_grad_()
    mend_loss(v, v_old, d, sigma).sum().backward()
    nudge = numbers(2, 4, 3, 3, seed=9)
    up, down = (mend_loss((v + e * nudge).detach().double(), v_old.double(), d.double(), sigma).sum() for e in (1e-3, -1e-3))
    assert float((v.grad * nudge).sum()) == pytest.approx(float(up - down) / 2e-3, rel=1e-4)


def test_rows_are_two_means_of_which_the_second_is_weighted():
    takes, losses = torch.tensor([True, False, True, False, False]), torch.tensor([1.0, 2.0, 3.0, 4.0, 6.0])
    assert float((row_weights(takes, 10.0) * losses).sum()) == pytest.approx(2.0 + 10 * 4.0)
    assert float((row_weights(torch.zeros(3, dtype=torch.bool), 10.0)).sum()) == pytest.approx(10.0)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    trainer = Trainer(mending(tmp_path_factory.mktemp("mend") / "run"))
    return trainer, trainer.run()


def test_a_run_brightens_and_logs_what_it_did(straight):
    trainer, summary = straight
    assert summary["score"]["after"] > summary["score"]["before"] + 0.002
    lines = read_lines(trainer.run_folder / "metrics.jsonl")
    assert [line["network_evaluations"] for line in lines] == [
        sum(passes_of(trainer.recipe, step).evaluations for step in range(1, last + 1)) for last in range(1, 5)
    ]
    for line, later in pairwise(lines):
        assert later["tau"] == pytest.approx(adapted_tau(line["tau"], line["accepted"]))
        assert line["gain"] > 0 or not line["accepted"]
        assert 0 <= line["move"] <= 0.4**2 + 1e-6


def test_a_run_goes_on_to_the_same_bits(straight, tmp_path):
    folder = tmp_path / "run"
    Trainer(mending(folder, "rollouts=2")).run()
    Trainer(open_run(folder, ["rollouts=4"]), resume=folder).run()
    assert contents(folder) == contents(straight[0].run_folder)


def test_two_processes_compute_what_one_does(straight, tmp_path):
    run = straight[0].run_folder
    done = together(2, main, ["train", str(run / "recipe.toml"), f"run={json.dumps(str(tmp_path / 'two'))}"], folder=tmp_path / "ranks")
    assert done.codes == [0, 0], done.stderr[-2000:]
    for name in ("backprop_reward", "accepted", "move", "loss", "grad_norm"):
        ours, theirs = ([line[name] for line in read_lines(folder / "metrics.jsonl")] for folder in (tmp_path / "two", run))
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-7), name
    shutil.rmtree(tmp_path / "two")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective.improve={}"], r"objective.improve: names no reward"),
        (["objective.improve={playground_smoth=1}"], r"improve: 'playground_smoth' is not in \[rewards\]; did you mean '"),
        (["objective.moves=[]"], r"objective.moves: needs at least one length"),
        (["rollout.solver=dpm2"], r'rollout.solver: mend trains a state on the way of "euler"'),
        (["rollout.guidance=2"], r"rollout.guidance: mend trains the velocity without guidance"),
        (["rollout.lag=1"], r"rollout.lag: mend takes the images of the trained policy alone"),
        (["train=full"], r"train: mend trains LoRAs"),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_one_line(overrides, said):
    with pytest.raises(UserError, match=said) as found:
        load_recipe("playground-mend", overrides)
    assert "\n" not in str(found.value)


def test_a_reward_without_a_gradient_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"reward playground: has no gradient to the images"):
        Trainer(load_recipe("playground-mend", [f"run={tmp_path}/run", "objective.improve={playground=1}"])).run()
