"""Tables of an evaluation: the means, the differences, the means by tag."""

from collections.abc import Mapping, Sequence
from html import escape

from flowtilt.estimate import EXACT, FEW, FEWEST, Estimate
from flowtilt.report.bars import bars, forest, scale_of
from flowtilt.report.evaluation.estimates import (
    bracketed,
    column_decimals,
    difference_decimals,
    extent,
    missing,
    reader_note,
    reasons,
    rows_of,
    verdict,
    written,
)
from flowtilt.report.evaluation.loading import Column, PromptSet, Results
from flowtilt.report.markup import none_yet, scrolling

LOOKS = {"base": "before", "tuned": "after"}


def means(results: Results) -> str:
    """Every score on every set: mean and interval of each variant."""
    if not any(one.columns for one in results.sets):
        return none_yet("There are no scores: results.json names no set with any.")
    head = "".join(f'<th scope="col">{v if results.compares else "mean"}</th>' for v in results.variants)
    bodies = "".join(
        _group(one, [_means_of(one, column, results) for column in one.columns], len(results.variants) + 1) for one in results.sets
    )
    table = f'<table class="numbers estimates means"><thead><tr><th scope="col">score</th>{head}</tr></thead>{bodies}</table>'
    return f"{scrolling('Scores', table)}{_reading(results)}"


def _group(one: PromptSet, rows: Sequence[str], columns: int) -> str:
    size = extent(one.prompts, one.images)
    head = f'<tr class="set"><th colspan="{columns}" scope="rowgroup">{escape(one.name)} <span class="quiet">{size}</span></th></tr>'
    nothing = f'<tr><td colspan="{columns}" class="none">no scores</td></tr>'
    return f"<tbody>{head}{''.join(rows) or nothing}</tbody>"


def _means_of(one: PromptSet, column: Column, results: Results) -> str:
    digits, found = column_decimals(column), []
    for place, (which, of) in enumerate(rows_of(one, column)):
        cells = []
        for variant in results.variants:
            # how many are missing belongs to the score, and is said once
            lost = missing(column.of[variant].overall) if place == 0 else ""
            cells.append(f"<td>{estimate_cell(of.get(variant), digits)}{_lost(lost)}</td>")
        said = " · ".join(filter(None, (which, reader_note(column) if place == 0 else "")))
        found.append(f'<tr{_look(column, place)}><th scope="row">{_name(column, said)}</th>{"".join(cells)}</tr>')
    return "".join(found)


def _look(column: Column, place: int = 0) -> str:
    looks = (["detail"] if column.is_detail else []) + (["again"] if place else [])
    return f' class="{" ".join(looks)}"' if looks else ""


def _name(column: Column, said: str = "") -> str:
    return f'<span class="score-name">{escape(column.name)}</span>' + (f' <span class="quiet">{escape(said)}</span>' if said else "")


def _lost(said: str) -> str:
    return f'<span class="lost">{said}</span>' if said else ""


def estimate_cell(estimate: Estimate | None, digits: int, signed: bool = False) -> str:
    """A mean and, quieter, its interval."""
    if estimate is None or not estimate.known:
        return "–"
    mean, interval = written(estimate.value, digits, signed), bracketed(estimate, digits, signed)
    text = f'<b>{mean}</b> <span class="interval">{interval}</span>'
    return text.replace("-", "−")


def _reading(results: Results) -> str:
    found = [row for one in results.sets for column in one.columns for row in rows_of(one, column)]
    said = [
        "In brackets is the 95% interval of the mean, by a bootstrap over whole prompts, since images of one prompt are alike. "
        "It says how far the mean might be off for other prompts of the same kinds; another training run may differ by more."
    ]
    if any(which for which, _ in found):
        said.append(
            "The mean over tags counts every tag once, as GenEval's overall score does; the mean over images counts every image once. "
            "Where one mean is given, it is over prompts."
        )
    shown = [e for _, of in found for e in of.values()]
    if any(e.kind == EXACT for e in shown):
        said.append(
            "Where all prompts scored alike, a bootstrap has no width, and “exact” marks the bound of Clopper and Pearson over "
            "prompts for a score known to lie in [0, 1]."
        )
    said += [f"No interval: {why}." for why in reasons(shown)]
    return "".join(f"<p>{sentence}</p>" for sentence in said)


def differences(results: Results) -> str:
    """Tuned minus base of every score, with what the interval says in words."""
    bodies = []
    for one in results.sets:
        found = [row for column in one.columns if (row := _difference_of(column))]
        bodies += [_group(one, found, 5)] if found else []
    if not bodies:
        return none_yet("There are no differences: no image has scores of both.")
    titles = ("score", "difference", "0 in the middle", "higher / equal", "95% interval")
    head = "".join(f'<th scope="col"{_hidden_on_phones(place)}>{title}</th>' for place, title in enumerate(titles))
    table = f'<table class="numbers estimates differences"><thead><tr>{head}</tr></thead>{"".join(bodies)}</table>'
    return (
        f"{scrolling('Differences', table)}<p>Each image is compared with the base's of the same prompt from the same noise, over the "
        "images where both have a score. “Higher / equal” are the shares of images where tuned scores higher, and the same. "
        "Of twenty scores that training does not touch, one may have an interval that excludes 0.</p>"
    )


def _hidden_on_phones(place: int) -> str:
    return ' class="wide"' if place in (2, 3) else ""


def _difference_of(column: Column) -> str:
    if column.difference is None:
        return ""
    estimate, digits = column.difference.estimate, difference_decimals(column)
    shares = " / ".join(f"{share:.0%}" if share == share else "–" for share in (column.difference.wins, column.difference.ties))
    said = verdict(estimate)
    look = said.split(":")[0] if said.startswith(("higher", "lower")) else "chance"
    # the column's title says "interval"
    word, _, why = said.replace(": interval", ":").partition(": ")
    words = f'<b class="{look}">{word}</b> <span class="interval">{why}</span>' if said else "–"
    return (
        f'<tr{_look(column)}><th scope="row">{_name(column)}</th>'
        f"<td>{estimate_cell(estimate, digits, True)}{_lost(missing(estimate))}</td>"
        f'<td class="wide">{forest(estimate) if estimate.known else ""}</td>'
        f'<td class="wide">{shares}</td><td class="words">{words}</td></tr>'
    )


def tags(one: PromptSet, results: Results) -> str:
    """The means by tag of every score of one set, the first unfolded; "" where there are none."""
    found = []
    for column in one.columns:
        if any(summary.by_tag for summary in column.of.values()):
            unfolded = " open" if not found else ""
            found.append(f"<details{unfolded}><summary>{escape(column.name)}</summary>{_tags_of(one, column, results)}</details>")
    few = any(e.kind == FEW for column in one.columns for summary in column.of.values() for e in summary.by_tag.values())
    why = f"<p>No interval: tags with fewer than {FEWEST} prompts have none.</p>" if few else ""
    return f'<h3 class="set-name">{escape(one.name)}</h3>{_key(results)}{"".join(found)}{why}' if found else ""


def _key(results: Results) -> str:
    keys = "".join(f'<span><span class="key {LOOKS[v]}"></span> {v}</span>' for v in results.variants)
    return f'<p class="keys">{keys}</p>' if results.compares else ""


def _tags_of(one: PromptSet, column: Column, results: Results) -> str:
    names = dict.fromkeys(tag for summary in column.of.values() for tag in summary.by_tag)
    by_tag = {tag: {v: column.of[v].by_tag.get(tag) for v in results.variants} for tag in names}
    scale, digits = scale_of([e for of in by_tag.values() for e in of.values() if e]), column_decimals(column)

    def row(name: str, of: Mapping[str, Estimate | None], drawn: str) -> str:
        cells = "".join(f"<td>{estimate_cell(e, digits)}{_lost(missing(e) if e and drawn else '')}</td>" for e in of.values())
        return f'<tr><th scope="row">{escape(name)}</th><td class="bar-cell">{drawn}</td>{cells}</tr>'

    body = [row(tag.replace("_", " "), of, bars([(LOOKS[v], e) for v, e in of.items() if e], scale)) for tag, of in by_tag.items()]
    foot = row("mean over tags", {v: s.of_tags for v, s in column.of.items()}, "")
    foot += row("mean over images", {v: s.overall for v, s in column.of.items()}, "")
    span = f"{written(scale.low, digits)} to {written(scale.high, digits)}".replace("-", "−")
    titles = "".join(f'<th scope="col">{v if results.compares else "mean"}</th>' for v in results.variants)
    head = f'<tr><th scope="col">tag</th><th scope="col" class="bar-cell">{span}</th>{titles}</tr>'
    table = f"<thead>{head}</thead><tbody>{''.join(body)}</tbody><tfoot>{foot}</tfoot>"
    label = f"{column.name} by tag on {one.name}"
    return scrolling(label, f'<table class="numbers estimates tags" style="--variants:{len(results.variants)}">{table}</table>')
