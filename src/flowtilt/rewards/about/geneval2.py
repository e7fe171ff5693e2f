"""GenEval 2: prompts of 3 to 10 parts, each part a question to a vision-language model. Its file is CC BY-NC 4.0; users bring it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flowtilt.rewards.about.judge import JUDGE, check_service

SKILLS = ("count", "object", "attribute", "position", "verb")
"""What the benchmark's questions are about."""
QUESTIONS = 7.5
"""Of a prompt, on average over the benchmark's 800."""


def _requests(options: Mapping[str, Any], prompts: int, copies: int) -> float:
    return QUESTIONS * prompts * copies


_RANGE = (0.0, 1.0)
GENEVAL2 = replace(
    JUDGE,
    name="geneval2",
    source="flowtilt.rewards.geneval2:GenEval2",
    score_range=_RANGE,
    detail_ranges=dict.fromkeys(("am", "tifa", *SKILLS), _RANGE),
    detail_notes={"am": "Soft-TIFA AM", "tifa": "share of the parts that are likelier right than not"},
    plan_note="on its server while images are sampled, 7.5 questions per image",
    requests=_requests,
    check=check_service,
)
