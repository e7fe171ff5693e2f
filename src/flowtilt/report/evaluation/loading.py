"""What an evaluation's folder holds, read leniently: an odd piece is a missing piece, never an error."""

from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flowtilt.estimate import Estimate
from flowtilt.io.run_folder import EvaluationFolder
from flowtilt.report.image_scores import count, estimate_of
from flowtilt.report.numbers import counted, number
from flowtilt.report.reading import Reader, Record, said

VARIANTS = ("base", "tuned")
"""In the order of the tables."""


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
    lost: list[str] = field(default_factory=list)  # what of the folder's files could not be read, a clause a file

    @property
    def compares(self) -> bool:
        """Whether there is a base beside the tuned model."""
        return len(self.variants) > 1


@dataclass(frozen=True)
class ScoredImage:
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
    source: Path | None = None  # the source image of an edit

    def score(self, column: str) -> float:
        """NaN where it has none."""
        return number(self.scores, column)


def load(folder: Path) -> tuple[Results, list[ScoredImage]]:
    """The results and the images of an evaluation's folder."""
    reader = Reader(folder)
    results, images = parse(reader.object(EvaluationFolder.results)), _images(reader)
    return replace(results, lost=list(said(reader.lost))), images


def parse(record: Record) -> Results:
    """Everything of results.json that can be made out."""
    variants = record.get("variants")
    known = [name for name in VARIANTS if isinstance(variants, list) and name in variants] or ["tuned"]
    sets = [_prompt_set(str(name), value, known) for name, value in _object(record.get("sets")).items() if isinstance(value, dict)]
    left_out = [(str(r.get("set", "")), str(r.get("reward", "")), str(r.get("why", ""))) for r in _objects(record.get("left_out"))]
    return Results(_object(record.get("protocol")), known, sets, left_out, number(record, "seconds"))


def _prompt_set(name: str, record: Record, variants: list[str]) -> PromptSet:
    prompts = count(record, "prompts")
    columns = [_column(str(key), _object(value), variants, prompts) for key, value in _object(record.get("columns")).items()]
    return PromptSet(name, prompts, count(record, "images"), columns)


def _column(name: str, record: Record, variants: list[str], prompts: int) -> Column:
    difference = _object(record.get("difference"))
    compared = Difference(estimate_of(difference, prompts), number(difference, "wins"), number(difference, "ties"))
    of = {v: _summary(_object(record.get(v)), prompts) for v in variants}
    return Column(name, of, compared if difference and len(variants) > 1 else None)


def _summary(record: Record, prompts: int) -> Summary:
    overall = estimate_of(record, prompts)
    of_tags = estimate_of(_object(record.get("mean_of_tags")), overall.prompts)
    by_tag = {str(tag): estimate_of(value) for tag, value in _object(record.get("by_tag")).items() if isinstance(value, dict)}
    return Summary(overall, of_tags if of_tags.known else None, by_tag)


def _object(value: Any) -> Record:
    return value if isinstance(value, dict) else {}


def _objects(value: Any) -> list[Record]:
    return [part for part in value if isinstance(part, dict)] if isinstance(value, list) else []


def _images(reader: Reader) -> list[ScoredImage]:
    """The images of scores.jsonl that say which prompt they are of, in the file's order; of a repeated one the last line holds."""
    inside, records = reader.folder.resolve(), reader.lines(EvaluationFolder.scores)
    found = [record for record in records if abs(number(record, "index")) < 2**53]
    if len(found) < len(records):
        reader.lose(EvaluationFolder.scores, f"{counted(len(records) - len(found), 'line')} without the place of a prompt")
    unscored = sum(not isinstance(record.get("scores"), dict) for record in found)
    if unscored:
        reader.lose(EvaluationFolder.scores, f"{counted(unscored, 'line')} without scores")
    images = [_scored(inside, record) for record in found]
    return list({(image.set, image.index, image.copy, image.variant): image for image in images}.values())


def _scored(folder: Path, record: Record) -> ScoredImage:
    texts = {key: str(record.get(key) or "") for key in ("set", "prompt", "tag", "note")}
    return ScoredImage(
        **texts,
        index=int(number(record, "index")),
        copy=count(record, "copy"),
        variant=str(record.get("variant") or "tuned"),
        scores=_object(record.get("scores")),
        picture=_picture(folder, record.get("picture")),
        source=_picture(folder, record.get("source")),
    )


def _picture(folder: Path, name: Any) -> Path | None:
    if not isinstance(name, str) or not name:
        return None
    with suppress(OSError, ValueError, RuntimeError):
        path = (folder / name).resolve()
        # the page is sent about: no line of scores.jsonl may put another file into it
        return path if path.is_relative_to(folder) else None
    return None
