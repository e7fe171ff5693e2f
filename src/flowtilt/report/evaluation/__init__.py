"""The page of an evaluation: one HTML file that opens offline. No torch here."""

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from flowtilt.errors import UserError
from flowtilt.io.files import write_atomic
from flowtilt.io.run_folder import EvaluationFolder
from flowtilt.report.document import document, section
from flowtilt.report.evaluation import extremes, tables
from flowtilt.report.evaluation.headline import headline, subject
from flowtilt.report.evaluation.loading import Results, ScoredImage, load
from flowtilt.report.markup import flat_table, folded, none_yet


def write_evaluation_page(folder: Path) -> Path:
    """Writes `folder`/report.html from results.json, scores.jsonl and the pictures that it names, and returns its path.

    An older page stays whole until the new one replaces it.

    Raises:
        UserError: there is no results.json, the disk is full or the folder cannot be written.
    """
    if not os.path.isfile(EvaluationFolder(folder).results):
        raise UserError(f"evaluation {folder}: no {EvaluationFolder.results}; give the folder of an evaluation that has ended")
    target = EvaluationFolder(folder).report
    write_atomic(target, page(*load(folder)))
    return target


def page(results: Results, images: Sequence[ScoredImage]) -> str:
    """The whole page as HTML."""
    body = f"{headline(results)}\n{_sections(results, images)}\n<footer>Written by flowtilt.</footer>"
    return document(f"{subject(results.protocol)}: evaluation", body, styles=("page.css", "evaluation.css"))


def _sections(results: Results, images: Sequence[ScoredImage]) -> str:
    """Every section, each saying so in a sentence where it has nothing to show."""
    tags = "".join(tables.tags(one, results) for one in results.sets)
    chosen = "".join(extremes.extremes(one, images, results, unfolded=place == 0) for place, one in enumerate(results.sets))
    unscored = "".join(extremes.unscored(one, images, results) for one in results.sets)
    parts = [
        ("scores", "Scores", tables.means(results)),
        ("differences", "Tuned minus base", tables.differences(results) if results.compares else ""),
        ("tags", "By tag", tags),
        ("images", "Lowest and highest", chosen or none_yet("There are no scores to choose images by.")),
        ("missing", "Images without a score", unscored or none_yet(_none_missing(results, images))),
        ("left-out", "Left out", _left_out(results)),
        ("protocol", "Protocol", _protocol(results)),
    ]
    return "\n".join(section(name, title, body) for name, title, body in parts if body)


def _none_missing(results: Results, images: Sequence[ScoredImage]) -> str:
    if any(summary.overall.missing for one in results.sets for column in one.columns for summary in column.of.values()):
        return "Scores are missing, but scores.jsonl does not say of which images."
    return "Every image has every score." if images else "The folder's scores.jsonl lists no images."


def _left_out(results: Results) -> str:
    rows = "".join(f"<li><b>{escape(reward)}</b> on {escape(name)}: {escape(why)}</li>" for name, reward, why in results.left_out)
    return f'<ul class="listed">{rows}</ul>' if rows else ""


def _protocol(results: Results) -> str:
    if not results.protocol:
        return none_yet("The folder's results hold no protocol.")
    return folded("All that the scores depend on", flat_table("Protocol", results.protocol))
