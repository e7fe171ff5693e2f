"""The results as Markdown and as a picture. No torch here."""

import math
import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from contest.settings import TARGET
from flowtilt.config import load_recipe
from flowtilt.io.files import write_atomic
from flowtilt.report.compare import Comparison
from flowtilt.report.compare.comparison import Reach
from flowtilt.report.compare.curves import score_chart, tone
from flowtilt.report.compare.entries import Entry
from flowtilt.report.compare.methods import Method
from flowtilt.report.compare.spans import span
from flowtilt.report.compare.tables import ratio_cell
from flowtilt.report.loading import Run
from flowtilt.report.numbers import fixed, short

Record = dict[str, Any]
BEGIN, END = "<!-- results: written by benchmarks/head_to_head.py -->", "<!-- end of results -->"
CAPTION = "*Lines are medians over seeds, bands the range of the seeds. A triangle marks a rollout at which a guard warned.*"
NOTHING = "**No run is finished yet.**"
LADDER = (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, TARGET)
"""Scores to which the cost of getting there is told: where some methods end, another has hardly begun."""
WIDTH, HEIGHT, MARGIN = 860, 470, 56


def with_results(page: str, results: Record | None) -> str:
    """The page with its generated part made anew."""
    return between(page, BEGIN, END, markdown(results))


def run_on(entries: Sequence[Record]) -> str:
    """Machines and commits, as a line."""
    machines = sorted({f"{entry['machine']}, commit {str(entry['commit'])[:12]}" for entry in entries})
    return f"Run on: {'; '.join(machines)}."


def between(page: str, begin: str, end: str, text: str) -> str:
    """The page with `text` between two of its lines."""
    head, _, rest = page.partition(begin)
    _, _, tail = rest.partition(end)
    return f"{head}{begin}\n{text}\n{end}{tail}"


def markdown(results: Record | None) -> str:
    """The tables; that nothing was run yet, where there are no results."""
    if not results or not results["entries"]:
        return NOTHING
    parts = [run_on(results["entries"]), _methods(results["entries"], results["base"])]
    if (Path(__file__).parents[2] / "docs" / "images" / "head_to_head.svg").is_file():
        parts.insert(1, f"![Score against network evaluations](../images/head_to_head.svg)\n\n{CAPTION}")
    parts.append(_ladder(drawn(results["entries"])))
    parts += ["### What the search tried", *(_search(method, tried) for method, tried in results["search"].items())]
    if results["ablations"]:
        parts += ["### Ablations", _ablations(results["ablations"], results["entries"])]
    return "\n\n".join(parts)


def _methods(entries: Sequence[Record], base: Record) -> str:
    """One row a method: the median over seeds, the lowest and the highest."""
    head = ["", "seeds", f"evaluations to {TARGET:g}", "final score", "collapsed", "held out", "trained", "diversity", "distance"]
    rows = [["base", "", "", "", "", *_measured([base])]]
    for method in dict.fromkeys(entry["method"] for entry in entries):
        rows.append([method, *_row([entry for entry in entries if entry["method"] == method])])
    return table(head, rows)


def _row(own: Sequence[Record]) -> list[str]:
    return [
        str(len(own)),
        _reached(own),
        median([entry["final_score"] for entry in own]),
        f"{sum(entry['collapsed'] for entry in own)} of {len(own)}",
        *_measured(own),
    ]


def _reached(own: Sequence[Record]) -> str:
    """Median and range; how many seeds got there, where not all did."""
    costs = [entry[f"evaluations_to_{TARGET:g}"] for entry in own]
    known = [cost for cost in costs if cost is not None]
    if len(known) == len(costs):
        found = span(known)
        return f"{short(found.value)} ({short(found.low)} to {short(found.high)})"
    median = span([math.inf if cost is None else cost for cost in costs]).value
    told = f"{len(known)} of {len(costs)} seeds"
    if math.isfinite(median):
        return f"{short(median)}, {told}"
    return f"{told}, first after {short(min(known))}" if known else f"never ({told})"


def _ladder(comparison: Comparison) -> str:
    """Medians of the cost of each score, and how many times the first method's that is."""
    rows = []
    for method in comparison.methods:
        reaches = [comparison.reach(method, "evaluations", score) for score in LADDER]
        rows.append([method.label, *(_step(reach) for reach in reaches)])
    return table(["thousands of network evaluations to", *(f"{score:g}" for score in LADDER)], rows)


def _step(reach: Reach) -> str:
    cost = f"{reach.span.value / 1000:.0f}" if math.isfinite(reach.span.value) else "–"
    return f"{cost} ({ratio_cell(reach.against).main})" if reach.against else cost


def _measured(own: Sequence[Record]) -> list[str]:
    scores = [median([entry[key] for entry in own]) for key in ("held_out", "trained")]
    diversities = [entry["diversity"]["right"] for entry in own if entry["diversity"]["right"] is not None]
    return [*scores, median(diversities), short(span([entry["distance"] for entry in own]).value, 2)]


def median(values: Sequence[float]) -> str:
    if not values:
        return "–"
    found = span(values)
    whole = f" ({fixed(found.low, 3)} to {fixed(found.high, 3)})" if len(values) > 1 else ""
    return fixed(found.value, 3) + whole


def _search(method: str, tried: Sequence[Record]) -> str:
    keys = list(dict.fromkeys(key for record in tried for key in record["settings"]))
    rows = []
    for record in tried:
        scores = [fixed(found, 3) if found is not None else "–" for found in (record["score"], record.get("final"))]
        mark = "**chosen**" if record.get("chosen") else ""
        values = [record["settings"].get(key, "–") for key in keys]
        rows.append([*(value if isinstance(value, str) else short(value) for value in values), *scores, mark])
    return f"{method}\n\n" + table([*(key.rpartition(".")[2] for key in keys), "first round", "second round", ""], rows)


def _ablations(ablations: Sequence[Record], entries: Sequence[Record]) -> str:
    head = [
        "question",
        "variant",
        "seeds",
        f"evaluations to {TARGET:g}",
        "final score",
        "collapsed",
        "held out",
        "trained",
        "diversity",
        "distance",
    ]
    rows = [["–", "DiffusionNFT as the search left it", *_row([entry for entry in entries if entry["method"] == "nft"])]]
    for name in dict.fromkeys(entry["variant"] for entry in ablations):
        own = [entry for entry in ablations if entry["variant"] == name]
        rows.append([own[0]["question"], own[0]["label"], *_row(own)])
    return table(head, rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def drawn(entries: Sequence[Record]) -> Comparison:
    """What the curves of entries say, wherever their runs were made."""
    methods = dict.fromkeys(str(entry["method"]) for entry in entries)
    return Comparison(
        [Method(method, [_run(entry) for entry in entries if entry["method"] == method]) for method in methods],
        axes=["evaluations"],
        targets=[TARGET],
        chosen=True,
        odd=[],
    )


def _run(entry: Record) -> Entry:
    _, _, recipe, *overrides = str(entry["command"]).split()
    costs, scores = np.array(entry["curve_evaluations_score"], dtype=float).T
    metrics = [{"rollout": place, "network_evaluations": cost} for place, cost in enumerate(costs.tolist())]
    run = Run(Path(), "", {}, {}, metrics, [], {}, [], {})
    return Entry(run, load_recipe(recipe, overrides), np.arange(len(costs), dtype=float), scores)


def write_plot(target: Path, comparison: Comparison) -> None:
    """The compare page's curves as a picture of their own, with a legend."""
    chart = re.search(r"<svg role.*</svg>", score_chart(comparison, "evaluations"), re.S)
    assert chart
    assets = (resources.files("flowtilt.report") / name for name in ("page.css", "compare.css"))
    style = "".join(asset.read_text(encoding="utf-8") for asset in assets)
    # HTML's rules make the chart as large as its box, which a picture has to say itself
    inner = chart[0].replace(
        "<svg ", f'<svg x="{MARGIN}" y="44" width="{WIDTH - MARGIN - 20}" height="{HEIGHT - 110}" overflow="visible" ', 1
    )
    columns = math.ceil(len(comparison.methods) / 2)
    legend = "".join(
        f'<g class="{tone(place)}"><line class="line" x1="{x}" x2="{x + 22}" y1="{y}" y2="{y}"/>'
        f'<text class="tick" x="{x + 28}" y="{y + 4}">'
        f"{escape(method.label)}</text></g>"
        for place, method in enumerate(comparison.methods)
        for x, y in [(MARGIN + place % columns * (WIDTH - MARGIN) // columns, 14 + 18 * (place // columns))]
    )
    name = comparison.unit("evaluations").name
    write_atomic(
        target,
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="system-ui, sans-serif">'
        f'<style>{escape(style, quote=False)}</style><rect width="100%" height="100%" fill="var(--page)"/>{legend}{inner}'
        f'<text class="tick" x="50%" y="{HEIGHT - 14}" text-anchor="middle">{name}; strict score of the test prompts</text></svg>\n',
    )
