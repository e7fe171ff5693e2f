"""Draws the figures of docs/explain/, and of half precision, from benchmarks/results/*.json.

`python docs/tools/figures.py` writes docs/images/methods/NAME.svg.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
RESULTS, OUT = ROOT / "benchmarks" / "results", ROOT / "docs" / "images" / "methods"
Curve = Sequence[tuple[float, float]]
Lines = dict[str, list[Curve]]
"""Curves of (network evaluations, score), one per seed, by label."""
COLOURS = ("#2459c9", "#98a1ab", "#d9892b", "#2f8f6b")
LABELS = {
    "nft": "DiffusionNFT",
    "grpo": "FlowGRPO",
    "grpo-fast": "FlowGRPO-Fast",
    "awm": "AWM",
    "epg": "EPG",
    "pepg": "PEPG",
    "ram": "RAM",
    "awr": "FlowAWR",
    "crd": "CRD",
    "dgpo": "DGPO",
    "dpo": "online DPO",
}
PAGES = {
    "nft": ("nft",),
    "grpo": ("grpo", "grpo-fast"),
    "awm": ("awm",),
    "elbo": ("epg", "pepg"),
    "ram": ("ram",),
    "awr": ("awr",),
    "crd": ("crd",),
    "dgpo": ("dgpo",),
}
"""Methods of the comparison on each page."""
FIRST_GUIDE = "objective.guide=[[0,2.0],[12,0.3],[24,0.0]]"
HALF = {
    "fp32": f"test {FIRST_GUIDE}",
    "bfloat16": f"test model.dtype=bfloat16 {FIRST_GUIDE}",
    "bfloat16, compiled": f"test model.dtype=bfloat16 model.compile=true {FIRST_GUIDE}",
}
"""playground-fast on a base of each precision, as docs/results/performance.md shows it."""
HALF_SEEDS = (0, 1, 2)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 360, 54, 150, 20, 50


def figures() -> dict[str, Lines]:
    """The curves of each figure for which there are results, by its name."""
    contest = _curves("head_to_head.json")
    found: dict[str, Lines] = {}
    for page, methods in PAGES.items():
        if all(method in contest for method in methods):
            lines = {LABELS[method]: contest[method] for method in methods}
            other = "grpo-fast" if page == "nft" else "nft"
            found[page] = lines | {LABELS[other]: contest[other]}
    steps = _curves("rtdmd.json")
    found["rtdmd"] = {"student (stage 1)": steps["cold"], "then stage 2": steps["rl"], "or few-step NFT": steps["nft"]}
    fast = json.loads((RESULTS / "fast.json").read_text())
    for page, label, part in (("guide", "playground-fast", "test"), ("mend", "MEND", "test playground-mend")):
        if part in fast:
            curves = [run["curve_evaluations_score"] for run in fast[part]["runs"]]
            found[page] = {label: curves, "DiffusionNFT": contest["nft"]}
    found["half"] = {label: _seeds(fast, part, HALF_SEEDS) for label, part in HALF.items() if part in fast}
    dpo = json.loads((RESULTS / "dpo.json").read_text())["test"]["playground-dpo"]
    share = dpo["network_evaluations"] / max(int(step) for step in dpo["scores"])
    found["dpo"] = {"offline DPO": [[(int(step) * share, score) for step, score in dpo["scores"].items()]], "DiffusionNFT": contest["nft"]}
    if "dpo" in contest:
        found["dpo"][LABELS["dpo"]] = contest["dpo"]
    return found


def _seeds(series: Mapping[str, Any], name: str, seeds: Sequence[int]) -> list[Curve]:
    return [run["curve_evaluations_score"] for run in series[name]["runs"] if run["seed"] in seeds]


def _curves(file: str) -> Lines:
    found: Lines = {}
    for entry in json.loads((RESULTS / file).read_text())["entries"]:
        found.setdefault(entry["method"], []).append(entry["curve_evaluations_score"])
    return found


def svg(lines: Lines, most: float | None = None) -> str:
    """A chart of score against network evaluations: each seed thin, the median bold.

    Args:
        most: where the x axis ends; none takes the longest curve.
    """
    most = most or max(x for curves in lines.values() for curve in curves for x, _ in curve)
    unit = next(step for step in (10_000, 20_000, 50_000, 100_000) if most / step <= 7)

    def place(x: float, y: float) -> str:
        across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return f"{LEFT + across * x / most:.1f},{TOP + down * (1 - y):.1f}"

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>']
    for tenth in range(0, 11, 2):
        x, y = place(0, tenth / 10).split(",")
        parts.append(f'<path d="M{x} {y}H{WIDTH - RIGHT}" stroke="#e4e4df"/>')
        parts.append(_text(LEFT - 8, float(y) + 4, f"{tenth / 10:g}", anchor="end"))
    for k in range(math.floor(most / unit) + 1):
        x, y = (float(value) for value in place(k * unit, 0).split(","))
        parts.append(_text(x, y + 18, f"{k * unit // 1000}"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "thousand network evaluations of training"))
    middle = (HEIGHT - BOTTOM + TOP) / 2
    parts.append(_text(14, middle, "strict score, test prompts", f' transform="rotate(-90 14 {middle})"'))
    ends: list[float] = []
    for (label, curves), colour in zip(lines.items(), COLOURS, strict=False):
        shown = [[point for point in curve if point[0] <= most] for curve in curves]
        middle = _median(shown)
        for curve in shown:
            thin = len(shown) > 1
            parts.append(_line([place(*point) for point in curve], colour, 1 if thin else 2.5, 0.5 if thin else 1))
        if len(shown) > 1:
            parts.append(_line([place(*point) for point in middle], colour, 2.5, 1))
        x, y = (float(value) for value in place(*middle[-1]).split(","))
        while any(abs(y - other) < 15 for other in ends):
            y += 15
        ends.append(y)
        left = min(x, WIDTH - RIGHT) + 8
        parts.append(_text(left, y + 4, label, f' fill="{colour}" font-weight="600"', anchor="start"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    return f'{head} font-family="system-ui, sans-serif" font-size="12" fill="#1c2024">{"".join(parts)}</svg>\n'


def _text(x: float, y: float, text: str, more: str = "", anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{text}</text>'


def _line(points: Sequence[str], colour: str, width: float, opacity: float) -> str:
    return f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="{width:g}" opacity="{opacity:g}"/>'


def _median(curves: Sequence[Curve]) -> Curve:
    """The median curve at the number of each evaluation; on straight lines between them where seeds were evaluated unequally often."""
    if len({len(curve) for curve in curves}) == 1:
        return [(median(x for x, _ in points), median(y for _, y in points)) for points in zip(*curves, strict=True)]
    end = min(curve[-1][0] for curve in curves)
    costs = [x for x, _ in min(curves, key=len) if x < end] + [end]
    return [(x, median(float(np.interp(x, *zip(*curve, strict=True))) for curve in curves)) for x in costs]


def main() -> int:
    OUT.mkdir(parents=True, exist_ok=True)
    for name, lines in figures().items():
        (OUT / f"{name}.svg").write_text(svg(lines), encoding="utf-8")
        print(OUT / f"{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
