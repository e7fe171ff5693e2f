"""What every judge over HTTP has: a client, a budget, answers that are kept, and a share of answers that may be unreadable."""

import logging
import math
import os
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from flowtilt.errors import UserError
from flowtilt.io.threads import in_threads
from flowtilt.rewards.about import Facts
from flowtilt.rewards.about.judge import check_service
from flowtilt.rewards.judge.budget import Budget, Limits
from flowtilt.rewards.judge.client import Client, quoted
from flowtilt.rewards.judge.reading import Answer
from flowtilt.rewards.judge.wording import Part, picture

log = logging.getLogger("flowtilt")
URL = "FLOWTILT_JUDGE_URL"
"""Environment variable of the server where the recipe names none, as on a command line."""
RECENT, FEWEST = 200, 10
"""Answers over which the unreadable share is taken: the last so many, once there are so many."""
SHOWN = 5
"""Unreadable answers whose text is logged."""


class Asking:
    """A reward that asks a model on a server. A subclass says what, in `__call__`.

    Args:
        name: what the recipe calls it.
        url: the server's address up to "/v1", of OpenAI's chat completions; "" takes FLOWTILT_JUDGE_URL.
        model: the name under which it has the model; "" takes the only one.
        logprobs: "auto", "need" or "off"; see `Client`.
        picture: "png" or "jpeg".
        side: pixels of a picture's longer side at most; 0 keeps it.
        length: tokens of an answer without log-probabilities.
        workers: requests at a time, of each process.
        timeout: seconds for one try.
        patience: seconds for which a failed request is tried again.
        max_missing: share of the last 200 answers that may be unreadable.
        max_calls, max_tokens, max_cost: the budget of a run; 0 is no limit.
        price_in, price_out: of a million tokens, for `max_cost` and reports.

    Raises:
        UserError: an option makes no sense, or the server can't be used; see `Client.start`.
    """

    off_device = True

    def __init__(
        self,
        name: str,
        url: str,
        model: str,
        *,
        facts: Facts,
        logprobs: str,
        picture: str,
        side: int,
        length: int,
        workers: int,
        timeout: float,
        patience: float,
        max_missing: float,
        max_calls: int,
        max_tokens: int,
        max_cost: float,
        price_in: float,
        price_out: float,
    ):
        url = url or os.environ.get(URL, "")
        service = {"url": url, "model": model, "logprobs": logprobs, "picture": picture, "workers": workers, "timeout": timeout}
        limits = {"max_calls": max_calls, "max_tokens": max_tokens, "max_cost": max_cost, "price_in": price_in, "price_out": price_out}
        check_service(name, {**service, **limits, "length": length, "side": side, "patience": patience, "max_missing": max_missing})
        if not url:
            raise UserError(f'rewards.{name}: url is missing; set it to the server, as in url = "http://127.0.0.1:8000/v1", or set {URL}')
        self.name, self.facts = name, facts
        self.budget = Budget(name, Limits(**limits))
        self.client = Client(name, url, model, logprobs=logprobs, length=length, timeout=timeout, patience=patience, budget=self.budget)
        self._form, self._side, self._workers, self._max_missing = picture, side, workers, max_missing
        self._readable: deque[bool] = deque(maxlen=RECENT)
        self._logged = 0
        self.client.start()
        self.version = {"model": self.client.model, "logprobs": self.client.gives_logprobs}

    def opened(self, folder: Path, rank: int, size: int) -> None:
        """A run or an evaluation of `size` processes keeps the answers in `folder`, and its budget counts those that are there."""
        self.budget.begin(self.client.kept.open(folder, rank), size)

    def picture_of(self, image: Image.Image) -> Part:
        """An image as a part of a message."""
        return picture(image, self._form, self._side)

    def ask_all(
        self, messages: Sequence[Callable[[], Sequence[Part]]], read: Sequence[Callable[[Answer], float]]
    ) -> tuple[list[float], list[str]]:
        """The numbers read from the answers to messages, NaN where one can't be read, and a note for each of these.

        Args:
            messages: each makes its parts when its turn has come, so that pictures need no memory before.
            read: the number that an answer says.

        Raises:
            UserError: see `Client.ask`; or too many answers can't be read.
        """
        answers = in_threads([partial(self._ask, message) for message in messages], self._workers)
        values = [reader(answer) for reader, answer in zip(read, answers, strict=True)]
        notes = [
            f"{_fault(answer)} {quoted(answer.text)}" if math.isnan(value) else "" for value, answer in zip(values, answers, strict=True)
        ]
        for value, answer in zip(values, answers, strict=True):
            self._readable.append(not math.isnan(value))
            if math.isnan(value) and self._logged < SHOWN:
                self._logged += 1
                log.warning("rewards.%s: an %s counts as missing: %s", self.name, _fault(answer), quoted(answer.text, 300))
        lost = self._readable.count(False)
        if len(self._readable) >= FEWEST and lost > self._max_missing * len(self._readable):
            example = next((note for note in reversed(notes) if note), "")
            raise UserError(
                f"rewards.{self.name}: {lost} of the last {len(self._readable)} answers of {self.client.model!r} can't be read, more than "
                f"max_missing = {self._max_missing:g}{'; the newest: ' + example if example else ''}; change what is asked, or the model"
            )
        return values, notes

    def _ask(self, message: Callable[[], Sequence[Part]]) -> Answer:
        return self.client.ask(message())


def _fault(answer: Answer) -> str:
    return "answer without log-probabilities" if answer.first == () else "unreadable answer"
