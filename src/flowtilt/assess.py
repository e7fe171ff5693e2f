"""`flowtilt evaluate` as one call: a model and its LoRAs, sets of prompts, rewards; a folder with results."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowtilt import distributed
from flowtilt.benchmark import PromptSet, applicable, open_folder, run
from flowtilt.config import Recipe, load_recipe
from flowtilt.environment import versions
from flowtilt.errors import UserError
from flowtilt.evaluate import each, spread
from flowtilt.files import digest
from flowtilt.memory import MicroBatch
from flowtilt.models.sd3 import SD3, fingerprint
from flowtilt.prompts import Prompt
from flowtilt.rewards import Reward
from flowtilt.rewards.named import load_named
from flowtilt.rewards.versions import versions_of
from flowtilt.rollout import Sampler
from flowtilt.setup import load_prompts
from flowtilt.stack import Stack, find_lora, open_model, recipe_of


def assess(
    folder: Path,
    *,
    model: str | None = None,
    loras: Sequence[Path] = (),
    prompts: Sequence[str] = (),
    rewards: Sequence[str] = (),
    images: int | None = None,
    images_per_prompt: int | None = None,
    solver: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int | None = None,
    compare_base: bool = False,
    compat: bool = False,
    save_images: bool = False,
    micro_batch: int | str = "auto",
    say: Any = None,
) -> dict[str, Any]:
    """Draws, judges and writes `folder`; goes on where it was interrupted. Returns results.json's content on the first rank.

    What is none or empty comes from the recipe of the run that the first LoRA lies in, which then gives the
    run's own score again, else from the playground's recipe for the playground.

    Args:
        prompts: files or names of sets.
        rewards: see `rewards.named.load_named`.
        images: spread over the prompts; or else `images_per_prompt` of each.
        compare_base: also draw the model without LoRAs, from the same noise, and give paired differences.
        say: told in a line what is left out.

    Raises:
        UserError: something can't be loaded, the folder holds another evaluation, or a reward fails.
    """
    world = distributed.start()
    files = [find_lora(place) for place in loras]
    own = recipe_of(loras[0]) if loras else None
    recipe = own or load_recipe("playground")
    known = own is not None or model in (None, "playground")  # otherwise the playground's prompts would say nothing about the model
    if not known and not (prompts and rewards):
        raise UserError("evaluate: --prompts and --rewards must be named for a model that is no run of ours")
    e = recipe.evaluate
    stack = Stack(open_model(model, recipe, world.device), files)
    judges, left_out = load_named(rewards or e.rewards or list(recipe.rewards), device=world.device, compat=compat)
    if not prompts and images is None and images_per_prompt is None:
        images = e.images
    sources = prompts or [e.prompts or recipe.prompts]
    loaded = {_name(source): load_prompts(source) for source in sources}
    sets, dropped = [], [{"set": "all", "reward": name, "why": why} for name, why in left_out.items()]
    for name, members in loaded.items():
        able, why = applicable(members, judges)
        dropped += [{"set": name, "reward": reward, "why": reason} for reward, reason in why.items()]
        if not able:
            raise UserError(f"evaluate: none of the rewards can judge {name}: " + "; ".join(f"{r}: {reason}" for r, reason in why.items()))
        rows = each(members, images_per_prompt or 1) if images is None else spread(members, images)
        sets.append(PromptSet(name, members, rows, able))
    if say and world.rank == 0:
        for line in dropped:
            say(f"left out: {line['reward']} for {line['set']}: {line['why']}")
    sampler = Sampler(solver or e.solver, steps or e.steps, e.guidance if guidance is None else guidance)
    chosen_seed = recipe.seed if seed is None else seed
    variants = ("tuned", "base") if compare_base else ("tuned",) if files else ("base",)
    if compare_base and not files:
        raise UserError("evaluate: --compare base needs a --lora to compare with it")
    hashed = _protocol(stack.model, model, recipe, files, loaded, sampler, judges) if world.rank == 0 else {}
    protocol = hashed | {
        "images": images,
        "images_per_prompt": None if images else images_per_prompt or 1,
        "seed": chosen_seed,
        "variants": list(variants),
        "left_out": dropped,
    }
    open_folder(folder, protocol, world)
    size = MicroBatch(micro_batch, world.device.type)
    return run(folder, stack, sets, variants, sampler, seed=chosen_seed, micro_batch=size, world=world, save_images=save_images)


def _name(source: str) -> str:
    """A set's own name, or a file's without its ending."""
    return Path(source).stem if Path(source).suffix else source


def _protocol(
    model: SD3,
    path: str | None,
    recipe: Recipe,
    files: Sequence[Path],
    prompts: Mapping[str, Sequence[Prompt]],
    sampler: Sampler,
    judges: Mapping[str, Reward],
) -> dict[str, Any]:
    """All that a score depends on, as JSON."""
    texts = {name: hashlib.sha256("\n".join(p.text for p in members).encode()).hexdigest() for name, members in prompts.items()}
    place = path or recipe.model.path
    revision = recipe.model.revision if place == recipe.model.path else None
    return {
        "model": place,
        "revision": revision,
        "model_files": fingerprint(place, revision),
        "lora": [{"path": str(file), "sha256": digest(file)} for file in files],
        "prompts": {name: {"prompts": len(members), "sha256": texts[name]} for name, members in prompts.items()},
        "solver": sampler.solver,
        "steps": sampler.steps,
        "guidance": sampler.guidance,
        "shift": model.shift,
        "resolution": model.latent_shape[-1] * model.pipeline.vae_scale_factor,
        "t5_length": model.t5_length,
        "dtype": str(model.network.dtype).removeprefix("torch."),
        "device": model.device.type,
        "rewards": versions_of(judges),
        "flowtilt": versions()["flowtilt"],
    }
