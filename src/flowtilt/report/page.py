"""The page of a run: its sections in order."""

from flowtilt.report import curves, grids, judges, tables, verdict
from flowtilt.report.document import document, section
from flowtilt.report.loading import Run
from flowtilt.report.numbers import counted


def page(run: Run) -> str:
    """The report of a run as HTML."""
    title = f"{run.name}: {verdict.sentence(run, verdict.verdict(run))}"
    footer = f"<footer>Written by flowtilt after {counted(run.step, 'rollout')}.</footer>"
    return document(title, f"{verdict.headline(run)}\n{_sections(run)}\n{footer}", script="page.js")


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
