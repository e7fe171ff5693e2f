"""A judge of one's own: a vision-language model on a server that the user starts."""

from collections.abc import Mapping, Sequence
from typing import Any

from flowtilt.errors import UserError
from flowtilt.rewards.about.base import BuiltIn

MODES = ("yes", "number", "questions", "pairs")
ASK = {
    "yes": "Does the picture show {prompt}?",
    "number": "How well does the picture show {prompt}?",
    "questions": "{question}",
    "pairs": "Which of the two pictures shows {prompt} better?",
}
"""What is asked where the recipe says nothing."""
_WHOLE = ("workers", "length", "side", "max_calls", "max_tokens")
_AT_LEAST_0 = ("side", "patience", "max_missing", "max_calls", "max_tokens", "max_cost", "price_in", "price_out")
_MORE = ("workers", "timeout", "length")


def check_service(name: str, options: Mapping[str, Any]) -> None:
    """Raises UserError where an option of how a server is asked makes no sense."""
    for key in ("url", "model"):
        if not isinstance(options.get(key, ""), str):
            raise UserError(f"rewards.{name}: {key} must be text, not {options[key]!r}")
    url = options.get("url", "").strip()
    if url and not url.startswith(("http://", "https://")):
        raise UserError(f"rewards.{name}: url {url!r} is no address of a server; want one like http://127.0.0.1:8000/v1")
    choose(name, "logprobs", options.get("logprobs", "auto"), ("auto", "need", "off"))
    choose(name, "picture", options.get("picture", "png"), ("png", "jpeg"))
    for key in [key for key in (*_MORE, *_AT_LEAST_0) if key in options]:
        value = options[key]
        kind, what = (int, "a whole number") if key in _WHOLE else (int | float, "a number")
        if isinstance(value, bool) or not isinstance(value, kind) or value < 0 or (key in _MORE and not value):
            raise UserError(f"rewards.{name}: {key} must be {what} {'above' if key in _MORE else 'of at least'} 0, not {value!r}")
    if options.get("max_cost") and not (options.get("price_in") or options.get("price_out")):
        raise UserError(f"rewards.{name}: max_cost needs price_in and price_out, of a million tokens")


def check(name: str, options: Mapping[str, Any]) -> None:
    """Raises UserError where an option of a judge makes no sense."""
    check_service(name, options)
    mode, ask = options.get("mode", "yes"), options.get("ask", "")
    choose(name, "mode", mode, MODES)
    choose(name, "mean", options.get("mean", "arithmetic"), ("arithmetic", "geometric"))
    wanted = "{question}" if mode == "questions" else "{prompt}"
    if not isinstance(ask, str):
        raise UserError(f"rewards.{name}: ask must be text with {wanted} in it, not {ask!r}")
    if ask and wanted not in ask:
        raise UserError(f"rewards.{name}: ask has no {wanted}, which stands for the {wanted[1:-1]}; write it in, as in {ASK[mode]!r}")
    low, high = bounds = options.get("low", 0.0), options.get("high", 10.0)
    if any(isinstance(bound, bool) or not isinstance(bound, int | float) for bound in bounds):
        raise UserError(f"rewards.{name}: low and high must be numbers, not {low!r} and {high!r}")
    if not low < high:
        raise UserError(f"rewards.{name}: low = {low:g} must be below high = {high:g}")


def choose(name: str, key: str, value: object, known: Sequence[str]) -> None:
    """Raises UserError where an option is none of the known values."""
    if value not in known:
        raise UserError(f"rewards.{name}: {key} is {value!r}; it is one of {', '.join(known)}")


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
    check=check,
    service_options=(
        *("url", "workers", "timeout", "patience", "max_missing"),
        *("max_calls", "max_tokens", "max_cost", "price_in", "price_out"),
    ),
)
