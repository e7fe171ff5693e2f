"""RTDMD's results as a table and as a picture."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from textwrap import wrap
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from contest.page import between, median, run_on, table
from flowtilt.build import evaluation_prompts, sampler_of, training_prompts
from flowtilt.config import load_recipe
from flowtilt.device.micro_batch import MicroBatch
from flowtilt.evaluate import generate, spread
from flowtilt.io.files import write_atomic
from flowtilt.io.images import to_pil
from flowtilt.lora.stacked import read_stack
from flowtilt.models.opening import open_model
from flowtilt.playground import verify
from flowtilt.policy.tuned_model import TunedModel
from flowtilt.report.compare.spans import span
from flowtilt.report.numbers import short
from flowtilt.sampling.sampler import Sampler

Record = dict[str, Any]
BEGIN, END = "<!-- results: written by benchmarks/rtdmd.py -->", "<!-- end of results -->"
LABELS = {"cold": "student, 4 steps", "rl": "student after stage 2, 4 steps", "nft": "student after few-step NFT, 4 steps"}
SHOWN = 10
TILE, GAP, MARGIN, HEAD = 96, 6, 190, 56
GREEN, GREY = (38, 150, 70), (214, 214, 214)
TEACHER = Sampler("euler", 20, 4.5)
"""The base with the guidance that playground-rtdmd-cold distils."""


def with_table(page: str, results: Record | None) -> str:
    """The page with its generated part made anew; without results it says so."""
    return between(page, BEGIN, END, _table(results) if results else "**Not run yet.** There is no `benchmarks/results/rtdmd.json`.")


def _table(results: Record) -> str:
    head = ["", "seeds", "network evaluations an image", "score", "held out", "network evaluations of training", "seconds"]
    told = results["teacher"]
    rows = [
        ["base, 20 steps", str(len(told)), "20", median([one["base"] for one in told]), "", "", ""],
        ["base, 4 steps", str(len(told)), "4", median([one["base in 4 steps"] for one in told]), "", "", ""],
        ["teacher: base with guidance, 20 steps", str(len(told)), "40", median([one["teacher"] for one in told]), "", "", ""],
    ]
    for name, label in LABELS.items():
        own = [entry for entry in results["entries"] if entry["method"] == name]
        if own:
            cost = short(span([entry["network_evaluations"] for entry in own]).value)
            seconds = short(span([entry["seconds"] for entry in own]).value)
            held_out = median([entry["held_out"] for entry in own])
            rows.append([label, str(len(own)), "4", median([entry["final_score"] for entry in own]), held_out, cost, seconds])
    return f"{run_on(results['entries'])}\n\n{table(head, rows)}"


def picture(target: Path, runs: Mapping[str, Path]) -> None:
    """Test prompts from the same noise: a row for the teacher and one for each run, framed where the verifier agrees."""
    recipe = load_recipe(next(iter(runs.values())) / "recipe.toml")
    prompts = evaluation_prompts(recipe, training_prompts(recipe))
    rows = spread(prompts, recipe.evaluate.images)[:SHOWN]
    size = MicroBatch("auto", "cpu")
    drawn = [("teacher, 20 steps, guided", generate(_stack(recipe, None), "base", prompts, rows, TEACHER, recipe.seed, size))]
    for name, run in runs.items():
        images = generate(_stack(recipe, run), "tuned", prompts, rows, sampler_of(recipe.evaluate), recipe.seed, size)
        drawn.append((LABELS[name], images))
    shown = [prompts[index] for index, _ in rows]
    buffer = BytesIO()
    _sheet([prompt.text for prompt in shown], drawn, [verify.score(images, shown) for _, images in drawn]).save(buffer, "PNG")
    write_atomic(target, buffer.getvalue())


def _stack(recipe: Any, run: Path | None) -> TunedModel:
    return TunedModel(open_model(recipe.model, torch.device("cpu")), read_stack([run]) if run else [])


def _sheet(texts: Sequence[str], drawn: Sequence[tuple[str, Tensor]], right: Sequence[Tensor]) -> Image.Image:
    step = TILE + 2 * GAP
    sheet = Image.new("RGB", (MARGIN + SHOWN * step, HEAD + len(drawn) * step), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for x, text in enumerate(texts):
        place = (MARGIN + x * step + step // 2, HEAD - 4)
        pen.multiline_text(place, "\n".join(wrap(text, 17)), "black", ImageFont.load_default(12), anchor="md", align="center")
    for y, ((label, images), scores) in enumerate(zip(drawn, right, strict=True)):
        pen.multiline_text((8, HEAD + y * step + TILE // 2), label.replace(", ", ",\n"), "black", font, anchor="lm")
        for x, (tile, score) in enumerate(zip(to_pil(images), scores.tolist(), strict=True)):
            left, top = MARGIN + x * step, HEAD + y * step
            pen.rectangle((left + 2, top + 2, left + step - 3, top + step - 3), fill=GREEN if score == 1 else GREY)
            sheet.paste(tile.resize((TILE, TILE), Image.Resampling.NEAREST), (left + GAP, top + GAP))
    return sheet
