"""The grid of samples: a prompt's image from the same noise before, during and after training."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from flowtilt.report.images import Embedded, embed
from flowtilt.report.loading import Run, Sample
from flowtilt.report.markup import none_yet
from flowtilt.report.numbers import fixed, short

MOST_COLUMNS = 4
MOST_ROWS = 32


def sample_grid(run: Run) -> str:
    """One card a prompt, with an image a column; a sentence where no samples were kept."""
    if not run.samples:
        return none_yet("No samples yet: the first are kept with the first evaluation.")
    steps = _evenly(list(run.samples), MOST_COLUMNS)
    columns = {step: run.samples[step] for step in steps}
    names = _column_names(steps, run.finished)
    judged = _is_judged(columns)
    length = max(map(len, columns.values()))
    shown = _evenly(list(range(length)), MOST_ROWS)
    images = {(step, row): embed(samples[row].path) for step, samples in columns.items() for row in shown if row < len(samples)}
    large = any(image is not None and not image.is_pixel_art for image in images.values())
    cards = []
    for row in shown:
        first = next(samples[row] for samples in columns.values() if row < len(samples))
        shots = []
        for step, name in zip(steps, names, strict=True):
            sample = columns[step][row] if row < len(columns[step]) else None
            # another prompt in this place would be compared with what it has nothing to do with
            same = sample is not None and sample.prompt == first.prompt
            shots.append(_shot(name, sample if same else None, images.get((step, row)) if same else None, judged))
        cards.append(_card(first, shots, large))
    left_out = f"<p>{len(shown)} of {length} prompts are shown, evenly chosen.</p>" if len(shown) < length else ""
    look = "cards large" if large else "cards"
    return f'{_tally(columns, names) if judged else ""}{left_out}<div class="{look}" style="--columns:{len(steps)}">{"".join(cards)}</div>'


def _evenly(values: list[int], most: int) -> list[int]:
    """At most so many of the values, the ends among them."""
    if len(values) <= most:
        return values
    return [values[round(i)] for i in np.linspace(0, len(values) - 1, most)]


def _column_names(steps: Sequence[int], finished: bool) -> list[str]:
    names = [f"step {step:,}" for step in steps]
    if steps[0] == 0:
        names[0] = "before"
    if len(steps) > 1:
        names[-1] = "after" if finished else f"now (step {steps[-1]:,})"
    return names


def _is_judged(columns: dict[int, list[Sample]]) -> bool:
    """Whether images are right or wrong here; a score of taste has neither a note nor a full mark."""
    samples = [sample for column in columns.values() for sample in column]
    return any(sample.note for sample in samples) or all(sample.score in (0, 1) for sample in samples)


def _is_right(sample: Sample) -> bool | None:
    return None if math.isnan(sample.score) and not sample.note else not sample.note and sample.score > 0


def _tally(columns: dict[int, list[Sample]], names: Sequence[str]) -> str:
    counts = [(sum(_is_right(sample) is True for sample in column), len(column)) for column in columns.values()]
    said = ", ".join(
        f"{right} of {n} {'at ' if name.startswith('step') else ''}{name}" for (right, n), name in zip(counts, names, strict=True)
    )
    return f"<p>Right: {said}.</p>"


def _card(sample: Sample, shots: Sequence[str], large: bool) -> str:
    tag = f' <span class="chip">{escape(sample.tag.replace("_", " "))}</span>' if sample.tag else ""
    # what scrolls must be reachable by keyboard
    reach = f' tabindex="0" role="group" aria-label="Images of {escape(sample.prompt)}"' if large else ""
    return (
        f'<figure class="card"><figcaption>{escape(sample.prompt)}{tag}</figcaption>'
        f'<div class="strip"{reach}>{"".join(shots)}</div></figure>'
    )


def _shot(name: str, sample: Sample | None, image: Embedded | None, judged: bool) -> str:
    verdict, said = _verdict(sample, judged)
    if sample is None or image is None:
        picture = '<div class="missing">no image</div>'
    else:
        look = "pixels" if image.is_pixel_art else "photo"
        alt = escape(f"{sample.prompt}, {name}{said}")
        picture = f'<img class="{look}" src="{image.url}" width="{image.width}" height="{image.height}" alt="{alt}">'
    return f'<div class="shot">{picture}<p><span class="when">{name}</span>{verdict}</p></div>'


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
