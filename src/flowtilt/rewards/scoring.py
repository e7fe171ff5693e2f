"""Calling rewards: images and prompts in, checked scores out."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flowtilt.errors import UserError
from flowtilt.io import user_code as sources
from flowtilt.io.containment import contained
from flowtilt.io.images import read_square
from flowtilt.io.user_errors import HINT, describe_error, hint, is_fault
from flowtilt.prompts import Prompt
from flowtilt.rewards.serving.answers import checked, details_of, notes_of, seed_of


@dataclass(frozen=True)
class RewardOutput:
    """Scores [N] and, where a reward can say why, one note per image ("" where all is well).

    Args:
        details: further scores [N] of the same judgement, by name; "strict" of a reward "mine" is reported as "mine/strict".
    """

    scores: Tensor
    notes: Sequence[str] = ()
    details: Mapping[str, Tensor] = field(default_factory=dict)


Reward = Callable[..., Tensor | RewardOutput]
"""Called with images [N, 3, H, W] and N prompts; one that has a parameter `sources` also with the source images [N, 3, H, W]."""


def sees_sources(reward: Callable[..., object]) -> bool:
    """Whether a reward compares an image with the source image of its edit: it has a parameter `sources`."""
    try:
        return "sources" in inspect.signature(reward).parameters
    except (TypeError, ValueError):
        return False


def sources_of(name: str, prompts: Sequence[Prompt], like: Tensor) -> Tensor:
    """The source images of N prompts, of the size and on the device of images [N, 3, H, W].

    Raises:
        UserError: a prompt has none, or its file can't be read.
    """
    for prompt in prompts:
        if not prompt.image:
            where = f"prompts {prompt.where}" if prompt.where else f'prompt "{prompt.text}"'
            raise UserError(f'reward {name}: reads source images, but {where} has none; name it in a column "image"')
    try:
        return torch.stack([read_square(prompt.image, like.shape[-1]) for prompt in prompts]).to(like.device)
    except UserError as error:
        raise UserError(f"reward {name}: source image {error}") from None


def modules_of(reward: Reward) -> tuple[nn.Module, ...]:
    """The models of a reward that may be elsewhere between two calls.

    Raises:
        UserError: its `modules` fail, or are no torch.nn.Module.
    """
    if isinstance(reward, nn.Module):
        return (reward,)
    whose = f"{type(reward).__name__}.modules"
    try:
        found = tuple(getattr(reward, "modules", ()))
    except UserError:
        raise
    except BaseException as error:
        if not is_fault(error):
            raise
        raise UserError(f"{whose} failed: {describe_error(error)} ({HINT})") from error
    if not all(isinstance(one, nn.Module) for one in found):
        raise UserError(f"{whose}: must be a tuple of torch.nn.Module, has {', '.join(type(one).__name__ for one in found)}")
    return found


def applies(reward: Reward, prompt: Prompt) -> str:
    """Why a reward can't judge images of this prompt; "" where it can.

    Raises:
        UserError: the reward's own `applies` fails, or does not return text.
    """
    ask = getattr(reward, "applies", None)
    if ask is None:
        return ""
    whose = getattr(ask, "__qualname__", "applies")
    try:
        if sources.is_ours(reward):
            why = ask(prompt)
        else:
            with contained(whose, path=sources.search_path(reward)):
                why = ask(prompt.copy())
    except UserError:
        raise
    except BaseException as error:
        if not is_fault(error):
            raise
        raise UserError(f'{whose} failed: {describe_error(error)} (prompt "{prompt.text}"; {HINT})') from error
    if not isinstance(why, str):
        raise UserError(f'{whose}: returned {why!r}, want why a prompt can\'t be judged, "" where it can (prompt "{prompt.text}")')
    return why


def applicable(prompts: Sequence[Prompt], rewards: Mapping[str, Reward]) -> tuple[dict[str, Reward], dict[str, str]]:
    """The rewards that can judge at least one of the prompts; the others with the first prompt's reason."""
    with contained("rewards"):
        why = {name: [applies(reward, prompt) for prompt in prompts] for name, reward in rewards.items()}
    able = {name: reward for name, reward in rewards.items() if not all(why[name])}
    return able, {name: why[name][0] for name in rewards if name not in able}


def _output(name: str, answer: Any) -> RewardOutput:
    """Any answer of a reward as a `RewardOutput`, not yet checked; of a dict "score" is the score and the rest are details."""
    if isinstance(answer, RewardOutput):
        return answer
    if not isinstance(answer, Mapping):
        return RewardOutput(answer)
    if "score" not in answer:
        keys = ", ".join(map(repr, answer)) or "nothing"
        raise UserError(f'reward {name}: returned a dict with {keys}, want a key "score" (other keys become details)')
    return RewardOutput(answer["score"], details={key: values for key, values in answer.items() if key != "score"})


@torch.no_grad()
def score(rewards: Mapping[str, Reward], images: Tensor, prompts: Sequence[Prompt]) -> tuple[dict[str, Tensor], list[str]]:
    """Scores [N] fp32 on the CPU of each reward and detail, and one note per image, the first that any reward gives.

    Raises:
        UserError: a reward raises, or returns what is no score for each image; names the reward and a prompt.
    """
    if not prompts:
        return {name: torch.empty(0) for name in rewards}, []
    scores: dict[str, Tensor] = {}
    notes = [""] * len(prompts)
    # 8 bits would make a number of a NaN, and a judge a score of it
    sums = images.flatten(1).sum(1).cpu()
    broken = ~sums.isfinite()
    for name, reward in rewards.items():
        seen = {"sources": sources_of(name, prompts, images)} if sees_sources(reward) else {}
        try:
            with contained(f"reward {name}", seed=seed_of(name, prompts, sums), path=sources.search_path(reward), slow=f"reward {name}"):
                ours = sources.is_ours(reward)
                output = reward(images if ours else images.clone(), [prompt if ours else prompt.copy() for prompt in prompts], **seen)
        except BaseException as error:
            if not is_fault(error):
                raise
            more = "; ".join(part for part in (f'prompts from "{prompts[0].text}" on', hint(error)) if part)
            raise UserError(f"reward {name} failed: {describe_error(error)} ({more}); nothing was scored") from error
        output = _output(name, output)
        for column, values in {name: output.scores, **details_of(name, output.details)}.items():
            scores[column] = checked(column, values, prompts).masked_fill(broken, torch.nan)
        notes = [note or new for note, new in zip(notes, notes_of(name, output.notes, len(prompts)), strict=True)]
    return scores, ["the image is not finite" if bad else note for note, bad in zip(notes, broken.tolist(), strict=True)]
