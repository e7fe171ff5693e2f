"""Recipes from configurations of other code: DiffusionNFT's and flow_grpo's Python files, RTDMD's YAML files.

`convert` reads a file without executing it, writes a recipe of the keys that have a counterpart, and lists the others.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowtilt.config.files import toml_key, toml_value, validate
from flowtilt.convert.names import EVALUATED, GRPO, NFT, RTDMD, SETS, Names, Silent
from flowtilt.convert.python import LARGEST, configurations, read_python
from flowtilt.errors import UserError
from flowtilt.io.nested import load_yaml
from flowtilt.rewards.about import built_in

GPUS = 8
"""For how many a configuration counts that does not say it: RTDMD's own figures."""
PUBLISHED_ADAM = (0.9, 0.999)


@dataclass
class Converted:
    """A recipe, and what did not fit into it.

    Args:
        origin: the file, and the function in it.
        tree: the recipe's keys.
        unmatched: their keys without a counterpart, with their values.
        notes: what to look at, a line each.
    """

    origin: str
    kind: str
    tree: dict[str, Any] = field(default_factory=dict)
    unmatched: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def set(self, key: str, value: Any) -> None:
        """Sets a dotted key; None leaves it out."""
        if value is None:
            return
        *tables, last = key.split(".")
        place = self.tree
        for table in tables:
            place = place.setdefault(table, {})
        place[last] = value

    def lines(self) -> list[str]:
        """What was not carried over, and what to look at."""
        left = [f"no counterpart: {key} = {_shown(value)}" for key, value in self.unmatched.items()]
        return [_one_line(line) for line in (*self.notes, *left)]

    def toml(self) -> str:
        """The recipe's file."""
        head = [f"# {self.kind}'s {self.origin}, by flowtilt convert.", *(f"# {line}" for line in self.lines())]
        plain = [f"{key} = {toml_value(value)}" for key, value in self.tree.items() if not isinstance(value, dict)]
        tables = [
            "\n".join([f"[{name}]", *(f"{toml_key(key)} = {toml_value(value)}" for key, value in table.items())])
            for name, table in self.tree.items()
            if isinstance(table, dict)
        ]
        return "\n".join([*head, "", *plain, ""]) + "\n" + "\n\n".join(tables) + "\n"


def convert(source: str, gpus: int | None = None) -> Converted:
    """The recipe that a configuration comes to.

    Args:
        source: a .yaml file of RTDMD, or "file.py:function" of DiffusionNFT or flow_grpo.
        gpus: on how many it was run, which their number of prompts depends on; none takes what the file says.

    Raises:
        UserError: no such file or function, something in it would have to be executed, or what comes out is no recipe.
    """
    place, _, name = source.rpartition(":") if ".py:" in source else (source, "", "")
    path = Path(place)
    if not path.is_file():
        raise UserError(f"convert {path}: no such file; name a .yaml file, or file.py:function")
    if path.suffix in (".yaml", ".yml"):
        found = _from_yaml(path, gpus)
    elif path.suffix == ".py":
        found = _from_python(path, name or _only(path), gpus)
    else:
        raise UserError(f"convert {path}: neither .py nor .yaml; configurations of DiffusionNFT, flow_grpo and RTDMD are read")
    validate(found.tree, {}, f"{source}, converted")
    return found


def _only(path: Path) -> str:
    names = configurations(path)
    if len(names) != 1:
        first = (names or ["function"])[0]
        raise UserError(f"convert {path}: name one of its configurations, as {path.name}:{first}; there are {', '.join(names) or 'none'}")
    return names[0]


# Python ---------------------------------------------------------------------------------------------------


def _from_python(path: Path, name: str, gpus: int | None) -> Converted:
    read = read_python(path, name)
    values, own = read.values, read.own
    nft = "decay_type" in values
    if not nft and "train.clip_range" not in values:
        raise UserError(f"convert {path}:{name}: neither DiffusionNFT's (decay_type) nor flow_grpo's (train.clip_range)")
    found = Converted(f"{path.name}:{name}", "DiffusionNFT" if nft else "flow_grpo")
    found.tree |= {"name": name.replace("_", "-"), "model": {}}
    found.set("objective.type", "nft" if nft else "grpo")
    used = _named(found, values, NFT if nft else GRPO)
    used |= _betas(found, values, "train.adam_beta1", "train.adam_beta2")
    used |= _amounts(found, values, gpus or read.gpus)
    _rewards(found, _weights(found, values, "reward_fn"))
    _prompts(found, str(values.get("dataset", "")))
    used |= {"reward_fn", "dataset"}
    used |= _nft(found, values) if nft else _grpo(found, values, own)
    if found.tree.get("rollouts", 0) >= 100_000:
        found.notes.append("rollouts: their runs are stopped by hand; choose a number of rollouts")
    if nft and found.tree.get("model", {}).get("dtype") == "float16":
        found.notes.append("model.dtype: their base is fp16; LoRA weights, latents and sums are fp32 here")
    _leave(found, values, used, own)
    return found


def _named(found: Converted, values: Mapping[str, Any], names: Names) -> set[str]:
    """Carries over what has a name here; returns their keys that are done with."""
    for key, name in names.items():
        if key in values and not isinstance(name, Silent):
            try:
                found.set(name.key, name.convert(values[key]))
            except (TypeError, ValueError, OverflowError):
                raise _strange(found, key, values[key]) from None
    return set(names)


def _strange(found: Converted, key: str, value: Any) -> UserError:
    return UserError(f"convert {found.origin}: {key} = {_shown(value)} is no value that such a configuration has there")


def _one_line(text: str) -> str:
    """A text that stays within a comment: without line breaks, halves of surrogate pairs escaped."""
    return " ".join(text.encode(errors="backslashreplace").decode().split())


def _shown(value: Any) -> str:
    try:
        text = toml_value(value)
    except (TypeError, ValueError, AttributeError):  # a date, a null within a list, a key that is no text
        text = toml_value(str(value))
    return text if len(text) <= 200 else f"{text[:199]}…"


def _number(found: Converted, values: Mapping[str, Any], key: str, usual: float) -> Any:
    """A number above 0 of theirs, `usual` where there is none.

    Raises:
        UserError: it is something else.
    """
    value = values.get(key)
    if value is None or (value == 0 and usual == 0):
        return usual
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < LARGEST:
        raise _strange(found, key, value)
    return value


def _betas(found: Converted, values: Mapping[str, Any], first: str, second: str) -> set[str]:
    betas = [values.get(key, usual) for key, usual in zip((first, second), PUBLISHED_ADAM, strict=True)]
    found.set("optimizer.betas", betas)
    return {first, second}


def _amounts(found: Converted, values: Mapping[str, Any], gpus: int | None) -> set[str]:
    """Prompts of a rollout, and its updates, from the batches of all GPUs."""
    number = _number(found, values, "sample.mini_num_image_per_prompt", 0) or _number(found, values, "sample.train_batch_size", 1)
    batches, per_prompt = (_number(found, values, f"sample.{key}", 1) for key in ("num_batches_per_epoch", "num_image_per_prompt"))
    if gpus is None:
        raise UserError(f"convert {found.origin}: says nowhere for how many GPUs its batches are; give --gpus")
    _prompts_of(found, number * batches * gpus, per_prompt, gpus)
    rows = _number(found, values, "train.batch_size", number) * _number(found, values, "train.gradient_accumulation_steps", 1)
    found.set("optimizer.steps_per_rollout", max(1, round(batches * number / rows)))
    keys = ("train_batch_size", "mini_num_image_per_prompt", "num_batches_per_epoch", "num_image_per_prompt")
    return {*(f"sample.{key}" for key in keys), "train.gradient_accumulation_steps"}


def _prompts_of(found: Converted, images: float, per_prompt: float, gpus: int) -> None:
    prompts = float(images / per_prompt)
    found.set("rollout.prompts", max(1, math.floor(prompts)))
    found.notes.append(
        f"rollout.prompts: {images:g} images on {gpus} GPUs, {per_prompt} of each prompt"
        + ("" if prompts.is_integer() else ", rounded down")
    )


def _nft(found: Converted, values: Mapping[str, Any]) -> set[str]:
    steps, share = _number(found, values, "sample.num_steps", 10), _number(found, values, "train.timestep_fraction", 1.0)
    found.set("objective.times", "rollout")
    found.set("objective.times_per_image", max(1, int(steps * share)))
    found.set("evaluate.guidance", found.tree["rollout"].get("guidance"))
    done = {"train.timestep_fraction", "sample.num_steps"}
    done |= {"sample.deterministic"} if values.get("sample.deterministic", True) else set()
    return done | ({"train.adv_mode"} if values.get("train.adv_mode", "all") == "all" else set())


def _grpo(found: Converted, values: Mapping[str, Any], own: set[str]) -> set[str]:
    """Which steps are stochastic and trained: the scripts named _fast have a window, which the others ignore."""
    steps, share = _number(found, values, "sample.num_steps", 10), _number(found, values, "train.timestep_fraction", 1.0)
    found.set("rollout.solver", "euler")
    done = {"sample.sde_window_size", "sample.sde_window_range", "sample.train_num_steps", "train.timestep_fraction", "train.clip_range_lt"}
    size = _number(found, values, "sample.sde_window_size" if "sample.sde_window_size" in own else "sample.train_num_steps", 0)
    if size:
        found.set("objective.window", "random")
        found.set("objective.window_size", size)
        span = values.get("sample.sde_window_range") if "sample.sde_window_range" in own else None
        found.set("objective.span", (list(span) if isinstance(span, list | tuple) else span) or [0, max(size, steps // 2)])
    elif int(steps * share) not in (steps, steps - 1):
        found.set("objective.span", [0, max(1, int(steps * share))])
    guided = found.tree["rollout"].get("guidance", 1.0) > 1
    if values.get("train.cfg", True) or not guided:
        done.add("train.cfg")
    clip = values.get("train.clip_range")
    two = [values.get("train.clip_range_lt", clip), values.get("train.clip_range_gt", clip)]
    if two == [clip, clip] or not {"train.clip_range_lt", "train.clip_range_gt"} & own:
        done |= {"train.clip_range_lt", "train.clip_range_gt"}
    return done


def _leave(found: Converted, values: Mapping[str, Any], used: set[str], own: set[str]) -> None:
    """Lists what is neither carried over nor a default of theirs that switches something off."""
    off = (0, 0.0, False, None, "", {}, [])
    found.unmatched = {key: value for key, value in values.items() if key not in used and key in own and value not in off}
    if values.get("train.num_inner_epochs", 1) == 1:
        found.unmatched.pop("train.num_inner_epochs", None)


# rewards and prompts --------------------------------------------------------------------------------------


def _weights(found: Converted, values: Mapping[str, Any], key: str) -> dict[str, float]:
    """Their table of rewards, with its weights."""
    given = values.get(key) or {}
    if not isinstance(given, dict) or not all(isinstance(name, str) and isinstance(one, int | float) for name, one in given.items()):
        raise _strange(found, key, given)
    return {name: float(weight) for name, weight in given.items()}


def _rewards(found: Converted, given: Mapping[str, float]) -> None:
    known = built_in()
    for name, weight in given.items():
        if name in known:
            found.set(f"rewards.{name}", weight)
        else:
            found.tree.setdefault("rewards", {})[name] = {"source": f"{name}.py:{name}", "weight": weight}
            found.notes.append(f"rewards.{name}: not built in; write the function {name} into {name}.py (docs/guides/add-a-reward.md)")
    if not given:
        raise UserError(f"convert {found.origin}: reward_fn names no reward")


def _prompts(found: Converted, dataset: str) -> None:
    name = dataset.rstrip("/").rpartition("/")[2]
    train, test = SETS.get(name, (f"{dataset}/train.txt", f"{dataset}/test.txt"))
    if name not in SETS:
        found.notes.append(f"prompts: {dataset or 'nothing is named'}; give a file of yours")
    found.tree["prompts"] = train
    found.set("evaluate.prompts", test)
    if reported := [part for reward in found.tree.get("rewards", {}) for part in EVALUATED.get(reward, (reward,))]:
        found.set("evaluate.rewards", reported)


# YAML -----------------------------------------------------------------------------------------------------


def _from_yaml(path: Path, gpus: int | None) -> Converted:
    try:
        read = load_yaml(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"convert {path}: not YAML that can be read: {error}") from None
    if not isinstance(read, dict) or not ("grpo" in read or "dmd" in read):
        raise UserError(f"convert {path}: not RTDMD's, which has grpo or dmd")
    values = _flat(read)
    second = "grpo" in read
    found = Converted(path.name, "RTDMD")
    found.tree |= {"name": f"{path.stem}-rtdmd" if second else f"{path.stem}-acdmd", "model": {}}
    found.set("objective.type", "rtdmd" if second else "acdmd")
    found.set("rollout.solver", "cps")
    found.set("evaluate.solver", "cps")
    only = {key: value for key, value in values.items() if not (second and key.startswith("dmd."))}
    used = _named(found, only, RTDMD) | {key for key in values if key.partition(".")[0] in ("logging", "eval")}
    used |= {key for key in values if second and key.startswith("dmd.")}
    used |= {"prompt_path", *_constants(values, _number(found, values, "grpo.num_steps" if second else "dmd.num_inference_steps", 4))}
    number = GPUS if gpus is None else gpus
    used |= _second(found, values, number) if second else _first(found, values, number)
    _prompts(found, str(values.get("prompt_path", "")))
    _loras(found, values)
    _leave(found, values, used, set(values))
    return found


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        table = isinstance(value, dict) and not str(key).endswith(("reward_fn", "_map"))
        found |= _flat(value, f"{prefix}{key}.") if table else {f"{prefix}{key}": value}
    return found


FIXED: dict[str, Any] = {
    "sampling_mode": "dmd", "sde_type": "cps", "eval_sde_type": "cps", "num_inner_epochs": 1, "use_ema": True, "range_start": 0,
    "loss_type": "ac_dmd", "train_steps": [-1], "fake_guidance_scale": 1.0, "gradient_normalization": True, "enabled": True,
    "ac_start_mode": "next_sigma", "start_mode": "next_sigma", "ac_fake_train_guidance_scale": 1.0, "ac_consistency_enabled": True,
    "consistency_enabled": True, "ac_consistency_num_steps": 1, "consistency_num_steps": 1, "random_stop_idx": True,
    "ac_consistency_use_two_sample_unbiased": True, "consistency_use_two_sample_unbiased": True, "bp_only_deterministic": True,
    "ac_consistency_stopgrad_transitions": True, "consistency_stopgrad_transitions": True, "generator_scheduler": "cps",
    "init_lora_weights": "gaussian", "bp_use_training_reward_fn": True, "num_train_timesteps": 1000, "autocast_dtype": "bf16",
    "ac_min_step": 20, "ac_max_step": 980, "min_step": 20, "max_step": 980, "min_renoise_step": 20, "max_renoise_step": 980,
    "ac_end_timestep": 1000.0, "end_timestep": 1000.0, "ac_timestep_offset": 10.0, "timestep_offset": 10.0,
    "ac_fake_loss_weight_clamp_max": 10.0, "fake_loss_weight_clamp_max": 10.0, "fake_max_step": 999, "logit_std": 1.0,
    "fake_logit_std": 1.0, "dmd_logit_std": 1.0, "ac_target_formula_move_scale_out": True, "target_formula_move_scale_out": True,
    "all_include_terminal_when_no_random_stop": True,
}  # fmt: skip
"""Values of RTDMD's published configurations for which there is no key here, because it is how the method is computed."""


COMPUTED = (
    "timestep_sampling", "boundary_sigma_index", "step_selection.range_end", "log_interval", "reward_ckpt_path", "ema_update_interval",
    "ema_every", "clip_range_lt", "clip_range_gt", "fake_score_lora.rank", "fake_score_lora.lora_alpha",
)  # fmt: skip
"""Ends of their keys that say nothing to us, whatever their values."""


def _constants(values: Mapping[str, Any], steps: float) -> set[str]:
    """Their keys whose values are how the method is computed here, of so many steps."""
    even = [1000 * (steps - k) / steps for k in range(min(int(steps), 1000))]
    done = {key for key, value in values.items() if FIXED.get(key.rpartition(".")[2]) == value}
    done |= {key for key, value in values.items() if key.endswith("denoising_step_list") and value == even}
    return done | {key for key in values if key.endswith(COMPUTED) or key.startswith("solver.fake_score.")}


def _second(found: Converted, values: Mapping[str, Any], gpus: int) -> set[str]:
    batch, batches = (_number(found, values, f"grpo.{key}", 1) for key in ("sample_batch_size", "num_batches_per_epoch"))
    _prompts_of(found, batch * batches * gpus, _number(found, values, "grpo.num_image_per_prompt", 1), gpus)
    accumulated = _number(found, values, "grpo.gradient_accumulation_steps", batches)
    found.set("optimizer.steps_per_rollout", max(1, round(batches / accumulated)))
    done = _betas(found, values, "grpo.adam_beta1", "grpo.adam_beta2")
    rewards = _weights(found, values, "grpo.reward_fn")
    _rewards(found, rewards)
    if values.get("grpo.last_step_loss.bp_enabled"):
        known = built_in()
        found.set("objective.backprop", {name: weight for name, weight in rewards.items() if name in known and known[name].differentiable})
    else:
        found.tree["objective"].pop("margin", None)
    if not values.get("grpo.last_step_loss.ac_consistency_enabled"):
        found.set("objective.consistency", 0.0)
    if not values.get("grpo.last_step_loss.enabled", True):
        found.set("objective.matching", 0.0)
    found.notes.append(
        "optimizer.lr: their A is drawn 32 times as large as ours, so equal steps of B count for more there; see sd35m-rtdmd-rl"
    )
    keys = ("sample_batch_size", "num_batches_per_epoch", "gradient_accumulation_steps", "reward_fn", "timestep_fraction")
    return done | {f"grpo.{key}" for key in keys} | {"grpo.last_step_loss.bp_enabled", "grpo.last_step_loss.real_guidance_scale_min"}


def _first(found: Converted, values: Mapping[str, Any], gpus: int) -> set[str]:
    per_gpu = _number(found, values, "train.batch_size", 1) * _number(found, values, "train.gradient_accumulation_steps", 1)
    found.set("rollout.images_per_prompt", 1)
    _prompts_of(found, per_gpu * gpus, 1, gpus)
    found.set("optimizer.steps_per_rollout", 1)
    fake = _number(found, values, "dmd.fake_update_ratio", 10)
    found.set("rollouts", max(1, _number(found, values, "train.total_steps", 1) // fake))
    found.set("checkpoint.every", max(1, _number(found, values, "train.save_interval", fake) // fake))
    found.set("evaluate.every", _number(found, values, "eval.eval_interval", fake) // fake)
    found.set("evaluate.steps", values.get("eval.eval_num_steps"))
    found.notes.append(f"rollouts: one here is {fake} updates of the fake score and one of the student; theirs are counted by the former")
    done = _betas(found, values, "solver.generator.beta1", "solver.generator.beta2")
    measured = [name for name in _weights(found, values, "eval.reward_fn") if name in built_in()]
    found.tree["rewards"] = {name: 0.0 for name in measured} or {"pickscore": 0.0}
    if not values.get("ac_dmd.consistency_enabled"):
        found.set("objective.consistency", 0.0)
    keys = ("batch_size", "gradient_accumulation_steps", "total_steps", "save_interval", "resume_from")
    return done | {f"train.{key}" for key in keys} | {"dmd.real_guidance_scale_min"}


def _loras(found: Converted, values: dict[str, Any]) -> None:
    """Their files of weights are pickles, which are never read."""
    for role, key in (("generator_lora", "lora.on"), ("fake_score_lora", "objective.fake")):
        place = values.pop(f"model.{role}.load_path", None)
        values.pop(f"model.{role}.merge_before_training", None)
        if place:
            found.notes.append(f"{key}: theirs is {place}, a pickle, which is not read; name a run of yours, or a LoRA as safetensors")
            if key == "objective.fake":
                found.set("objective.matching", 0.0)
                found.notes.append("objective.matching: 0 until objective.fake names a fake score")
