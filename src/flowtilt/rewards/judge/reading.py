"""What a judge's answer says, as a number. What can't be read is NaN, never 0."""

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LEAST = 0.01
"""Probability of the answers that were asked for, together; below it a first token is the beginning of something else."""
YES, NO = ("yes",), ("no",)
_ROUNDING = 1e-3
"""What servers that compute in half precision give as the log-probability of a certain token."""
_NUMBER = r"[-+]?\d+(?:[.,]\d+)?(?![\w]|[.,]\d)"
_WHOLE = re.compile(rf"({_NUMBER})(?:\s*(?:/|out of)\s*{_NUMBER})?\.?")
_NAMED = re.compile(rf"(?:score|rating|answer|points?)\W{{0,4}}(?:is\W{{0,3}})?({_NUMBER})", re.IGNORECASE)
_THOUGHT = re.compile(r".*</think>", re.DOTALL)


@dataclass(frozen=True)
class Answer:
    """A server's answer.

    Args:
        text: what it wrote.
        first: the likeliest first tokens with their log-probabilities, best first; None where they were not asked for, () where this
            answer lacks them, so that it can't be read: words and probabilities are not mixed in one score.
        read, written: tokens, 0 where the server does not count them.
    """

    text: str
    first: tuple[tuple[str, float], ...] | None = None
    read: int = 0
    written: int = 0


def tokens(pairs: Any) -> tuple[tuple[str, float], ...] | None:
    """Those of the pairs that are a token and its log-probability, at most 0; none where there is none."""
    try:
        found = [(token, float(value)) for token, value in pairs if isinstance(token, str)]
    except (TypeError, ValueError, OverflowError):
        return None
    return tuple((token, min(value, 0.0)) for token, value in found if value < _ROUNDING) or None


def yes(answer: Answer) -> float:
    """P(yes) / (P(yes) + P(no)) of the first token, or 1 or 0 by the first word where there are no log-probabilities."""
    if answer.first is None:
        return {"yes": 1.0, "no": 0.0}.get(_first_word(answer.text), math.nan)
    return _share(_mass(answer.first, YES), _mass(answer.first, NO))


def first_is_better(answer: Answer) -> float:
    """How probably picture 1 was preferred to picture 2, in [0, 1]; an answer of 0, neither, counts half."""
    if answer.first is None:
        said = re.findall(r"\d+", _plain(answer.text))
        return {"1": 1.0, "2": 0.0, "0": 0.5}.get(said[0], math.nan) if len(said) == 1 else math.nan
    one, two, neither = (_mass(answer.first, (digit,)) for digit in "120")
    return _share(one + neither / 2, two + neither / 2)


def one_of(answer: Answer, forms: Sequence[str]) -> float:
    """Probability that the first token is one of the forms; each token counts once.

    Where none of the forms is among the tokens that the server lists, it is the probability of the least likely of these, which it can't
    exceed. Without log-probabilities it is 1 or 0 for an answer of at most two words.
    """
    wanted = {_bare(form) for form in forms}
    if answer.first is None:
        words = re.findall(r"[\w']+", _plain(answer.text).lower())
        return float(words[0] in wanted) if 1 <= len(words) <= 2 else math.nan
    if not answer.first:
        return math.nan
    mass = _mass(answer.first, wanted)
    return min(1.0, mass) if mass else math.exp(min(value for _, value in answer.first))


def number(answer: Answer, low: float, high: float) -> float:
    """The one number that an answer gives, in [low, high]: alone, as "7/10", after "Score:", or the only one in it."""
    text = _plain(answer.text).strip("*_` \n")
    whole, named, all_numbers = _WHOLE.fullmatch(text), _NAMED.findall(text), re.findall(rf"(?<![\w.,]){_NUMBER}", text)
    found = whole[1] if whole else named[-1] if named else all_numbers[0] if len(all_numbers) == 1 else ""
    value = float(found.replace(",", ".")) if found else math.nan
    return value if low <= value <= high else math.nan


def win_rates(preferences: Mapping[tuple[int, int], float], number: int) -> list[float]:
    """How often each of `number` pictures is preferred to another, over the pairs that were read in both orders.

    Args:
        preferences: how probably the first picture of a pair (first, second) was preferred, NaN where that can't be read.

    Returns:
        the mean over the other pictures, in [0, 1]; NaN where no pair of a picture was read.
    """
    wins: list[list[float]] = [[] for _ in range(number)]
    for (i, j), before in preferences.items():
        after = preferences.get((j, i), math.nan)
        if i < j and not math.isnan(before) and not math.isnan(after):
            better = (before + 1 - after) / 2
            wins[i].append(better)
            wins[j].append(1 - better)
    return [sum(won) / len(won) if won else math.nan for won in wins]


def arithmetic(values: Sequence[float]) -> float:
    """The mean; NaN where a value is missing or there is none."""
    return sum(values) / len(values) if values else math.nan


def geometric(values: Sequence[float]) -> float:
    """The geometric mean of values that are at least 0; NaN where one is missing or there is none."""
    if not values or any(math.isnan(value) for value in values):
        return math.nan
    return math.exp(sum(math.log(value) for value in values) / len(values)) if all(values) else 0.0


def _mass(first: Sequence[tuple[str, float]], forms: Sequence[str] | set[str]) -> float:
    return sum(math.exp(value) for token, value in first if _bare(token) in forms)


def _share(one: float, other: float) -> float:
    return one / (one + other) if one + other >= LEAST else math.nan


def _bare(token: str) -> str:
    """A token or word in lower case, without spaces, marks and a tokenizer's own sign for a space."""
    return unicodedata.normalize("NFKC", token).strip(" \t\n\r.,:;!?*_\"'`()[]▁Ġ").lower()


def _plain(text: str) -> str:
    """An answer without what its writer thought before, full-width characters as usual ones."""
    return unicodedata.normalize("NFKC", _THOUGHT.sub("", text)).strip()


def _first_word(text: str) -> str:
    found = re.search(r"\w+", _plain(text))
    return found[0].lower() if found else ""
