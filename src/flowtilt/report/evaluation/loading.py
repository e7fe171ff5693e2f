"""What an evaluation's folder holds, read leniently: an odd piece is a missing piece, never an error."""

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowtilt.report.numbers import number

Record = dict[str, Any]
VARIANTS = ("base", "tuned")
"""In the order of the tables."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval, NaN where there is none; `missing` of all `images` have no score."""

    mean: float
    low: float
    high: float
    images: int = 0
    missing: int = 0
    alike: bool = False  # no two prompts differ

    @property
    def known(self) -> bool:
        return math.isfinite(self.mean)

    @property
    def has_interval(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)


@dataclass(frozen=True)
class Summary:
    """One score of one variant: the mean over images; where prompts have tags also that over tags, and each tag's."""

    overall: Estimate
    of_tags: Estimate | None
    by_tag: dict[str, Estimate]


@dataclass(frozen=True)
class Difference:
    """Tuned minus base, image by image; `wins` and `ties` are shares in [0, 1], NaN where not known."""

    estimate: Estimate
    wins: float
    ties: float


@dataclass(frozen=True)
class Column:
    """One score on one set of prompts; "geneval/strict" is a further score of the reward "geneval"."""

    name: str
    of: dict[str, Summary]  # variant -> its summary
    difference: Difference | None

    @property
    def reward(self) -> str:
        return self.name.split("/")[0]

    @property
    def is_detail(self) -> bool:
        return self.name != self.reward


@dataclass(frozen=True)
class PromptSet:
    """A set of prompts and its scores, the first of which is the one it is judged by."""

    name: str
    prompts: int
    images: int
    columns: list[Column]


@dataclass(frozen=True)
class Results:
    """results.json. `left_out` are (set, reward, why)."""

    protocol: Record
    variants: list[str]
    sets: list[PromptSet]
    left_out: list[tuple[str, str, str]]
    seconds: float

    @property
    def compares(self) -> bool:
        """Whether there is a base beside the tuned model."""
        return len(self.variants) > 1


@dataclass(frozen=True)
class Scored:
    """One image and its scores; `picture` lies in the evaluation's folder."""

    set: str
    index: int
    copy: int
    prompt: str
    tag: str
    variant: str
    scores: Record
    note: str
    picture: Path | None

    def score(self, column: str) -> float:
        """NaN where it has none."""
        return number(self.scores, column)


def read_object(path: Path) -> Record:
    """The JSON object in a file; {} where there is none."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        return found if isinstance(found, dict) else {}
    return {}


def parse(record: Record) -> Results:
    """Everything of results.json that can be made out."""
    variants = record.get("variants")
    known = [name for name in VARIANTS if isinstance(variants, list) and name in variants] or ["tuned"]
    sets = [_prompt_set(str(name), value, known) for name, value in _object(record.get("sets")).items() if isinstance(value, dict)]
    left_out = [(str(r.get("set", "")), str(r.get("reward", "")), str(r.get("why", ""))) for r in _objects(record.get("left_out"))]
    return Results(_object(record.get("protocol")), known, sets, left_out, number(record, "seconds"))


def _prompt_set(name: str, record: Record, variants: list[str]) -> PromptSet:
    columns = [_column(str(key), _object(value), variants) for key, value in _object(record.get("columns")).items()]
    return PromptSet(name, _count(record, "prompts"), _count(record, "images"), columns)


def _column(name: str, record: Record, variants: list[str]) -> Column:
    difference = _object(record.get("difference"))
    compared = Difference(_estimate(difference), number(difference, "wins"), number(difference, "ties"))
    return Column(name, {v: _summary(_object(record.get(v))) for v in variants}, compared if difference and len(variants) > 1 else None)


def _summary(record: Record) -> Summary:
    of_tags = _estimate(_object(record.get("mean_of_tags")))
    by_tag = {str(tag): _estimate(value) for tag, value in _object(record.get("by_tag")).items() if isinstance(value, dict)}
    return Summary(_estimate(record), of_tags if of_tags.known else None, by_tag)


def _estimate(record: Record) -> Estimate:
    mean, low, high = (number(record, key) for key in ("mean", "low", "high"))
    return Estimate(mean, low, high, _count(record, "images"), _count(record, "missing"), record.get("alike") is True)


def _count(record: Record, key: str) -> int:
    value = number(record, key)
    return int(value) if value > 0 else 0


def _object(value: Any) -> Record:
    return value if isinstance(value, dict) else {}


def _objects(value: Any) -> list[Record]:
    return [part for part in value if isinstance(part, dict)] if isinstance(value, list) else []


def load_scores(folder: Path) -> list[Scored]:
    """The images of scores.jsonl that say which prompt they are of, in the file's order; of a repeated one the last line holds."""
    inside = folder.resolve()
    images = [_scored(inside, record) for record in _lines(folder / "scores.jsonl") if math.isfinite(number(record, "index"))]
    return list({(image.set, image.index, image.copy, image.variant): image for image in images}.values())


def _lines(path: Path) -> Iterator[Record]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return
    for line in lines:
        with suppress(ValueError, RecursionError):
            found = json.loads(line)
            if isinstance(found, dict):
                yield found


def _scored(folder: Path, record: Record) -> Scored:
    texts = {key: str(record.get(key) or "") for key in ("set", "prompt", "tag", "note")}
    return Scored(
        **texts,
        index=int(number(record, "index")),
        copy=_count(record, "copy"),
        variant=str(record.get("variant") or "tuned"),
        scores=_object(record.get("scores")),
        picture=_picture(folder, record.get("picture")),
    )


def _picture(folder: Path, name: Any) -> Path | None:
    if not isinstance(name, str) or not name:
        return None
    with suppress(OSError, ValueError, RuntimeError):
        path = (folder / name).resolve()
        # the page is sent about: no line of scores.jsonl may put another file into it
        return path if path.is_relative_to(folder) else None
    return None
