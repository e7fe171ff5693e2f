"""`flowtilt evaluate` as one call: a model and its LoRAs, sets of prompts, rewards; a folder with results."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowtilt.build import EVALUATED_AT, default_evaluation, judges_of, load_prompts, model_settings, recipe_of, sampler_of, vouch
from flowtilt.config import ModelSettings, Recipe, load_recipe
from flowtilt.config.prompt_data import shown
from flowtilt.config.trust import of_model, of_rewards
from flowtilt.device.micro_batch import MicroBatch
from flowtilt.device.placement import storage_device
from flowtilt.distributed import world as distributed
from flowtilt.distributed.sameness import leaves
from flowtilt.errors import UserError
from flowtilt.evaluate import Row, each, spread
from flowtilt.evaluate.folder import PromptSet, opened, run
from flowtilt.io.environment import versions
from flowtilt.io.files import digest
from flowtilt.io.run_folder import EvaluationFolder
from flowtilt.models.base import Model
from flowtilt.models.cutting import notice_cut
from flowtilt.models.editing import check_sources
from flowtilt.models.opening import fingerprint, open_model
from flowtilt.policy.tuned import Tuned, read_tuned
from flowtilt.prompts import Prompt
from flowtilt.prompts.sets import is_path
from flowtilt.rewards import Reward, applicable
from flowtilt.rewards.comparing import refuse_comparing
from flowtilt.rewards.judge.ledger import keep_answers
from flowtilt.rewards.named import Named, load_named, parse, with_compat
from flowtilt.rewards.versions import versions_of
from flowtilt.sampling.sampler import Sampler


def assess(
    folder: Path | str,
    *,
    model: str | None = None,
    loras: Sequence[Path] = (),
    prompts: Sequence[str] = (),
    rewards: Sequence[str] = (),
    images: int | None = None,
    images_per_prompt: int | None = None,
    resolution: int | None = None,
    dtype: str | None = None,
    t5_length: int | None = None,
    levels: str | None = None,
    solver: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    eta: float | None = None,
    seed: int | None = None,
    compare_base: bool = False,
    compat: bool = False,
    save_images: bool = False,
    micro_batch: int | str = "auto",
    trust: bool = False,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Samples, scores and writes `folder`; resumes where it was interrupted. Returns the content of results.json on rank 0.

    What is None or empty comes from the recipe of the first LoRA's run (or of the run on top of it), which repeats the run's own
    score. For the playground it comes from its recipe, for another model from DiffusionNFT's evaluation.

    Args:
        prompts: files or names of sets.
        rewards: see `rewards.named.parse`.
        resolution, dtype, t5_length, levels: keys of `[model]`. A model without a recipe is evaluated at 512 pixels, or its own resolution
            where that is smaller.
        images: spread over the prompts; or else `images_per_prompt` of each.
        compare_base: also sample the model without LoRAs, from the same noise, and give paired differences.
        compat: reproduce upstream's numbers, for rewards that have such a mode.
        trust: the recipe beside the LoRA may run its own code and contact its servers; a run of this user may anyway.
        say: called with a line for each reward that is left out.

    Raises:
        UserError: something can't be loaded, a recipe of somebody else's runs code, the solver does not have the eta, the folder
            holds another evaluation, or a reward fails.
    """
    world, folder = distributed.start(), Path(folder)
    added = read_tuned(loras)
    if compare_base and not added:
        raise UserError("evaluate: --compare base needs a --lora to compare with it")
    recipe = _recipe_for(model, added, complete=bool(prompts and rewards))
    settings = model_settings(model, recipe, resolution=resolution, dtype=dtype, t5_length=t5_length, levels=levels)
    if added.leading and recipe:
        theirs = [] if rewards else [(one.name, one.source, one.options) for one in judges_of(recipe)]
        vouch(added.leading, of_model(settings) | of_rewards(theirs), trust)
    e = recipe.evaluate if recipe else default_evaluation(model)
    sampler = sampler_of(e, solver=solver, steps=steps, guidance=guidance, eta=eta)
    named = _named(rewards, recipe, compat)
    loaded = _load_sets(prompts or _own_prompts(recipe))
    if not prompts and images is None and images_per_prompt is None:
        images = e.images
    eval_rewards, left_out = load_named(named, device=world.device, storage_device=storage_device(settings.offload, world.device))
    refuse_comparing(eval_rewards, "evaluate --rewards")
    rows = {name: each(members, images_per_prompt or 1) if images is None else spread(members, images) for name, members in loaded.items()}
    sets, dropped = _with_judges(loaded, rows, eval_rewards, left_out, say if world.rank == 0 else None)
    stack = added.on(open_model(settings, world.device, at_most=None if recipe else EVALUATED_AT))
    check_sources(stack.model, [prompt for members in loaded.values() for prompt in members])
    notice_cut(stack.model, [prompt for members in loaded.values() for prompt in members])
    variants = ("tuned", "base") if compare_base else ("tuned",) if added else ("base",)
    seed = seed if seed is not None else recipe.seed if recipe else 0
    chosen = {"images": images, "images_per_prompt": None if images else images_per_prompt or 1, "seed": seed, "variants": list(variants)}

    def protocol() -> dict[str, Any]:
        protocol_so_far = _model_protocol(stack.model, settings, added, sampler) | _prompt_protocol(loaded) | chosen
        return protocol_so_far | _reward_protocol(named, eval_rewards, dropped) | {"flowtilt": versions()["flowtilt"]}

    if world.size > 1:
        world.agree(leaves(protocol()) | {"--save-images": save_images, "version of torch": versions()["torch"]})
    size = MicroBatch(micro_batch, world.device.type)
    with opened(folder, protocol, world):
        keep_answers(eval_rewards.values(), EvaluationFolder(folder).judges, world)
        return run(folder, stack, sets, variants, sampler, seed=seed, micro_batch=size, world=world, save_images=save_images)


def _recipe_for(model: str | None, added: Tuned, complete: bool) -> Recipe | None:
    """Where what is not said comes from: the leading LoRA's run, or the playground's recipe; none for another model.

    Args:
        complete: prompts and rewards are said.

    Raises:
        UserError: they are not, and there is no such recipe.
    """
    own = recipe_of(added.leading) if added.leading else None
    recipe = own or (load_recipe("playground") if model in (None, "playground") else None)
    if recipe is None and not complete:
        raise UserError("evaluate: --prompts and --rewards must be named for a model that is no run of ours")
    return recipe


def _named(rewards: Sequence[str], recipe: Recipe | None, compat: bool) -> list[Named]:
    found = parse(rewards) if rewards or recipe is None else judges_of(recipe)
    return [with_compat(one) for one in found] if compat else found


def _with_judges(
    loaded: Mapping[str, Sequence[Prompt]],
    rows: Mapping[str, Sequence[Row]],
    eval_rewards: Mapping[str, Reward],
    left_out: Mapping[str, str],
    say: Callable[[str], None] | None,
) -> tuple[list[PromptSet], list[dict[str, str]]]:
    """Each set with the rewards that can judge it, and what is left out of which set and why.

    Raises:
        UserError: a set is left without rewards.
    """
    sets, dropped = [], [{"set": "all", "reward": name, "why": why} for name, why in left_out.items()]
    for name, members in loaded.items():
        able, why = applicable(members, eval_rewards)
        dropped += [{"set": name, "reward": reward, "why": reason} for reward, reason in why.items()]
        sets.append(PromptSet(name, members, rows[name], able))
    if say:
        for line in dropped:
            say(f"left out: {line['reward']} for {line['set']}: {line['why']}")
    for one in sets:
        if not one.rewards:
            reasons = "; ".join(f"{line['reward']}: {line['why']}" for line in dropped if line["set"] == one.name)
            raise UserError(f"evaluate: none of the rewards can judge {one.name}: {reasons}")
    return sets, dropped


def _own_prompts(recipe: Recipe | None) -> list[str]:
    return [recipe.evaluate.prompts or recipe.prompts] if recipe else []


def _load_sets(sources: Sequence[str]) -> dict[str, list[Prompt]]:
    """Prompts by the set's own name, or the file's without its ending."""
    found: dict[str, list[Prompt]] = {}
    for source in sources:
        name = (Path(source).stem if is_path(source) else shown(source)) or "prompts"
        if name in found:
            raise UserError(f"evaluate: two sets of prompts are called {name}; rename a file")
        found[name] = load_prompts(source)
    return found


def _prompt_protocol(loaded: Mapping[str, Sequence[Prompt]]) -> dict[str, Any]:
    return {"prompts": {name: {"prompts": len(members), "sha256": _digest_of(members)} for name, members in loaded.items()}}


def _digest_of(prompts: Sequence[Prompt]) -> str:
    text = json.dumps([[p.text, p.tag, dict(p.metadata), *([digest(Path(p.image))] if p.image else [])] for p in prompts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _model_protocol(model: Model, settings: ModelSettings, added: Tuned, sampler: Sampler) -> dict[str, Any]:
    """All that an image depends on but its prompt and noise."""
    return {
        "model": settings.path,
        "revision": settings.revision,
        "model_files": fingerprint(settings.path, settings.revision),
        **added.protocol(),
        "solver": sampler.solver,
        **({} if sampler.eta is None else {"eta": sampler.eta}),
        "steps": sampler.steps,
        "guidance": sampler.guidance,
        **model.protocol,
        "dtype": str(model.network.dtype).removeprefix("torch."),
        "vae_dtype": str(model.pipeline.vae.dtype).removeprefix("torch."),
        "device": model.device.type,
    }


def _reward_protocol(named: Sequence[Named], eval_rewards: Mapping[str, Reward], dropped: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    known = versions_of(eval_rewards)
    used = {one.name: {"source": one.source, "options": dict(one.options), **known[one.name]} for one in named if one.name in eval_rewards}
    return {"rewards": used, "left_out": list(dropped)}
