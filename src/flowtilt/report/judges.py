"""What judges on servers have cost a run, and what their budgets are."""

import math
import re
from html import escape

from flowtilt.report.loading import Record, Run
from flowtilt.report.markup import scrolling
from flowtilt.report.numbers import number

KINDS = {"calls": ",.0f", "tokens": ",.0f", "cost": ",.4g"}


def spending(run: Run) -> str:
    """A row for each judge; "" where there is none."""
    newest = run.metrics[-1] if run.metrics else {}
    names = dict.fromkeys(found[1] for key in newest if (found := re.fullmatch(r"spent/(.+)/calls", key)))
    if not names:
        return ""
    rows = "".join(f'<tr><th scope="row">{escape(name)}</th>{_cells(run, newest, name)}</tr>' for name in names)
    head = "".join(f"<th>{kind}</th>" for kind in ("", *KINDS))
    table = f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f"{scrolling('Judges', table)}<p>Over all processes and evaluations so far, and the most that the recipe allows.</p>"


def _cells(run: Run, newest: Record, name: str) -> str:
    return "".join(f"<td>{_cell(run, newest, name, kind)}</td>" for kind in KINDS)


def _cell(run: Run, newest: Record, name: str, kind: str) -> str:
    spent, most = number(newest, f"spent/{name}/{kind}"), number(_options(run, name), f"max_{kind}")
    if not math.isfinite(spent):
        return "–"
    return format(spent, KINDS[kind]) + (f" of {format(most, KINDS[kind])}" if most > 0 else "")


def _options(run: Run, name: str) -> Record:
    rewards = run.recipe.get("rewards")
    settings = rewards.get(name) if isinstance(rewards, dict) else None
    options = settings.get("options") if isinstance(settings, dict) else None
    return options if isinstance(options, dict) else {}
