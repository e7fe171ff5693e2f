"""What the run came to, in one sentence, two numbers and the protocol they were measured by."""

import math
from dataclasses import dataclass
from html import escape

from flowtilt.config import held_out
from flowtilt.estimate import EXACT, Estimate
from flowtilt.report.loading import Record, Run
from flowtilt.report.numbers import counted, decimals_apart, duration, fixed, number
from flowtilt.report.reading import said

NEWS = ' <span class="news"></span>'
"""Where the page's script says how old the page is, of a run that goes on."""


@dataclass(frozen=True)
class Score:
    """The score after so many rollouts."""

    step: int
    of: Estimate

    @property
    def value(self) -> float:
        return self.of.value


@dataclass(frozen=True)
class Verdict:
    """The score of the base and of the newest weights; none where not measured."""

    before: Score | None
    after: Score | None

    @property
    def decimals(self) -> int:
        return decimals_apart([score.value for score in (self.before, self.after) if score])


def verdict(run: Run) -> Verdict:
    """Before is step 0, after the newest evaluation; a summary stands in where evaluations are missing."""
    scored = [Score(int(r["rollout"]), e) for r, e in zip(run.evaluations, run.estimates, strict=True) if e.known]
    before = scored[0] if scored and scored[0].step == 0 else None
    after = scored[-1] if scored and scored[-1].step > 0 else None
    summary = run.summary.get("score")
    if run.finished and isinstance(summary, dict):
        before = before or _summary_score(summary, "before", 0)
        after = after or _summary_score(summary, "after", run.step)
    return Verdict(before, after)


def _summary_score(summary: Record, key: str, step: int) -> Score | None:
    value = number(summary, key)
    return Score(step, Estimate(value)) if math.isfinite(value) else None


def interval(estimate: Estimate, decimals: int, signed: bool = False) -> str:
    """95% interval 0.25 to 0.37; why there is none; "" where the value is not known."""
    if not estimate.has_interval:
        return _none_because(estimate)
    ends = [f"{end:+,.{decimals}f}" if signed else fixed(end, decimals) for end in (estimate.low, estimate.high)]
    name = "exact 95% bound over prompts" if estimate.kind == EXACT else "95% interval"
    return f"{name} {ends[0]} to {ends[1]}"


def _none_because(estimate: Estimate) -> str:
    return f"no interval: {estimate.why_none}" if estimate.why_none else ""


def judged_change(run: Run) -> str:
    """What the paired difference of the newest evaluation and the base says, in one sentence; "" where there is none."""
    result, found = verdict(run), run.change
    if not (result.before and result.after and found.known):
        return ""
    if not found.value and not found.has_interval:
        return "The score did not change."
    decimals = max(result.decimals, decimals_apart([0.0, found.value]))
    value = f"{found.value:+,.{decimals}f}"
    if not found.has_interval:
        return f"The change is {value}. It has no interval ({found.why_none}), so nothing says whether it is chance."
    change = f"The change, prompt by prompt, is {value} ({interval(found, decimals, signed=True)})"
    return f"{change}: it may be chance, as the interval includes 0." if found.value and not found.side else f"{change}."


def score_name(run: Run) -> str:
    return held_out.score_name(run.scores_held_out_prompts)


def progress(run: Run) -> str:
    """60 rollouts, or 17 of 60 rollouts where more are planned."""
    if not run.finished and run.planned_steps and run.planned_steps > run.step:
        return f"{run.step:,} of {counted(run.planned_steps, 'rollout')}"
    return counted(run.step, "rollout")


def _took(run: Run) -> str:
    return f", {duration(run.seconds)} of training" if math.isfinite(run.seconds) and run.seconds > 0 else ""


def sentence(run: Run, result: Verdict) -> str:
    """The result in one sentence of plain text."""
    name, before, after = score_name(run), result.before, result.after
    yet = "" if run.finished else " yet"
    if after is None:
        if before:
            return f"the base has a {name} of {fixed(before.value, result.decimals)}; no later evaluation{yet}, {progress(run)} done."
        return f"no evaluation{yet}, {progress(run)} done." if run.step else "nothing is logged yet."
    now, of = fixed(after.value, result.decimals), f" of {run.planned_steps:,}" if run.planned_steps else ""
    by = f"in {progress(run)}{_took(run)}" if run.finished else f"by rollout {after.step:,}{of}"
    if before is None:
        return f"the {name} reached {now} {by}; the base was not evaluated."
    was = fixed(before.value, result.decimals)
    if was == now:
        return f"the {name} stayed at {now} {by}."
    ended, going = ("rose", "has risen") if after.value > before.value else ("fell", "has fallen")
    return f"the {name} {ended if run.finished else going} from {was} to {now} {by}."


def headline(run: Run) -> str:
    """The top of the page."""
    result = verdict(run)
    state = run.state if run.finished else f"{run.state} at {progress(run)}{_took(run)}"
    seed = run.summary.get("seed", run.recipe.get("seed"))
    about = ["flowtilt", *([f"seed {seed}"] if isinstance(seed, int) else []), state]
    numbers = [_big("before", result.before, result.decimals), '<div class="arrow" aria-hidden="true">→</div>']
    numbers.append(_big("after" if run.finished else "so far", result.after, result.decimals))
    changed = judged_change(run).replace(" -", " −").replace("(-", "(−")
    notes = []
    if run.lost:
        notes.append(f"Not all of the run's files could be read: {escape('; '.join(said(run.lost)))}.")
    if run.guards:
        notes.append(f'<a href="#guards">{counted(len(run.guards), "guard")} fired.</a>')
    text = escape(sentence(run, result)).replace("held-out", '<span class="whole">held-out</span>')
    measured = result.before or result.after
    parts = [
        f'<p class="about">{" · ".join(map(escape, about))}{NEWS if run.held else ""}</p>',
        f'<h1><span class="name">{escape(run.name)}:</span> {text}</h1>',
        f'<div class="result">{"".join(numbers)}</div>' if measured else "",
        f'<p class="{"" if run.change.side else "caution"}">{escape(changed)}</p>' if changed else "",
        *(f'<p class="caution">{note}</p>' for note in notes),
        f'<p class="protocol">{_protocol(run)}</p>' if measured else "",
    ]
    return f"<header>{''.join(parts)}</header>"


def _big(name: str, score: Score | None, decimals: int) -> str:
    value, more = "–", ["not measured yet" if name == "so far" else "not measured"]
    if score:
        value = fixed(score.value, decimals)
        more = [f"rollout {score.step:,}"] if name == "so far" else []
        more += [extent(score.of), interval(score.of, decimals)]
    look = "big newest" if score and name != "before" else "big"
    details = "".join(f"<span>{part}</span>" for part in more if part)
    return f'<div class="{look}"><span>{name}</span><strong>{value}</strong>{details}</div>'


def extent(estimate: Estimate) -> str:
    """240 images of 40 prompts; only what is known."""
    return " of ".join(counted(n, noun) for n, noun in ((estimate.images, "image"), (estimate.prompts, "prompt")) if n)


def _protocol(run: Run) -> str:
    rewards = next((list(r["rewards"]) for r in run.evaluations if isinstance(r.get("rewards"), dict) and r["rewards"]), [])
    judged = next((r["column"] for r in run.evaluations if r.get("column")), rewards[0] if rewards else None)
    what = f"Score: <b>{escape(str(judged))}</b>. " if judged else ""
    protocol = run.summary.get("protocol")
    return what + (f"Protocol: {escape(str(protocol))}." if protocol else "The protocol is written down when the run ends.")
