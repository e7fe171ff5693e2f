"""What is best read as a list or a table: tags, guards, timings, the recipe, the environment."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from flowtilt.estimate import EXACT, FEW, FEWEST, Estimate
from flowtilt.io.run_folder import RunFolder
from flowtilt.report.bars import Scale, bars, divided_bar, scale_of, swatch
from flowtilt.report.image_scores import tag_estimates
from flowtilt.report.loading import Run
from flowtilt.report.markup import flat_table, folded, none_yet, scrolling
from flowtilt.report.numbers import decimals_apart, duration, fixed, number, short

PHASES = {
    "encode": "reading the captions",
    "sample": "sampling the images",
    "decode": "latents to pixels",
    "reward": "scoring them",
    "train": "loss, gradient, optimizer",
    "sync": "waiting for other devices",
    "other": "everything else",
}


def evaluations(run: Run) -> str:
    """The score curve as a table, with the other rewards that were measured."""
    if not run.evaluations:
        return ""
    rewards = [r["rewards"] if isinstance(r.get("rewards"), dict) else {} for r in run.evaluations]
    columns = {"score": [number(record, "score") for record in run.evaluations]}
    for name in dict.fromkeys(name for measured in rewards for name in measured):
        column = [number(measured, name) for measured in rewards]
        if not np.array_equal(column, columns["score"], equal_nan=True):
            columns[name] = column
    rows = []
    for i, record in enumerate(run.evaluations):
        seconds = number(record, "seconds")
        e = run.estimates[i]
        between = f"{fixed(e.low, 4)} to {fixed(e.high, 4)}" if e.has_interval else "–"
        cells = [f"{record['rollout']:,.0f}", duration(seconds) if math.isfinite(seconds) else "–"]
        cells += [*(fixed(column[i], 4) for column in columns.values()), fixed(number(record, "images"), 0), between]
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in ("rollout", "training", *columns, "images", "95% interval"))
    table = f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return folded("The same as a table", scrolling("Evaluations", table))


def tags(run: Run) -> str:
    """Score of each tag before and after, with its interval."""
    measured = [(number(record, "rollout"), of) for record in run.evaluations if (of := tag_estimates(record))]
    if not measured:
        return none_yet("There are no scores by tag: no evaluation yet, or its prompts carry no tags.")
    (first, before), (last, after) = measured[0], measured[-1]
    looks = [("after", after)] if first == last else [("before", before), ("after", after)]
    shown = [of[tag] for _, of in looks for tag in after if tag in of]
    scale = scale_of(shown)
    rows = "".join(_tag_row(tag, [(look, of[tag]) for look, of in looks if tag in of], scale) for tag in after)
    said = ["The same score as above, for each kind of prompt by itself."]
    said += ["In brackets is the 95% interval over its prompts."] if any(e.has_interval for e in shown) else []
    few = f"a kind has fewer than {FEWEST} prompts"
    reasons = dict.fromkeys(few if e.kind == FEW else e.why_none for e in shown if e.why_none)
    said += [f"No interval where {few}." if why == few else f"No interval: {why}." for why in reasons]
    if first == last:
        said.insert(0, f"Only rollout {first:,.0f} has been evaluated so far.")
    else:
        keys = f'<span class="key before"></span> rollout {first:,.0f} <span class="key after"></span> rollout {last:,.0f}.'
        said.insert(0, keys)
    return f'<div class="tag-rows">{rows}</div><p>{" ".join(said)}</p>'


def _tag_row(tag: str, values: Sequence[tuple[str, Estimate]], scale: Scale) -> str:
    decimals = decimals_apart([e.value for _, e in values])
    lines = " ".join(f'<span class="{look}">{_bracketed(e, decimals)}</span>' for look, e in values)
    name = escape(tag.replace("_", " "))
    return f'<div class="tag-row"><span class="tag-name">{name}</span>{bars(values, scale)}<span class="tag-value">{lines}</span></div>'


def _bracketed(estimate: Estimate, decimals: int) -> str:
    """0.82 [0.75, 0.89], without brackets where there is no interval."""
    ends = f"[{fixed(estimate.low, decimals)}, {fixed(estimate.high, decimals)}]" if estimate.has_interval else ""
    exact = " exact" if estimate.has_interval and estimate.kind == EXACT else ""
    return f"<b>{fixed(estimate.value, decimals)}</b>" + (f' <span class="interval">{ends}{exact}</span>' if ends else "")


def guards(run: Run) -> str:
    """What the guards reported, which the curves show as dashed lines."""
    if run.recipe.get("guards") == "off":
        return none_yet("Guards were off in this run.")
    if not run.guards:
        return none_yet("No guard fired.")
    told = [(str(g.get("guard", "guard")), number(g, "rollout"), str(g.get("message", ""))) for g in run.guards]
    rows = [f"<li><b>{escape(name)}</b> at rollout {at:,.0f}: {escape(message)}</li>" for name, at, message in told]
    return f'<ul class="guards">{"".join(rows)}</ul><p>Dashed lines mark these rollouts on every curve.</p>'


def timings(run: Run) -> str:
    """Where the time of a rollout goes, on average over all rollouts."""
    names = [name for name in run.metric_names if name.startswith("time/")]
    means = {name.removeprefix("time/"): _mean(run, name) for name in names}
    means = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    total = sum(means.values())
    if not total > 0:
        return none_yet("No timings are logged yet.")
    decimals = min(3, max(1, 2 - math.floor(math.log10(total))))
    parts = [(name, mean / total) for name, mean in means.items()]
    rows = [
        f'<tr><th scope="row">{swatch(i)} {escape(name)} <span class="quiet">{PHASES.get(name, "")}</span></th>'
        f"<td>{fixed(means[name], decimals)}</td><td>{share:.0%}</td></tr>"
        for i, (name, share) in enumerate(parts)
    ]
    head = "<thead><tr><th>phase</th><th>seconds per rollout</th><th>share</th></tr></thead>"
    foot = f'<tfoot><tr><th scope="row">whole rollout</th><td>{fixed(total, decimals)}</td><td>100%</td></tr></tfoot>'
    table = f'<table class="numbers phases">{head}<tbody>{"".join(rows)}</tbody>{foot}</table>'
    return f"{divided_bar(parts)}{scrolling('Timings', table)}<p>{' '.join(_pace(run))}</p>"


def _mean(run: Run, name: str) -> float:
    values = run.series(name)
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def _pace(run: Run) -> list[str]:
    said = []
    rates = run.series("images_per_second")
    rates = rates[np.isfinite(rates)]
    if len(rates):
        said.append(f"{short(float(np.median(rates)))} images per second (median rollout).")
    if math.isfinite(run.seconds):
        said.append(f"{duration(run.seconds)} of training in all.")
    passes = run.series("network_evaluations")
    passes = passes[np.isfinite(passes)]
    if len(passes):
        said.append(f"{short(float(passes[-1]))} network evaluations.")
    return said


def recipe(run: Run) -> str:
    """The resolved recipe, word for word."""
    if not run.recipe_text:
        return none_yet("The folder holds no recipe.toml.")
    code = f'<pre tabindex="0"><code>{escape(run.recipe_text)}</code></pre>'
    return folded("recipe.toml, which can be trained again as it is", code)


def environment(run: Run) -> str:
    """Versions, device, command: flattened."""
    if not run.environment:
        return none_yet("The folder holds no environment.json.")
    return folded(RunFolder.environment, flat_table("Environment", run.environment))
