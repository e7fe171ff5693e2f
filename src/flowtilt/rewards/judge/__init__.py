"""A vision-language model on any server of OpenAI's chat completions as a reward: it looks at the image and is asked.

mode         asked                                     score of an image
yes          ask, "Answer yes or no."                  P(yes) / (P(yes) + P(no)) of the first token
number       ask, "Answer with one number …"           that number, in [low, high]
questions    each question of the prompt's line        mean over questions of the probability of the right answer
pairs        two images of a prompt, in both orders    mean probability of being preferred, over the prompt's other images
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import permutations

import torch
from PIL import Image
from torch import Tensor

from flowtilt.errors import UserError
from flowtilt.io.images import to_pil
from flowtilt.prompts import Prompt
from flowtilt.rewards import RewardOutput
from flowtilt.rewards.about.judge import ASK, JUDGE, check
from flowtilt.rewards.judge import reading
from flowtilt.rewards.judge.asking import Asking
from flowtilt.rewards.judge.questions import Question, questions_of
from flowtilt.rewards.judge.reading import Answer
from flowtilt.rewards.judge.wording import Part, text, with_caption

__all__ = ["Judge", "of_questions"]


class Judge(Asking):
    """Scores by one of the `MODES`.

    Args:
        name: what the recipe calls it.
        mode: see the module.
        ask: the question, with {prompt} for the caption; of "questions", with {question}.
        low, high: of "number".
        mean: of "questions", "arithmetic" or "geometric"; both are details, too.

    Other Args and Raises: see `Asking`.
    """

    def __init__(
        self,
        *,
        name: str = "judge",
        url: str = "",
        model: str = "",
        mode: str = "yes",
        ask: str = "",
        low: float = 0.0,
        high: float = 10.0,
        mean: str = "arithmetic",
        logprobs: str = "auto",
        picture: str = "png",
        side: int = 0,
        length: int = 64,
        workers: int = 16,
        timeout: float = 120.0,
        patience: float = 600.0,
        max_missing: float = 0.2,
        max_calls: int = 0,
        max_tokens: int = 0,
        max_cost: float = 0.0,
        price_in: float = 0.0,
        price_out: float = 0.0,
    ):
        check(name, {"mode": mode, "ask": ask, "low": low, "high": high, "mean": mean})
        self._mode, self._ask_for, self._mean, self._low, self._high = mode, ask or ASK[mode], mean, low, high
        details = {"arithmetic": (0.0, 1.0), "geometric": (0.0, 1.0)} if mode == "questions" else {}
        bounds = (float(low), float(high)) if mode == "number" else (0.0, 1.0)
        super().__init__(
            name,
            url,
            model,
            facts=replace(JUDGE, score_range=bounds, detail_ranges=details, compares=mode == "pairs"),
            logprobs="off" if mode == "number" else logprobs,
            picture=picture,
            side=side,
            length=length,
            workers=workers,
            timeout=timeout,
            patience=patience,
            max_missing=max_missing,
            max_calls=max_calls,
            max_tokens=max_tokens,
            max_cost=max_cost,
            price_in=price_in,
            price_out=price_out,
        )

    def applies(self, prompt: Prompt) -> str:
        """Why a prompt's images can't be judged; "" where they can.

        Raises:
            UserError: its questions have a fault.
        """
        return "" if self._mode != "questions" or questions_of(prompt) else "no questions in its line of the prompt file"

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> RewardOutput:
        """Scores of images [N, 3, H, W] in [0, 1]; of "pairs", images of one prompt."""
        pictures = to_pil(images)
        if self._mode == "questions":
            return self._questions(pictures, prompts)
        if self._mode == "pairs":
            return self._pairs(pictures, prompts)
        ending = (
            "Answer yes or no." if self._mode == "yes" else f"Answer with one number from {self._low:g} to {self._high:g} and nothing else."
        )
        read: Callable[[Answer], float] = reading.yes if self._mode == "yes" else partial(reading.number, low=self._low, high=self._high)
        messages = [
            partial(self._about, [one], with_caption(self._ask_for, prompt.text), ending)
            for one, prompt in zip(pictures, prompts, strict=True)
        ]
        values, notes = self.ask_all(messages, [read] * len(messages))
        return RewardOutput(torch.tensor(values, dtype=torch.float32), notes)

    def _about(self, pictures: Sequence[Image.Image], question: str, ending: str) -> list[Part]:
        parts = [self.picture_of(one) for one in pictures]
        if len(parts) > 1:
            parts = [part for k, one in enumerate(parts, 1) for part in (text(f"Picture {k}:"), one)]
        return [*parts, text(f"{question}\n{ending}")]

    def _pairs(self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> RewardOutput:
        if len(pictures) < 2:
            raise UserError(f"rewards.{self.name}: one image has none to be compared with; set rollout.images_per_prompt to 2 or more")
        pairs = list(permutations(range(len(pictures)), 2))
        question = with_caption(self._ask_for, prompts[0].text)
        ending = "Answer 1 or 2, or 0 if neither is better."
        messages = [partial(self._about, [pictures[i], pictures[j]], question, ending) for i, j in pairs]
        values, notes = self.ask_all(messages, [reading.first_is_better] * len(pairs))
        rates = reading.win_rates(dict(zip(pairs, values, strict=True)), len(pictures))
        said = [next((note for (i, _), note in zip(pairs, notes, strict=True) if i == k and note), "") for k in range(len(pictures))]
        return RewardOutput(torch.tensor(rates, dtype=torch.float32), said)

    def _questions(self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> RewardOutput:
        def right(answer: Answer, question: Question) -> float:
            return reading.yes(answer) if question.answer.lower() == "yes" else reading.one_of(answer, (question.answer,))

        def words(question: Question) -> str:
            ending = "Answer yes or no." if question.answer.lower() == "yes" else "Answer in one word."
            return f"{self._ask_for.replace('{question}', question.text)}\n{ending}"

        atoms, notes = of_questions(self, pictures, prompts, words, right)
        means = {name: [getattr(reading, name)(one) for one in atoms] for name in ("arithmetic", "geometric")}
        details = {name: torch.tensor(values, dtype=torch.float32) for name, values in means.items()}
        return RewardOutput(details[self._mean], notes, details)


def of_questions(
    asking: Asking,
    pictures: Sequence[Image.Image],
    prompts: Sequence[Prompt],
    words: Callable[[Question], str],
    read: Callable[[Answer, Question], float],
) -> tuple[list[list[float]], list[str]]:
    """How probably each question of each picture is answered right, and a note for each picture, on its worst answer.

    Args:
        words: what is asked for a question.
        read: the probability of the right answer in an answer, NaN where it can't be read.
    """
    asked = [(k, question) for k, prompt in enumerate(prompts) for question in questions_of(prompt)]
    messages = [partial(_message, asking, pictures[k], words(question)) for k, question in asked]
    values, said = asking.ask_all(messages, [partial(_right, read, question) for _, question in asked])
    atoms: list[list[float]] = [[] for _ in prompts]
    notes = ["" for _ in prompts]
    worst = [math.inf for _ in prompts]
    for (k, question), value, unread in zip(asked, values, said, strict=True):
        atoms[k].append(value)
        if unread:
            notes[k], worst[k] = f"{question.text} {unread}", -1.0
        elif value < min(worst[k], 0.5):
            notes[k], worst[k] = f"{question.text} {question.answer}: {value:.2f}", value
    return atoms, notes


def _message(asking: Asking, picture: Image.Image, words: str) -> list[Part]:
    return [asking.picture_of(picture), text(words)]


def _right(read: Callable[[Answer, Question], float], question: Question, answer: Answer) -> float:
    return read(answer, question)
