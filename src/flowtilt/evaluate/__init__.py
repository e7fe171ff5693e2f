"""A score that can be compared: fixed prompts, each image always from its own noise, no prompt counted twice.

The noise of an image is a function of the seed, its caption, and which copy of it this is. So an image is
the same in training and afterwards, in a set of prompts or a part of it, in whatever order, on however
many devices, and two models are compared on the same noise.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowtilt.device.micro_batch import MicroBatch
from flowtilt.distributed.world import World
from flowtilt.errors import UserError
from flowtilt.models.base import RoleModel
from flowtilt.models.editing import sources_beside
from flowtilt.prompts import Prompt
from flowtilt.rewards import Reward
from flowtilt.rewards.facts import ranges_of
from flowtilt.rewards.judging import judge
from flowtilt.sampling.sampler import Sampler, decode
from flowtilt.seeding import noise, step_noise

Row = tuple[int, int]
"""An image of an evaluation: the place of its prompt, and how many images of this prompt come before it."""


BLOCK = 32
"""Images per batch: fixed, so that no batch depends on the rank that samples it or on interruptions."""


@dataclass(frozen=True)
class Evaluation:
    """What came out, over all ranks.

    Args:
        column: the reward, or "reward/detail", that is the score.
        score: its mean over the images that have it.
        by_tag: the same for each tag; empty where prompts have none.
        rewards: mean of each reward and detail that has any score.
        stds: their standard deviations over the images.
        missing: images without a score, of each column that misses any.
        images: how many were judged.
        by_image: the captions' hash, lists of every image's prompt (its place), tag and score (none where it has none), and the
            score's range where it has one.
        samples: images [M, 3, H, W] for the report, with their prompts, scores and notes beside them.
        sources: of edits, the source images of the samples.
    """

    column: str
    score: float
    by_tag: dict[str, float]
    rewards: dict[str, float]
    stds: dict[str, float]
    missing: dict[str, int]
    images: int
    by_image: dict[str, str | list]
    samples: Tensor
    sample_rows: list[dict[str, object]]
    sources: Tensor | None = None


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


def generate(
    drawing: RoleModel, role: str, prompts: Sequence[Prompt], rows: Sequence[Row], sampler: Sampler, seed: int, micro_batch: MicroBatch
) -> Tensor:
    """Images [N, 3, H, W] in [0, 1] of N rows."""
    drawn = [prompts[index] for index, _ in rows]
    keys = [int.from_bytes(hashlib.sha256(prompt.key.encode()).digest()[:6], "big") for prompt in drawn]
    positions = [(key, copy) for key, (_, copy) in zip(keys, rows, strict=True)]
    start = noise(seed, "evaluate", positions, drawing.model.latent_shape).to(drawing.model.device)
    conditioning = drawing.model.encode([prompt.caption for prompt in drawn])
    fresh = step_noise(seed, "evaluate", positions, drawing.model.latent_shape)
    latents = micro_batch.run_with_backoff("sample", lambda size: sampler(drawing, role, start, conditioning, size, fresh))
    return micro_batch.run_with_backoff("decode", lambda size: decode(drawing, latents, size))


def evaluate(
    drawing: RoleModel,
    role: str,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    sampler: Sampler,
    *,
    images: int,
    column: str,
    seed: int,
    samples: int,
    micro_batch: MicroBatch,
    world: World,
) -> Evaluation:
    """Samples and scores `images` images, spread over the prompts, in the same batches as `flowtilt evaluate`.

    Args:
        column: the reward, or "reward/detail", that is the score.

    Raises:
        UserError: a reward fails, the score applies to none of the images, or there is no such column.
    """
    rows = spread(prompts, images)
    blocks = [rows[start : start + BLOCK] for start in range(0, images, BLOCK)]
    mine = world.share(len(blocks))
    parts: list[dict[str, Tensor]] = []
    notes: list[str] = []
    kept: dict[int, Tensor] = {}
    drawing.model.encode.prepare(prompts[index].caption for number in mine for index, _ in blocks[number])
    for number in mine:
        pictures = generate(drawing, role, prompts, blocks[number], sampler, seed, micro_batch)
        scores, said = judge(rewards, pictures, [prompts[index] for index, _ in blocks[number]], drawing.model.device)
        parts.append({name: _padded(value) for name, value in scores.items()})
        notes += said
        kept |= {number * BLOCK + k: picture.cpu() for k, picture in enumerate(pictures) if number * BLOCK + k < samples}
    columns = {name: value[:images] for name, value in _gathered(parts, len(blocks), world).items()}
    notes = world.gather_json(notes)
    if column not in columns:
        raise UserError(f"evaluate.rewards: no score {column!r}; there are {', '.join(columns)}")
    mean = _mean(columns[column])
    if mean is None:
        raise UserError(f"reward {column}: gives none of the evaluation's images a score")
    row_prompts = [prompts[index] for index, _ in rows]
    sample_records = [
        _sample_record(*row) for row in zip(row_prompts[:samples], columns[column][:samples].tolist(), notes[:samples], strict=True)
    ]
    shown = _collected(kept, len(sample_records), world)
    return Evaluation(
        column,
        mean,
        _by_tag(columns[column], row_prompts),
        {name: value for name, values in columns.items() if (value := _mean(values)) is not None},
        {name: float(values[~values.isnan()].double().std(correction=0)) for name, values in columns.items() if _mean(values) is not None},
        {name: count for name, values in columns.items() if (count := int(values.isnan().sum()))},
        images,
        _by_image(rows, row_prompts, columns[column], ranges_of(rewards).get(column, ())),
        shown,
        sample_records,
        sources_beside(shown, row_prompts[:samples]) if len(shown) else None,
    )


def _by_image(rows: Sequence[Row], prompts: Sequence[Prompt], scores: Tensor, span: Sequence[float]) -> dict[str, str | list]:
    """`Evaluation.by_image`."""
    return {
        "captions": hashlib.sha256("\n".join(prompt.key for prompt in prompts).encode()).hexdigest(),
        "prompt": [index for index, _ in rows],
        "tag": [prompt.tag for prompt in prompts],
        "score": [None if math.isnan(score) else score for score in scores.tolist()],
        "range": list(span),
    }


def _gathered(parts: Sequence[Mapping[str, Tensor]], blocks: int, world: World) -> dict[str, Tensor]:
    """Every column of all ranks' blocks, one after the other; a block has NaN in a column that it lacks."""
    names = dict.fromkeys(name for part in parts for name in part)
    joined = {name: torch.stack([part.get(name, _padded(torch.empty(0))) for part in parts]) for name in names}
    return {name: value.flatten() for name, value in world.gather_columns(joined, blocks, (BLOCK,)).items()}


def _by_tag(values: Tensor, prompts: Sequence[Prompt]) -> dict[str, float]:
    """The mean of each tag that has a score."""
    tags = [prompt.tag for prompt in prompts]
    of_tag = {tag: values[[t == tag for t in tags]] for tag in dict.fromkeys(tags) if tag}
    return {tag: mean for tag, values in of_tag.items() if (mean := _mean(values)) is not None}


def _sample_record(prompt: Prompt, score: float, note: str) -> dict[str, object]:
    """What stands beside an image in the report."""
    return {"prompt": prompt.text, "tag": prompt.tag, "score": None if math.isnan(score) else round(score, 4), "note": note}


def _padded(values: Tensor) -> Tensor:
    """A block's scores, NaN where the last block is short."""
    return torch.cat([values, torch.full((BLOCK - len(values),), torch.nan)])


def _collected(kept: Mapping[int, Tensor], number: int, world: World) -> Tensor:
    """The first images, on whichever rank each of them was drawn."""
    if not number:
        return torch.empty(0)
    shape = next(iter(world.gather_json([list(image.shape) for image in kept.values()])))
    samples = torch.zeros(number, *shape, device=world.device)
    for k, image in kept.items():
        samples[k] = image
    world.sum_([samples])
    return samples.cpu()


def _mean(values: Tensor) -> float | None:
    known = values[~values.isnan()]
    return float(known.double().mean()) if len(known) else None
