"""Sampling with stochastic steps, "cps": the maths, whose noise it is, and the same in recipes, evaluations and commands."""

import math

import pytest
import torch
from conftest import quick

from flowtilt import Trainer, UserError
from flowtilt.build import build_objective, sampler_of
from flowtilt.cli import main
from flowtilt.config import EvaluateSettings, load_recipe, to_toml
from flowtilt.evaluate.assess import assess
from flowtilt.flow import sigma_schedule
from flowtilt.io.files import read_lines
from flowtilt.models.opening import load_pipeline
from flowtilt.models.sd3 import SD3
from flowtilt.playground import pipeline_path
from flowtilt.policy.tuned_model import TunedModel
from flowtilt.sampling.sampler import Sampler
from flowtilt.seeding import noise, step_noise
from flowtilt.solvers import solve, solve_cps
from flowtilt.training.collector import collector

TEXTS = ["a red circle", "two crosses", "a yellow square above a green circle"]
CPS = ["rollout.solver=cps", "rollout.steps=4"]


@pytest.fixture(scope="module")
def stack():
    return TunedModel(SD3(load_pipeline(str(pipeline_path()), revision=None, dtype="float32", device=torch.device("cpu"))), [])


def drawn(stack, sampler, rows=(0, 1, 2), size=8, seed=0):
    """Latents of the images `rows` of three."""
    places = [(k,) for k in rows]
    shape = stack.model.latent_shape
    start, given = noise(seed, "x", places, shape), stack.model.encode([TEXTS[k] for k in rows])
    return sampler(stack, "base", start, given, size, step_noise(seed, "z", places, shape))


# the maths -------------------------------------------------------------------------------------------


def test_four_steps_of_shift_3_have_rtdmds_levels():
    torch.testing.assert_close(sigma_schedule(4, 3.0), torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]), atol=1e-7, rtol=0)


def test_each_step_is_the_formula_and_the_last_one_is_the_predicted_data():
    torch.manual_seed(0)
    x, z = torch.randn(3, 5), torch.randn(2, 3, 5)
    sigmas, eta = torch.tensor([1.0, 0.7, 0.3, 0.0]), 0.6
    asked = []

    def velocity(x, s):
        return x.sin() + s

    def fresh(j):
        asked.append(j)
        return z[j]

    found = solve_cps(velocity, x, sigmas, fresh, eta)
    for j, (a, b) in enumerate([(1.0, 0.7), (0.7, 0.3)]):
        v = velocity(x, a)
        x = (1 - b) * (x - a * v) + b * math.cos(eta * math.pi / 2) * (x + (1 - a) * v) + b * math.sin(eta * math.pi / 2) * z[j]
    torch.testing.assert_close(found, x - 0.3 * velocity(x, 0.3))
    assert asked == [0, 1]


@pytest.mark.parametrize("eta", [0.3, 0.9, 1.0])
def test_the_marginal_of_every_level_is_kept(eta):
    """Of data that are one point, where eps_hat has unit variance: mean (1 - s) x0, standard deviation s."""
    x = noise(0, "x", [(0,)], (200_000,))[0]
    fresh = step_noise(0, "z", [(0,)], (200_000,))
    for sigmas in (torch.tensor([1.0, 0.9, 0.75]), torch.tensor([1.0, 0.9, 0.75, 0.5])):
        found = solve_cps(lambda x, s: (x - 2.0) / s, x, sigmas, lambda j: fresh(torch.tensor([0]), j)[0], eta)
        s = float(sigmas[-1])
        assert float(found.mean()) == pytest.approx(2.0 * (1 - s), abs=0.01) and float(found.std()) == pytest.approx(s, abs=0.01)


def test_with_hardly_any_new_noise_it_is_euler():
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    levels, z = sigma_schedule(5, 3.0), torch.ones(2, 4)
    nearly = solve_cps(lambda x, s: x.cos(), x, levels, lambda j: z, 1e-6)
    torch.testing.assert_close(nearly, solve(lambda x, s: x.cos(), x, levels, "euler"), atol=1e-5, rtol=0)


def test_levels_that_do_not_fall_are_refused():
    with pytest.raises(ValueError, match="must fall strictly"):
        solve_cps(lambda x, s: x, torch.zeros(1, 2), torch.tensor([1.0, 0.5, 0.5]), lambda j: torch.zeros(1, 2), 0.9)


# the sampler -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_an_image_is_its_own_whatever_it_is_drawn_with(stack, guidance):
    sampler = Sampler("cps", 4, guidance, 0.9)
    whole = drawn(stack, sampler)
    for other in (drawn(stack, sampler, size=2), torch.cat([drawn(stack, sampler, rows=(k,)) for k in range(3)])):
        torch.testing.assert_close(other, whole, atol=5e-5, rtol=1e-4)
    assert (drawn(stack, sampler, seed=1) - whole).abs().max() > 0.1


def test_every_step_has_noise_of_its_own(stack):
    sampler, shape = Sampler("cps", 4, eta=0.9), stack.model.latent_shape
    asked = []

    def fresh(rows, j):
        asked.append((rows.tolist(), j))
        return noise(0, "z", [(k, j) for k in rows.tolist()], shape)

    sampler(stack, "base", noise(0, "x", [(0,), (1,), (2,)], shape), stack.model.encode(TEXTS), 2, fresh)
    assert asked == [([0, 1], 0), ([0, 1], 1), ([0, 1], 2), ([2], 0), ([2], 1), ([2], 2)]
    z = step_noise(3, "z", [(7, 1), (8, 0)], (2,))
    assert torch.equal(z(torch.tensor([1]), 2), noise(3, "z", [(8, 0, 2)], (2,)))


def test_what_the_sampler_cannot_do_is_said(stack):
    with pytest.raises(ValueError, match="cps draws new noise in its steps"):
        Sampler("cps", 4, eta=0.9)(stack, "base", torch.zeros(1, *stack.model.latent_shape), stack.model.encode(["a"]), 1)
    for eta in (None, 0.0, 1.1, -0.5, math.nan):
        with pytest.raises(ValueError, match="eta: must be above 0 and at most 1"):
            Sampler("cps", 4, eta=eta)
    with pytest.raises(ValueError, match="eta: belongs to solver cps, not euler"):
        Sampler("euler", 4, eta=0.9)


def test_what_is_said_takes_the_place_of_the_recipes():
    plain, few = EvaluateSettings(), EvaluateSettings(solver="cps", eta=0.5, steps=4)
    assert sampler_of(plain) == Sampler("euler", 40) and sampler_of(few) == Sampler("cps", 4, 1.0, 0.5)
    assert sampler_of(plain, solver="cps", steps=4) == Sampler("cps", 4, 1.0, 0.9)
    assert sampler_of(few, eta=0.7, guidance=2.0) == Sampler("cps", 4, 2.0, 0.7)
    assert sampler_of(few, solver="euler") == Sampler("euler", 4)
    with pytest.raises(UserError, match="belongs to solver cps"):
        sampler_of(few, solver="euler", eta=0.9)


# recipes ---------------------------------------------------------------------------------------------


def test_a_recipe_tells_its_eta_and_reads_back_equal(tmp_path):
    recipe = load_recipe("playground", ["evaluate.solver=cps", "evaluate.steps=4", "rollout.eta=0.5", *CPS])
    assert (recipe.rollout.eta, recipe.evaluate.eta) == (0.5, 0.9)
    assert "4 cps steps of eta 0.9" in recipe.protocol()
    text = to_toml(recipe)
    (tmp_path / "r.toml").write_text(text)
    assert load_recipe(tmp_path / "r.toml") == recipe and text.count("eta = 0.9") == text.count("eta = 0.5") == 1


def test_another_solver_leaves_the_eta_below_behind(tmp_path):
    (tmp_path / "few.toml").write_text('base = "playground"\n[rollout]\nsolver = "cps"\neta = 0.5\n')
    (tmp_path / "many.toml").write_text('base = "few.toml"\n[rollout]\nsolver = "heun"\n')
    assert load_recipe(tmp_path / "many.toml").rollout.eta is None
    assert load_recipe(tmp_path / "few.toml", ["rollout.solver=euler"]).rollout.eta is None
    assert load_recipe(tmp_path / "few.toml", ["rollout.steps=3"]).rollout.eta == 0.5


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rollout.eta=0.5"], "rollout.eta: belongs to rollout.solver = 'cps', not 'euler' [command line: rollout.eta=0.5]"),
        (["evaluate.eta=0.5", "evaluate.solver=heun"], "evaluate.eta: belongs to evaluate.solver = 'cps', not 'heun'"),
        (["rollout.solver=cps", "rollout.eta=0"], "rollout.eta: must be greater than 0, not 0"),
        (["rollout.solver=cps", "rollout.eta=1.5"], "rollout.eta: must be less than or equal to 1, not 1.5"),
        (["objective.type=grpo", "rollout.solver=cps"], 'set objective.sde = "cps"'),
    ],
)
def test_an_eta_without_use_is_an_error(overrides, said):
    with pytest.raises(UserError) as error:
        load_recipe("playground", overrides)
    assert said in str(error.value)


# training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nft", "awm", "epg", "pepg", "par", "ram"])
def test_every_method_on_the_forward_process_trains_what_few_steps_draw(tmp_path, kind):
    small = ["rollout.prompts=2", "rollout.images_per_prompt=2", "objective.times_per_image=2", "optimizer.steps_per_rollout=1"]
    trainer = Trainer(quick(tmp_path / "run", f"objective.type={kind}", *CPS, *small))
    metrics = trainer._step()
    assert math.isfinite(metrics["loss"]) and metrics["network_evaluations"] >= 4 * 4 + 3 * 8


def test_a_rollouts_image_does_not_depend_on_the_others(stack, tmp_path):
    recipe = quick(tmp_path / "run", *CPS)
    where = [(1, 0, 0), (1, 0, 1), (1, 2, 0)]
    start = noise(0, "rollout", where, stack.model.latent_shape)

    def latents(rows, size, rollout=1):
        collect = collector(recipe.rollout, recipe.seed, rollout, build_objective(recipe.objective))
        places = [(rollout, *where[k][1:]) for k in rows]
        return collect(stack, start[rows], stack.model.encode(TEXTS).select(torch.tensor(rows)), places, size)[0]

    whole = latents([0, 1, 2], 8)
    torch.testing.assert_close(torch.cat([latents([2], 8), latents([0, 1], 1)]), whole[[2, 0, 1]], atol=5e-5, rtol=1e-4)
    assert (latents([0, 1, 2], 8, rollout=2) - whole).abs().max() > 0.1  # other steps' noise, though the same start


# evaluation and commands -----------------------------------------------------------------------------


def test_an_evaluation_is_the_same_in_any_batch_and_tells_its_eta(tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("\n".join(TEXTS) + "\n")
    given = {"prompts": [f"{tmp_path}/p.txt"], "rewards": ["jpeg_incompressibility"], "images_per_prompt": 2, "solver": "cps", "steps": 4}
    results = assess(tmp_path / "whole", **given)
    assert (results["protocol"]["solver"], results["protocol"]["eta"], results["protocol"]["steps"]) == ("cps", 0.9, 4)
    assess(tmp_path / "parts", micro_batch=1, **given)
    scores = [[r["scores"]["jpeg_incompressibility"] for r in read_lines(tmp_path / name / "scores.jsonl")] for name in ("whole", "parts")]
    assert scores[0] == pytest.approx(scores[1], rel=0.02) and len(set(scores[0])) == 6
    assert "cps, eta 0.9, 4 solver steps" in (tmp_path / "whole" / "report.html").read_text()
    assert assess(tmp_path / "whole", **given)["sets"] == results["sets"]
    with pytest.raises(UserError, match="whose eta differ"):
        assess(tmp_path / "whole", eta=0.5, **given)
    euler = assess(tmp_path / "euler", **{**given, "solver": "euler"})
    assert "eta" not in euler["protocol"]


def test_a_run_evaluates_with_it_and_its_lora_scores_the_same_again(tmp_path):
    cps = ["evaluate.solver=cps", "evaluate.eta=0.8", "rollouts=1", "rollout.prompts=2", "optimizer.steps_per_rollout=1"]
    Trainer(quick(tmp_path / "run", *cps, whole=True)).run()
    results = assess(tmp_path / "e", loras=[tmp_path / "run"])
    found = results["sets"]["playground"]["columns"]["playground_strict"]["tuned"]
    assert found["mean"] == read_lines(tmp_path / "run" / "evaluations.jsonl")[-1]["score"]
    assert results["protocol"]["eta"] == 0.8


def test_the_commands(tmp_path, capsys):
    few = ["--solver", "cps", "--steps", "4", "-o"]
    for name, more in (("a", []), ("b", ["--eta", "0.9"]), ("c", ["--eta", "0.3"])):
        assert main(["sample", TEXTS[0], *few, str(tmp_path / name), *more]) == 0
    pictures = [(tmp_path / name).read_bytes() for name in "abc"]
    assert pictures[0] == pictures[1] != pictures[2]
    assert main(["evaluate", "--images", "2", *few, str(tmp_path / "e"), "--eta", "0.7"]) == 0
    assert "--eta" not in capsys.readouterr().err
    for command in (["sample", TEXTS[0]], ["evaluate"]):
        assert main([*command, "--solver", "heun", "--eta", "0.9"]) == 2
        assert "eta: belongs to solver cps, not heun" in capsys.readouterr().err
        assert main([*command, "--solver", "cps", "--eta", "0"]) == 2
        assert "eta: must be above 0 and at most 1, not 0.0" in capsys.readouterr().err
