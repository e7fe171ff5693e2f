"""A score that can be compared: fixed prompts, each image always from its own noise, no prompt counted twice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowtilt.distributed import World
from flowtilt.errors import UserError
from flowtilt.policy import Policy
from flowtilt.prompts import Prompt
from flowtilt.rewards import Reward, score
from flowtilt.rollout import Sampler, decode
from flowtilt.seeding import noise


@dataclass(frozen=True)
class Evaluation:
    """What came out, over all ranks.

    Args:
        score: mean of the first reward over the images to which it applies.
        by_tag: the same for each tag; empty where prompts have none.
        rewards: mean of each reward.
        images: how many were judged.
        samples: images [M, 3, H, W] for the report, with their prompts, scores and notes beside them.
    """

    score: float
    by_tag: dict[str, float]
    rewards: dict[str, float]
    images: int
    samples: Tensor
    sample_rows: list[dict[str, object]]


def spread(prompts: Sequence[Prompt], number: int) -> list[tuple[Prompt, int]]:
    """`number` pairs of a prompt and how often it was met before; tags take turns, and prompts within a tag."""
    tags = list(dict.fromkeys(p.tag for p in prompts))
    by_tag = [[p for p in prompts if p.tag == tag] for tag in tags]
    found = []
    for k in range(number):
        members = by_tag[k % len(tags)]
        again, place = divmod(k // len(tags), len(members))
        # a fixed stride through the tag's prompts, so that a small number still sees all of its kinds
        found.append((members[place * _stride(len(members)) % len(members)], again))
    return found


def _stride(length: int) -> int:
    """A step near the golden section that visits all of `length` places."""
    step = max(1, round(length * 0.618))
    while torch.gcd(torch.tensor(step), torch.tensor(length)) != 1:
        step += 1
    return step


def evaluate(
    policy: Policy,
    role: str,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    sampler: Sampler,
    *,
    images: int,
    seed: int,
    samples: int,
    micro_batch: int,
    world: World,
) -> Evaluation:
    """Draws and judges `images` images. Image k depends on (seed, k) alone, whatever the number of processes.

    Raises:
        UserError: a reward fails, or applies to none of the images.
    """
    rows = spread(prompts, images)
    mine = list(world.share(images))
    own = [rows[k][0] for k in mine]
    start = noise(seed, "evaluate", [(k,) for k in mine], policy.model.latent_shape).to(policy.model.device)
    latents = sampler(policy, role, start, policy.model.encode([p.text for p in own]), micro_batch)
    pictures = decode(policy, latents, micro_batch)
    scores, notes = score(rewards, pictures, own)

    everything = {name: world.gather(value.to(world.device), images).cpu() for name, value in scores.items()}
    notes = world.gather_json(notes)
    kept = pictures.new_zeros(samples, *pictures.shape[1:])
    for place, k in enumerate(mine):
        if k < samples:
            kept[k] = pictures[place]
    world.sum_([kept])

    means = {name: _mean(name, value) for name, value in everything.items()}
    first = next(iter(everything.values()))
    tags = [prompt.tag for prompt, _ in rows]
    of_tag = {tag: first[[t == tag for t in tags]] for tag in dict.fromkeys(tags) if tag}
    by_tag = {tag: _mean(tag, values) for tag, values in of_tag.items() if not values.isnan().all()}
    told = [
        {"prompt": rows[k][0].text, "tag": tags[k], "score": None if first[k].isnan() else round(float(first[k]), 4), "note": notes[k]}
        for k in range(min(samples, images))
    ]
    return Evaluation(next(iter(means.values())), by_tag, means, images, kept[: len(told)].cpu(), told)


def _mean(name: str, values: Tensor) -> float:
    known = values[~values.isnan()]
    if not len(known):
        raise UserError(f"reward {name}: applies to none of the evaluation's prompts")
    return float(known.double().mean())
