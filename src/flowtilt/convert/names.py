"""What the settings of DiffusionNFT, flow_grpo and RTDMD are called here.

A table says for each of their keys which key of a recipe it is, and how its value is read. What several of their keys say together, as
the number of prompts, is computed apart. A key in no table has no counterpart.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Convert = Callable[[Any], Any]
"""Their value to ours; None leaves the key out."""


class Same(NamedTuple):
    """A key of a recipe, and how a value becomes its own."""

    key: str
    convert: Convert = lambda value: value


class Silent(NamedTuple):
    """A key that says nothing a recipe would say, and why."""

    why: str


Names = Mapping[str, Same | Silent]

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "no": "float32", "fp32": "float32"}
SETS = {
    "ocr": ("ocr-train", "ocr"),
    "geneval": ("geneval-train", "geneval"),
    "pickscore": ("pickapic-train", "pickapic"),
    "drawbench": ("drawbench", "drawbench"),
}
"""Their folders of prompts: the sets to train and to evaluate on."""
EVALUATED = {"geneval": ("geneval/correct", "geneval/strict"), "ocr": ("ocr",)}
"""What is reported of a reward, where it is more than the reward itself."""

_MEMORY = Silent("a matter of memory; micro_batch is found by trying")
_LOGS = Silent("a run has one folder: run = …")
_HERE = Silent("always so here")


def _number_or_nothing(value: Any) -> Any:
    return value if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else None


def _guidance(value: Any) -> Any:
    """Theirs is off at 0 and at 1."""
    return max(1.0, float(value)) if isinstance(value, int | float) else None


_COMMON: Names = {
    "seed": Same("seed"),
    "num_epochs": Same("rollouts"),
    "save_freq": Same("checkpoint.every", _number_or_nothing),
    "num_checkpoint_limit": Same("checkpoint.keep", _number_or_nothing),
    "eval_freq": Same("evaluate.every"),
    "resolution": Same("model.resolution", _number_or_nothing),
    "mixed_precision": Same("model.dtype", DTYPES.get),
    "pretrained.model": Same("model.path"),
    "pretrained.revision": Same("model.revision", lambda value: None if value in ("", "main", None) else value),
    "activation_checkpointing": Same("model.recompute", lambda value: True if value else None),
    "use_lora": Same("train", lambda value: "lora" if value else "full"),
    "sample.num_steps": Same("rollout.steps"),
    "sample.eval_num_steps": Same("evaluate.steps"),
    "sample.guidance_scale": Same("rollout.guidance", _guidance),
    "sample.eval_guidance_scale": Same("evaluate.guidance", _guidance),
    "sample.num_image_per_prompt": Same("rollout.images_per_prompt"),
    "sample.global_std": Same("advantage", lambda value: "global" if value else "group"),
    "train.learning_rate": Same("optimizer.lr"),
    "train.adam_weight_decay": Same("optimizer.weight_decay"),
    "train.adam_epsilon": Same("optimizer.eps"),
    "train.max_grad_norm": Same("optimizer.clip"),
    "train.adv_clip_max": Same("objective.advantage_clip"),
    "train.beta": Same("objective.kl"),
    "train.lora_path": Same("lora.init", lambda value: value or None),
    "train.ema": Same("ema", lambda value: 0.9 if value else 0.0),
    "train.batch_size": _MEMORY,
    "sample.test_batch_size": _MEMORY,
    "sample.batch_size": _MEMORY,
    "fsdp_optimizer_offload": _MEMORY,
    "allow_tf32": Silent("torch's own default"),
    "logdir": _LOGS,
    "save_dir": _LOGS,
    "run_name": _LOGS,
    "base_model": Silent("the family is read from the pipeline"),
    "debug": Silent("switches logging off"),
    "per_prompt_stat_tracking": _HERE,
    "prompt_fn": Silent("follows from the prompts"),
}

NFT: Names = {
    **_COMMON,
    "beta": Same("objective.beta"),
    "decay_type": Same("objective.old_policy", {0: "copy", 1: "linear", 2: "delayed"}.get),
    "sample.solver": Same("rollout.solver", lambda value: {"flow": "euler"}.get(value, value)),
    "sample.noise_level": Silent("of a stochastic sampler, and DiffusionNFT's is an ODE"),
}

GRPO: Names = {
    **_COMMON,
    "train.clip_range": Same("objective.clip_range"),
    "sample.noise_level": Same("objective.eta"),
    "sample.sde_type": Same("objective.sde", {"sde": "flow", "cps": "cps", "dance": "dance"}.get),
}

RTDMD: Names = {
    "model.pretrained_path": Same("model.path"),
    "model.image_resolution": Same("model.resolution"),
    "model.dtype": Same("model.dtype", DTYPES.get),
    "model.gradient_checkpointing": Same("model.recompute", lambda value: True if value else None),
    "model.generator_lora.rank": Same("lora.rank"),
    "model.generator_lora.lora_alpha": Same("lora.alpha", float),
    "train.seed": Same("seed"),
    "grpo.num_steps": Same("rollout.steps"),
    "grpo.noise_level": Same("rollout.eta"),
    "grpo.num_image_per_prompt": Same("rollout.images_per_prompt"),
    "grpo.guidance_scale": Same("rollout.guidance", _guidance),
    "grpo.eval_num_steps": Same("evaluate.steps"),
    "grpo.eval_guidance_scale": Same("evaluate.guidance", _guidance),
    "grpo.eval_noise_level": Same("evaluate.eta"),
    "grpo.eval_freq": Same("evaluate.every"),
    "grpo.save_freq": Same("checkpoint.every"),
    "grpo.num_epochs": Same("rollouts"),
    "grpo.clip_range": Same("objective.clip_range"),
    "grpo.adv_clip_max": Same("objective.advantage_clip"),
    "grpo.max_grad_norm": Same("optimizer.clip"),
    "grpo.learning_rate": Same("optimizer.lr"),
    "grpo.adam_weight_decay": Same("optimizer.weight_decay"),
    "grpo.adam_epsilon": Same("optimizer.eps"),
    "grpo.ema_decay": Same("ema"),
    "grpo.per_prompt_global_std": Same("advantage", lambda value: "global" if value else "group"),
    "grpo.weight_advantages": Same("combine", lambda value: "normalized" if value else "sum"),
    "grpo.step_selection.num_train_steps": Same("objective.trained_steps"),
    "grpo.last_step_loss.weight": Same("objective.matching"),
    "grpo.last_step_loss.real_guidance_scale_max": Same("objective.teacher_guidance", _guidance),
    "grpo.last_step_loss.ac_consistency_weight": Same("objective.consistency"),
    "grpo.last_step_loss.ac_consistency_epsilon_timestep": Same("objective.consistency_span", lambda value: value / 1000),
    "grpo.last_step_loss.bp_grad_scale": Same("objective.backprop_scale"),
    "grpo.last_step_loss.bp_reward_margin": Same("objective.margin"),
    "dmd.num_inference_steps": Same("rollout.steps"),
    "dmd.cps_eta": Same("rollout.eta"),
    "dmd.real_guidance_scale_max": Same("objective.teacher_guidance", _guidance),
    "dmd.fake_update_ratio": Same("objective.fake_updates"),
    "ac_dmd.consistency_weight": Same("objective.consistency"),
    "ac_dmd.consistency_epsilon_timestep": Same("objective.consistency_span", lambda value: value / 1000),
    "solver.fake_score.lr": Same("objective.fake_lr"),
    "solver.generator.lr": Same("optimizer.lr"),
    "solver.generator.eps": Same("optimizer.eps"),
    "solver.generator.weight_decay": Same("optimizer.weight_decay"),
    "solver.generator.warmup_steps": Same("optimizer.warmup"),
    "solver.generator.max_grad_norm": Same("optimizer.clip"),
    "train.ema_decay": Same("ema"),
    **{key: _MEMORY for key in ("grpo.test_batch_size", "grpo.vae_decode_batch_size", "grpo.train_batch_size", "eval.eval_batch_size")},
    "grpo.last_step_loss.fake_score_batch_size": _MEMORY,
    "model.model_type": Silent("the family is read from the pipeline"),
    "model.generator_lora.target_modules": Silent("those of the family"),
    "model.fake_score_lora.target_modules": Silent("those of the family"),
    "grpo.per_prompt_stat_tracking": _HERE,
    "output_dir": _LOGS,
    "distributed.strategy": Silent("torchrun's processes; a sharded base does not go with RTDMD"),
    "distributed.fsdp_sharding": Silent("torchrun's processes; a sharded base does not go with RTDMD"),
}
