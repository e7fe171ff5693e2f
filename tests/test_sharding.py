"""A base that lies in parts on two ranks gives what a whole one does, whatever the shares, and holds up nobody."""

import pytest
import torch
from conftest import quick
from ranks import together
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from flowtilt import Trainer, checkpoint
from flowtilt.files import read_lines

UNEVEN = [
    "rollout.prompts=5",
    "rollout.images_per_prompt=3",
    "micro_batch=4",
    "evaluate.images=70",
    "evaluate.samples=3",
    "evaluate.steps=2",
]


def train(folder, *overrides):
    trainer = Trainer(quick(folder, *UNEVEN, *overrides))
    weight = next(iter(trainer.policy.model.blocks[0].parameters()))
    assert isinstance(weight, DTensor) == ("shard=base" in overrides)
    trainer.run()


def numbers(folder):
    return [
        {k: v for k, v in record.items() if "second" not in k and "time/" not in k and v is not None}
        for name in ("metrics.jsonl", "evaluations.jsonl")
        for record in read_lines(folder / name)
    ]


def test_it(tmp_path):
    done = together(2, train, tmp_path / "sharded", "steps=2", "shard=base", folder=tmp_path)
    assert done.codes == [0, 0], done.stderr[-3000:]
    done = together(2, train, tmp_path / "whole", "steps=2", folder=tmp_path)
    assert done.codes == [0, 0], done.stderr[-3000:]
    for a, b in zip(numbers(tmp_path / "sharded"), numbers(tmp_path / "whole")):
        print(a, "\n", b)
    assert 0
