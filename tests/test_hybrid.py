"""RTDMD's second stage: three gradients in one, each as written down, on LoRAs that lie beneath, wherever and however often it runs."""

import math
import shutil
from dataclasses import replace

import pytest
import torch
from few_steps import going_on, kept, largest, recorded, rl

from flowtilt import Trainer, UserError
from flowtilt.io.files import read_lines
from flowtilt.lora import fingerprint
from flowtilt.lora.read import read_lora
from flowtilt.lora.stacked import read_stack
from flowtilt.methods.rtdmd import RTDMDSettings
from flowtilt.models.opening import load_pipeline
from flowtilt.models.sd3 import SD3
from flowtilt.objectives.rtdmd import draw_renoise_times, kappa, subgrpo_steps
from flowtilt.plan.passes import passes_in_all
from flowtilt.playground import smooth
from flowtilt.policy.tuned_model import TunedModel
from flowtilt.runs import checkpoint
from flowtilt.runs.folder import open_run
from flowtilt.sampling.sampler import Sampler
from flowtilt.sampling.trajectory import Trajectory
from flowtilt.seeding import generator, noise, step_noise
from flowtilt.solvers import sde_step
from flowtilt.training.rtdmd.fake_score import Samples
from flowtilt.training.timing import Phases

CPU = torch.device("cpu")
N, K, S, ETA = 12, 4, 4, 0.9
STEP = 3


@pytest.fixture(scope="module")
def run(distilled, tmp_path_factory):
    """Two rollouts on it; tests only read it."""
    folder = tmp_path_factory.mktemp("runs") / "rl"
    Trainer(rl(folder, distilled)).run()
    return folder


@pytest.fixture(scope="module")
def trainer(run, tmp_path_factory):
    """It goes on, with weights that have moved; tests leave these as they are."""
    return going_on(run, tmp_path_factory.mktemp("runs") / "on")


@pytest.fixture(scope="module")
def rollout(trainer):
    drawn = trainer.walk.take((STEP - 1) * 3, 3)
    return trainer.method.rollouts.sample(STEP, drawn, Phases(CPU))[0]


@pytest.fixture(scope="module")
def sigmas(trainer):
    return trainer.policy.model.levels(S)


@pytest.fixture
def learn(trainer, rollout, monkeypatch):
    """The gradients that the learner makes of the rollout, with other settings and another rollout where they are given."""

    def learnt(changed=None, fake=True, updates=1, **settings):
        learner = trainer.method.learner
        optimizer = trainer.recipe.optimizer.model_copy(update={"steps_per_rollout": updates})
        with monkeypatch.context() as here:
            here.setattr(learner, "settings", learner.settings.model_copy(update=settings))
            here.setattr(learner, "recipe", trainer.recipe.model_copy(update={"optimizer": optimizer}))
            if not fake:
                here.setattr(learner, "fake", None)
            found = recorded(here)
            learner.learn(STEP, changed or rollout, Phases(CPU))
        return found

    return learnt


def agree(ours, direct, within=2e-5):
    scale = largest(ours)
    assert scale > 0
    for a, b in zip(ours, direct, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, atol=within * scale, rtol=1e-3)


# what a run is -----------------------------------------------------------------------------------------


def test_it_costs_what_the_plan_says_and_its_ratio_is_1(distilled, run):
    # 4 steps; two trained steps and the last; the fake score's loss; beside the last it and the teacher, whom guidance asks twice
    step = N * (4 + 3 * 3 + 3 + 1 + 2)
    records = read_lines(run / "metrics.jsonl")
    assert [record["network_evaluations"] for record in records] == [step, 2 * step]
    assert passes_in_all(rl(run, distilled)).evaluations == 2 * step
    assert all(record["ratio_off"] == 0 and record["skipped_updates"] == 0 and record["grad_norm"] > 0 for record in records)
    for record in records:  # the same images, judged in the rollout and again where the gradient comes from
        assert record["backprop_reward"] == pytest.approx(record["reward/playground_smooth"], abs=1e-5)
    last = checkpoint.newest(run)
    assert last and last.state["optimizer_steps"] == {"current": 2, "fake": 2}


def test_with_several_updates_later_ones_look_anew_at_what_they_have_moved(distilled, tmp_path):
    recipe = rl(tmp_path / "run", distilled, "rollouts=1", "optimizer.steps_per_rollout=3", "objective.consistency=0.01", "micro_batch=5")
    Trainer(recipe).run()
    [record] = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert record["network_evaluations"] == passes_in_all(recipe).evaluations == N * (4 + 3 * 3 + 3 * 3 + 1 + 2) + 8
    assert 0 < record["ratio_off"] < 0.1 and record["optimizer_step"] == 3 and "fake_consistency" in record


def test_matching_of_0_leaves_the_fake_score_out(distilled, tmp_path):
    folder = tmp_path / "run"
    recipe = rl(folder, distilled, "rollouts=1", "objective.matching=0")
    trainer = Trainer(recipe)
    trainer.run()
    [record] = read_lines(folder / "metrics.jsonl")
    assert record["network_evaluations"] == passes_in_all(recipe).evaluations == N * (4 + 3 * 3)
    assert not {"fake_loss", "teacher_gap"} & record.keys() and record["grad_norm"] > 0
    assert trainer.policy.roles == ("current", "old", "ema") and list(trainer.method.updates) == ["current"]
    assert not (folder / "fake").exists() and [place.name for place in (folder / "on").iterdir()] == ["1"]


def test_it_goes_on_to_the_bit_though_the_distillation_went_on_in_the_meantime(distilled, run, tmp_path):
    moving, folder = tmp_path / "cold", tmp_path / "run"
    shutil.copytree(distilled, moving)
    Trainer(rl(folder, moving, "rollouts=1"))
    shutil.rmtree(folder / "on")  # as if killed before there were copies
    Trainer(open_run(folder, []), resume=folder).run()
    Trainer(open_run(moving, ["rollouts=3"]), resume=moving).run()
    assert fingerprint(read_lora(moving)) != fingerprint(read_lora(distilled))
    Trainer(open_run(folder, ["rollouts=2"]), resume=folder).run()
    assert kept(folder) == kept(run)
    assert [fingerprint(lora) for lora in read_stack([folder])] == [fingerprint(lora) for lora in read_stack([run])]
    shutil.rmtree(folder / "on")
    with pytest.raises(UserError, match="was trained on top of other LoRAs than those now in its on/"):
        Trainer(open_run(folder, ["rollouts=3"]), resume=folder)


def test_what_it_draws_anywhere_is_what_its_average_draws_here(run, distilled, trainer):
    loras = read_stack([run])
    assert [fingerprint(lora) for lora in loras[:-1]] == [fingerprint(read_lora(distilled))]
    assert read_lora(run / "fake").parents == (fingerprint(read_lora(distilled / "fake")),)
    stack = TunedModel(SD3(load_pipeline(trainer.recipe.model.path, revision=None, dtype="float32", device=CPU)), loras)
    places, shape = [(9, k) for k in range(3)], stack.model.latent_shape
    sampler, texts = Sampler("cps", S, eta=ETA), ["a red circle", "two crosses", "three green triangles"]
    drawn = [
        sampler(it, role, noise(0, "test", places, shape), it.model.encode(texts), 3, step_noise(0, "test", places, shape))
        for it, role in ((stack, "tuned"), (trainer.policy, "ema"), (trainer.policy, "reference"))
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_a_further_stage_goes_on_with_the_whole_fake_score(run, trainer, tmp_path):
    third = Trainer(rl(tmp_path / "third", run))
    x, t = noise(0, "test", [(0,), (1,)], third.policy.model.latent_shape), torch.tensor([0.3, 0.8])
    given = third.policy.model.encode(["a red circle", "two crosses"])
    with torch.no_grad():
        goes_on, ended = third.policy.velocity("fake", x, t, given), trainer.policy.velocity("fake", x, t, given)
        torch.testing.assert_close(goes_on, ended, atol=1e-5, rtol=1e-4)
        assert (ended - trainer.policy.velocity("teacher", x, t, given)).abs().max() > 1e-3
    third.close()
    again = Trainer(open_run(third.run_folder, []), resume=third.run_folder)
    assert torch.equal(again.policy.velocity("fake", x, t, given), third.policy.velocity("fake", x, t, given))
    torn = tmp_path / "torn"
    shutil.copytree(run, torn)
    shutil.rmtree(torn / "on" / "fake")
    with pytest.raises(UserError, match=r"objective.fake: .*on/fake"):
        Trainer(rl(tmp_path / "fourth", torn))
    assert not (tmp_path / "fourth").exists()


# rollouts ----------------------------------------------------------------------------------------------


def test_a_prompts_images_share_their_noise_in_steps_that_are_not_trained_and_only_there(rollout, sigmas):
    """Which noise it is says nothing of batch or rank: the rollout, the prompt, the step, and the copy where it is trained."""
    trained = subgrpo_steps(STEP - 1, S, 2, 0)
    shape = rollout.x0.shape[1:]
    assert len(trained) == 2 and rollout.path.means.shape[1] == S - 1
    for j in range(S - 1):
        std = float(sigmas[j + 1]) * math.sin(ETA * math.pi / 2)
        z = (rollout.path.states[:, j + 1] - rollout.path.means[:, j]) / std
        if j in trained:
            expected = noise(0, "sde", [(STEP, i // K, i % K, j) for i in range(N)], shape)
            assert len({one.numpy().tobytes() for one in expected}) == N
        else:
            expected = noise(0, "shared", [(STEP, i // K, j) for i in range(N)], shape)
            assert len({one.numpy().tobytes() for one in expected}) == N // K
        torch.testing.assert_close(z, expected, atol=2e-5, rtol=1e-4)


def test_the_last_step_is_the_prediction_of_the_image(trainer, rollout, sigmas):
    with torch.no_grad():
        v = trainer.policy.velocity("current", rollout.path.states[:, -1], sigmas[-2], rollout.conditioning)
    torch.testing.assert_close(rollout.x0, rollout.path.states[:, -1] - sigmas[-2] * v, atol=2e-5, rtol=1e-4)


# the gradients -----------------------------------------------------------------------------------------


def test_the_policy_gradient_is_reinforce(trainer, rollout, sigmas, learn):
    """dL / dv = 2 A rho kappa z / D at each trained step, over the rows of all images, of which the last step's are empty here."""
    policy = trainer.policy
    assert rollout.advantages.abs().max() > 0.1
    surrogates = []
    for j in subgrpo_steps(STEP - 1, S, 2, 0):
        v = policy.velocity("current", rollout.path.states[:, j], sigmas[j], rollout.conditioning)
        z = noise(0, "sde", [(STEP, i // K, i % K, j) for i in range(N)], v.shape[1:])
        rho = sigmas[j + 1] * math.sin(ETA * math.pi / 2)
        factor = 2 * rho * kappa(sigmas[j], sigmas[j + 1], ETA) / v[0].numel() * rollout.advantages.clamp(-5, 5)
        surrogates.append((factor.view(-1, 1, 1, 1) * z * v).sum() / (3 * N))
    direct = torch.autograd.grad(sum(surrogates), policy.parameters, allow_unused=True)
    [(role, ours, sums)] = learn(fake=False, backprop={})
    assert role == "current" and sums["ratio_off"] == 0
    agree(ours, direct, within=2e-4)


@pytest.mark.parametrize("margin", [None, 0.5])
def test_the_last_steps_gradient_is_that_of_its_whole_loss_in_one_graph(trainer, rollout, sigmas, learn, margin):
    """C4: AC-DMD's quadratic and the rewards of the decoded image, through student and decoder at once."""
    policy, o = trainer.policy, trainer.recipe.objective
    assert isinstance(o, RTDMDSettings)
    still = replace(rollout, advantages=torch.zeros(N))
    positions = [(STEP, 0, i // K, i % K) for i in range(N)]
    x, sigma = rollout.path.states[:, -1], sigmas[-2]
    x0 = x - sigma * policy.velocity("current", x, sigma, rollout.conditioning)
    g = direct_matching(policy, x0.detach(), positions, rollout.conditioning)
    reward = smooth.score(policy.model.decode(x0), rollout.prompts)
    if margin:
        assert 0 < (reward > margin).sum() < N
    pull = 0.5 * (x0 - (x0 - g).detach()).square().flatten(1).mean(1)
    loss = (o.matching * pull + o.backprop_scale * (-reward if margin is None else (margin - reward).relu())).sum() / (3 * N)
    direct = torch.autograd.grad(loss, policy.parameters, allow_unused=True)
    (_, (role, ours, sums)) = learn(still, margin=margin)
    assert role == "current" and sums["backprop_reward"] == pytest.approx(float(reward.detach().sum()), rel=1e-4)
    agree(ours, direct)


def direct_matching(policy, x0, positions, given):
    """g of AC-DMD at s = 0: t (v_teacher - v_fake) over mean |x0 - y_T|, y_T the teacher's prediction, per sample."""
    u = torch.cat([torch.rand(1, generator=generator(0, "match", *place)) for place in positions])
    n = torch.stack([torch.randn(2, *x0.shape[1:], generator=after_one(place))[0] for place in positions])
    t = draw_renoise_times(0.0, u)
    wide = t.view(-1, 1, 1, 1)
    x_t = (1 - wide) * x0 + wide * n
    with torch.no_grad():
        free = policy.velocity("teacher", x_t, t, policy.model.encode_negative().select(torch.zeros(len(t), dtype=torch.long)))
        teacher = free + 4.5 * (policy.velocity("teacher", x_t, t, given) - free)
        fake = policy.velocity("fake", x_t, t, given)
    off = (x0 - (x_t - wide * teacher)).abs().flatten(1).mean(1)
    return wide * (teacher - fake) / off.view(-1, 1, 1, 1)


def after_one(place):
    rng = generator(0, "match", *place)
    torch.rand(1, generator=rng)
    return rng


def test_the_fake_score_learns_finished_images_by_ordinary_flow_matching(trainer, rollout, learn):
    policy = trainer.policy
    places = [(STEP, 0, i // K, i % K) for i in range(N)]
    times, noises = [], []
    for place in places:
        rng = generator(0, "fake", *place)
        times.append(torch.rand(2, generator=rng)[0])
        noises.append(torch.randn(3, *rollout.x0.shape[1:], generator=rng)[0])
    t, n = 0.02 + 0.96 * torch.stack(times), torch.stack(noises)
    wide = t.view(-1, 1, 1, 1)
    v = policy.velocity("fake", (1 - wide) * rollout.x0 + wide * n, t, rollout.conditioning)
    loss = ((10 * t**2).clamp_max(1) * (v - (n - rollout.x0)).square().flatten(1).mean(1)).mean()
    direct = torch.autograd.grad(loss, list(policy._weights["fake"].values()), allow_unused=True)
    (role, ours, sums), _ = learn()
    assert role == "fake" and sums["fake_loss"] / N == pytest.approx(float(loss.detach()), rel=1e-4)
    agree(ours, direct)


def share(rollout, rank, ranks):
    """One rank's part of a rollout."""
    mine = range(N * rank // ranks, N * (rank + 1) // ranks)
    rows = torch.tensor(mine)
    path = Trajectory(*(x[rows] for x in (rollout.path.states, rollout.path.means, rollout.path.log_probs)), rollout.path.steps)
    own = [rollout.prompts[k] for k in mine]
    return replace(
        rollout,
        x0=rollout.x0[rows],
        advantages=rollout.advantages[rows],
        conditioning=rollout.conditioning.select(rows),
        path=path,
        indices=mine,
        prompts=own,
    )


@pytest.mark.parametrize(("ranks", "updates"), [(2, 1), (3, 6)])
def test_gradients_of_the_ranks_add_up_to_that_of_one_also_where_one_has_no_image(rollout, learn, ranks, updates):
    # six updates are of two images each, which three ranks cannot all have
    whole, *parts = (learn(one, updates=updates) for one in (rollout, *(share(rollout, rank, ranks) for rank in range(ranks))))
    assert [role for role, _, _ in whole] == ["fake", *["current"] * updates]
    for k, (_, gradient, sums) in enumerate(whole):
        agree(gradient, [sum(one) for one in zip(*(part[k][1] for part in parts), strict=True)])
        assert {name: sum(part[k][2][name] for part in parts) for name in sums} == pytest.approx(sums, rel=1e-3, abs=1e-4)


def test_the_micro_batch_is_a_matter_of_memory_only(trainer, learn, monkeypatch):
    whole = learn()
    monkeypatch.setattr(trainer.micro_batch, "_first", 5)
    for (_, ours, sums), (_, theirs, all_sums) in zip(learn(), whole, strict=True):
        agree(ours, theirs)
        assert sums == pytest.approx(all_sums, rel=1e-4, abs=1e-5)


def test_an_image_without_a_score_is_in_no_update_and_nothing_of_it_is_nan(rollout, learn):
    kept_ones, advantages = rollout.kept.clone(), rollout.advantages.clone()
    kept_ones[[1, 7]], advantages[[1, 7]] = False, torch.nan
    (_, fake, _), (_, gradient, sums) = learn(replace(rollout, kept=kept_ones, advantages=advantages))
    assert all(g.isfinite().all() for g in (*fake, *gradient)) and all(map(math.isfinite, sums.values()))
    (_, _, _), (_, _, all_sums) = learn()
    assert sums["backprop_reward"] < all_sums["backprop_reward"]


def test_later_updates_take_the_prediction_of_the_weights_as_they_are_then(trainer, rollout, sigmas, monkeypatch):
    """Where an update has moved the student, the last step is looked at from what it predicts now."""
    policy, learner = trainer.policy, trainer.method.learner
    seen = []

    def gradient(samples):
        seen.append(samples.x_s)
        return torch.zeros_like(samples.x_s), {}

    monkeypatch.setattr(learner.fake, "gradient", gradient)
    finished = Samples(rollout.x0, torch.zeros(N), rollout.conditioning, [(STEP, 0, i // K, i % K) for i in range(N)])
    own = torch.tensor([2, 5])
    state = policy.state("current")
    learner._last_step(rollout, rollout.path, finished, own)
    policy.load_state("current", {name: x + 0.01 for name, x in state.items()})
    learner._last_step(rollout, rollout.path, finished, own)
    with torch.no_grad():
        x = rollout.path.states[own, -1]
        now = x - sigmas[-2] * policy.velocity("current", x, sigmas[-2], rollout.conditioning.select(own))
    policy.load_state("current", state)
    assert policy.same_version("old", "current")
    assert torch.equal(seen[0], rollout.x0[own])
    torch.testing.assert_close(seen[1], now, atol=1e-6, rtol=1e-5)
    assert (seen[1] - seen[0]).abs().max() > 1e-3


def test_a_step_drawn_again_is_the_stored_one(trainer, rollout, sigmas):
    """The log-probability at sampling is that at training, where the weights are equal."""
    for j in range(S - 1):
        with torch.no_grad():
            v = trainer.policy.velocity("current", rollout.path.states[:, j], sigmas[j], rollout.conditioning)
        zero = torch.zeros_like(v)
        _, mean, _ = sde_step(rollout.path.states[:, j], v, sigmas[j], sigmas[j + 1], zero, "cps", ETA)
        torch.testing.assert_close(mean, rollout.path.means[:, j], atol=2e-5, rtol=1e-4)
