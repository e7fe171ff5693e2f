"""The curves of a run: which there are, on which clock, and what each of them means."""

import json
import re
from html import escape

import numpy as np

from flowtilt.report.axes import unit_axis, value_axis
from flowtilt.report.charts import Chart, Curve
from flowtilt.report.clock import FEW, Clock, clock
from flowtilt.report.loading import Run
from flowtilt.report.markup import none_yet
from flowtilt.report.numbers import Array, counted, number, short
from flowtilt.report.verdict import score_name

SPENT = {"calls": "Requests that were made of", "tokens": "Tokens read and written by", "cost": "Money spent on"}
"""What a judge has cost, by the last part of its metric's name."""
MEANINGS = {
    "loss": "The objective. Its target moves with the policy, so it need not fall while the reward rises.",
    "grad_norm": "Length of the gradient before it is clipped; a sudden leap means an unstable update.",
    "deviation": "Mean (v<sub>θ</sub> − v<sub>old</sub>)²: how far the trained network is ahead of the one that samples.",
    "kl": "Mean (v<sub>θ</sub> − v<sub>ref</sub>)², for FlowGRPO of a solver step's mean: how far the network has moved from the base.",
    "norm_ratio": "|v<sub>θ</sub>| / |v<sub>ref</sub>|; where it stays above 1.05, look at the images for lost quality.",
    "log_ratio": "|log p<sub>θ</sub> − log p<sub>old</sub>| by the lower bound: how far an update outruns the policy that samples.",
    "anchor": "Mean (v<sub>θ</sub> − v<sub>old</sub>)²: what the pull to the policy that samples acts on.",
    "ratio_off": "How far the likelihood ratio is from 1 on average; compare with the clip range.",
    "clip_fraction": "Share of ratios beyond the clip range; those of a rollout's first update are 1.",
    "groups/without_variance": "Share of prompts whose images all scored alike; these teach nothing.",
    "images/saturated": "Share of pixel values at the end of their range.",
    "images/blank": "Share of images of one colour.",
    "images/diversity": "How far a prompt's images lie from their mean; falls as wrong images go, and collapses towards 0.",
    "groups/identical_images": "Share of prompts whose images are all the same.",
    "fake_loss": "How well the fake score predicts what the student samples; of the noisy levels most cannot be predicted.",
    "teacher_gap": "Mean (v<sub>fake</sub> − v<sub>teacher</sub>)²: how far the student's images are from the teacher's distribution.",
    "backprop_reward": "The rewards that the last solver step follows by their gradient, in a weighted sum.",
    "fake_consistency": "How far the fake score's denoiser is from its own answer one solver step later; an estimate with both signs.",
    "fake_grad_norm": "Length of the fake score's gradient before it is clipped.",
    "lr": "Learning rate of AdamW.",
    "images_per_second": "Images sampled and trained on, per second.",
    "images_per_second_per_device": "The same for each device.",
    "prompts/unique": "Different captions among the prompts of a rollout.",
    "skipped_updates": "Updates left out: no image with an advantage, or a gradient that is not finite.",
    "reward/total_std": "Spread of the reward over the images of a rollout.",
}
# shown elsewhere, or no more than the clock
NOT_SMALL = {"rollout", "seconds", "network_evaluations", "optimizer_step", "reward/total"}
UNIT = "rollout"


def _reads(time: Clock, steps: Array, values: Array) -> list[str]:
    return [f"{short(value, 4)} · {time.read(step)}" for value, step in zip(values, steps, strict=True)]


def _marks(run: Run) -> list[tuple[float, str]]:
    return [
        (number(g, "rollout"), f"{g.get('guard', 'guard')} at rollout {number(g, 'rollout'):,.0f}: {g.get('message', '')}")
        for g in run.guards
    ]


def _spoken(what: str, steps: Array, values: Array) -> str:
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        return f"{what}: no values"
    first, last = known[0], known[-1]
    return f"{what}: {short(float(values[first]))} at rollout {steps[first]:.0f}, {short(float(values[last]))} at rollout {steps[last]:.0f}"


def score_curve(run: Run) -> str:
    """Score of every evaluation against rollouts, with its interval where there is one."""
    if not run.evaluations:
        return none_yet("No evaluation yet: the first one is of the base, before the first rollout.")
    time = clock(run)
    steps = np.array([number(record, "rollout") for record in run.evaluations])
    scores = np.array([number(record, "score") for record in run.evaluations])
    band = None
    if any(e.has_interval for e in run.estimates):
        band = (np.array([e.low for e in run.estimates]), np.array([e.high for e in run.estimates]))
    curve = Curve(steps, scores, dots=True, band=band, read=_reads(time, steps, scores))
    known = scores[np.isfinite(scores)]
    share = run.score_range == (0, 1) and len(known) > 0 and 0 <= known.min() <= known.max() <= 1
    axis = unit_axis() if share else value_axis([scores, *(band or ())])
    chart = Chart(_spoken(score_name(run), steps, scores), [curve], time.axis(), axis, UNIT, _marks(run), clock="ticks")
    images = {int(number(record, "images")) for record in run.evaluations if number(record, "images") >= 1}
    mean = f"mean over {counted(images.pop(), 'image')}" if len(images) == 1 else "mean over its images"
    seen = "held-out prompts" if run.scores_held_out_prompts else "the training prompts"
    about = (
        "The band is the 95% interval, by a bootstrap over prompts; where all prompts scored alike, the exact bound over prompts."
        if band
        else f"There is no band: {_why_no_band(run)}."
    )
    said = f"How good images are on {seen}. Each dot is one evaluation, the {mean}, always of the same prompts and noise."
    return f"{chart.svg()}<p>{said} {about}</p>"


def _why_no_band(run: Run) -> str:
    return next((e.why_none for e in reversed(run.estimates) if e.why_none), "there is no score")


def running_mean(values: Array, window: int) -> Array:
    """Mean over the `window` values round each, NaN where there is none; [N] -> [N]."""
    known = np.isfinite(values)
    kernel = np.ones(window)
    count = np.convolve(known, kernel, "same")
    total = np.convolve(np.where(known, values, 0.0), kernel, "same")
    return np.where(known, total / np.maximum(count, 1), np.nan)


def _window(values: Array) -> int:
    return max(5, len(values) // 20)


def _with_mean(x: Array, values: Array, reads: list[str]) -> list[Curve]:
    """A curve, and over it its running mean once there are enough points for one."""
    if len(values) < 20:
        return [Curve(x, values, read=reads)]
    return [Curve(x, values, "faint", read=reads), Curve(x, running_mean(values, _window(values)))]


def reward_curve(run: Run) -> str:
    """Training reward of every rollout, and its running mean where there are enough of them."""
    name = "reward/total" if "reward/total" in run.metric_names else next((n for n in run.metric_names if n.startswith("reward/")), None)
    if name is None:
        nothing = "No rollout is logged yet, so there is no training reward."
        return none_yet("This run trains on no reward." if run.metric_names else nothing)
    time = clock(run)
    steps, rewards = run.series("rollout"), run.series(name)
    reads = _reads(time, steps, rewards)
    curves = _with_mean(steps, rewards, reads)
    smooth = f" The faint line is every rollout, the strong one a running mean over {_window(rewards)}." if len(curves) > 1 else ""
    chart = Chart(
        _spoken("training reward", steps, rewards),
        curves,
        time.axis(),
        value_axis([rewards]),
        UNIT,
        _marks(run),
        clock="ticks",
    )
    return f"{chart.svg()}<p>What training maximises: the mean reward of the images of each rollout.{smooth}</p>"


def small_curves(run: Run) -> str:
    """Every other logged metric: what is known comes first, with what it means."""
    names = [name for name in run.metric_names if name not in NOT_SMALL and not name.startswith("time/")]
    # a single reward is its own total
    names = [
        name
        for name in names
        if not (name.startswith("reward/") and np.array_equal(run.series(name), run.series("reward/total"), equal_nan=True))
    ]
    if not names:
        return none_yet("No further metrics are logged yet.")
    flat = {name: values[0] for name in names if (values := _known(run.series(name))).size and values.min() == values.max()}
    names = [name for name in names if name not in flat and _known(run.series(name)).size]
    order = list(MEANINGS)
    names.sort(key=lambda name: order.index(name) if name in MEANINGS else len(order))
    time = clock(run)
    steps = run.series("rollout")
    figures = []
    for name in names:
        values = run.series(name)
        lines = _with_mean(steps, values, _reads(time, steps, values))
        axes = (time.axis(FEW), value_axis([values], 3))
        chart = Chart(_spoken(name, steps, values), lines, *axes, UNIT, _marks(run), height=96, points=160, clock="few")
        figures.append(f'<figure class="small"><h3>{escape(name)}</h3>{chart.svg()}<figcaption>{meaning(name)}</figcaption></figure>')
    lines = f"<p>Faint lines are every rollout, strong ones running means over {_window(steps)}.</p>" if len(steps) >= 20 else ""
    shown = f'{lines}<div class="smalls">{"".join(figures)}</div>' if figures else ""
    same = ", ".join(f"{escape(name)} {short(float(value), 4)}" for name, value in flat.items())
    return f"{shown}<p>Constant so far: {same}.</p>" if same else shown


def _known(values: Array) -> Array:
    return values[np.isfinite(values)]


def meaning(name: str) -> str:
    """What a metric is, as HTML; "" where nothing is known of it."""
    if share := re.fullmatch(r"reward/top_(\d+)", name):
        return f"Mean reward of each prompt's best {share[1]} % of the images, at least one."
    if spread := re.fullmatch(r"reward/(.+)_std", name):
        return MEANINGS.get(name) or f"Standard deviation of {escape(spread[1])} over the images of a rollout."
    if lacking := re.fullmatch(r"missing/(.+)", name):
        return f"Images that {escape(lacking[1])} gave no score."
    if paid := re.fullmatch(r"spent/(.+)/(calls|tokens|cost)", name):
        return f"{SPENT[paid[2]]} {escape(paid[1])} so far, its evaluations included."
    return MEANINGS.get(name, "")


def axis_choice(run: Run) -> str:
    """Where the page's script lets a reader choose what curves stand on; nothing is shown without the script."""
    axes = clock(run).choices()
    if len(axes) < 2 or not (run.metrics or run.evaluations):
        return ""
    data = escape(json.dumps(axes, ensure_ascii=False, separators=(",", ":")))
    return f'<div class="axis-choice" role="radiogroup" aria-label="What curves stand on" hidden data-axes="{data}"></div>'
