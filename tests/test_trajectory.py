"""FlowGRPO through the whole loop: steps kept as they were taken, ratios of 1 at first, windows, guidance, resume, ranks' shares."""

import pytest
import torch
from conftest import LONGER, quick

from flowtilt import Trainer, UserError
from flowtilt.io.files import read_lines
from flowtilt.objectives.grpo import grpo_loss
from flowtilt.sampling.sampler import Sampler
from flowtilt.sampling.trajectory import KeptSteps, PathSampler
from flowtilt.seeding import noise
from flowtilt.solvers import log_prob, sde_step
from flowtilt.training.collector import collector
from flowtilt.training.timing import Phases

GRPO = ["objective.type=grpo", "objective.clip_range=1e-3", "objective.kl=0.01"]


def grpo(run, *overrides):
    # QUICK names options of "nft", which another type leaves behind
    return quick(run, *GRPO, *overrides)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return Trainer(grpo(tmp_path_factory.mktemp("grpo") / "run", "rollouts=1"))


def drawn(trainer, sampler, stochastic, rows=5, size=8, sde="flow", eta=0.7):
    policy = trainer.policy
    start = noise(0, "x", [(k,) for k in range(rows)], policy.model.latent_shape)
    given = policy.model.encode(["a red circle", "two crosses", "a blue square"][:rows] * 2).select(torch.arange(rows))

    def fresh(which, j):
        return noise(0, "z", [(k, j) for k in which.tolist()], policy.model.latent_shape)

    return start, given, PathSampler(sampler, KeptSteps(stochastic, sde, eta))(policy, "old", start, given, fresh, size)


def test_the_kept_steps_are_those_that_were_taken(trainer):
    sigmas = trainer.policy.model.levels(6)
    start, given, (x0, path) = drawn(trainer, Sampler("euler", 6), range(1, 4))
    assert path.states.shape[:2] == (5, 4) and path.means.shape[:2] == path.log_probs.shape == (5, 3)
    with torch.no_grad():
        x = start + (sigmas[1] - sigmas[0]) * trainer.policy.velocity("old", start, sigmas[0], given)
        torch.testing.assert_close(path.states[:, 0], x)
        for k, j in enumerate(range(1, 4)):
            z = noise(0, "z", [(row, j) for row in range(5)], trainer.policy.model.latent_shape)
            v = trainer.policy.velocity("old", x, sigmas[j], given)
            x, mean, std = sde_step(x, v, sigmas[j], sigmas[j + 1], z, "flow", 0.7)
            torch.testing.assert_close(path.states[:, k + 1], x)
            torch.testing.assert_close(path.log_probs[:, k], log_prob(x, mean, std))
        for j in (4, 5):
            x = x + (sigmas[j + 1] - sigmas[j]) * trainer.policy.velocity("old", x, sigmas[j], given)
    torch.testing.assert_close(x0, x)


def test_an_image_and_its_way_do_not_depend_on_the_batch(trainer):
    whole, parts = (drawn(trainer, Sampler("dpm2", 5, guidance), range(5), size=size) for guidance, size in ((2.0, 8), (2.0, 2)))
    torch.testing.assert_close(whole[2][0], parts[2][0], atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(whole[2][1].states, parts[2][1].states, atol=5e-5, rtol=1e-4)


def test_without_noise_it_is_the_ode(trainer):
    start, given, (x0, _) = drawn(trainer, Sampler("euler", 5), range(1, 3), sde="cps", eta=1e-4)
    torch.testing.assert_close(x0, Sampler("euler", 5)(trainer.policy, "old", start, given, 8), atol=2e-3, rtol=1e-3)


def test_no_other_objective_draws_noise(trainer, tmp_path):
    recipe = quick(tmp_path / "nft")
    from flowtilt.build import build_objective

    policy = trainer.policy
    start, given = noise(0, "x", [(0,), (1,)], policy.model.latent_shape), policy.model.encode(["a", "b"])
    x0, path = collector(recipe.rollout, recipe.seed, 1, build_objective(recipe.objective))(policy, start, given, [(1, 0, 0), (1, 0, 1)], 8)
    assert path is None and torch.equal(x0, Sampler(recipe.rollout.solver, recipe.rollout.steps)(policy, "old", start, given, 8))


@pytest.mark.parametrize("extra", [[], ["rollout.guidance=2.0"], ["objective.guard=true"], ["objective.sde=cps"], ["objective.sde=dance"]])
def test_at_the_first_update_the_gradient_is_reinforce(tmp_path, extra):
    """Of the mean over steps: -A grad log p, Guard's scaled by std / -dt, plus a KL that has no gradient yet."""
    trainer = Trainer(grpo(tmp_path / "run", "optimizer.steps_per_rollout=1", *extra))
    phases = Phases(torch.device("cpu"))
    drawn = trainer.walk.take(0, trainer.recipe.rollout.prompts)
    rollout, _ = trainer.method.rollouts.sample(1, drawn, phases)
    own = [k for k in range(len(rollout.x0)) if rollout.kept[k]]
    rows = trainer.method.learner.rows(1, rollout, own)
    trainer.method.learner._gradients(rows, len(rows), 7)
    ours = [p.grad.clone() for p in trainer.policy.parameters]
    for p in trainer.policy.parameters:
        p.grad = None
    (batch,) = rows.micro_batches(10_000)
    o = trainer.recipe.objective
    v = batch.velocity(trainer.policy, "current")
    _, mean, std = sde_step(batch.x, v, batch.sigma, batch.sigma_next, torch.zeros_like(batch.x), o.sde, o.eta, batch.sigma_max)
    density = log_prob(batch.x_next, mean, std)
    torch.testing.assert_close(density, batch.log_prob, atol=1e-4, rtol=1e-4)  # the policy that drew is the one that learns
    weight = std.flatten() / (batch.sigma - batch.sigma_next) if o.guard else torch.ones(len(batch))
    (-(batch.advantages * weight * density).mean()).backward()
    largest = max(float(p.grad.abs().max()) for p in trainer.policy.parameters)
    for p, grad in zip(trainer.policy.parameters, ours, strict=True):
        torch.testing.assert_close(grad, p.grad, atol=1e-4 * largest, rtol=1e-3)
    assert largest > 0


def test_groups_without_a_difference_are_left_out(tmp_path):
    (tmp_path / "reward.py").write_text(
        "import torch\ndef reward(images, prompts):\n"
        "    same = prompts[0].text\n"
        "    return torch.tensor([0.1 if p.text == same else float(i.mean()) for p, i in zip(prompts, images)])\n"
    )
    trainer = Trainer(grpo(tmp_path / "run", f"rewards={{mine='{tmp_path}/reward.py:reward'}}", "evaluate.rewards=[]"))
    drawn = trainer.walk.take(0, trainer.recipe.rollout.prompts)
    rollout, metrics = trainer.method.rollouts.sample(1, drawn, Phases(torch.device("cpu")))
    assert metrics["groups/without_variance"] == pytest.approx(1 / 3)
    assert rollout.kept.view(3, 4).any(1).tolist() == [False, True, True]


def test_where_nothing_is_left_no_weight_moves(tmp_path):
    (tmp_path / "reward.py").write_text("import torch\ndef reward(images, prompts):\n    return torch.ones(len(images))\n")
    trainer = Trainer(grpo(tmp_path / "run", "rollouts=1", f"rewards={{mine='{tmp_path}/reward.py:reward'}}", "evaluate.rewards=[]"))
    before = trainer.policy.state("current")
    trainer.run()
    assert all(torch.equal(before[name], value) for name, value in trainer.policy.state("current").items())
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[0]["skipped_updates"] == 2


def test_a_run_learns_counts_its_cost_and_resumes_to_the_bit(tmp_path):
    window = ["objective.window=sliding", "objective.window_size=2", "objective.window_every=1", "rollout.solver=dpm2"]
    whole = Trainer(grpo(tmp_path / "whole", *LONGER, *window))
    whole.run()
    records = read_lines(tmp_path / "whole" / "metrics.jsonl")
    assert [r["optimizer_step"] for r in records] == [2, 4, 6, 8] and all(r["loss"] == r["loss"] for r in records)
    # 12 images: 4 steps of the sampler, and 2 trained steps with backward and reference
    if all(r["groups/without_variance"] == 0 for r in records):
        assert records[0]["network_evaluations"] == 12 * 4 + 12 * 2 * 4
    first = Trainer(grpo(tmp_path / "parts", *window, "rollouts=2"))
    first.run()
    recipe = grpo(tmp_path / "parts", *LONGER, *window)
    second = Trainer(recipe, resume=tmp_path / "parts")
    second.run()
    for name, value in whole.policy.state("current").items():
        assert torch.equal(value, second.policy.state("current")[name])
    assert not torch.equal(value, torch.zeros_like(value))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("objective.clip_range=0", "objective.clip_range"),
        ("objective.eta=0", "objective.eta"),
        ("objective.span=[0, 9]", "objective.span: 0 to 9 does not lie within the rollout's 4 steps"),
        ("objective.span=[3, 3]", "objective.span"),
        ("objective.sde=cps objective.span=[0, 4]", "the last step of cps is deterministic"),
        ("objective.sde=cps objective.eta=1.5", "replaces the whole noise"),
        ("objective.window=random objective.window_size=4", "4 steps do not fit into the 3"),
        ("objective.beta=1.0", "belongs to objective.type = 'nft'"),
        ("rollout.images_per_prompt=1", "rollout.images_per_prompt"),
    ],
)
def test_what_it_cannot_do_is_said_when_the_recipe_is_read(tmp_path, override, said):
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        grpo(tmp_path / "run", *override.replace(", ", ",").split())
    assert not (tmp_path / "run").exists()


def test_the_clipped_loss_is_what_the_objective_computes_after_an_update(trainer):
    # one more look at the composition: a stored density that differs from the present one
    log_old, log_new = torch.tensor([-1.0, -1.0]), torch.tensor([-0.9, -1.1])
    advantages = torch.tensor([1.0, -1.0])
    assert torch.equal(grpo_loss(log_new, log_old, advantages, 1e-3), torch.tensor([-1.001, 0.999]))
