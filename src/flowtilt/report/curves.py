"""The curves of a run: which there are, on which clock, and what each of them means."""

import math
from html import escape

import numpy as np

from flowtilt.report.axes import unit_axis, value_axis
from flowtilt.report.charts import Chart, Curve
from flowtilt.report.clock import Clock, clock
from flowtilt.report.loading import Run
from flowtilt.report.markup import none_yet
from flowtilt.report.numbers import Array, counted, number, short, wilson
from flowtilt.report.verdict import has_intervals, score_name

MEANINGS = {
    "loss": "The objective. Its target moves with the policy, so it need not fall while the reward rises.",
    "grad_norm": "Length of the gradient before it is clipped; a sudden leap means an unstable step.",
    "deviation": "Mean (v<sub>θ</sub> − v<sub>old</sub>)²: how far the trained network is ahead of the one that draws the images.",
    "kl": "Mean (v<sub>θ</sub> − v<sub>ref</sub>)², for FlowGRPO of a step's mean: how far the network has moved from the base.",
    "norm_ratio": "|v<sub>θ</sub>| / |v<sub>ref</sub>|; where it stays above 1.05, look at the images for lost quality.",
    "log_ratio": "|log p<sub>θ</sub> − log p<sub>old</sub>| by the lower bound: how far an update outruns the one that draws the images.",
    "anchor": "Mean (v<sub>θ</sub> − v<sub>old</sub>)²: what the pull to the policy that draws the images acts on.",
    "ratio_off": "How far the likelihood ratio is from 1 on average; compare with the clip range.",
    "clip_fraction": "Share of ratios beyond the clip range; those of a step's first update are 1.",
    "groups/without_variance": "Share of prompts whose images all scored alike; these teach nothing.",
    "images/saturated": "Share of pixel values at the end of their range.",
    "images/blank": "Share of images of one colour.",
    "images/diversity": "How far a prompt's images lie from their mean; falls as wrong images go, and collapses towards 0.",
    "groups/identical_images": "Share of prompts whose images are all the same.",
    "fake_loss": "How well the fake score predicts what the student draws; of the noisy levels most cannot be predicted.",
    "teacher_gap": "Mean (v<sub>fake</sub> − v<sub>teacher</sub>)²: how far the student's images are from the teacher's distribution.",
    "backprop_reward": "The rewards that the last step follows by their gradient, in a weighted sum.",
    "fake_consistency": "How far the fake score's denoiser is from agreeing with itself one step later; an estimate with both signs.",
    "fake_grad_norm": "Length of the fake score's gradient before it is clipped.",
    "lr": "Learning rate of AdamW.",
    "images_per_second": "Images drawn and trained on, per second.",
    "reward/total_std": "Spread of the reward over the images of a step.",
}
# shown elsewhere, or no more than the clock
NOT_SMALL = {"step", "seconds", "network_evaluations", "reward/total"}


def _reads(time: Clock, steps: Array, values: Array) -> list[str]:
    at = ["" if time.unit == "step" else f" · {short(time.at(step))} {time.unit}" for step in steps]
    return [f"{short(value, 4)} · step {step:,.0f}{when}" for value, step, when in zip(values, steps, at, strict=True)]


def _marks(run: Run, time: Clock) -> list[tuple[float, str]]:
    return [
        (time.at(number(g, "step")), f"{g.get('guard', 'guard')} at step {number(g, 'step'):,.0f}: {g.get('message', '')}")
        for g in run.guards
    ]


def _spoken(what: str, steps: Array, values: Array) -> str:
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        return f"{what}: no values"
    first, last = known[0], known[-1]
    return f"{what}: {short(float(values[first]))} at step {steps[first]:.0f}, {short(float(values[last]))} at step {steps[last]:.0f}"


def score_curve(run: Run) -> str:
    """Score of every evaluation against training time, with its interval where there is one."""
    if not run.evaluations:
        return none_yet("No evaluation yet: the first one is of the base, at step 0.")
    time = clock(run)
    steps = np.array([number(record, "step") for record in run.evaluations])
    scores = np.array([number(record, "score") for record in run.evaluations])
    band = None
    if has_intervals(run):
        edges = [
            wilson(s, number(r, "images")) if math.isfinite(s) else (math.nan, math.nan)
            for s, r in zip(scores, run.evaluations, strict=True)
        ]
        band = (np.array([low for low, _ in edges]), np.array([high for _, high in edges]))
    curve = Curve(np.array([time.at(s) for s in steps]), scores, dots=True, band=band, read=_reads(time, steps, scores))
    axis = unit_axis() if band else value_axis([scores])
    chart = Chart(_spoken(score_name(run), steps, scores), [curve], time.axis(), axis, time.unit, time.step_ticks(), _marks(run, time))
    images = {int(number(record, "images")) for record in run.evaluations if number(record, "images") >= 1}
    mean = f"mean over {counted(images.pop(), 'image')}" if len(images) == 1 else "mean over its images"
    seen = "held-out prompts" if run.scores_held_out_prompts else "the training prompts"
    about = (
        "The band is the 95% Wilson interval." if band else "There is no band, as not all scores are known to be means of values in 0 to 1."
    )
    said = (
        f"How good images are on {seen}, against {time.name}. Each dot is one evaluation, the {mean}, always of the same prompts and noise."
    )
    return f"{chart.svg()}<p>{said} {about}</p>"


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
    """Training reward of every step, and its running mean where there are enough of them."""
    name = "reward/total" if "reward/total" in run.metric_names else next((n for n in run.metric_names if n.startswith("reward/")), None)
    if name is None:
        nothing = "No step is logged yet, so there is no training reward."
        return none_yet("This run trains on no reward." if run.metric_names else nothing)
    time = clock(run)
    steps, rewards = run.series("step"), run.series(name)
    x = np.array([time.at(s) for s in steps])
    reads = _reads(time, steps, rewards)
    curves = _with_mean(x, rewards, reads)
    smooth = f" The faint line is every step, the strong one a running mean over {_window(rewards)}." if len(curves) > 1 else ""
    chart = Chart(
        _spoken("training reward", steps, rewards),
        curves,
        time.axis(),
        value_axis([rewards]),
        time.unit,
        time.step_ticks(),
        _marks(run, time),
    )
    return f"{chart.svg()}<p>What training maximises: the mean reward of the images drawn at each step, against {time.name}.{smooth}</p>"


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
    order = list(MEANINGS)
    names.sort(key=lambda name: order.index(name) if name in MEANINGS else len(order))
    time = clock(run)
    steps = run.series("step")
    x = np.array([time.at(s) for s in steps])
    figures = []
    for name in names:
        values = run.series(name)
        drawn = _with_mean(x, values, _reads(time, steps, values))
        axes = (time.axis(3), value_axis([values], 3))
        chart = Chart(_spoken(name, steps, values), drawn, *axes, time.unit, (), _marks(run, time), height=96, points=160)
        figures.append(
            f'<figure class="small"><h3>{escape(name)}</h3>{chart.svg()}<figcaption>{MEANINGS.get(name, "")}</figcaption></figure>'
        )
    lines = f"<p>Faint lines are every step, strong ones running means over {_window(steps)}.</p>" if len(steps) >= 20 else ""
    return f'{lines}<div class="smalls">{"".join(figures)}</div>'
