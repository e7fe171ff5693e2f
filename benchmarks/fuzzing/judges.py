"""Answers of vision-language models as judges: a number in its range or a missing one, or one line."""

import json
import math
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from flowtilt.errors import UserError, printable
from flowtilt.io.web import Again, understood
from flowtilt.rewards.judge.budget import Budget, Limits, Spent
from flowtilt.rewards.judge.client import Client
from flowtilt.rewards.judge.kept import Kept
from flowtilt.rewards.judge.reading import Answer, first_is_better, number, one_of, yes
from fuzzing._mutations import damaged, json_values, mostly

URL = "http://host:8000/v1"
TEXTS = st.text(max_size=12) | st.sampled_from(
    [
        "yes",
        "No.",
        "7/10",
        "Score: 7,5",
        "１",
        "2",
        "0",
        "<think>1</think> 2",
        "9" * 5000,
        "-" * 200,
        "**yes**",
        "Rating is 3 and 4",
        "▁yes",
        "\ud800",
    ]
)
LINE = json.dumps({"key": "k", "text": "yes", "first": [["yes", -0.1], ["no", -2.5]], "read": 5, "written": 1}).encode() + b"\n"
Payload = tuple[bytes, bytes, float, float]
"""The body of an answer, a file of kept answers, and the range of a number."""


def inputs() -> st.SearchStrategy[Payload]:
    """Chat completions with odd parts, any JSON, any bytes."""
    odd = json_values()
    token = st.fixed_dictionaries(
        {
            "token": mostly(TEXTS, odd),
            "logprob": mostly(st.floats(-30, 0), st.floats() | st.sampled_from([10**400, 1e4, "x", "-1", True]) | odd),
        }
    )
    first = st.fixed_dictionaries({"top_logprobs": mostly(st.lists(mostly(token, odd), max_size=4), odd)})
    logprobs = st.fixed_dictionaries({"content": mostly(st.lists(mostly(first, odd), min_size=1, max_size=2), odd)})
    count = mostly(st.integers(0, 5000), st.integers() | st.sampled_from([10**400, True]) | odd)
    usage = st.fixed_dictionaries({}, optional={"prompt_tokens": count, "completion_tokens": count})
    message = mostly(st.fixed_dictionaries({"content": mostly(TEXTS, odd)}), odd)
    choice = st.fixed_dictionaries({"message": message}, optional={"logprobs": mostly(logprobs, odd)})
    choices = mostly(st.lists(mostly(choice, odd), min_size=1, max_size=2), odd)
    reply = st.fixed_dictionaries({"choices": choices}, optional={"usage": mostly(usage, odd)})
    bodies = mostly(
        reply.map(lambda value: json.dumps(value).encode()), st.binary(max_size=100) | odd.map(lambda value: json.dumps(value).encode())
    )
    pairs = mostly(st.lists(mostly(st.tuples(TEXTS | odd, st.floats() | odd), odd), max_size=3), odd)
    line = st.fixed_dictionaries({"key": st.just("k"), "text": TEXTS, "first": pairs, "read": st.integers() | odd, "written": st.just(1)})
    kept = damaged([LINE, LINE * 2]) | line.map(lambda value: json.dumps(value).encode() + b"\n")
    return st.tuples(bodies, kept, st.sampled_from([0.0, 1.0, -5.0]), st.sampled_from([10.0, 1e9]))


def read(payload: Payload, folder: Path) -> None:
    """Reads the answer as a judge does, adds up what it cost, and reads the kept ones."""
    body, lines, low, high = payload
    (folder / "judge-0.jsonl").write_bytes(lines)
    kept = Kept("judge")
    spent = kept.open(folder, 1)
    if answer := kept.get("k"):
        _numbers(answer, low, high)
    budget = Budget("judge", Limits(max_calls=10, max_tokens=10**6, max_cost=1e6, price_in=1.0, price_out=2.0))
    budget.begin(spent, 2)
    client = Client("judge", URL, "m", logprobs="auto", length=16, timeout=1.0, patience=1.0, budget=budget)
    try:
        reply: dict[str, Any] = understood(URL, 200, "", body, 10**6)
    except (Again, ValueError) as error:  # `post_json` tries again, and says this when it gives up
        raise UserError(printable(str(error))) from None
    answer = client._answer(reply)  # pyright: ignore[reportPrivateUsage]
    _numbers(answer, low, high)
    budget.settle(Spent(), Spent(1, answer.read, answer.written))
    budget.told()
    budget.reserve(Spent(1, answer.read, answer.written))


def _numbers(answer: Answer, low: float, high: float) -> None:
    for found in (yes(answer), first_is_better(answer), one_of(answer, ("yes", "1"))):
        assert math.isnan(found) or 0 <= found <= 1 + 1e-9, found
    found = number(answer, low, high)
    assert math.isnan(found) or low <= found <= high, found
