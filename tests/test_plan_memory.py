"""Memory of `flowtilt plan`: that of a real rollout on a CPU, and what follows from a GPU's size."""

import pytest
import torch
from conftest import quick

from flowtilt import Trainer, load_recipe
from flowtilt.models.captions import IN_MEMORY
from flowtilt.plan import Machine, make_plan
from flowtilt.plan.memory import CONTEXT, GIB, PROCESS
from flowtilt.plan.meter import measure
from flowtilt.plan.text import summary, table
from flowtilt.training.timing import Phases

FULL = ("sd35m", "sd35m-geneval", "sd35m-hpsv2", "sd35m-multireward", "sd35m-ocr", "sd35m-pickscore")
HALVED = [1152 >> k for k in range(11)]


def moved(recipe):
    """A trainer whose optimizer and old policy have what any update leaves them; no rollout is needed for that."""
    trainer = Trainer(recipe)
    learner = trainer.method.learner
    learner.update.clear()
    learner.update.step({}, Phases(torch.device("cpu")))
    learner.objective.after_rollout(trainer.policy, learner.update.count)
    return trainer


def phase(plan, name):
    return next(one for one in plan.phases if one.name == name)


# a run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_of_a_rollout_is_that_of_a_real_one_on_a_cpu(unread, tmp_path, dtype, recompute):
    overrides = [
        "objective.kl=0.1",
        "objective.times_per_image=4",
        "optimizer.steps_per_rollout=1",
        "rollout.prompts=3",
        "rollout.images_per_prompt=2",
        "evaluate.every=0",
        "rollout.steps=2",
    ]
    told = [f"model.dtype={dtype}", f"model.recompute={str(recompute).lower()}", "micro_batch=5"]
    recipe = quick(tmp_path / "run", *told, *overrides)
    trainer, found = moved(recipe), make_plan(recipe, Machine())
    drawn, scored = trainer.walk.take(3, 3), []
    drawing = measure(lambda: scored.append(trainer.method.rollouts.sample(2, drawn, Phases(torch.device("cpu")))))
    learning = measure(lambda: trainer.method.learner.learn(2, scored[0][0], Phases(torch.device("cpu"))))
    costs, decode, train = found.costs, phase(found, "decode"), phase(found, "train")
    # a CPU is the computer's memory, too: new captions are kept there, and of the GPU's residents the old policy's weights are made
    beside = 3 * costs.caption + costs.injected_weights
    assert drawing.peak == pytest.approx(decode.total - sum(found.resident.values()) + beside, rel=1e-3)
    # captions and latents are from before; noise is the computer's, and of the residents the gradient is made
    noise = 6 * 4 * costs.latent
    assert learning.peak == pytest.approx(train.activations + train.held["micro-batch"] + noise + costs.trained.bytes, rel=2e-3)
    assert found.recompute == recompute


def test_the_peak_of_training_guided_steps_is_that_of_a_real_one_on_a_cpu(tmp_path):
    overrides = ["objective.type=grpo", "objective.kl=0.1", "rollout.guidance=2.0", "optimizer.steps_per_rollout=1", "micro_batch=6"]
    recipe = quick(tmp_path / "run", "model.dtype=float32", "rollout.prompts=2", *overrides)
    trainer, found = moved(recipe), make_plan(recipe, Machine())
    scored, _ = trainer.method.rollouts.sample(2, trainer.walk.take(2, 2), Phases(torch.device("cpu")))
    learning = measure(lambda: trainer.method.learner.learn(2, scored, Phases(torch.device("cpu"))))
    train = phase(found, "train")
    inside = train.held["micro-batch"] + train.held["captions with the empty one"]
    assert learning.peak == pytest.approx(train.activations + inside + found.costs.trained.bytes, rel=5e-3)


def test_a_caption_is_held_once_however_many_images_share_it():
    for gpus, groups in ((1, 48), (5, 11), (8, 6), (1000, 1)):  # 1152 / 5 = 230.4 images begin and end within a group of 24
        found = make_plan(load_recipe("sd35m-geneval"), Machine(gpus=gpus))
        assert phase(found, "train").held["captions"] == groups * found.costs.caption


# a GPU's size -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FULL)
def test_the_published_geometry_fits_into_24_gib(name):
    recipe = load_recipe(name)
    assert (recipe.rollout.prompts, recipe.rollout.images_per_prompt, recipe.model.resolution) == (48, 24, 512)
    found = make_plan(recipe, Machine("4090"))
    assert found.fits and found.offload and not found.recompute and found.peak.total < 0.9 * 24 * GIB
    assert found.micro_batches["train"] >= 4 and found.micro_batches["sample"] >= 144 // (8 if name == "sd35m-ocr" else 1)
    assert "fits with micro-batches sample" in summary(found)


def test_micro_batches_fall_with_less_memory_each_for_itself():
    plans = [make_plan(load_recipe("sd35m", ["model.offload=true"]), Machine(memory=memory)) for memory in (141, 80, 48, 40, 24, 19)]
    for kind in ("sample", "decode", "train"):
        found = [one.micro_batches[kind] for one in plans]
        assert found == sorted(found, reverse=True) and set(found) <= set(HALVED) and len(set(found)) >= 4
    assert len(set(plans[0].micro_batches.values())) == 3
    for one in plans:
        assert one.fits and one.peak.total <= 0.9 * one.machine.gib * GIB
        assert phase(one, "train").activations == one.costs.train(True, one.recompute).at(one.micro_batches["train"]).peak


def test_what_does_not_fit_is_named():
    small = make_plan(load_recipe("sd35m"), Machine(memory=16))
    assert not small.fits and small.peak.name == "encode"  # the T5 and its network
    assert f"DOES NOT FIT: encode needs {small.peak.total / GIB:.1f} GiB" in summary(small)
    tiny = make_plan(load_recipe("sd35m"), Machine(memory=6))
    assert not tiny.fits and tiny.recompute and set(tiny.micro_batches.values()) == {1}


def test_activations_are_recomputed_before_fewer_than_four_rows_are_trained():
    def planned(*overrides):
        return make_plan(load_recipe("sd35m", ["model.offload=false", *overrides]), Machine("4090"))

    auto, never, always = planned(), planned("model.recompute=false"), planned("model.recompute=true")
    assert auto.fits and auto.recompute and auto.micro_batches == always.micro_batches  # the search begins anew
    assert never.fits and not never.recompute and never.micro_batches["train"] == 2
    assert always.fits and always.recompute and always.micro_batches["train"] > 8  # it starts with many
    assert "computes activations anew" in table(auto) and "computes activations anew" not in table(never)
    assert auto.work["train"].evaluations == never.work["train"].evaluations  # as a run counts them
    more = auto.work["train"].hours / never.work["train"].hours
    assert 1.15 < more < 1.3


def test_a_given_micro_batch_stays_and_is_recomputed_where_it_must_be():
    given = make_plan(load_recipe("sd35m", ["micro_batch=3"]), Machine())
    assert set(given.micro_batches.values()) == {3} and not given.recompute
    assert "micro-batches sample 3, decode 3, train 3 (given)" in table(given)
    larger = make_plan(load_recipe("sd35m", ["micro_batch=12"]), Machine("4090"))
    assert larger.fits and larger.recompute and larger.micro_batches["train"] == 12
    refused = make_plan(load_recipe("sd35m", ["micro_batch=12", "model.recompute=false"]), Machine("4090"))
    assert not refused.fits and refused.peak.name == "train"


def test_encoders_and_rewards_visit_a_small_gpu_one_kind_of_work_at_a_time():
    recipe = load_recipe("sd35m-multireward")
    auto = {gib: make_plan(recipe, Machine(memory=gib)).offload for gib in (24, 35.9, 40, 80)}
    assert auto == {24: True, 35.9: True, 40: False, 80: False}
    away, near = (make_plan(load_recipe("sd35m-multireward", [f"model.offload={word}"]), Machine()) for word in ("true", "false"))
    visitors = {"text encoders", "pickscore", "hpsv2", "clip-l"}
    assert set(near.resident) - set(away.resident) == visitors and set(away.resident) < set(near.resident)
    weights = {name.removeprefix("reward model "): found.bytes for name, found in near.weights.items()}
    assert sum(near.resident[name] for name in visitors) == sum(weights[name] for name in visitors)
    assert phase(away, "encode").held == {"text encoders": weights["text encoders"]}
    assert weights["pickscore"] in phase(away, "reward").held.values() and weights["clip-l"] not in phase(away, "reward").held.values()
    for name in ("sample", "decode", "train"):
        assert not visitors & set(phase(away, name).held)


def test_a_phase_is_the_sum_of_its_parts_and_more_gpus_hold_less():
    one, eight = (make_plan(load_recipe("sd35m-geneval"), Machine(gpus=gpus)) for gpus in (1, 8))
    for found in one.phases:
        assert found.total == pytest.approx(sum(one.resident.values()) + sum(found.held.values()) + found.activations)
    assert one.resident["CUDA context"] == CONTEXT
    assert one.resident["lora (current, old, ema)"] == 3 * one.weights["lora, rank 32"].bytes
    assert one.resident["as the network takes it (old, ema)"] == one.weights["lora, rank 32"].bytes  # two of them, in half the precision
    few, all_ = phase(eight, "decode").held, phase(one, "decode").held
    assert all(few[name] == pytest.approx(all_[name] / 8) for name in all_)


def test_host_memory_is_what_waits_there():
    small, large = (make_plan(load_recipe("sd35m-geneval"), machine) for machine in (Machine("4090"), Machine(gpus=8)))
    assert small.host == {
        "process": PROCESS,
        "captions": IN_MEMORY,
        "text encoders": small.weights["text encoders"].bytes,
        "reward models": sum(found.bytes for name, found in small.weights.items() if name.startswith("reward model")),
        "images": 2 * 1152 * 3 * 512 * 512 * 4,
    }
    assert f"host memory about {sum(small.host.values()) / GIB:.0f} GiB for each GPU's process" in table(small)
    assert set(large.host) == {"process", "captions", "the pipeline while it is loaded"}
    many = make_plan(load_recipe("sd35m-geneval", ["objective.times=stratified", "objective.times_per_image=100", "rollouts=1"]), Machine())
    assert many.host["noise of the training pairs"] == 1152 * 100 * 16 * 64 * 64 * 4
    assert many.host["captions"] == 48 * many.costs.caption


def test_a_plan_counts_all_weights():
    overrides = ["rewards.mine=jpeg_compressibility"]
    full = make_plan(load_recipe("sd35m", [*overrides, "train=full"]), Machine())
    number = full.weights["all weights, fp32"].number
    held = full.resident["weights (current, old, ema)"] + full.resident["gradient and AdamW"]
    assert 2.2e9 < number < full.weights["network"].number  # which counts the table of positions, too
    assert held == 6 * 4 * number
    assert full.resident["as the network takes it (old, ema)"] == 2 * 2 * number
    assert full.costs.train(False, True).fixed.saved >= 0.99 * 2 * number  # current's weights but biases, as the network takes them
    assert full.peak.total > held and not full.fits
    assert make_plan(load_recipe("sd35m", [*overrides, "train=full"]), Machine(memory=160)).fits
