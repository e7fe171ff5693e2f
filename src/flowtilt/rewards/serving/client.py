"""A reward that a `flowtilt serve-rewards` computes, on this machine or another."""

import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from flowtilt.errors import UserError
from flowtilt.io.threads import in_threads
from flowtilt.io.web import Refused, post_json
from flowtilt.prompts import Prompt
from flowtilt.rewards import RewardOutput, find_reward
from flowtilt.rewards.about import Facts, built_in
from flowtilt.rewards.serving.wire import KEY, KEY_HOST, key_for, key_from_environment, most_bytes, read_answer, request

log = logging.getLogger("flowtilt")
FIRST_ANSWER_SECONDS = 10.0
"""Seconds for which a server may be missing when a run starts."""


class RemoteReward:
    """Sends images as PNG, which rounds them to 8 bits, and returns what the server's reward says.

    Args:
        url: "http://host:port"; a path's last part is the reward's name.
        reward: what the server calls it.
        timeout: seconds for an answer; longer than the server takes for `workers` requests at a time.
        patience: seconds that a server may be away before it is an error; a killed one can be started again.
        images_per_request: at most.
        workers: requests at a time.

    Raises:
        UserError: there is no server, it has no such reward, or the key is wrong.
    """

    off_device = True

    def __init__(
        self, url: str, reward: str, *, timeout: float = 120.0, patience: float = 600.0, images_per_request: int = 32, workers: int = 4
    ):
        for name, value in {"timeout": timeout, "images_per_request": images_per_request, "workers": workers}.items():
            if value <= 0:
                raise UserError(f"rewards.{reward}: {name} must be more than 0, not {value}")
        self.url, self.reward = _parts(url, reward)
        self.timeout, self.patience = timeout, patience
        self.images_per_request, self.workers = images_per_request, workers
        self.version: dict[str, Any] = {}
        self._key = key_for(self.url)
        self._away = False
        about = built_in().get(self.reward, Facts())
        self.score_range, self.detail_ranges, self.reads_prompt = about.score_range, about.detail_ranges, about.reads_prompt
        self._own = _applies_of_class(find_reward(self.reward, self.reward)) if self.reward in built_in() else None
        self._find()

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> RewardOutput:
        """Scores [N] of images [N, 3, H, W] in [0, 1].

        Raises:
            UserError: the server stays away for `patience` seconds, or the reward fails there.
        """
        parts = [slice(start, start + self.images_per_request) for start in range(0, len(prompts), self.images_per_request)]
        outputs = in_threads([partial(self._ask, images[part], prompts[part]) for part in parts], self.workers)
        notes = [note for output in outputs for note in output.notes]
        names = dict.fromkeys(name for output in outputs for name in output.details)

        def joined(values: Iterable[Tensor]) -> Tensor:
            return torch.cat([torch.empty(0), *values])

        details = {name: joined(o.details.get(name, torch.full_like(o.scores, torch.nan)) for o in outputs) for name in names}
        return RewardOutput(joined(output.scores for output in outputs), notes, details)

    def applies(self, prompt: Prompt) -> str:
        """What the reward of that name says about the prompt, where it is a built-in one whose settings don't matter for it."""
        return self._own(prompt) if self._own else ""

    def _find(self) -> None:
        """Asks for no scores, which proves the server, the key and the reward's name."""
        body = request(self.reward, torch.empty(0), [])
        try:
            said = post_json(
                f"{self.url}/score", body, key=self._key, timeout=FIRST_ANSWER_SECONDS, patience=FIRST_ANSWER_SECONDS, most=most_bytes(0)
            )
            _, self.version = read_answer(said, 0)
        except Refused as error:
            unsent = error.status == 401 and not self._key and key_from_environment()
            why = f"; {KEY} was not sent, for {KEY_HOST} does not name this server" if unsent else ""
            raise UserError(f"rewards.{self.reward}: {error}{why}") from None
        except UserError as error:
            start = f"flowtilt serve-rewards --rewards {self.reward}"
            raise UserError(f"rewards.{self.reward}: no reward server at {self.url} ({error}); start one with: {start}") from None

    def _ask(self, images: Tensor, prompts: Sequence[Prompt]) -> RewardOutput:
        body = request(self.reward, images, prompts)
        said = post_json(
            f"{self.url}/score",
            body,
            key=self._key,
            timeout=self.timeout,
            patience=self.patience,
            most=most_bytes(len(prompts)),
            waiting=self._tell_once,
        )
        if self._away:
            self._away = False
            log.warning("%s answers again", self.url)
        output, self.version = read_answer(said, len(prompts))
        return output

    def _tell_once(self, line: str) -> None:
        if not self._away:
            self._away = True
            log.warning("%s", line)


def _applies_of_class(reward: Any) -> Callable[[Prompt], str] | None:
    """Its `applies` where that asks no instance; one with the server's settings is not known here."""
    return reward.applies if isinstance(inspect.getattr_static(reward, "applies", None), staticmethod) else None


def _parts(url: str, reward: str) -> tuple[str, str]:
    """The address without the reward's name, and the name."""
    try:
        split = urlsplit(url)
        wrong = not split.hostname or split.port == 0 or split.query or split.fragment
    except ValueError as error:
        raise UserError(f"rewards.{reward}: {url!r} is not an address: {error}") from None
    if wrong:
        raise UserError(f'rewards.{reward}: {url!r} is not the address of a server; write "http://host:8765"')
    above, _, name = split.path.strip("/").rpartition("/")
    return f"{split.scheme}://{split.netloc}{'/' if above else ''}{above}", name or reward
