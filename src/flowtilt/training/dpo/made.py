"""Pairs that the playground makes: its base samples several images of each prompt, and the verifier compares them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from flowtilt.build import load_prompts, sampler_of
from flowtilt.config import load_recipe
from flowtilt.errors import UserError
from flowtilt.io.files import cache_folder, whole_folder, write_json
from flowtilt.io.images import to_png
from flowtilt.io.notices import notice
from flowtilt.models.opening import fingerprint
from flowtilt.policy.roles import Policy
from flowtilt.preferences.files import LINES
from flowtilt.prompts import PromptWalk
from flowtilt.rewards.playground import Playground
from flowtilt.sampling.sampler import decode
from flowtilt.seeding import noise
from flowtilt.training.dpo.online import best_and_worst
from flowtilt.training.parts import Parts

RECORD = "made.json"
"""Beside the pairs: how they were made, and the network evaluations that it took."""
IMAGES, PER_PROMPT = 4000, 4
"""What `flowtilt pairs playground` samples unless it is told otherwise."""
AT_ONCE = 96
"""Images; fixed, since roundings depend on it."""


def make(
    folder: Path, policy: Policy, *, prompts: str = "playground", images: int = IMAGES, per_prompt: int = PER_PROMPT, seed: int = 0
) -> dict[str, Any]:
    """Samples the bare base and writes a folder of pairs; returns its record.

    Of each prompt's images the best is preferred to the worst by the mean of the verifier's strict and partial score; a prompt whose
    images all score alike gives no pair. The sampler is that of the playground's rollouts.

    Raises:
        UserError: no prompt gives a pair, or the folder can't be written.
    """
    number = images // per_prompt
    walk = PromptWalk(load_prompts(prompts, "train"), seed)
    asked = walk.take(0, number)
    sampler, judge, before = sampler_of(load_recipe("playground").rollout), Playground(), policy.evaluations
    pairs = 0
    with whole_folder(folder) as place:
        (place / "images").mkdir()
        lines = []
        for first in range(0, number, AT_ONCE // per_prompt):
            these = asked[first : first + AT_ONCE // per_prompt]
            copies = [prompt for prompt in these for _ in range(per_prompt)]
            where = [(first + k // per_prompt, k % per_prompt) for k in range(len(copies))]
            start = noise(seed, "made pairs", where, policy.model.latent_shape).to(policy.model.device)
            x0 = sampler(policy, "teacher", start, policy.model.encode([prompt.caption for prompt in copies]), len(copies))
            pictures = decode(policy, x0, len(copies))
            scores = torch.as_tensor(judge(pictures, copies).scores)
            for best, worst in best_and_worst(scores, per_prompt).tolist():
                names = [f"images/{where[k][0]:06d}-{where[k][1]}.png" for k in (best, worst)]
                for name, k in zip(names, (best, worst), strict=True):
                    (place / name).write_bytes(to_png(pictures[k]))
                record = {"prompt": copies[best].text, "chosen": names[0], "rejected": names[1]}
                lines.append(json.dumps({**record, "scores": [float(scores[best]), float(scores[worst])]}))
                pairs += 1
        if not pairs:
            raise UserError(f"pairs {prompts}: the images of each of {number} prompts score alike; sample more")
        (place / LINES).write_text("\n".join(lines) + "\n", encoding="utf-8")
        record = {
            "prompts": prompts,
            "seed": seed,
            "images": number * per_prompt,
            "images_per_prompt": per_prompt,
            "pairs": pairs,
            "ties": number - pairs,
            "sampler": f"{sampler.steps} {sampler.solver} steps, guidance {sampler.guidance:g}",
            "preferred_by": "playground",
            "network_evaluations": policy.evaluations - before,
        }
        write_json(place / RECORD, record)
    return record


def evaluations_of(place: Path) -> int:
    """Network evaluations that made the pairs of a file or folder, as its record says; 0 without one."""
    try:
        record = json.loads(((place if place.is_dir() else place.parent) / RECORD).read_bytes())
        return int(record["network_evaluations"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def of_playground(parts: Parts) -> Path:
    """The folder of the pairs that a run of this seed has for `objective.pairs = "playground"`, sampled where it is not there yet.

    Raises:
        UserError: the cache can't be written.
    """
    recipe = parts.recipe
    weights = hashlib.sha256(json.dumps(fingerprint(recipe.model.path, recipe.model.revision), sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_folder("FLOWTILT_PAIRS", "pairs") / f"{recipe.prompts}-seed-{recipe.seed}-{weights}"

    def ready() -> bool:
        if not (folder / LINES).is_file():
            notice(f"pairs: sampling {IMAGES:,} images of the base, once; they are kept in {folder}")
            before = parts.policy.evaluations
            make(folder, parts.policy, prompts=recipe.prompts, seed=recipe.seed)
            parts.policy.evaluations = before  # what a run cost is what it trained
        return True

    parts.world.on_rank0(ready)
    return folder
