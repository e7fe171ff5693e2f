"""One page of several runs: how far each is, their curves in one chart, their newest samples side by side."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from flowtilt.report.axes import value_axis
from flowtilt.report.charts import Chart, Curve
from flowtilt.report.compare.costs import COSTS, spent, unit_of
from flowtilt.report.compare.curves import tone
from flowtilt.report.document import document, section
from flowtilt.report.grids import Column, sample_cards
from flowtilt.report.loading import Run
from flowtilt.report.markup import none_yet, scrolling
from flowtilt.report.numbers import Array, counted, duration, fixed, number, short
from flowtilt.report.verdict import verdict

AXES = ("rollouts", "seconds", "evaluations")


@dataclass(frozen=True)
class Watched:
    """A run with the name that tells it from the others; none where its folder is not there yet."""

    name: str
    run: Run | None


def overview(watched: Sequence[Watched], version: str) -> str:
    """The page as HTML; run k has its own page at k/."""
    runs = [one.run for one in watched]
    states = [run.state if run else "waiting" for run in runs]
    count = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    head = f'<header><p class="about">flowtilt · {escape(count)}</p><h1>{counted(len(watched), "run")}, side by side</h1></header>'
    parts = [
        ("runs", "Runs", _table(watched)),
        ("curves", "Curves", _curves(watched)),
        ("samples", "From the same noise", _samples(watched)),
    ]
    body = "\n".join(section(name, title, inner) for name, title, inner in parts)
    return document(
        f"{counted(len(watched), 'run')}: {count}",
        f"{head}\n{body}",
        styles=("page.css", "evaluation.css", "compare.css"),
        script="page.js",
        live={"version": version},
    )


def _name(place: int, one: Watched) -> str:
    line = '<svg class="swatch line-swatch" aria-hidden="true"><line class="line" x2="100%" y1="50%" y2="50%"/></svg>'
    return f'<span class="method {tone(place)}">{line}<a href="{place}/">{escape(one.name)}</a></span>'


def _table(watched: Sequence[Watched]) -> str:
    head = ("run", "state", "rollouts", "training", "score before", "score now", "training reward", "images per second", "guards fired")
    rows = "".join(
        f'<tr><th scope="row">{_name(place, one)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in _cells(one.run))}</tr>'
        for place, one in enumerate(watched)
    )
    names = "".join(f'<th scope="col">{name}</th>' for name in head)
    return scrolling("Runs", f'<table class="numbers compared"><thead><tr>{names}</tr></thead><tbody>{rows}</tbody></table>')


def _cells(run: Run | None) -> list[str]:
    if run is None:
        return ["waiting", *["–"] * 7]
    result = verdict(run)
    before, after = (fixed(score.value, result.decimals) if score else "–" for score in (result.before, result.after))
    done = f"{run.step:,} of {run.planned_steps:,}" if run.planned_steps else f"{run.step:,}"
    newest = run.metrics[-1] if run.metrics else {}
    return [
        run.state,
        done,
        duration(run.seconds) if math.isfinite(run.seconds) else "–",
        before,
        after,
        short(number(newest, "reward/total")),
        short(number(newest, "images_per_second")),
        str(len(run.guards)) if run.guards else "none",
    ]


def _curves(watched: Sequence[Watched]) -> str:
    """Score and training reward on each axis; radio buttons choose, without a script."""
    axes = [axis for axis in AXES if axis == "rollouts" or any(_spent(one.run, axis) for one in watched)]
    buttons, panels = [], []
    for axis in axes:
        chosen = " checked" if axis == axes[0] else ""
        buttons.append(f'<input type="radio" name="axis" id="by-{axis}"{chosen}><label for="by-{axis}">{COSTS[axis].name}</label>')
        score = _chart("Score", axis, watched, lambda run: _series(run.evaluations, "score"), dots=True)
        reward = _chart("Training reward", axis, watched, lambda run: _series(run.metrics, "reward/total"))
        panels.append(f'<div class="panel by-{axis}"><div class="two">{score}{reward}</div></div>')
    keys = "".join(f"<li>{_name(place, one)}</li>" for place, one in enumerate(watched))
    return f'<ul class="legend">{keys}</ul><div class="tabs">{"".join(buttons)}{"".join(panels)}</div>'


def _spent(run: Run | None, axis: str) -> float:
    """What a run has spent so far, 0 where that is not known."""
    if run is None:
        return 0.0
    found = spent(run, axis, np.array([float(run.step)]))[0]
    return float(found) if math.isfinite(found) else 0.0


def _series(records: Sequence[dict], key: str) -> tuple[Array, Array]:
    """Rollouts [N] and values [N] of the records that have the key."""
    known = [(number(record, "rollout"), number(record, key)) for record in records if math.isfinite(number(record, key))]
    return np.array([step for step, _ in known]), np.array([value for _, value in known])


def _chart(title: str, axis: str, watched: Sequence[Watched], series: Callable[[Run], tuple[Array, Array]], dots: bool = False) -> str:
    unit = unit_of(axis, max((_spent(one.run, axis) for one in watched), default=0.0))
    curves, longest = [], 0.0
    for place, one in enumerate(watched):
        steps, values = series(one.run) if one.run else (np.array([]), np.array([]))
        if one.run is None or not len(values):
            continue
        x = spent(one.run, axis, steps)
        reads = [f"{one.name} · {short(value, 4)} · {unit.written(at)} {COSTS[axis].behind}" for value, at in zip(values, x, strict=True)]
        curves.append(Curve(x / unit.factor, values, dots=dots, read=reads, tone=tone(place)))
        longest = max(longest, float(np.nanmax(x, initial=0.0)))
    if not curves:
        return f"<div><h3>{title}</h3>{none_yet('Nothing is logged yet.')}</div>"
    chart = Chart(f"{title} against {unit.name}", curves, unit.axis(longest), value_axis([curve.y for curve in curves]))
    return f'<div><h3>{title}</h3>{chart.svg()}<p class="axis-name x">{unit.name}</p></div>'


def _samples(watched: Sequence[Watched]) -> str:
    """The newest samples of the runs that have the same prompts as the first one that has any, beside the base's."""
    kept = [(place, one, one.run.samples[max(one.run.samples)]) for place, one in enumerate(watched) if one.run and one.run.samples]
    if not kept:
        return none_yet("No samples yet: the first are kept with the first evaluation.")
    prompts = [sample.prompt for sample in kept[0][2]]
    seed = _seed(kept[0][1])
    alike = [(place, one, found) for place, one, found in kept if [s.prompt for s in found] == prompts and _seed(one) == seed]
    base = next((one.run.samples[0] for _, one, _ in alike if one.run and 0 in one.run.samples and max(one.run.samples) > 0), None)
    columns = [Column("before", base, "before")] if base else []
    columns += [Column(one.name, found, f"by {one.name}", f"toned {tone(place)}") for place, one, found in alike]
    others = [one.name for _, one, _ in kept if one.name not in {same.name for _, same, _ in alike}]
    left = f" Not here, as their prompts or their seeds differ: {escape(', '.join(others))}." if others else ""
    said = "Each card is one prompt, every image in it from the same noise, at each run's newest evaluation."
    return f"<p>{said}{left}</p>{sample_cards(columns)}"


def _seed(one: Watched) -> object:
    return one.run.recipe.get("seed", 0) if one.run else None
