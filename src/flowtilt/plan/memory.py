"""What one GPU holds in each phase of a rollout, as flowtilt is: every model stays on the device all the time.

Bytes of weights and of tensors that the loops hold follow from shapes and are exact. Activations are exact for
torch's own kernels taken one by one; what kernels and libraries take beside is `CONTEXT` and the spare tenth.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from flowtilt.config import Recipe
from flowtilt.evaluate import BLOCK
from flowtilt.memory import START
from flowtilt.plan.judges import Judging
from flowtilt.plan.machine import Machine
from flowtilt.plan.network import Costs
from flowtilt.scoring import PARTS

GIB = 2**30
CONTEXT = 0.5 * GIB
"""Bytes of a CUDA context with its libraries, an assumption."""
SPARE = 0.1
"""Share of the memory that is left to what is not modelled."""
STATES = 4
"""Latents that a solver has at hand: x, the velocity, and two predictions of x0."""


@dataclass(frozen=True)
class Phase:
    """Bytes on one GPU.

    Args:
        held: what flowtilt's loops keep meanwhile, by what it is.
        activations: what passes through a network, at most.
        total: with all resident weights and the context.
    """

    name: str
    held: Mapping[str, float]
    activations: float
    total: float


def resident(recipe: Recipe, costs: Costs, models: Judging) -> dict[str, float]:
    """Bytes that stay on a GPU from the first optimizer step on, by what they are."""
    return {
        "network": costs.network.bytes,
        "text encoders": costs.encoders.bytes,
        "vae": costs.vae.bytes,
        **{name: model.weights.bytes for name, model in models.models.items()},
        "lora (current, old, ema)": 3 * costs.lora.bytes,
        "gradient and AdamW": 3 * costs.lora.bytes,
        # of the roles that draw, kept until they change
        "merged weights (old, ema)": 2 * costs.merged,
        "CUDA context": CONTEXT,
    }


def phases(
    recipe: Recipe, costs: Costs, train: Judging, judge: Judging, machine: Machine, kept: Mapping[str, float], size: int
) -> list[Phase]:
    """Bytes on a GPU in each phase of a rollout and in an evaluation.

    Args:
        train, judge: rewards of the rollouts and of the evaluations.
        kept: what stays.
        size: the micro-batch.
    """
    found = {**_rollout(recipe, costs, train, machine, size), "train": _train(recipe, costs, machine, size)}
    found["evaluate"] = _evaluate(recipe, costs, judge, size)
    resident = sum(kept.values())
    return [
        Phase(name, {what: count for what, count in held.items() if count}, activations, resident + sum(held.values()) + activations)
        for name, (held, activations) in found.items()
    ]


Use = tuple[Mapping[str, float], float]
"""Bytes that are held, by what they are, and activations at most."""


def _rollout(recipe: Recipe, costs: Costs, judging: Judging, machine: Machine, size: int) -> dict[str, Use]:
    r = recipe.rollout
    images = machine.share(r.prompts * r.images_per_prompt)
    part = -(-images // PARTS) if judging.off_device else images
    rows = min(size, part)
    captions, latents, pictures = images * costs.caption, images * costs.latent, images * costs.image
    drawn = {
        "captions of all images": captions,
        "captions of the part being drawn": part * costs.caption,
        "noise": part * costs.latent,
        "latents": latents,
    }
    # chunks pile up until they are joined, then they are there twice
    decoding = max(costs.decode.at(rows).peak + (part - rows) * costs.image, 2 * part * costs.image)
    joined = 2 if judging.off_device and judging.models else 1
    return {
        "encode": ({"captions of all images": captions}, costs.encode.peak),
        "sample": ({**drawn, "parts before they are joined": latents}, _drawing(costs, rows, r.guidance)),
        "decode": ({**drawn, "images": pictures if judging.off_device else 0}, decoding),
        "reward": ({**drawn, "images": joined * pictures}, judging.working(images)),
    }


def _train(recipe: Recipe, costs: Costs, machine: Machine, size: int) -> Use:
    images, updates = recipe.rollout.prompts * recipe.rollout.images_per_prompt, recipe.optimizer.steps_per_rollout
    own = machine.share(images)
    pairs = machine.share(-(-images // updates)) * recipe.rows_per_image()
    rows = min(size, pairs)
    pair = 2 * costs.latent + costs.caption
    held = {"captions of all images": own * costs.caption, "latents": own * costs.latent, "pairs of image and time": pairs * pair}
    # while a share is made the one before it is still there
    return held, max(costs.train.at(rows).peak + rows * pair, pairs * pair if updates > 1 else 0)


def _evaluate(recipe: Recipe, costs: Costs, judging: Judging, size: int) -> Use:
    e = recipe.evaluate
    images = min(BLOCK, e.images)
    rows = min(size, images)
    held = {"captions": images * costs.caption, "noise and latents": 3 * images * costs.latent, "images": images * costs.image}
    decoding = costs.decode.at(rows).peak + images * costs.image
    return held, max(_drawing(costs, rows, e.guidance), decoding, judging.working(images))


def _drawing(costs: Costs, rows: int, guidance: float) -> float:
    """Bytes of `rows` images on their way through the solver."""
    through = rows * (2 if guidance != 1 else 1)
    # guidance joins the captions with the empty one: theirs, its copies, and both
    captions = (rows if guidance == 1 else 4 * rows) * costs.caption
    return costs.forward.at(through).peak + captions + rows * STATES * costs.latent


def fits(found: list[Phase], machine: Machine) -> bool:
    """Whether every phase leaves the spare."""
    return max(phase.total for phase in found) <= (1 - SPARE) * machine.gib * GIB


def sizes(recipe: Recipe) -> list[int]:
    """The micro-batches that a run would try: its own, or what "auto" begins with, halved and halved again."""
    if isinstance(recipe.micro_batch, int):
        return [recipe.micro_batch]
    size, found = START["cuda"], []
    while size:
        found.append(size)
        size //= 2
    return found
