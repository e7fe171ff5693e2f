"""GenEval 2's Soft-TIFA as a reward: how probably a vision-language model answers each of a prompt's questions right.

    p of a question   sum of the probabilities of the answer's forms as the first token, not divided by other answers
    AM, GM            arithmetic and geometric mean of a prompt's p
    of a skill        mean p of the questions about it

The published judge is Qwen3-VL-8B-Instruct, which has the whole vocabulary's probabilities. A server lists the 20 likeliest tokens:
an answer that is not among them counts with the probability of the last of these, which it can't exceed, and a token that two
forms share counts once (the published code counts it twice).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flowtilt.io.images import to_pil
from flowtilt.prompts import Prompt
from flowtilt.rewards import RewardOutput
from flowtilt.rewards.about.geneval2 import GENEVAL2, SKILLS
from flowtilt.rewards.judge import of_questions
from flowtilt.rewards.judge.asking import Asking
from flowtilt.rewards.judge.questions import Question, questions_of
from flowtilt.rewards.judge.reading import Answer, arithmetic, geometric, one_of

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


class GenEval2(Asking):
    """Soft-TIFA GM as the score; details `am`, `tifa` and each skill. A prompt without questions has no score.

    Args and Raises: see `Asking`; its server must give log-probabilities unless `logprobs` is "auto", which then reads words.
    """

    def __init__(
        self,
        *,
        name: str = "geneval2",
        url: str = "",
        model: str = "",
        logprobs: str = "need",
        picture: str = "png",
        side: int = 0,
        length: int = 16,
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
        super().__init__(
            name,
            url,
            model,
            facts=GENEVAL2,
            logprobs=logprobs,
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

    @staticmethod
    def applies(prompt: Prompt) -> str:
        """Why a prompt can't be judged; "" where it can.

        Raises:
            UserError: its questions have a fault.
        """
        return "" if questions_of(prompt) else "no questions (vqa_list) as in GenEval 2's file"

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> RewardOutput:
        """Scores of images [N, 3, H, W] in [0, 1]."""
        atoms, notes = of_questions(self, to_pil(images), prompts, _asked, _right)
        skills = [[question.skill for question in questions_of(prompt)] for prompt in prompts]
        columns = {
            "am": [arithmetic(one) for one in atoms],
            "tifa": [arithmetic([math.nan if math.isnan(p) else float(p > 0.5) for p in one]) for one in atoms],
            **{skill: [_of_skill(one, named, skill) for one, named in zip(atoms, skills, strict=True)] for skill in SKILLS},
        }
        details = {key: torch.tensor(values, dtype=torch.float32) for key, values in columns.items()}
        return RewardOutput(torch.tensor([geometric(one) for one in atoms], dtype=torch.float32), notes, details)


def forms(question: Question) -> tuple[str, ...]:
    """The right answer in all forms that count: a number also as a digit."""
    answer = question.answer.lower()
    counted = question.text.lower().startswith("how many") and answer in NUMBERS
    return (answer, str(NUMBERS.index(answer) + 1)) if counted else (answer,)


def _asked(question: Question) -> str:
    return f"{question.text} Answer in one word."


def _right(answer: Answer, question: Question) -> float:
    return one_of(answer, forms(question))


def _of_skill(atoms: Sequence[float], named: Sequence[str], skill: str) -> float:
    return arithmetic([p for p, name in zip(atoms, named, strict=True) if name == skill])
