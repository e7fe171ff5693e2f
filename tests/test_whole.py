"""`train = "full"`: all weights in roles, resumed to the bit, exported as a pipeline, sampled and evaluated as in training."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import quick
from ranks import together
from reading import from_pretrained
from safetensors.torch import load_file
from test_trainer import rewards

from flowtilt import Trainer, UserError, load_recipe
from flowtilt.cli.train import report
from flowtilt.evaluate.assess import assess
from flowtilt.evaluate.side_by_side import sample
from flowtilt.io.files import read_lines
from flowtilt.lora.read import read_lora
from flowtilt.models.opening import load_pipeline
from flowtilt.models.sd3 import SD3
from flowtilt.policy.roles import ROLES
from flowtilt.policy.tuned import read_tuned
from flowtilt.policy.whole import WEIGHTS, WholePolicy
from flowtilt.runs.export import export
from flowtilt.runs.folder import open_run

FULL = ["train=full", "optimizer.lr=1e-3", "model.dtype=float32"]
TEXTS = ["a red circle", "two crosses"]


def model(dtype="float32"):
    return SD3(load_pipeline("playground", revision=None, dtype=dtype, device=torch.device("cpu")))


@pytest.fixture(scope="module")
def inputs():
    return torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.9])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full") / "run"
    Trainer(quick(folder, *FULL, "checkpoint.keep=2")).run()
    return folder


def velocity(policy, role, inputs):
    return policy.velocity(role, *inputs, policy.model.encode(TEXTS))


# the policy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_role_begins_as_the_base_and_the_reference_stays(inputs, dtype):
    policy = WholePolicy(model(dtype))
    bare = model(dtype)
    with torch.no_grad():
        before = bare.velocity(inputs[0], inputs[1], bare.encode(TEXTS))
        assert all(torch.equal(velocity(policy, role, inputs), before) for role in (*ROLES, "reference", "teacher"))
        for weight in policy.parameters:
            weight += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        policy.changed()
        assert not torch.allclose(velocity(policy, "current", inputs), before, atol=1e-2)
        assert all(torch.equal(velocity(policy, role, inputs), before) for role in ("old", "ema", "reference"))
        policy.average("old", 0.0)
        assert policy.same_version("old", "current") and torch.equal(velocity(policy, "old", inputs), velocity(policy, "current", inputs))
    assert all(weight.dtype == torch.float32 for weight in policy.parameters)
    with pytest.raises(UserError, match="no role 'fake'"):
        velocity(policy, "fake", inputs)


def test_the_gradient_is_that_of_the_network_with_its_weights_trained(inputs):
    policy, plain = WholePolicy(model()), model()
    plain.network.requires_grad_(True)
    velocity(policy, "current", inputs).square().mean().backward()
    plain.velocity(inputs[0], inputs[1], plain.encode(TEXTS)).square().mean().backward()
    theirs = {name: x.grad for name, x in plain.network.named_parameters()}
    assert len(theirs) == len(policy.parameters)
    for name, weight in policy._weights["current"].items():
        if theirs[name] is None:  # the last block's captions, which nothing reads
            assert weight.grad is None or not weight.grad.any()
        else:
            torch.testing.assert_close(weight.grad, theirs[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputed_activations_change_no_bit(inputs, dtype):
    found = []
    for recompute in (False, True):
        policy = WholePolicy(model(dtype))
        policy.recompute(recompute)
        velocity(policy, "current", inputs).square().mean().backward()
        found.append([weight.grad for weight in policy.parameters])
    for one, two in zip(*found, strict=True):
        assert (one is None) == (two is None) and (one is None or torch.equal(one, two))


def test_a_step_too_small_for_half_precision_is_kept():
    policy = WholePolicy(model("bfloat16"))
    with torch.no_grad():
        before = policy.parameters[0].clone()
        policy.parameters[0] *= 1 + 1e-4
    assert (policy.parameters[0] != before).any()
    assert torch.equal(policy.parameters[0].to(torch.bfloat16), before.to(torch.bfloat16))


# a run -----------------------------------------------------------------------------------------------


def test_a_run_learns_and_stores_whole_weights(trained):
    names = load_file(trained / "transformer" / WEIGHTS).keys()
    states = {role: load_file(trained / "checkpoints" / "step-000002" / f"{role}.safetensors") for role in ROLES}
    assert all(state.keys() <= names and all(x.dtype == torch.float32 for x in state.values()) for state in states.values())
    assert any(not torch.equal(x, states["ema"][name]) for name, x in states["current"].items())
    assert not (trained / "lora").exists()
    metrics = read_lines(trained / "metrics.jsonl")
    assert all(line["grad_norm"] > 0 for line in metrics) and metrics[-1]["deviation"] > 0


def test_a_run_that_goes_on_has_the_same_bits(trained, tmp_path):
    Trainer(quick(tmp_path / "run", *FULL, "rollouts=1", "evaluate.every=0")).run()
    Trainer(open_run(tmp_path / "run", ["rollouts=2"]), resume=tmp_path / "run").run()
    whole, resumed = (folder / "checkpoints" / "step-000002" for folder in (trained, tmp_path / "run"))
    for file in sorted(whole.glob("*.safetensors")):
        one, two = load_file(file), load_file(resumed / file.name)
        assert one.keys() == two.keys() and all(torch.equal(x, two[name]) for name, x in one.items()), file.name


def test_the_result_opens_in_stock_diffusers_and_draws_what_evaluation_draws(trained, tmp_path):
    line = export([trained], tmp_path / "out")
    assert "DiffusionPipeline.from_pretrained" in line and str(tmp_path / "out") in line
    exported = from_pretrained(tmp_path / "out", dtype=torch.float32)
    ema = load_file(trained / "checkpoints" / "step-000002" / "ema.safetensors")
    own = exported.transformer.state_dict()
    assert all(torch.equal(own[name], x) for name, x in ema.items())
    snippet = (trained / "transformer" / "README.md").read_text()
    assert "All weights of the network of" in snippet and "LoRA" not in snippet.split("```")[2]
    scope = {}
    exec(snippet.split("```python\n")[1].partition("# the noise levels")[0], scope)
    assert torch.equal(scope["pipe"].transformer.state_dict()["proj_out.weight"], own["proj_out.weight"])
    # of a checkpoint, too
    export([trained / "checkpoints" / "step-000002"], tmp_path / "checkpoint", "pipeline")
    assert torch.equal(load_file(tmp_path / "checkpoint" / "transformer" / WEIGHTS)["proj_out.weight"], own["proj_out.weight"])


def test_evaluate_gives_the_runs_own_score_again_and_compares_with_the_base(trained, tmp_path):
    found = assess(tmp_path / "out", loras=[trained], compare_base=True)
    record = read_lines(trained / "evaluations.jsonl")[-1]
    results = json.loads(json.dumps(found))
    scores = [line["scores"]["light"] for line in read_lines(tmp_path / "out" / "scores.jsonl") if line["variant"] == "tuned"]
    assert sum(scores) / len(scores) == pytest.approx(record["rewards"]["light"], abs=1e-6)
    assert results["protocol"]["weights"]["path"] == str(trained / "transformer" / WEIGHTS)
    assert "with run" in (tmp_path / "out" / "report.html").read_text()


def test_sample_takes_the_run_and_a_checkpoint(trained, tmp_path):
    pictures = [
        sample(["a red circle"], tmp_path / f"{k}.png", loras=[place], steps=2).read_bytes()
        for k, place in enumerate((trained, trained / "checkpoints" / "step-000002"))
    ]
    assert (
        pictures[0]
        == pictures[1]
        != sample(["a red circle"], tmp_path / "x.png", loras=[trained / "checkpoints" / "step-000001"], steps=2).read_bytes()
    )


# ranks -----------------------------------------------------------------------------------------------


def test_two_ranks_give_the_same_rewards_and_gradients(trained, tmp_path):
    done = together(2, _train, tmp_path / "run", folder=tmp_path / "ranks")
    assert done.codes == [0, 0], done.stderr[-2000:]
    for name in ("grad_norm", "loss", "deviation"):
        ours, theirs = ([line[name] for line in read_lines(folder / "metrics.jsonl")] for folder in (tmp_path / "run", trained))
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-12)
    assert rewards(tmp_path / "run") == pytest.approx(rewards(trained), abs=1e-6)
    for name, x in load_file(trained / "transformer" / WEIGHTS).items():
        torch.testing.assert_close(load_file(tmp_path / "run" / "transformer" / WEIGHTS)[name], x, atol=2e-3, rtol=0)


def _train(folder):
    Trainer(quick(folder, *FULL)).run()


SPREAD = [*FULL, "shard=weights", "micro_batch=5", "rollout.images_per_prompt=3", "objective.kl=0.1", "evaluate.every=1"]


def _train_spread(folder):
    """9 images in parts and whole, 4 and 5 of them on a rank; then a run that goes on."""
    Trainer(quick(folder / "whole", *SPREAD, "shard=none")).run()
    trainer = Trainer(quick(folder / "parts", *SPREAD))
    assert sum(x.numel() for x in trainer.policy.parameters) < 0.6 * sum(x.numel() for x in trainer.policy.model.network.parameters())
    trainer.run()
    Trainer(quick(folder / "half", *SPREAD, "rollouts=1")).run()
    Trainer(open_run(folder / "half", ["rollouts=2"]), resume=folder / "half").run()


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spread")
    done = together(2, _train_spread, folder, folder=folder / "ranks")
    assert done.codes == [0, 0], done.stderr[-3000:]
    return folder


def test_weights_in_parts_give_the_gradients_and_scores_of_whole_ones(spread):
    for name in ("grad_norm", "loss", "kl", "deviation"):
        ours, theirs = ([line[name] for line in read_lines(spread / run / "metrics.jsonl")] for run in ("parts", "whole"))
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-9)
    ours, theirs = ([line["score"] for line in read_lines(spread / run / "evaluations.jsonl")] for run in ("parts", "whole"))
    assert ours == pytest.approx(theirs, abs=1e-3)
    whole, own = (load_file(spread / run / "transformer" / WEIGHTS) for run in ("whole", "parts"))
    assert whole.keys() == own.keys()
    for name, x in whole.items():
        torch.testing.assert_close(own[name], x, atol=2e-3, rtol=0)  # AdamW's first steps have the size of lr, whatever the gradient


def test_weights_in_parts_go_on_to_the_same_bits_and_on_one_rank(spread, tmp_path):
    files = [sorted((spread / run / "checkpoints" / "step-000002").glob("*.safetensors")) for run in ("parts", "half")]
    for one, two in zip(*files, strict=True):
        ours, theirs = load_file(one), load_file(two)
        assert ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items()), one.name
    folder = shutil.copytree(spread / "half", tmp_path / "run")
    Trainer(open_run(folder, ["rollouts=3", "shard=none"]), resume=folder).run()
    assert len(rewards(folder)) == 3
    assert "DiffusionPipeline" in export([spread / "parts"], tmp_path / "out")


def _sum_large(file):
    from flowtilt.distributed import world

    world.LARGE = 8
    here = world.start()
    tensors = [torch.full((3, 5), 1.0 + here.rank), torch.full((2,), 10.0 * (1 + here.rank)), torch.ones(4, 3).mT]
    here.sum_(tensors)
    assert [float(x.mean()) for x in tensors] == [3.0, 30.0, 2.0] and all((x == x.flatten()[0]).all() for x in tensors)
    Path(f"{file}{here.rank}").touch()


def test_large_tensors_are_summed_in_place(tmp_path):
    done = together(2, _sum_large, tmp_path / "done", folder=tmp_path / "ranks")
    assert done.codes == [0, 0], done.stderr[-2000:]
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()


# what does not go ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["lora.rank=8"], "lora.rank: there is no LoRA"),
        (['lora.on=["x"]'], "lora.on: there is no LoRA"),
        (["shard=base", "micro_batch=4"], 'shard: "base" spreads a frozen base'),
        (["shard=weights"], "micro_batch: a sharded base needs a number"),
        (["train=half"], "train"),
    ],
)
def test_keys_that_make_no_sense_are_refused(overrides, said):
    with pytest.raises(UserError) as caught:
        load_recipe("playground", ["train=full", *overrides])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_few_step_methods_train_loras(tmp_path):
    with pytest.raises(UserError, match="trains LoRAs alone"):
        load_recipe("playground-rtdmd-cold", ["train=full"])


def test_a_run_of_all_weights_is_no_lora(trained, tmp_path):
    with pytest.raises(UserError, match='train = "full" has all weights and no LoRA'):
        read_lora(trained)
    with pytest.raises(UserError, match="write it with --to pipeline"):
        export([trained], tmp_path / "out", "peft")
    with pytest.raises(UserError, match="stands alone"):
        read_tuned([trained, trained])
    with pytest.raises(UserError, match="belong to another base"):
        export([trained], tmp_path / "out", model="playground")
    assert not (tmp_path / "out").exists()
    copy = shutil.copytree(trained, tmp_path / "copy")
    (copy / "transformer" / WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        read_tuned([copy]).on(model())
    shutil.rmtree(copy / "transformer")
    with pytest.raises(UserError, match="no weights there"):
        read_tuned([copy])


def test_the_last_line_of_a_run_says_where_the_network_is(trained, capsys):
    report(load_recipe(trained / "recipe.toml", stored=True), json.loads((trained / "summary.json").read_text()), trained)
    assert f"network {trained / 'transformer'}" in capsys.readouterr().out
