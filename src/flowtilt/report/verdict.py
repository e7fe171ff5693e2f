"""What the run came to, in one sentence, two numbers and the protocol they were measured by."""

import math
from dataclasses import dataclass
from html import escape

from flowtilt.report.loading import Record, Run
from flowtilt.report.numbers import counted, decimals_apart, duration, fixed, number, wilson


@dataclass(frozen=True)
class Score:
    """A mean over `images` values (0 where not known), with its 95 % interval where one can be given."""

    step: int
    value: float
    images: int
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Verdict:
    """The score of the base and of the newest weights; none where not measured."""

    before: Score | None
    after: Score | None

    @property
    def decimals(self) -> int:
        return decimals_apart([score.value for score in (self.before, self.after) if score])

    @property
    def overlap(self) -> bool:
        """Whether the intervals leave room for no change at all."""
        if not (self.before and self.after and self.before.interval and self.after.interval):
            return False
        return self.before.interval[0] <= self.after.interval[1] and self.after.interval[0] <= self.before.interval[1]


def has_intervals(run: Run) -> bool:
    """Whether all scores are in [0, 1] and say of how many images they are the mean."""
    scores = [number(record, "score") for record in run.evaluations]
    known = [value for value in scores if math.isfinite(value)]
    return bool(known) and all(0 <= value <= 1 for value in known) and all(number(record, "images") >= 1 for record in run.evaluations)


def verdict(run: Run) -> Verdict:
    """Before is step 0, after the newest evaluation; a summary stands in where evaluations are missing."""
    intervals = has_intervals(run)
    scored = [_score(record, intervals) for record in run.evaluations if math.isfinite(number(record, "score"))]
    before = scored[0] if scored and scored[0].step == 0 else None
    after = scored[-1] if scored and scored[-1].step > 0 else None
    told = run.summary.get("score")
    if run.finished and isinstance(told, dict):
        before = before or _told(told, "before", 0)
        after = after or _told(told, "after", run.step)
    return Verdict(before, after)


def _score(record: Record, intervals: bool) -> Score:
    value, images = number(record, "score"), number(record, "images")
    return Score(int(record["step"]), value, int(images) if images >= 1 else 0, wilson(value, images) if intervals else None)


def _told(told: Record, key: str, step: int) -> Score | None:
    value = number(told, key)
    return Score(step, value, 0, None) if math.isfinite(value) else None


def score_name(run: Run) -> str:
    return "held-out score" if run.scores_held_out_prompts else "score on the training prompts"


def progress(run: Run) -> str:
    """60 steps, or 17 of 60 steps where more are planned."""
    if not run.finished and run.planned_steps and run.planned_steps > run.step:
        return f"{run.step:,} of {counted(run.planned_steps, 'step')}"
    return counted(run.step, "step")


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
    by = f"in {progress(run)}{_took(run)}" if run.finished else f"by step {after.step:,}{of}"
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
    state = "finished" if run.finished else f"not finished: still going, or interrupted, at {progress(run)}{_took(run)}"
    seed = run.summary.get("seed", run.recipe.get("seed"))
    about = ["flowtilt", *([f"seed {seed}"] if isinstance(seed, int) else []), state]
    numbers = [_big("before", result.before, result.decimals), '<div class="arrow" aria-hidden="true">→</div>']
    numbers.append(_big("after" if run.finished else "so far", result.after, result.decimals))
    notes = []
    if result.overlap:
        notes.append("The two 95% intervals overlap, so the change may be chance.")
    if run.guards:
        notes.append(f'<a href="#guards">{counted(len(run.guards), "guard")} fired.</a>')
    said = escape(sentence(run, result)).replace("held-out", '<span class="whole">held-out</span>')
    measured = result.before or result.after
    parts = [
        f'<p class="about">{" · ".join(map(escape, about))}</p>',
        f'<h1><span class="name">{escape(run.name)}:</span> {said}</h1>',
        f'<div class="result">{"".join(numbers)}</div>' if measured else "",
        *(f'<p class="caution">{note}</p>' for note in notes),
        f'<p class="protocol">{_protocol(run)}</p>' if measured else "",
    ]
    return f"<header>{''.join(parts)}</header>"


def _big(name: str, score: Score | None, decimals: int) -> str:
    value, more = "–", ["not measured yet" if name == "so far" else "not measured"]
    if score:
        value = fixed(score.value, decimals)
        more = [f"step {score.step:,}"] if name == "so far" else []
        more += [counted(score.images, "image")] if score.images else []
        more += ["95% interval {} to {}".format(*(fixed(edge, decimals) for edge in score.interval))] if score.interval else []
    look = "big newest" if score and name != "before" else "big"
    return f'<div class="{look}"><span>{name}</span><strong>{value}</strong><span>{", ".join(more)}</span></div>'


def _protocol(run: Run) -> str:
    rewards = next((list(r["rewards"]) for r in run.evaluations if isinstance(r.get("rewards"), dict) and r["rewards"]), [])
    judged = next((r["column"] for r in run.evaluations if r.get("column")), rewards[0] if rewards else None)
    what = f"Score: <b>{escape(str(judged))}</b>. " if judged else ""
    told = run.summary.get("protocol")
    return what + (f"Protocol: {escape(str(told))}." if told else "The protocol is written down when the run ends.")
