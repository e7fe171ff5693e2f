"""The page of a comparison: its sections in order."""

from collections.abc import Sequence
from html import escape

from flowtilt.report.compare.comparison import Comparison
from flowtilt.report.compare.costs import COSTS
from flowtilt.report.compare.curves import score_chart, tone
from flowtilt.report.compare.entries import Entry
from flowtilt.report.compare.tables import Cell, Table, by_cost, counts, lead, scores, settings, totals
from flowtilt.report.document import document, section
from flowtilt.report.grids import Column, sample_cards
from flowtilt.report.markup import flat_table, folded, none_yet, scrolling
from flowtilt.report.numbers import number
from flowtilt.report.verdict import score_name


def page(comparison: Comparison) -> str:
    """The comparison as HTML."""
    names = ", ".join(method.label for method in comparison.methods)
    body = f"{_headline(comparison)}\n{_sections(comparison)}\n<footer>Written by flowtilt.</footer>"
    return document(f"{names}: comparison", body, styles=("page.css", "evaluation.css", "compare.css"), script="page.js")


def _headline(comparison: Comparison) -> str:
    said, doubt = lead(comparison)
    judged = comparison.entries[0].protocol["evaluate.rewards"]
    about = " · ".join(("flowtilt", "comparison", counts(comparison), f"{score_name(comparison.entries[0].run)}: {judged}"))
    cautions = "".join(f'<p class="caution">{escape(note)}</p>' for note in (doubt, *comparison.notes) if note)
    return f'<header><p class="about">{escape(about)}</p><h1>{escape(said)}</h1>{cautions}</header>'


def _sections(comparison: Comparison) -> str:
    parts = [
        ("curves", "Score for compute", _legend(comparison) + _tabs(comparison)),
        ("table", "What each method reached and spent", _reached(comparison)),
        ("samples", "From the same noise", _samples(comparison)),
        ("guards", "Guards", _guards(comparison)),
        ("settings", "What differs", _settings(comparison)),
        ("method", "How it is counted", _rules(comparison)),
        ("protocol", "Protocol", _protocol(comparison)),
    ]
    return "\n".join(section(name, title, body) for name, title, body in parts if body)


def _name(place: int, label: str) -> str:
    line = '<svg class="swatch line-swatch" aria-hidden="true"><line class="line" x2="100%" y1="50%" y2="50%"/></svg>'
    return f'<span class="method {tone(place)}">{line}{escape(label)}</span>'


def _legend(comparison: Comparison) -> str:
    if len(comparison.methods) == 1 and len(comparison.entries) == 1:
        return ""
    several = any(len(method.entries) > 1 for method in comparison.methods)
    said = "Strong lines are medians over seeds, bands reach from the lowest to the highest seed, thin lines are single seeds. "
    flags = "Triangles mark guards that fired. " if any(entry.run.guards for entry in comparison.entries) else ""
    keys = "".join(f"<li>{_name(place, method.label)}</li>" for place, method in enumerate(comparison.methods))
    return f'<ul class="legend">{keys}</ul><p>{said if several else ""}{flags}</p>'


def _tabs(comparison: Comparison) -> str:
    """The curves and what it took to reach the targets, on each axis; radio buttons choose, without a script."""
    buttons, panels = [], []
    for cost in comparison.axes:
        chosen = " checked" if cost == comparison.axes[0] else ""
        buttons.append(f'<input type="radio" name="axis" id="by-{cost}"{chosen}><label for="by-{cost}">{COSTS[cost].name}</label>')
        tables = by_cost(comparison, cost)
        details = f"<p>{COSTS[cost].counted}</p>{_side_by_side(comparison, tables) if tables else ''}"
        panels.append(f'<div class="panel by-{cost}">{score_chart(comparison, cost)}{details}</div>')
    # hidden panels follow the buttons, which is all that the style sheet needs to show one of them
    return f'<div class="tabs">{"".join(buttons)}{"".join(panels)}</div>'


def _side_by_side(comparison: Comparison, tables: Sequence[Table]) -> str:
    """Tables that have their rows in common, as one."""
    above = "".join(
        f'<th scope="colgroup" colspan="{len(table.head)}" class="starts">{escape(table.title)}</th>' for table in tables if table.title
    )
    names = "".join(f'<th scope="col"{_starts(k, table)}>{escape(name)}</th>' for table in tables for k, name in enumerate(table.head))
    rows = []
    for place, method in enumerate(comparison.methods):
        cells = "".join(_cell(cell, _starts(k, table)) for table in tables for k, cell in enumerate(table.rows[place]))
        rows.append(f'<tr><th scope="row">{_name(place, method.label)}</th>{cells}</tr>')
    groups = f'<tr class="groups"><td></td>{above}</tr>' if above else ""
    head = f'<thead>{groups}<tr><th scope="col">method</th>{names}</tr></thead>'
    label = ", ".join(table.title for table in tables) if above else "Methods"
    return scrolling(label, f'<table class="numbers estimates compared">{head}<tbody>{"".join(rows)}</tbody></table>')


def _starts(place: int, table: Table) -> str:
    return ' class="starts"' if table.title and place == 0 else ""


def _cell(cell: Cell, look: str) -> str:
    more = f' <span class="interval">{escape(cell.more)}</span>' if cell.more else ""
    return f"<td{look}><b>{escape(cell.main)}</b>{more}</td>"


def _reached(comparison: Comparison) -> str:
    said = "The final score is that of the last evaluation. The best score is that of the highest one, which favours noisy curves."
    if len(comparison.methods) > 1:
        said += " Runs that end at different costs are compared at equal cost above."
    if any(len(method.entries) > 1 for method in comparison.methods):
        said += " Bold is the median over seeds, below it the lowest and the highest."
    return f"{_side_by_side(comparison, [scores(comparison), totals(comparison)])}<p>{said}</p>"


def _samples(comparison: Comparison) -> str:
    """The last samples of one seed, which all methods have, beside the base's."""
    if comparison.odd:
        return none_yet("Runs with different evaluations do not sample from the same noise.")
    common = set.intersection(*(set(method.seeds) for method in comparison.methods))
    for seed in sorted(common):
        chosen = [next(entry for entry in method.entries if entry.seed == seed) for method in comparison.methods]
        if all(entry.run.samples for entry in chosen):
            said = f"Each card is one prompt, every image in it from the same noise (seed {seed}), at each run's last evaluation."
            return f"<p>{said}</p>{sample_cards(_columns(comparison, chosen))}"
    return none_yet("No seed has kept samples of every method, and other seeds sample from other noise.")


def _columns(comparison: Comparison, chosen: Sequence[Entry]) -> list[Column]:
    """The base, where a run began with it, and each method."""
    base = next((entry for entry in chosen if 0 in entry.run.samples and not (entry.recipe.lora.init or entry.recipe.lora.on)), None)
    columns = [Column("base", base.run.samples[0], "by the base")] if base else []
    for place, (method, entry) in enumerate(zip(comparison.methods, chosen, strict=True)):
        newest = entry.run.samples[max(entry.run.samples)]
        columns.append(Column(method.label, newest, f"by {method.label}", f"toned {tone(place)}"))
    return columns


def _guards(comparison: Comparison) -> str:
    """What the guards said, once for all seeds of a method that heard the same."""
    heard: dict[tuple[str, str, str], list[str]] = {}
    for method in comparison.methods:
        for entry in method.entries:
            for guard in entry.run.guards:
                same = (method.label, str(guard.get("guard", "guard")), str(guard.get("message", "")))
                heard.setdefault(same, []).append(f"seed {entry.seed} at rollout {number(guard, 'rollout'):,.0f}")
    rows = [
        f"<li><b>{escape(f'{name}, {label}')}</b>, {', '.join(when)}: {escape(said)}</li>" for (label, name, said), when in heard.items()
    ]
    return f'<ul class="guards">{"".join(rows)}</ul>' if rows else none_yet("No guard fired.")


def _settings(comparison: Comparison) -> str:
    keys, rows = settings(comparison)
    if not keys:
        return ""
    head = "".join(f'<th scope="col">{_name(place, method.label)}</th>' for place, method in enumerate(comparison.methods))
    body = "".join(
        f'<tr><th scope="row"><code>{escape(key)}</code></th>{"".join(f"<td>{escape(value)}</td>" for value in row)}</tr>'
        for key, row in zip(keys, rows, strict=True)
    )
    table = f'<table class="settings"><thead><tr><th scope="col">key</th>{head}</tr></thead><tbody>{body}</tbody></table>'
    return scrolling("Settings that differ", table)


def _rules(comparison: Comparison) -> str:
    said = [
        "A run reaches a score where the straight line between two evaluations first crosses it.",
        "A method reaches a score when the median of its seeds does. A seed that never reached it counts as later than all that did.",
        "“Of the first” is the method's median cost divided by the first method's. Below it are the least and the greatest ratio of any "
        "two seeds, with ? if one of them never reached the score. “More than” and “less than” mean that half of the seeds of one of the "
        "two spent that much without reaching it. “Not known” means that they ended before the other method got there.",
        "Methods are compared only up to where all of them have trained. A run that ended or still goes on may get there later.",
        "Medians and bands end where the first of a method's seeds ends.",
    ]
    if not comparison.chosen and comparison.targets:
        said.append(
            "The score to reach was not given: it is the highest round one that the median of every method reached and no run began with."
        )
    return f'<ul class="listed">{"".join(f"<li>{sentence}</li>" for sentence in said)}</ul>'


def _protocol(comparison: Comparison) -> str:
    folders = {str(entry.folder): f"{method.label}, seed {entry.seed}" for method in comparison.methods for entry in method.entries}
    alike = "" if comparison.odd else folded("How all runs are evaluated", flat_table("Protocol", comparison.entries[0].protocol))
    return alike + folded("Runs", flat_table("Runs", folders))
