"""Distillation to a few steps: what it computes, which network learns from what, and that neither batches, ranks nor pauses matter."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from few_steps import cold, going_on, kept, largest, recorded

from flowtilt import Trainer
from flowtilt.distributed.world import World
from flowtilt.io.files import read_lines
from flowtilt.lora.read import read_lora
from flowtilt.objectives.rtdmd import draw_renoise_times
from flowtilt.plan.passes import passes_in_all
from flowtilt.runs import checkpoint
from flowtilt.runs.folder import open_run
from flowtilt.seeding import generator, noise
from flowtilt.solvers import sde_step
from flowtilt.training.timing import Phases

CPU = torch.device("cpu")
N, S, ETA = 5, 4, 0.9


@pytest.fixture(scope="module")
def trainer(distilled, tmp_path_factory):
    """It goes on, with weights that have moved; tests leave these as they are."""
    return going_on(distilled, tmp_path_factory.mktemp("runs") / "on", "evaluate.images=1")


@pytest.fixture
def simulated(trainer):
    """Where the student's samples of step 3 stopped, and the samples."""
    return trainer.method._simulated(3, 2, trainer.walk.take(0, N))


# what a run is -----------------------------------------------------------------------------------------


def test_it_costs_what_the_plan_says(distilled):
    # simulations of 1, 2, 3, 4, 1 steps, thrice; 3 passes for the fake score, twice; one for the student;
    # in its update the fake score once, the teacher with and without the caption
    step = 3 * 11 + 2 * N * 3 * 3 + N * 3 + N + 2 * N
    assert [record["network_evaluations"] for record in read_lines(distilled / "metrics.jsonl")] == [step, 2 * step]
    assert passes_in_all(cold(distilled)).evaluations == 2 * step


def test_it_logs_no_reward_and_no_guard_fires(distilled):
    record = read_lines(distilled / "metrics.jsonl")[-1]
    assert {"fake_loss", "fake_consistency", "fake_grad_norm", "teacher_gap", "grad_norm"} <= record.keys()
    assert record["skipped_updates"] == 0 and not any(name.startswith(("reward/", "images/", "loss")) for name in record)
    assert not read_lines(distilled / "guards.jsonl") and "This run trains on no reward" in (distilled / "report.html").read_text()
    last = checkpoint.newest(distilled)
    assert last and last.state["optimizer_steps"] == {"current": 2, "fake": 4}


def test_the_student_and_its_fake_score_are_loras_that_load(distilled):
    last = checkpoint.newest(distilled)
    for place, role in (("lora", "ema"), ("fake", "fake")):
        lora, weights = read_lora(distilled / place), last.tensors[role]
        # a file has alpha / rank, 2, in its B
        assert set(lora.alphas.values()) == {32.0} and not lora.parents and 2 * len(lora.layers) == len(weights)
        for name, (a, b) in lora.layers.items():
            assert torch.equal(a, weights[f"{name}.lora_A.weight"]) and torch.equal(b, 2 * weights[f"{name}.lora_B.weight"])
        assert any(weights[f"{name}.lora_B.weight"].any() for name in lora.layers)


def test_interrupted_and_gone_on_with_it_is_the_unbroken_run_to_the_bit(distilled, tmp_path):
    folder = tmp_path / "run"
    Trainer(cold(folder, "rollouts=1")).run()
    again = Trainer(open_run(folder, ["rollouts=2"]), resume=folder)
    assert again.clock.step == 1
    again.run()
    assert kept(folder) == kept(distilled)


# samples of the student --------------------------------------------------------------------------------


def test_every_level_is_stopped_at_equally_often_by_samples_that_change(trainer):
    sigmas, seen = trainer.policy.model.levels(S), set()
    for draw in range(3):
        stopped, samples = trainer.method._simulated(5, draw, trainer.walk.take(0, N))
        counts = Counter(samples.s.tolist())
        assert [counts[level] for level in sigmas[1:].tolist()] == [2, 1, 1, 1]
        before = {float(after): float(level) for level, after in pairwise(sigmas)}
        assert stopped.sigma.tolist() == [before[s] for s in samples.s.tolist()]
        seen.add(tuple(samples.s.tolist()))
    assert len(seen) == 3


def test_a_sample_is_the_students_own_way_step_by_step(trainer, simulated):
    """Each by itself, from its own noise; x_s is the state after its last step, with that step's noise in it."""
    stopped, samples = simulated
    sigmas, shape = trainer.policy.model.levels(S).tolist(), trainer.policy.model.latent_shape
    for k in range(N):
        position = (3, 2, k, 0)
        assert tuple(samples.positions[k]) == position
        x, given = noise(0, "distil", [position], shape), samples.conditioning.select(torch.tensor([k]))
        j = 0
        while True:
            before = x
            with torch.no_grad():
                v = trainer.policy.velocity("current", x, torch.tensor(sigmas[j]), given)
            x = sde_step(x, v, sigmas[j], sigmas[j + 1], noise(0, "distil step", [(*position, j)], shape), "cps", ETA)[0]
            j += 1
            if sigmas[j] == samples.s[k]:
                break
        torch.testing.assert_close(samples.x_s[k : k + 1], x, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(stopped.before[k : k + 1], before, atol=2e-5, rtol=1e-4)


def test_the_micro_batch_is_a_matter_of_memory_only(trainer, simulated, monkeypatch):
    method = trainer.method

    def gradients():
        found = recorded(monkeypatch)
        method._learn(*simulated, N, Phases(CPU))
        method.fake.learn(simulated[1], N, Phases(CPU))
        return found

    whole = gradients()
    monkeypatch.setattr(trainer.micro_batch, "_first", 5)
    _, samples = method._simulated(3, 2, trainer.walk.take(0, N))
    torch.testing.assert_close(samples.x_s, simulated[1].x_s, atol=1e-5, rtol=1e-5)
    assert torch.equal(samples.s, simulated[1].s)
    for (role, ours, sums), (other, theirs, all_sums) in zip(gradients(), whole, strict=True):
        assert role == other and sums == pytest.approx(all_sums, rel=1e-4, abs=1e-6)
        scale = largest(theirs)
        assert all(torch.allclose(a, b, atol=2e-5 * scale, rtol=1e-3) for a, b in zip(ours, theirs, strict=True)) and scale > 0


def test_gradients_of_the_ranks_add_up_to_that_of_one(trainer, monkeypatch):
    method, found, ranks = trainer.method, [], 3
    for world in (World(0, 1, CPU), *(World(rank, ranks, CPU) for rank in range(ranks))):
        monkeypatch.setattr(method, "world", world)
        found.append(recorded(monkeypatch))
        method.step(3, Phases(CPU))
    whole, *parts = found
    assert [role for role, _, _ in whole] == ["fake", "fake", "current"]
    for k, (_, gradient, sums) in enumerate(whole):
        scale = largest(gradient)
        for n, g in enumerate(gradient):
            torch.testing.assert_close(sum(part[k][1][n] for part in parts), g, atol=2e-5 * scale, rtol=1e-3)
        assert {name: sum(part[k][2][name] for part in parts) for name in sums} == pytest.approx(sums, rel=1e-4, abs=1e-5)


# who learns from what ----------------------------------------------------------------------------------


def test_the_student_is_asked_with_a_gradient_at_its_last_step_alone_and_the_teacher_never(trainer, monkeypatch):
    policy, asked = trainer.policy, Counter()
    velocity = policy.velocity

    def spy(role, x, t, given):
        asked[role, torch.is_grad_enabled()] += len(x)
        return velocity(role, x, t, given)

    monkeypatch.setattr(policy, "velocity", spy)
    updates = recorded(monkeypatch)
    trainer.method.step(3, Phases(CPU))
    assert asked == {
        ("current", False): 3 * 11,
        ("fake", True): 2 * 3 * N,
        ("fake", False): N,
        ("teacher", False): 2 * N,
        ("current", True): N,
    }
    assert all(largest(gradient) > 0 for _, gradient, _ in updates)


def test_the_students_gradient_is_that_of_the_papers_loss_through_its_last_step(trainer, simulated, monkeypatch):
    """C4: 1/2 mean (x_s - sg(x_s - g))^2, with x_s drawn anew in one graph."""
    stopped, samples = simulated
    policy, shape = trainer.policy, trainer.policy.model.latent_shape
    g, _ = trainer.method.fake.gradient(samples)
    sigmas = policy.model.levels(S).tolist()
    steps = [(*position, sigmas.index(level)) for position, level in zip(samples.positions, stopped.sigma.tolist(), strict=True)]
    v = policy.velocity("current", stopped.before, stopped.sigma, samples.conditioning)
    x_s = sde_step(stopped.before, v, stopped.sigma, stopped.s, noise(0, "distil step", steps, shape), "cps", ETA)[0]
    torch.testing.assert_close(x_s.detach(), samples.x_s, atol=2e-5, rtol=1e-4)
    direct = torch.autograd.grad(0.5 * (x_s - (x_s - g).detach()).square().mean(), policy.parameters, allow_unused=True)
    found = recorded(monkeypatch)
    trainer.method._learn(stopped, samples, N, Phases(CPU))
    [(role, ours, _)] = found
    assert role == "current"
    scale = largest(ours)
    for a, b in zip(ours, direct, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, atol=2e-5 * scale, rtol=1e-3)


def test_the_fake_scores_gradient_is_that_of_the_specified_loss(trainer, simulated, monkeypatch):
    """Each sample's target, weight and two looks ahead by the formulas of the specification, written out."""
    _, samples = simulated
    policy, span, consistency = trainer.policy, 0.2, 0.01
    losses = []
    for k, (x_s, s) in enumerate(zip(samples.x_s, samples.s.tolist(), strict=True)):
        rng = generator(0, "fake", *samples.positions[k])
        u, delta = torch.rand(2, generator=rng).tolist()
        n, z1, z2 = torch.randn(3, *x_s.shape, generator=rng)
        t = float(draw_renoise_times(s, torch.tensor([u])))
        a = (1 - t) / (1 - s)
        r = (t**2 - a**2 * s**2) ** 0.5
        target = -x_s / (1 - s) + (t + (1 - t) * s**2 / (1 - s) ** 2) / r * n
        given = samples.conditioning.select(torch.tensor([k]))

        def at(x, t, given=given):
            return policy.velocity("fake", x[None], torch.tensor([t]), given)[0]

        x_t = a * x_s + r * n
        v = at(x_t, t)
        later = max(t - span * (1 - delta), 0.0)
        ahead = [sde_step(x_t, v.detach(), t, later, z, "cps", ETA)[0] for z in (z1, z2)]
        h, h1, h2 = (x - time * (v if x is x_t else at(x, time)) for x, time in ((x_t, t), (ahead[0], later), (ahead[1], later)))
        losses.append(min(1, 10 * r**2) * (v - target).square().mean() + consistency * ((h1 - h) * (h2 - h)).mean())
    weights = list(policy._weights["fake"].values())
    direct = torch.autograd.grad(torch.stack(losses).mean(), weights, allow_unused=True)
    found = recorded(monkeypatch)
    trainer.method.fake.learn(samples, N, Phases(CPU))
    [(role, ours, _)] = found
    assert role == "fake"
    scale = largest(ours)
    for a, b in zip(ours, direct, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, atol=1e-4 * scale, rtol=1e-3)


def test_a_student_whose_fake_score_says_what_the_teacher_says_stays_where_it_is(tmp_path):
    """At the start, without guidance, both are the base."""
    trainer = Trainer(cold(tmp_path / "run", "objective.teacher_guidance=1"))
    before = trainer.policy.state("current")
    stopped, samples = trainer.method._simulated(1, 2, trainer.walk.take(0, N))
    metrics = trainer.method._learn(stopped, samples, N, Phases(CPU))
    assert metrics["grad_norm"] == 0 and metrics["teacher_gap"] == 0 and trainer.method.student.count == 1
    assert all(torch.equal(value, before[name]) for name, value in trainer.policy.state("current").items())
    trainer.method.fake.learn(samples, N, Phases(CPU))
    assert trainer.method._learn(stopped, samples, N, Phases(CPU))["grad_norm"] > 0


def test_the_normaliser_without_noise_scales_gradients_and_no_more(trainer, simulated, monkeypatch):
    fake, samples = trainer.method.fake, simulated[1]
    noisy, _ = fake.gradient(samples)
    monkeypatch.setattr(fake, "_settings", fake._settings.model_copy(update={"normaliser": "mean"}))
    plain, _ = fake.gradient(samples)
    ratio = (plain.flatten(1).norm(dim=1) / noisy.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    torch.testing.assert_close(plain, ratio * noisy, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(ratio.flatten()[samples.s == 0], torch.ones(1), atol=1e-5, rtol=0)
    assert (ratio.flatten()[samples.s > 0.4] > 1.1).all()


def test_a_fake_score_that_is_not_finite_is_left_out_counted_and_told(tmp_path, monkeypatch):
    trainer = Trainer(cold(tmp_path / "run", "rollouts=1"))
    loss = trainer.method.fake._loss

    def broken(samples):
        value, metrics = loss(samples)
        return value * float("nan"), metrics

    monkeypatch.setattr(trainer.method.fake, "_loss", broken)
    trainer.run()
    [record] = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert record["skipped_updates"] == 2 and record["fake_grad_norm"] is None and record["grad_norm"] > 0
    assert [fired["guard"] for fired in read_lines(tmp_path / "run" / "guards.jsonl")] == ["nan"]
    assert all(torch.isfinite(value).all() for role in trainer.policy.roles for value in trainer.policy.state(role).values())


def test_without_consistency_two_passes_in_three_are_saved(tmp_path):
    recipe = cold(tmp_path / "run", "rollouts=1", "objective.consistency=0")
    Trainer(recipe).run()
    [record] = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert "fake_consistency" not in record
    assert record["network_evaluations"] == passes_in_all(recipe).evaluations == 3 * 11 + 2 * N * 3 + N * 3 + N + 2 * N
