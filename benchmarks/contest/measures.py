"""What is measured of a finished run: on noise that nothing was compared on, and without its evaluations' share of luck."""

import math
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contest.settings import Amount
from flowtilt.build import evaluation_prompts, sampler_of, training_prompts
from flowtilt.config import Recipe, load_recipe
from flowtilt.device.micro_batch import MicroBatch
from flowtilt.evaluate import BLOCK, Row, each, generate, spread
from flowtilt.flow import add_noise
from flowtilt.io.files import write_json
from flowtilt.lora.stacked import read_stack
from flowtilt.models.opening import open_model
from flowtilt.objectives.batches import draw_times
from flowtilt.playground import verify
from flowtilt.policy.tuned_model import TunedModel
from flowtilt.prompts import Prompt
from flowtilt.sampling.sampler import Sampler
from flowtilt.seeding import generator, noise

FRESH = 1_000_003
"""Seed of the noise; no run has it."""
STEPS = 20
"""Of the reference's images, however few a run takes."""
TIMES = 4
"""Noise levels at which the distance from the reference is taken, for each prompt."""


def measure(run: Path, amount: Amount) -> None:
    """Writes measures.json into the folder of a finished run; see `measures_of`."""
    write_json(run / "measures.json", measures_of(load_recipe(run / "recipe.toml"), run, amount))


def measures_of(recipe: Recipe, run: Path | None, amount: Amount) -> dict[str, Any]:
    """What can be said of a run's EMA, or of the base where there is no run.

    held_out, trained: strict score on the test's prompts, whose combinations no training prompt has, and on the training prompts.
    diversity: mean distance of two images of one test prompt, of all images and of the right ones among them; none without a pair.
    distance: mean (v - v_ref)^2 at noised images of the reference.
    """
    stack = TunedModel(open_model(recipe.model, torch.device("cpu")), read_stack([run] if run else []))
    trained = training_prompts(recipe)
    tests = evaluation_prompts(recipe, trained)
    rows = spread(tests, amount.images)
    looked_at = [tests[index] for index in sorted({index for index, _ in rows})]
    groups, right = _drawn(stack, recipe, looked_at, each(looked_at, amount.copies))
    number = torch.arange(len(looked_at)).repeat_interleave(amount.copies)
    apart = {"all": diversity(groups, number), "right": diversity(groups[right > 0], number[right > 0])}
    return {
        "held_out": float(_drawn(stack, recipe, tests, rows)[1].double().mean()),
        "trained": float(_drawn(stack, recipe, trained, spread(trained, amount.images))[1].double().mean()),
        "diversity": {name: None if math.isnan(value) else value for name, value in apart.items()},
        "distance": distance(stack, recipe, looked_at),
    }


def diversity(images: Tensor, group: Tensor) -> float:
    """Root mean square difference of two images [3, H, W] in [0, 1] of one group, averaged over pairs, then groups; NaN without a pair.

    Args:
        images: [N, 3, H, W].
        group: of each, [N].
    """
    means = []
    for number in group.unique().tolist():
        own = images[group == number].flatten(1)
        apart = [float((a - b).square().mean().sqrt()) for a, b in combinations(own, 2)]
        if apart:
            means.append(sum(apart) / len(apart))
    return sum(means) / len(means) if means else math.nan


@torch.no_grad()
def distance(stack: TunedModel, recipe: Recipe, prompts: list[Prompt]) -> float:
    """mean (v - v_ref)^2 over images that the reference draws, one a prompt, each noised to `TIMES` stratified levels."""
    model, r = stack.model, recipe.rollout
    places = [(k,) for k in range(len(prompts))]
    given = model.encode([prompt.text for prompt in prompts])
    start = noise(FRESH, "reference", places, model.latent_shape)
    x0 = Sampler("euler", STEPS)(stack, "base", start, given, BLOCK)
    sigmas = model.levels(r.steps)
    between = partial(model.levels.at, steps=r.steps)
    times = torch.stack([draw_times("stratified", TIMES, sigmas, between, generator(FRESH, "times", *place)) for place in places])
    found = []
    for k in range(TIMES):
        x_t = add_noise(x0, noise(FRESH, "noised", [(*place, k) for place in places], model.latent_shape), times[:, k])
        moved = stack.velocity("tuned", x_t, times[:, k], given) - stack.velocity("base", x_t, times[:, k], given)
        found.append(moved.square().mean())
    return float(torch.stack(found).mean())


def _drawn(stack: TunedModel, recipe: Recipe, prompts: list[Prompt], rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W] of N rows and their strict scores [N]."""
    e, size = recipe.evaluate, MicroBatch("auto", "cpu")
    sampler = sampler_of(e)
    blocks = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
    images = torch.cat([generate(stack, "tuned", prompts, block, sampler, FRESH, size) for block in blocks])
    return images, verify.score(images, [prompts[index] for index, _ in rows])
