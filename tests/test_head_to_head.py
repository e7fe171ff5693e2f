"""The comparison of all objectives: equal budgets, an honest search, figures that are what they say, a page that is never out of date."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import LIGHT, two_blocks
from contest.jobs import ablation_jobs, main_jobs, search_jobs
from contest.measures import diversity
from contest.page import NOTHING, drawn, with_results
from contest.results import entry_of, kept
from contest.running import Job, more_rollouts, run_all
from contest.search import Search, finalists
from contest.settings import ABLATIONS, METHODS, QUICK, Amount, Plan
from head_to_head import Contest
from safetensors.torch import load_file

from flowtilt import Trainer, UserError, load_recipe
from flowtilt.build import evaluation_prompts, training_prompts
from flowtilt.config import to_toml
from flowtilt.io.files import append_line, write_json
from flowtilt.objectives.elbo import elbo, epg_loss
from flowtilt.objectives.forward import x0_error
from flowtilt.objectives.nft import optimality
from flowtilt.plan.passes import passes_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "head_to_head.json"
SMALL = ("rollout.prompts=3", "rollout.images_per_prompt=3", "evaluate.images=6", "evaluate.steps=2")


def tiny(**changes) -> Plan:
    """Small runs of one method on half of the playground's network, judged by the light of their images."""
    overrides = (*QUICK.overrides, *SMALL, two_blocks(), *LIGHT)
    return dataclasses.replace(QUICK, **{"budget": 700, "methods": ("grpo",), "overrides": overrides, "amount": Amount(6, 2), **changes})


def silent(line: str) -> None:
    pass


def combinations(prompts):
    return {frozenset((e["count"], e.get("color"), e["class"]) for e in prompt.metadata["include"]) for prompt in prompts}


# what is declared


def test_every_method_has_an_equally_large_search():
    assert {len(method.grid()) / len(method.pulls) for method in METHODS.values()} == {9}


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_has_the_setting_that_its_score_was_made_with(name):
    """What the README says of a recipe is what a user gets who trains it."""
    (chosen,) = (record["settings"] for record in json.loads(RESULTS.read_text())["search"][name] if record["chosen"])
    recipe = load_recipe(METHODS[name].recipe).model_dump()
    assert recipe["objective"]["type"] == name
    assert {key: recipe[key.split(".")[0]][key.split(".")[1]] for key in chosen} == chosen


def test_so_has_the_recipe_of_the_flowgrpo_that_the_wider_search_chose():
    (chosen,) = (run for run in json.loads(RESULTS.with_name("grpo_search.json").read_text())["runs"] if run.get("chosen"))
    ours, theirs = (
        load_recipe(*given).model_dump(exclude={"name"}) for given in (("playground-grpo-fast",), ("playground-grpo", chosen["overrides"]))
    )
    assert ours == theirs


def test_all_runs_of_a_stage_differ_in_folders_and_load(tmp_path):
    plan = Plan()
    jobs = [job for method in METHODS for job in search_jobs(tmp_path, plan, method)]
    jobs += [job for method in METHODS for job in main_jobs(tmp_path, plan, method, plan.grid(method)[0])]
    jobs += [job for name in ABLATIONS for job in ablation_jobs(tmp_path, plan, name, plan.grid("nft")[0])]
    assert len({job.folder for job in jobs}) == len(jobs) == sum(map(len, map(plan.grid, METHODS))) + 3 * len(METHODS) + 3 * len(ABLATIONS)
    protocols = {job.load().evaluate.model_dump_json(exclude={"every", "prompts", "samples"}) for job in jobs}
    assert len(protocols) == 1
    rollouts = {(r.prompts, r.images_per_prompt, r.steps) for r in (job.load().rollout for job in jobs)}
    assert len(rollouts) == 1


def test_the_search_sees_neither_the_tests_combinations_nor_a_reported_seed(tmp_path):
    plan = Plan()
    for method in METHODS:
        (main,) = main_jobs(tmp_path, dataclasses.replace(plan, seeds=(0,)), method, plan.grid(method)[0])
        test = combinations(evaluation_prompts(main.load(), []))
        assert len(training_prompts(main.load())) == 703
        for job in search_jobs(tmp_path, plan, method):
            recipe = job.load()
            trained, judged = training_prompts(recipe), evaluation_prompts(recipe, [])
            assert not combinations(trained) & combinations(judged)
            assert not combinations([*trained, *judged]) & test
            assert recipe.seed not in plan.seeds


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_is_spent_but_for_less_than_a_rollout(method):
    recipe = load_recipe(METHODS[method].recipe)
    number = more_rollouts(recipe, 0, 50_000)
    costs = [passes_of(recipe, step).evaluations for step in range(1, number + 2)]
    assert sum(costs[:-1]) <= 50_000 < sum(costs)
    assert more_rollouts(recipe, 3, sum(costs[3:-1])) == number - 3


def test_a_budget_below_a_rollout_is_refused(tmp_path):
    with pytest.raises(UserError, match="budget 2000: 666 network evaluations are less than one rollout of playground"):
        search_jobs(tmp_path, Plan(budget=2000), "nft")


def test_without_the_negative_term_is_the_positive_half_of_nft():
    """At beta = 1: clip r |v+ error| is what the ablation's EPG computes, to the gradient."""
    variant = load_recipe("playground", [*ABLATIONS["no-negative"].overrides])
    o, nft = variant.objective, load_recipe("playground").objective
    rng = torch.Generator().manual_seed(0)
    v, v_old, target = torch.randn(3, 6, 8, generator=rng)
    t, advantages = torch.rand(6, generator=rng), torch.tensor([-2.6, -1.0, 0.0, 0.4, 1.0, 2.6])
    v.requires_grad_()
    r = optimality(advantages + nft.consistency, nft.advantage_clip)
    positive = nft.advantage_clip * r * x0_error(v, target, t)
    ours = epg_loss(elbo(v, target, t), elbo(v_old, target, t), o.scale * (advantages + o.consistency), ratio=o.ratio)
    torch.testing.assert_close(ours, positive)
    (a,), (b,) = torch.autograd.grad(positive.sum(), v), torch.autograd.grad(ours.sum(), v)
    torch.testing.assert_close(a, b)


def test_whatever_beta_the_search_chooses_is_not_run_again_as_an_ablation():
    for setting in METHODS["nft"].grid():
        assert [variant.question for variant in ABLATIONS.values() if set(variant.overrides) <= set(setting)] == ["beta"]


# what is measured


def test_diversity_is_the_distance_of_pairs_within_a_prompt():
    images = torch.zeros(5, 3, 4, 4)
    images[1], images[2] = 0.1, 0.3  # pairs of the first prompt: .1, .3, .2
    images[4] = 0.5
    assert diversity(images, torch.tensor([0, 0, 0, 1, 1])) == pytest.approx((0.2 + 0.5) / 2)
    assert diversity(images, torch.tensor([0, 0, 0, 1, 2])) == pytest.approx(0.2)


def finished(folder: Path, scores: list[float], seed: int = 0) -> Job:
    """A run's folder as training leaves it, with these scores after every 1,000 network evaluations."""
    folder.mkdir(parents=True)
    recipe = load_recipe("playground", [f"seed={seed}", f"rollouts={len(scores) - 1}"])
    (folder / "recipe.toml").write_text(to_toml(recipe))
    for step, score in enumerate(scores):
        if step:
            append_line(folder / "metrics.jsonl", {"rollout": step, "network_evaluations": 1000 * step, "seconds": 2.0 * step})
        append_line(folder / "evaluations.jsonl", {"rollout": step, "score": score, "column": "playground_strict", "images": 240})
    write_json(folder / "environment.json", {"processor": "a core", "threads": 1, "commit": "0" * 40, "packages": {"torch": "2"}})
    write_json(folder / "summary.json", {"rollouts": len(scores) - 1, "seconds": 2.0, "score": {"before": scores[0], "after": scores[-1]}})
    return Job(folder, "playground", (f"seed={seed}",), 1000 * (len(scores) - 1))


def test_the_cost_of_a_score_lies_on_the_line_between_evaluations(tmp_path):
    entry = entry_of(finished(tmp_path / "run", [0.3, 0.8, 1.0, 0.95]), method="nft")
    assert entry["evaluations_to_0.9"] == 1500 and entry["final_score"] == 0.95 and entry["network_evaluations"] == 3000
    assert not entry["collapsed"] and entry["command"].endswith("rollouts=3")


def test_what_was_never_reached_is_none_and_what_fell_has_collapsed(tmp_path):
    entry = entry_of(finished(tmp_path / "run", [0.3, 0.85, 0.7]), method="nft")
    assert entry["evaluations_to_0.9"] is None and entry["fell"] == pytest.approx(0.15) and entry["collapsed"]


def test_the_second_round_is_for_those_that_one_evaluation_cant_tell_from_the_best():
    assert finalists([0.5, 0.9, 0.88, 0.86]) == [1, 2]
    assert finalists([0.5, 0.9, 0.86]) == [1]
    assert finalists([0.89, 0.9, 0.88, 0.9, 0.5]) == [0, 1, 3]


def searched(folder: Path, plan: Plan, scores: list[float]) -> Search:
    """A search of nft whose first round ended with these scores."""
    search = Search(folder, plan, "nft")
    records = [{"score": score, "network_evaluations": 0, "machine": "a core", "commit": ""} for score in scores]
    return Search(folder, plan, "nft", [tried | record for tried, record in zip(search.tried(), records, strict=True)])


def test_the_best_of_the_first_round_is_chosen_where_it_stands_out_else_the_second_round_decides(tmp_path):
    plan = Plan()
    alone = searched(tmp_path, plan, [0.5] * 8 + [0.9])
    assert not alone.first_round() and not alone.second_round() and alone.chosen() == plan.grid("nft")[8]
    close = searched(tmp_path, plan, [0.5] * 7 + [0.88, 0.9])
    assert [job.folder for job in close.second_round()] == [job.folder for job in close.jobs[7:]] and close.chosen() is None
    assert {job.budget for job in close.second_round()} == {plan.final_budget}
    finals = [{}] * 7 + [{"final": 0.95}, {"final": 0.93}]
    decided = Search(tmp_path, plan, "nft", [record | final for record, final in zip(close.tried(), finals, strict=True)])
    assert decided.chosen() == plan.grid("nft")[7] and not decided.second_round()


def test_curves_are_drawn_of_entries_alone(tmp_path):
    entry = entry_of(finished(tmp_path / "run", [0.3, 0.8, 1.0]), method="nft")
    (method,) = drawn([entry]).methods
    costs, scores = method.entries[0].line("evaluations")
    assert costs.tolist() == [0, 1000, 2000] and scores.tolist() == [0.3, 0.8, 1.0] and method.seeds == [0]


def test_an_entry_is_known_by_its_command_without_its_length(tmp_path):
    job = finished(tmp_path / "run", [0.3, 0.8])
    entry = entry_of(job, method="nft")
    assert kept(job, [entry]) == entry
    assert kept(dataclasses.replace(job, overrides=("seed=10",)), [entry]) is None


# the page


def test_the_page_is_what_the_results_say():
    told = (ROOT / "docs" / "results" / "benchmarks.md").read_text(encoding="utf-8")
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else None
    assert with_results(told, found) == told
    assert (NOTHING in told) == (not found or not found["entries"])


# all of it


@pytest.fixture(scope="module")
def contest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contest")
    found = Contest(folder, tiny(), 1, folder / "results.json", silent)
    found.search()
    found.run()
    return found


def test_the_search_ends_with_one_setting_and_keeps_what_lost(contest):
    search = Search(contest.folder, tiny(), "grpo")
    tried = search.tried()
    assert len({record["score"] for record in tried}) == len(tried) == 2 and [record["chosen"] for record in tried].count(True) == 1
    assert not search.first_round() and not search.second_round()
    close = finalists([record["score"] for record in tried])
    assert [place for place, record in enumerate(tried) if "final" in record] == (close if len(close) > 1 else [])
    decided = {place: tried[place].get("final", tried[place]["score"]) for place in close}
    assert tried[max(decided, key=decided.__getitem__)]["chosen"]


def test_another_machine_goes_on_with_what_the_results_hold(contest, tmp_path):
    found = contest.results()
    write_json(tmp_path / "results.json", found)
    other = Contest(tmp_path / "elsewhere", tiny(), 1, tmp_path / "results.json", silent)
    other.search()
    other.run()
    assert other.results() == found and not list(other.folder.rglob("metrics.jsonl"))
    longer = Contest(tmp_path / "longer", tiny(budget=800), 1, tmp_path / "results.json", silent)
    assert longer.results()["search"]["grpo"][0]["score"] is None


def test_runs_spend_their_budget_and_no_more(contest):
    (entry,) = contest.results()["entries"]
    rollout = passes_of(load_recipe("playground-grpo", tiny().overrides), 1).evaluations
    assert tiny().budget - rollout < entry["network_evaluations"] <= tiny().budget
    assert entry["distance"] > 0 and entry["diversity"]["all"] > 0 and 0 <= entry["held_out"] <= 1
    assert contest.results()["base"]["distance"] == 0


def test_what_is_finished_is_not_made_again(contest):
    before = {path: path.stat().st_mtime_ns for path in contest.folder.rglob("*.json*")}
    contest.search()
    contest.run()
    kept = {path: path.stat().st_mtime_ns for path in contest.folder.rglob("*.json*")}
    assert {path for path in kept if kept[path] != before.get(path)} <= {contest.folder / "plan.json"}


def test_another_plan_does_not_mix_with_what_is_there(contest):
    with pytest.raises(UserError, match="another plan"):
        Contest(contest.folder, tiny(budget=600), 1, contest.folder / "results.json", silent)


def test_the_report_has_the_search_and_every_seed_and_a_picture(contest, tmp_path):
    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs" / "results" / "benchmarks.md").read_text())
    contest.report(page, tmp_path / "plot.svg")
    told, results = page.read_text(), json.loads((contest.folder / "results.json").read_text())
    assert NOTHING not in told and "| grpo | 1 |" in told and told.count("**chosen**") == 1
    assert with_results(told, results) == told
    assert (tmp_path / "plot.svg").read_text().startswith("<svg xmlns")
    assert {"method", "seed", "command", "machine", "commit", "evaluations_to_0.9", "final_score"} <= results["entries"][0].keys()


def test_an_interrupted_run_goes_on_to_the_bits_of_an_unbroken_one(contest, tmp_path):
    (whole,), (broken,) = (main_jobs(folder, tiny(), "grpo", contest.chosen("grpo")) for folder in (contest.folder, tmp_path))
    broken = dataclasses.replace(broken, amount=None)
    trainer = Trainer(broken.load(2))
    trainer.interrupted = True
    assert trainer.run() is None and not broken.finished()
    run_all([broken], 1, silent, lambda job: 1.0)
    assert broken.finished() and whole.spent() == broken.spent()
    ours, theirs = (load_file(job.folder / "lora" / "pytorch_lora_weights.safetensors") for job in (whole, broken))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


def test_a_run_that_fails_is_named_and_the_others_are_made(tmp_path):
    good, bad = (Job(tmp_path / name, "playground", tiny().overrides, 300) for name in ("good", "bad"))
    bad = dataclasses.replace(bad, overrides=(*bad.overrides, "evaluate.prompts=./missing.txt"))
    said = []
    with pytest.raises(SystemExit, match="1 of 2 runs failed"):
        run_all([bad, good], 1, said.append, lambda job: 1.0)
    assert good.finished() and any("bad failed" in line for line in said)
    assert "missing.txt" in (tmp_path / "bad.log").read_text()
