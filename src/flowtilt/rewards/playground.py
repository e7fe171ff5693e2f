"""The playground's verifier as rewards."""

import torch
from torch import Tensor

from flowtilt.playground import verify
from flowtilt.prompts import Prompt
from flowtilt.rewards import RewardOutput


def playground(images: Tensor, prompts: list[Prompt]) -> RewardOutput:
    """Mean of the strict and the partial score, in [0, 1]: the strict one alone says too little about a bad image."""
    verdicts = verify.judge(images, prompts)
    scores = torch.tensor([(v.strict + v.partial) / 2 for v in verdicts])
    return RewardOutput(scores, ["; ".join(v.reasons) for v in verdicts])


def playground_strict(images: Tensor, prompts: list[Prompt]) -> RewardOutput:
    """1 where everything in the image is as the prompt says, else 0."""
    verdicts = verify.judge(images, prompts)
    return RewardOutput(torch.tensor([float(v.strict) for v in verdicts]), ["; ".join(v.reasons) for v in verdicts])


def playground_partial(images: Tensor, prompts: list[Prompt]) -> RewardOutput:
    """The share of the prompt's parts that are right, in [0, 1]."""
    verdicts = verify.judge(images, prompts)
    return RewardOutput(torch.tensor([v.partial for v in verdicts]), ["; ".join(v.reasons) for v in verdicts])
