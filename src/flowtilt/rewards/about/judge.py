"""A judge of one's own: a vision-language model on a server that the user starts."""

from collections.abc import Mapping
from typing import Any

from flowtilt.rewards.about.base import BuiltIn

MODES = ("yes", "number", "questions", "pairs")


def _requests(options: Mapping[str, Any], prompts: int, copies: int) -> float:
    """Requests for so many images of each of so many prompts; for "questions", of one question each."""
    return prompts * copies * (max(copies - 1, 0) if options.get("mode") == "pairs" else 1)


def _note(options: Mapping[str, Any]) -> str:
    more = ", a request for each question of a prompt" if options.get("mode") == "questions" else ""
    return f"on its server while images are sampled{more}"


JUDGE = BuiltIn(
    name="judge",
    source="flowtilt.rewards.judge:Judge",
    off_device=True,
    plan_note=_note,
    requests=_requests,
)
