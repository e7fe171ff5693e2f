"""The images to look at: the worst, the best, and those without a score."""

import math
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

from flowtilt.report.evaluation.estimates import column_decimals, written
from flowtilt.report.evaluation.loading import Column, PromptSet, Results, ScoredImage
from flowtilt.report.images import embed
from flowtilt.report.markup import folded, none_yet
from flowtilt.report.numbers import counted

SHOWN = 12
"""Pictures of each kind."""
LISTED = 500
"""Images without a score that are named; of more, only the number is given."""
LONG = 240
"""Letters of a prompt, above which it scrolls."""

Beside = dict[tuple[str, int, int, str], ScoredImage]


def beside(images: Sequence[ScoredImage]) -> Beside:
    """Each image by set, prompt, copy and variant."""
    return {(image.set, image.index, image.copy, image.variant): image for image in images}


def ranked(images: Sequence[ScoredImage], column: str) -> list[ScoredImage]:
    """Those with a score, the lowest first; equals in turn from all tags and, within a tag, from all prompts."""
    of_prompt: Counter[tuple[int, float]] = Counter()
    of_tag: Counter[tuple[str, int, float]] = Counter()
    places: list[tuple[float, int, int]] = []
    known = [image for image in images if math.isfinite(image.score(column))]
    for image in known:
        score = image.score(column)
        again = of_prompt[image.index, score]
        places.append((score, again, of_tag[image.tag, again, score]))
        of_prompt[image.index, score] += 1
        of_tag[image.tag, again, score] += 1
    return [known[i] for i in sorted(range(len(known)), key=lambda i: places[i])]


def worst_and_best(images: Sequence[ScoredImage], column: str) -> tuple[list[ScoredImage], list[ScoredImage]]:
    """The lowest and the highest scores, at most 12 of each, no image in both; no highest where all are alike."""
    rising = ranked(images, column)
    if rising and rising[0].score(column) == rising[-1].score(column):
        return rising[:SHOWN], []
    worst = rising[: min(SHOWN, (len(rising) + 1) // 2)]
    taken = {id(image) for image in worst}
    falling = sorted(rising, key=lambda image: -image.score(column))
    return worst, [image for image in falling if id(image) not in taken][:SHOWN]


def lacking(image: ScoredImage, one: PromptSet) -> list[str]:
    """The scores that an image lacks; not "geneval/strict" where it lacks "geneval"."""
    names = [column.name for column in one.columns if not math.isfinite(image.score(column.name))]
    return [name for name in names if "/" not in name or name.split("/")[0] not in names]


def extremes(one: PromptSet, images: Sequence[ScoredImage], results: Results, unfolded: bool) -> str:
    """The worst and the best images of a set by its first score, with the base's beside them."""
    if not one.columns:
        return ""
    column, tuned = one.columns[0], results.variants[-1]
    mine = [image for image in images if image.set == one.name and image.variant == tuned]
    worst, best = worst_and_best(mine, column.name)
    if not worst:
        return f"{_title(one)}{none_yet(f'No image with a score of {column.name} is listed in scores.jsonl.')}"
    others, scores = beside(images), [image.score(column.name) for image in mine]
    found = []
    for kind, chosen in (("lowest", worst), ("highest", best)):
        if chosen:
            said = _chosen(kind, chosen, scores, column)
            cards = _gallery([_pair(image, others, results) for image in chosen], column, results)
            look = " open" if unfolded else ""
            found.append(f"<details{look}><summary>{escape(column.name)}, {kind}</summary><p>{said}</p>{cards}</details>")
    return f"{_title(one)}{''.join(found)}"


def _title(one: PromptSet) -> str:
    return f'<h3 class="set-name">{escape(one.name)}</h3>'


def _chosen(kind: str, chosen: Sequence[ScoredImage], scores: Sequence[float], column: Column) -> str:
    edge = chosen[0].score(column.name)
    equal = sum(score == edge for score in scores)
    if equal > len(chosen):
        value = written(edge, column_decimals(column)).replace("-", "−")
        share = f"{equal:,} of {counted(len(scores), 'image')} share the {kind} score, {value}"
        return f"{share}; here are {len(chosen)}, from as many tags and prompts as can be."
    return f"The {len(chosen)} of {counted(len(scores), 'image')} that score {kind}."


def _pair(image: ScoredImage, others: Beside, results: Results) -> list[tuple[str, ScoredImage | None]]:
    return [(variant, others.get((image.set, image.index, image.copy, variant))) for variant in results.variants]


def _gallery(pairs: Sequence[list[tuple[str, ScoredImage | None]]], column: Column, results: Results) -> str:
    cards = []
    for pair in pairs:
        image = next(image for _, image in reversed(pair) if image)
        shots = "".join(_shot(variant, shown, column, results) for variant, shown in pair)
        cards.append(_card(image, _source(image) + shots))
    edited = any(image and image.source for pair in pairs for _, image in pair)
    return f'<div class="cards gallery" style="--columns:{len(results.variants) + edited}">{"".join(cards)}</div>'


def _source(image: ScoredImage) -> str:
    """The source image of an edit; "" where there is none."""
    if image.source is None:
        return ""
    return f'<div class="shot">{_embedded(image.source, f"{image.prompt}, source image")}<p><span class="when">source</span></p></div>'


def _card(image: ScoredImage, shots: str) -> str:
    tag = f' <span class="chip">{escape(image.tag.replace("_", " "))}</span>' if image.tag else ""
    # what scrolls must be reachable by keyboard
    caption = '<figcaption class="long" tabindex="0">' if len(image.prompt) > LONG else "<figcaption>"
    return f'<figure class="card">{caption}{escape(image.prompt)}{tag}</figcaption><div class="strip">{shots}</div></figure>'


def _shot(variant: str, image: ScoredImage | None, column: Column, results: Results) -> str:
    when = f'<span class="when">{variant}</span> ' if results.compares else ""
    if image is None:
        return f'<div class="shot"><div class="missing">no image</div><p>{when}</p></div>'
    value = image.score(column.name)
    said = written(value, column_decimals(column)).replace("-", "−") if math.isfinite(value) else "no score"
    note = f'<span class="note">{escape(image.note)}</span>' if image.note else ""
    alt = ", ".join(filter(None, (image.prompt, variant if results.compares else "", f"{column.name} {said}", image.note)))
    return f'<div class="shot">{_picture(image, alt)}<p>{when}<b class="value">{said}</b>{note}</p></div>'


def _picture(image: ScoredImage, alt: str) -> str:
    return _embedded(image.picture, alt)


def _embedded(picture: Path | None, alt: str) -> str:
    embedded = embed(picture) if picture else None
    if embedded is None:
        return '<div class="missing">no picture</div>'
    look = "pixels" if embedded.is_pixel_art else "photo"
    return f'<img class="{look}" src="{embedded.url}" width="{embedded.width}" height="{embedded.height}" alt="{escape(alt)}">'


def unscored(one: PromptSet, images: Sequence[ScoredImage], results: Results) -> str:
    """The images of a set that lack a score: pictures of the first, all others by name; "" where there are none."""
    mine = [image for image in images if image.set == one.name and image.variant in results.variants]
    found = [(image, names) for image in mine if (names := lacking(image, one))]
    if not found:
        return ""
    of = Counter(name for _, names in found for name in names)
    counts = ", ".join(f"{escape(name)} {n:,}" for name, n in of.items())
    cards = "".join(_unscored_card(image, names, results) for image, names in found[:SHOWN])
    rest = [f"<li>{_whose(image, results)}: {escape(image.prompt)} {_why(image, names)}</li>" for image, names in found[SHOWN:LISTED]]
    more = (
        folded(f"{counted(len(found) - SHOWN, 'more image')}", f'<ul class="listed">{"".join(rest)}</ul>{_unnamed(len(found))}')
        if rest
        else ""
    )
    said = f"{len(found):,} of {counted(len(mine), 'image')} lack a score: {counts}."
    return f'{_title(one)}<p>{said}</p><div class="cards gallery" style="--columns:1">{cards}</div>{more}'


def _unnamed(number: int) -> str:
    return f"<p>And {number - LISTED:,} more, which scores.jsonl names.</p>" if number > LISTED else ""


def _whose(image: ScoredImage, results: Results) -> str:
    variant = f"{escape(image.variant)}, " if results.compares else ""
    return f"{variant}prompt {image.index:,}, copy {image.copy}"


def _why(image: ScoredImage, names: Sequence[str]) -> str:
    note = f": {escape(image.note)}" if image.note else ""
    return f'<span class="note">no {escape(", ".join(names))}{note}</span>'


def _unscored_card(image: ScoredImage, names: Sequence[str], results: Results) -> str:
    picture = _picture(image, f"{image.prompt}, no {', '.join(names)}")
    return _card(image, f'<div class="shot">{picture}<p><span class="when">{_whose(image, results)}</span>{_why(image, names)}</p></div>')
