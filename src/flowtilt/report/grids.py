"""The grid of samples: a prompt's image from the same noise before, during and after training."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from flowtilt.report.images import Embedded, embed
from flowtilt.report.loading import Run, Sample
from flowtilt.report.markup import none_yet
from flowtilt.report.numbers import fixed, short

MOST_COLUMNS = 4
MOST_ROWS = 32


class Column(NamedTuple):
    """The samples that stand below each other: their name, how a sentence says where they come from, and their colour's class."""

    name: str
    samples: list[Sample]
    said: str
    tone: str = ""


def sample_grid(run: Run) -> str:
    """One card a prompt, with an image a column; a sentence where no samples were kept."""
    if not run.samples:
        return none_yet("No samples yet: the first are kept with the first evaluation.")
    steps = _evenly(list(run.samples), MOST_COLUMNS)
    named = zip(steps, _column_names(steps, run.finished), strict=True)
    columns = [Column(name, run.samples[step], f"at {name}" if name.startswith("rollout") else name) for step, name in named]
    return sample_cards(columns)


def _sources(samples: Sequence[Sample], rows: Sequence[int]) -> dict[int, Embedded | None]:
    """The source images of edits, by row."""
    found = {row: samples[row].source for row in rows if row < len(samples)}
    return {row: embed(path) for row, path in found.items() if path}


def sample_cards(columns: Sequence[Column]) -> str:
    """One card a prompt, with an image of each column; what is of another prompt than the first in its place is left out.

    The source image of an edit comes first.
    """
    judged = _is_judged(columns)
    length = max(len(column.samples) for column in columns)
    shown = _evenly(list(range(length)), MOST_ROWS)
    images = {(k, row): embed(c.samples[row].path) for k, c in enumerate(columns) for row in shown if row < len(c.samples)}
    sources = _sources(columns[0].samples, shown)
    large = any(image is not None and not image.is_pixel_art for image in (*images.values(), *sources.values()))
    cards = []
    for row in shown:
        first = next(column.samples[row] for column in columns if row < len(column.samples))
        shots = [_source(first, sources[row])] if row in sources else []
        for k, column in enumerate(columns):
            sample = column.samples[row] if row < len(column.samples) else None
            # another prompt in this place would be compared with what it has nothing to do with
            same = sample is not None and sample.prompt == first.prompt
            shots.append(_shot(column, sample if same else None, images.get((k, row)) if same else None, judged))
        cards.append(_card(first, shots, large))
    left_out = f"<p>{len(shown)} of {length} prompts are shown, evenly chosen.</p>" if len(shown) < length else ""
    look = "cards large" if large else "cards"
    width = len(columns) + bool(sources)
    return f'{_tally(columns) if judged else ""}{left_out}<div class="{look}" style="--columns:{width}">{"".join(cards)}</div>'


def _evenly(values: list[int], most: int) -> list[int]:
    """At most so many of the values, the ends among them."""
    if len(values) <= most:
        return values
    return [values[round(i)] for i in np.linspace(0, len(values) - 1, most)]


def _column_names(steps: Sequence[int], finished: bool) -> list[str]:
    names = [f"rollout {step:,}" for step in steps]
    if steps[0] == 0:
        names[0] = "before"
    if len(steps) > 1:
        names[-1] = "after" if finished else f"now (rollout {steps[-1]:,})"
    return names


def _is_judged(columns: Sequence[Column]) -> bool:
    """Whether images are right or wrong here; a score of taste has neither a note nor a full mark."""
    samples = [sample for column in columns for sample in column.samples]
    return any(sample.note for sample in samples) or all(sample.score in (0, 1) for sample in samples)


def _is_right(sample: Sample) -> bool | None:
    return None if math.isnan(sample.score) and not sample.note else not sample.note and sample.score > 0


def _tally(columns: Sequence[Column]) -> str:
    counts = [f"{sum(_is_right(sample) is True for sample in c.samples)} of {len(c.samples)} {escape(c.said)}" for c in columns]
    return f"<p>Right: {', '.join(counts)}.</p>"


def _card(sample: Sample, shots: Sequence[str], large: bool) -> str:
    tag = f' <span class="chip">{escape(sample.tag.replace("_", " "))}</span>' if sample.tag else ""
    # what scrolls must be reachable by keyboard
    reach = f' tabindex="0" role="group" aria-label="Images of {escape(sample.prompt)}"' if large else ""
    return (
        f'<figure class="card"><figcaption>{escape(sample.prompt)}{tag}</figcaption>'
        f'<div class="strip"{reach}>{"".join(shots)}</div></figure>'
    )


def _shot(column: Column, sample: Sample | None, image: Embedded | None, judged: bool) -> str:
    verdict, said = _verdict(sample, judged)
    if sample is None or image is None:
        picture = '<div class="missing">no image</div>'
    else:
        picture = _picture(image, f"{sample.prompt}, {column.name}{said}")
    look, name = f"shot {column.tone}".rstrip(), escape(column.name)
    return f'<div class="{look}">{picture}<p><span class="when" title="{name}">{name}</span>{verdict}</p></div>'


def _source(sample: Sample, image: Embedded | None) -> str:
    """The source image of an edit."""
    picture = '<div class="missing">no image</div>' if image is None else _picture(image, f"{sample.prompt}, source image")
    return f'<div class="shot">{picture}<p><span class="when">source</span></p></div>'


def _picture(image: Embedded, alt: str) -> str:
    look = "pixels" if image.is_pixel_art else "photo"
    return f'<img class="{look}" src="{image.url}" width="{image.width}" height="{image.height}" alt="{escape(alt)}">'


def _verdict(sample: Sample | None, judged: bool) -> tuple[str, str]:
    """HTML of the verdict, and the same in words for the alt text."""
    right = _is_right(sample) if sample else None
    if sample is None or right is None:
        return "", ""
    if not judged:
        score = fixed(sample.score, 2) if abs(sample.score) < 100 else short(sample.score)
        return f' <span class="value">{score}</span>', f", score {score}"
    if right:
        return ' <b class="right" aria-label="right">✓</b>', ": right"
    note = f'<span class="note">{escape(sample.note)}</span>' if sample.note else ""
    return f' <b class="wrong" aria-label="wrong">✗</b>{note}', f": wrong, {sample.note}" if sample.note else ": wrong"
