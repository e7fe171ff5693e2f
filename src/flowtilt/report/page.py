"""The page: sections in order, in one file that loads nothing from anywhere."""

import base64
import hashlib
from html import escape
from importlib import resources

from flowtilt.report import curves, grids, tables, verdict
from flowtilt.report.loading import Run
from flowtilt.report.numbers import counted


def page(run: Run) -> str:
    """The report of a run as HTML."""
    style, script = _asset("page.css"), _asset("page.js")
    title = f"{run.name}: {verdict.sentence(run, verdict.verdict(run))}"
    # whatever a prompt or a recipe contains, nothing but this one script runs and nothing is fetched
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n{verdict.headline(run)}\n{_sections(run)}\n"
        f"<footer>Written by flowtilt after {counted(run.step, 'step')}.</footer>\n</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _sections(run: Run) -> str:
    """Every section, each saying so in a sentence where it has nothing to show."""
    how = "Each card is one prompt, every image in it from the same noise." if run.samples else ""
    score = _section("score", verdict.score_name(run).capitalize(), curves.score_curve(run) + tables.evaluations(run))
    reward = _section("reward", "Training reward", curves.reward_curve(run))
    return "\n".join(
        (
            f'<div class="two">{score}{reward}</div>',
            _section("tags", "By kind of prompt", tables.tags(run)),
            _section("samples", "Before, during, after", (f"<p>{how}</p>" if how else "") + grids.sample_grid(run)),
            _section("guards", "Guards", tables.guards(run)),
            _section("timings", "Where the time goes", tables.timings(run)),
            _section("metrics", "Other metrics", curves.small_curves(run)),
            _section("recipe", "Recipe", tables.recipe(run)),
            _section("environment", "Environment", tables.environment(run)),
        )
    )


def _section(name: str, title: str, body: str) -> str:
    return f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{escape(title)}</h2>\n{body}</section>'


def _asset(name: str) -> str:
    return resources.files("flowtilt.report").joinpath(name).read_text(encoding="utf-8")
