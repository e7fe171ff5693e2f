"""The page of a run: its sections in order."""

import math

from flowtilt.report import curves, grids, judges, tables, verdict
from flowtilt.report.document import document, section
from flowtilt.report.loading import Run
from flowtilt.report.numbers import counted

RELOAD = 10
"""Seconds after which the page of a run that goes on shows itself anew, at least."""


def page(run: Run, version: str = "") -> str:
    """The report of a run as HTML. It shows itself anew while the run goes on.

    Args:
        version: of a page that a server has: what it answers at `version` until there is more to show.
    """
    title = f"{run.name}: {verdict.sentence(run, verdict.verdict(run))}"
    footer = f"<footer>Written by flowtilt after {counted(run.step, 'rollout')}.</footer>"
    return document(title, f"{verdict.headline(run)}\n{_sections(run)}\n{footer}", script="page.js", live=_live(run, version))


def _live(run: Run, version: str) -> dict[str, str | int]:
    """What `page.js` needs: "touched", when something was last logged; "every", seconds between two looks; "version"."""
    since = {"touched": round(run.touched)} if run.held and math.isfinite(run.touched) else {}
    if version:
        return {**since, "version": version}
    pace = run.seconds / run.step if run.step and math.isfinite(run.seconds) else 0.0
    return {**since, "every": max(RELOAD, min(60, round(pace)))} if run.held else {}


def _sections(run: Run) -> str:
    """Every section, each saying so in a sentence where it has nothing to show."""
    how = "Each card is one prompt, every image in it from the same noise." if run.samples else ""
    score = section("score", verdict.score_name(run).capitalize(), curves.score_curve(run) + tables.evaluations(run))
    reward = section("reward", "Training reward", curves.reward_curve(run))
    return "\n".join(
        (
            curves.axis_choice(run),
            f'<div class="two">{score}{reward}</div>',
            section("tags", "By kind of prompt", tables.tags(run)),
            section("samples", "Before, during, after", (f"<p>{how}</p>" if how else "") + grids.sample_grid(run)),
            section("guards", "Guards", tables.guards(run)),
            section("timings", "Where the time goes", tables.timings(run)),
            section("judges", "What the judges cost", spent) if (spent := judges.spending(run)) else "",
            section("metrics", "Other metrics", curves.small_curves(run)),
            section("recipe", "Recipe", tables.recipe(run)),
            section("environment", "Environment", tables.environment(run)),
        )
    )
