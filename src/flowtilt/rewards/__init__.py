"""Rewards: functions of images and prompts.

    def reward(images: Tensor[N, 3, H, W] in [0, 1], prompts: list[Prompt]) -> Tensor[N] | RewardOutput

A class is built once, as `Class(device=…, **options)`, and its instance is called like a function. It may
have `applies(prompt) -> str`, which says why a prompt can't be judged, or "" where it can. A class whose
models may leave the device between two calls names them in `modules`, a tuple of torch.nn.Module; each call
computes where they are at that moment. What can be back-propagated has `differentiable`: `rewards.gradient`.
NaN means "has no score for this image". An exception is an error of the run, never a score of 0.
A reward that is not flowtilt's own gets copies of the images and prompts, and `usercode.contained` runs it.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from flowtilt.errors import UserError
from flowtilt.io import user_code as sources
from flowtilt.io.containment import contained
from flowtilt.io.user_errors import HINT, hint, is_fault, told
from flowtilt.prompts import Prompt
from flowtilt.rewards.serving.answers import checked, details_of, notes_of, seed_of

BUILT_IN = {
    "pickscore": "flowtilt.rewards.pickscore:PickScore",
    "clipscore": "flowtilt.rewards.clipscore:ClipScore",
    "hpsv2": "flowtilt.rewards.hpsv2:HPSv2",
    "aesthetic": "flowtilt.rewards.aesthetic:Aesthetic",
    "imagereward": "flowtilt.rewards.imagereward:ImageReward",
    "geneval": "flowtilt.rewards.geneval:GenEval",
    "ocr": "flowtilt.rewards.ocr:OCR",
    "unifiedreward": "flowtilt.rewards.unifiedreward:UnifiedReward",
    "jpeg_compressibility": "flowtilt.rewards.jpeg:compressibility",
    "jpeg_incompressibility": "flowtilt.rewards.jpeg:incompressibility",
    "playground": "flowtilt.rewards.playground:Playground",
    "playground_strict": "flowtilt.rewards.playground:PlaygroundStrict",
    "playground_partial": "flowtilt.rewards.playground:PlaygroundPartial",
    "playground_smooth": "flowtilt.rewards.playground:PlaygroundSmooth",
}
PAPER = ("geneval", "ocr", "pickscore", "clipscore", "hpsv2", "aesthetic", "imagereward", "unifiedreward")
"""The eight of DiffusionNFT's table, which `--rewards all` names."""


@dataclass(frozen=True)
class RewardOutput:
    """Scores [N] and, where a reward can say why, one note an image ("" where all is well).

    Args:
        details: further scores [N] of the same judgement, by name; "strict" of the reward "geneval" is
            reported as "geneval/strict".
    """

    scores: Tensor
    notes: Sequence[str] = ()
    details: Mapping[str, Tensor] = field(default_factory=dict)


Reward = Callable[[Tensor, list[Prompt]], Tensor | RewardOutput]


def load_reward(
    name: str,
    source: str,
    *,
    device: torch.device | str = "cpu",
    home: torch.device | str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Reward:
    """The reward that `source` names: a built-in one, "path/to/file.py:function", or a server's "http://host:port".

    Args:
        name: what the recipe calls it; a server is asked for the reward of this name.
        device: where its models go.
        home: where they wait instead, for a class that names them in `modules`.
        options: keywords for it.

    Raises:
        UserError: there is no such reward, file, function or option, importing the file fails, or weights are missing.
    """
    found = find_reward(name, source)
    options = dict(options or {})
    _check_options(name, found, options)
    if source.startswith(("http://", "https://")):
        return found(url=source, reward=name, **options)
    if inspect.isclass(found):
        build = cast(Callable[..., Reward], found)
        try:
            with contained(f"rewards.{name}", path=sources.search_path(found), slow=f"rewards.{name} to be built"):
                return build(device=torch.device(device if home is None or not _names_modules(found) else home), **options)
        except UserError:
            raise
        except BaseException as error:
            if not is_fault(error):
                raise
            raise UserError(f"rewards.{name}: building {source} failed: {told(error)} ({HINT})") from error
    return partial(found, **options) if options else found


def _names_modules(found: type) -> bool:
    """Whether a class says which models may leave the device; `nn.Module.modules` says something else."""
    return hasattr(found, "modules") and not issubclass(found, nn.Module)


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
        raise UserError(f"{whose} failed: {told(error)} ({HINT})") from error
    if not all(isinstance(one, nn.Module) for one in found):
        raise UserError(f"{whose}: must be a tuple of torch.nn.Module, has {', '.join(type(one).__name__ for one in found)}")
    return found


def find_reward(name: str, source: str) -> Any:
    """The function or class behind `source`, not yet built; see `load_reward`."""
    if source.startswith(("http://", "https://")):
        from flowtilt.rewards.serving.client import Served

        return Served
    target = BUILT_IN.get(source, source)
    place, colon, function = target.rpartition(":")
    if not colon:
        if sources.is_file(source):
            raise UserError(f"rewards.{name}: {sources.without_function(Path(source))}")
        near = get_close_matches(source, BUILT_IN, 1)
        rather = f"did you mean {near[0]!r}?" if near else f'built in are {", ".join(BUILT_IN)}; your own is "file.py:function"'
        raise UserError(f"rewards.{name}: no reward {source!r}; {rather}")
    if source in BUILT_IN:
        return getattr(importlib.import_module(place), function)
    return sources.from_file(f"rewards.{name}", source)


def _check_options(name: str, found: Any, options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(found).parameters
    known = [key for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY and key not in ("device", "url", "reward")]
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for key in options:
        if key not in known:
            near = get_close_matches(key, known, 1)
            rather = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}" if known else "it has no options"
            raise UserError(f"rewards.{name}: unknown option {key!r}; {rather}")


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
        raise UserError(f'{whose} failed: {told(error)} (prompt "{prompt.text}"; {HINT})') from error
    if not isinstance(why, str):
        raise UserError(f'{whose}: returned {why!r}, want why a prompt can\'t be judged, "" where it can (prompt "{prompt.text}")')
    return why


def applicable(prompts: Sequence[Prompt], rewards: Mapping[str, Reward]) -> tuple[dict[str, Reward], dict[str, str]]:
    """The rewards that can judge at least one of the prompts; the others with the first prompt's reason."""
    with contained("rewards"):
        why = {name: [applies(reward, prompt) for prompt in prompts] for name, reward in rewards.items()}
    able = {name: reward for name, reward in rewards.items() if not all(why[name])}
    return able, {name: why[name][0] for name in rewards if name not in able}


@torch.no_grad()
def score(rewards: Mapping[str, Reward], images: Tensor, prompts: Sequence[Prompt]) -> tuple[dict[str, Tensor], list[str]]:
    """Scores [N] fp32 on the CPU of each reward and detail, and one note an image, the first that any reward gives.

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
        try:
            with contained(f"reward {name}", seed=seed_of(name, prompts, sums), path=sources.search_path(reward), slow=f"reward {name}"):
                ours = sources.is_ours(reward)
                output = reward(images if ours else images.clone(), [prompt if ours else prompt.copy() for prompt in prompts])
        except BaseException as error:
            if not is_fault(error):
                raise
            more = "; ".join(part for part in (f'prompts from "{prompts[0].text}" on', hint(error)) if part)
            raise UserError(f"reward {name} failed: {told(error)} ({more}); nothing was scored") from error
        output = output if isinstance(output, RewardOutput) else RewardOutput(output)
        for column, values in {name: output.scores, **details_of(name, output.details)}.items():
            scores[column] = checked(column, values, prompts).masked_fill(broken, torch.nan)
        notes = [note or new for note, new in zip(notes, notes_of(name, output.notes, len(prompts)), strict=True)]
    return scores, ["the image is not finite" if bad else note for note, bad in zip(notes, broken.tolist(), strict=True)]
