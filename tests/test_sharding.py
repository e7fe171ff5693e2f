"""A base that lies in parts on two ranks gives what a whole one does, whatever the shares, and holds up nobody."""

import shutil

import pytest
import torch
from conftest import quick
from ranks import together
from safetensors.torch import load_file
from test_trainer import rewards, weights
from torch.distributed.tensor import DTensor

from flowtilt import Trainer, UserError
from flowtilt.config import load_recipe
from flowtilt.io.files import read_lines
from flowtilt.policy.roles import ROLES
from flowtilt.runs.folder import open_run

# 5 prompts of 3 images on 2 ranks are 7 and 8 images, an optimizer step's share of them is anything; 35 images are 2 blocks
UNEVEN = [
    "rollout.prompts=5",
    "rollout.images_per_prompt=3",
    "micro_batch=4",
    "evaluate.images=35",
    "evaluate.samples=3",
    "evaluate.steps=1",
    "evaluate.every=1",
    "rollout.steps=2",
    "optimizer.steps_per_rollout=3",
]
FEWER = ["rollouts=1", "rollout.prompts=3", "evaluate.images=2"]
CASES = {
    "plain": ["rollouts=2"],
    "recomputed": [*FEWER, "model.recompute=true", "objective.type=grpo", "rollout.solver=euler"],
    "guided": [*FEWER, "rollout.guidance=2", "model.dtype=bfloat16"],
}


def train_all(folder):
    """Every case with the base in parts and with a whole one, whose adapters are not merged either."""
    for name, overrides in CASES.items():
        trainer = Trainer(quick(folder / name, *UNEVEN, *overrides))
        trainer.policy.merge = False
        trainer.policy._adapt(True)
        trainer.run()
        first = ["rollouts=1"] if name == "plain" else []
        trainer = Trainer(quick(folder / f"{name}-sharded", *UNEVEN, *overrides, *first, "shard=base"))
        network = trainer.policy.model.network
        parts = [x for x in network.parameters() if isinstance(x, DTensor)]
        assert all(x.to_local().numel() < x.numel() for x in parts)
        assert {id(x) for x in network.parameters()} == {id(x) for x in (*parts, *trainer.policy.parameters)}
        trainer.run()
    folder = folder / "plain-sharded"
    Trainer(open_run(folder, ["rollouts=2"]), resume=folder).run()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    done = together(2, train_all, folder, folder=folder / "ranks")
    assert done.codes == [0, 0], done.stderr[-3000:]
    return folder


def told(run):
    return [
        {key: value for key, value in record.items() if "second" not in key and "time/" not in key}
        for name in ("metrics.jsonl", "evaluations.jsonl")
        for record in read_lines(run / name)
    ]


@pytest.mark.parametrize("case", CASES)
def test_metrics_gradients_and_weights_are_those_of_a_whole_base(trained, case):
    ours, theirs = trained / f"{case}-sharded", trained / case
    assert told(ours) == told(theirs)
    for role in ROLES:
        expected = weights(theirs, role)
        assert all(torch.equal(value, expected[name]) for name, value in weights(ours, role).items())


def test_the_pictures_are_those_of_a_whole_base(trained):
    ours, theirs = (sorted((trained / name / "samples").rglob("*.png")) for name in ("plain-sharded", "plain"))
    assert len(ours) == 9 and [a.read_bytes() for a in ours] == [b.read_bytes() for b in theirs]


def test_the_lora_is_written_whole_and_the_run_goes_on_without_sharding(trained, tmp_path):
    folder = shutil.copytree(trained / "plain-sharded", tmp_path / "run")
    lora = [load_file(trained / name / "lora" / "pytorch_lora_weights.safetensors") for name in ("plain-sharded", "plain")]
    assert lora[0].keys() == lora[1].keys() and all(torch.equal(value, lora[1][name]) for name, value in lora[0].items())
    Trainer(open_run(folder, ["rollouts=3", "shard=none"]), resume=folder).run()
    assert len(rewards(folder)) == 3


@pytest.mark.parametrize(
    ("overrides", "said"), [(["micro_batch=auto"], "micro_batch: a sharded base"), (["model.compile=true"], "model.compile: does not go")]
)
def test_what_would_leave_ranks_behind_is_refused(overrides, said):
    with pytest.raises(UserError, match=said):
        load_recipe("playground", ["shard=base", "micro_batch=4", *overrides])


def disagree(folder):
    trainer = Trainer(quick(folder, *UNEVEN, "shard=base"))
    policy, model = trainer.policy, trainer.policy.model
    x, given = torch.zeros(1, *model.latent_shape), model.encode(["a cross"])
    with torch.set_grad_enabled(trainer.world.rank == 0):
        policy.velocity("current", x, torch.tensor([0.5]), given)


def test_ranks_at_different_passes_end_with_an_error_and_do_not_hang(tmp_path):
    done = together(2, disagree, tmp_path / "run", folder=tmp_path / "ranks", within=60)
    assert done.codes == [1, 1] and done.stderr.count("ranks want different passes at once") >= 2
