"""A score that can be compared: fixed prompts, each image always from its own noise, no prompt counted twice.

The noise of an image is a function of the seed, its caption, and which copy of it this is. So an image is
the same in training and afterwards, in a set of prompts or a part of it, in whatever order, on however
many devices, and two models are compared on the same noise.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from flowtilt.distributed import World
from flowtilt.errors import UserError
from flowtilt.models.base import Drawing
from flowtilt.prompts import Prompt
from flowtilt.rewards import Reward, score
from flowtilt.rollout import Sampler, decode
from flowtilt.seeding import noise

Row = tuple[int, int]
"""An image of an evaluation: the place of its prompt, and how many images of this prompt come before it."""


@dataclass(frozen=True)
class Evaluation:
    """What came out, over all ranks.

    Args:
        score: mean of the judged column over the images that have it.
        by_tag: the same for each tag; empty where prompts have none.
        rewards: mean of each reward and detail.
        missing: images without a score, of each column that misses any.
        images: how many were judged.
        samples: images [M, 3, H, W] for the report, with their prompts, scores and notes beside them.
    """

    score: float
    by_tag: dict[str, float]
    rewards: dict[str, float]
    missing: dict[str, int]
    images: int
    samples: Tensor
    sample_rows: list[dict[str, object]]


def each(prompts: Sequence[Prompt], copies: int) -> list[Row]:
    """Every prompt `copies` times."""
    return [(index, copy) for index in range(len(prompts)) for copy in range(copies)]


def spread(prompts: Sequence[Prompt], number: int) -> list[Row]:
    """`number` images; tags take turns, and prompts within a tag. A multiple of the prompts is each of them equally often."""
    if number % len(prompts) == 0:
        step = _stride(len(prompts))
        return [(k * step % len(prompts), copy) for copy in range(number // len(prompts)) for k in range(len(prompts))]
    tags = list(dict.fromkeys(p.tag for p in prompts))
    by_tag = [[index for index, p in enumerate(prompts) if p.tag == tag] for tag in tags]
    found = []
    for k in range(number):
        members = by_tag[k % len(tags)]
        copy, place = divmod(k // len(tags), len(members))
        # a fixed stride through the tag's prompts, so that a small number still sees all of its kinds
        found.append((members[place * _stride(len(members)) % len(members)], copy))
    return found


def _stride(length: int) -> int:
    """A step near the golden section that visits all of `length` places."""
    step = max(1, round(length * 0.618))
    while math.gcd(step, length) != 1:
        step += 1
    return step


def draw(
    drawing: Drawing, role: str, prompts: Sequence[Prompt], rows: Sequence[Row], sampler: Sampler, seed: int, micro_batch: int
) -> Tensor:
    """Images [N, 3, H, W] in [0, 1] of N rows."""
    texts = [prompts[index].text for index, _ in rows]
    keys = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") for text in texts]
    positions = [(key, copy) for key, (_, copy) in zip(keys, rows, strict=True)]
    start = noise(seed, "evaluate", positions, drawing.model.latent_shape).to(drawing.model.device)
    return decode(drawing, sampler(drawing, role, start, drawing.model.encode(texts), micro_batch), micro_batch)


def evaluate(
    drawing: Drawing,
    role: str,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    sampler: Sampler,
    *,
    images: int,
    column: str,
    seed: int,
    samples: int,
    micro_batch: int,
    world: World,
) -> Evaluation:
    """Draws and judges `images` images, spread over the prompts.

    Args:
        column: the reward, or "reward/detail", that is the score.

    Raises:
        UserError: a reward fails, applies to none of the images, or there is no such column.
    """
    rows = spread(prompts, images)
    mine = list(world.share(images))
    pictures = draw(drawing, role, prompts, [rows[k] for k in mine], sampler, seed, micro_batch)
    scores, notes = score(rewards, pictures, [prompts[rows[k][0]] for k in mine])

    everything = {name: world.gather(value.to(world.device), images).cpu() for name, value in scores.items()}
    notes = world.gather_json(notes)
    kept = pictures.new_zeros(samples, *pictures.shape[1:])
    for place, k in enumerate(mine):
        if k < samples:
            kept[k] = pictures[place]
    world.sum_([kept])

    if column not in everything:
        raise UserError(f"evaluate.rewards: no score {column!r}; there are {', '.join(everything)}")
    judged = everything[column]
    tags = [prompts[index].tag for index, _ in rows]
    of_tag = {tag: judged[[t == tag for t in tags]] for tag in dict.fromkeys(tags) if tag}
    told = [
        {
            "prompt": prompts[rows[k][0]].text,
            "tag": tags[k],
            "score": None if judged[k].isnan() else round(float(judged[k]), 4),
            "note": notes[k],
        }
        for k in range(min(samples, images))
    ]
    return Evaluation(
        _mean(column, judged),
        {tag: _mean(tag, values) for tag, values in of_tag.items() if not values.isnan().all()},
        {name: _mean(name, value) for name, value in everything.items()},
        {name: count for name, value in everything.items() if (count := int(value.isnan().sum()))},
        images,
        kept[: len(told)].cpu(),
        told,
    )


def _mean(name: str, values: Tensor) -> float:
    known = values[~values.isnan()]
    if not len(known):
        raise UserError(f"reward {name}: gives none of the evaluation's images a score")
    return float(known.double().mean())
