"""Rewards: plain functions of images and prompts.

    def reward(images: Tensor[N, 3, H, W] in [0, 1], prompts: list[Prompt]) -> Tensor[N] | RewardOutput

NaN means "does not apply to this image". An exception is an error of the run, never a score of 0.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from flowtilt.errors import UserError
from flowtilt.prompts import Prompt

BUILT_IN = {
    "playground": "flowtilt.rewards.playground:playground",
    "playground_strict": "flowtilt.rewards.playground:playground_strict",
    "playground_partial": "flowtilt.rewards.playground:playground_partial",
}


@dataclass(frozen=True)
class RewardOutput:
    """Scores [N] and, where a reward can say why, one note an image ("" where all is well)."""

    scores: Tensor
    notes: Sequence[str] = ()


Reward = Callable[[Tensor, list[Prompt]], Tensor | RewardOutput]


def load_reward(name: str, source: str) -> Reward:
    """The function that `source` names: a built-in reward, or "path/to/file.py:function".

    Raises:
        UserError: there is no such reward, file or function, or importing the file fails.
    """
    target = BUILT_IN.get(source, source)
    place, colon, function = target.rpartition(":")
    if not colon:
        from difflib import get_close_matches

        near = get_close_matches(source, BUILT_IN, 1)
        hint = f"did you mean {near[0]!r}?" if near else f'built in are {", ".join(BUILT_IN)}; your own is "file.py:function"'
        raise UserError(f"rewards.{name}: no reward {source!r}; {hint}")
    if source in BUILT_IN:
        module = importlib.import_module(place)
    else:
        path = Path(place)
        if not path.is_file():
            raise UserError(f"rewards.{name}: no file {place}")
        spec = importlib.util.spec_from_file_location(f"flowtilt_reward_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise UserError(f"rewards.{name}: {place} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise UserError(f"rewards.{name}: importing {place} failed: {type(error).__name__}: {error}") from error
    found: Any = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"rewards.{name}: no function {function!r} in {place}")
    return cast(Reward, found)


@torch.no_grad()
def score(rewards: Mapping[str, Reward], images: Tensor, prompts: Sequence[Prompt]) -> tuple[dict[str, Tensor], list[str]]:
    """Scores [N] fp32 on the CPU of each reward, and one note an image, the first that any reward gives.

    Raises:
        UserError: a reward raises, or returns another shape or an infinity; names the reward and a prompt.
    """
    scores: dict[str, Tensor] = {}
    notes = [""] * len(prompts)
    for name, reward in rewards.items():
        try:
            output = reward(images, list(prompts))
        except Exception as error:
            cause = " ".join(str(error).split())
            raise UserError(
                f'reward {name} failed: {type(error).__name__}: {cause} (prompts from "{prompts[0].text}" on); nothing was scored'
            ) from error
        output = output if isinstance(output, RewardOutput) else RewardOutput(output)
        values = output.scores
        if not isinstance(values, Tensor) or values.shape != (len(prompts),):
            got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise UserError(f"reward {name}: returned {got}, want a tensor of shape [{len(prompts)}]")
        values = values.detach().float().cpu()
        if values.isinf().any():
            raise UserError(f'reward {name}: infinite for "{prompts[int(values.isinf().nonzero()[0])].text}"')
        if output.notes and len(output.notes) != len(prompts):
            raise UserError(f"reward {name}: returned {len(output.notes)} notes for {len(prompts)} images")
        scores[name] = values
        notes = [note or new for note, new in zip(notes, output.notes or notes, strict=True)]
    return scores, notes
