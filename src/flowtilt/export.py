"""The result of a run: a LoRA that plain diffusers loads, and the card that says what it is."""

from pathlib import Path

from flowtilt.config import Recipe
from flowtilt.files import read_lines, whole_folder
from flowtilt.policy import Policy

CARD = """---
base_model: {base}
library_name: diffusers
tags: [text-to-image, lora, flowtilt, {objective}]
---
# {name}

A LoRA of rank {rank} (alpha {alpha:g}) on `{base}`, reinforced with {objective} by [flowtilt](https://pypi.org/project/flowtilt).

- rewards: {rewards}
- rollouts: {steps}, of {prompts} prompts x {images} images; seed {seed}
- score: {before} before, {after} after ({protocol})
- weights: the exponential moving average

```python
{load}
pipe.load_lora_weights("{folder}")
# the noise levels of the evaluation; num_inference_steps={solver_steps} alone takes slightly others
sigmas = [1 - k / {solver_steps} for k in range({solver_steps})]
image = pipe({prompt!r}, sigmas=sigmas, guidance_scale={guidance:.1f}{options}).images[0]
```

The recipe is in `recipe.toml` beside this folder; `flowtilt train recipe.toml` repeats the run.
"""

LOAD = """import torch
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained({base!r}{revision}, dtype=torch.{dtype}).to("{device}")"""

LOAD_PLAYGROUND = """from diffusers import StableDiffusion3Pipeline
from flowtilt.playground import pipeline_path

pipe = StableDiffusion3Pipeline.from_pretrained(pipeline_path())"""


def write_lora(policy: Policy, run: Path, recipe: Recipe, step: int) -> Path:
    """Writes the EMA weights to `run`/lora with a model card; the folder is replaced as a whole."""
    folder = run / "lora"
    with whole_folder(folder) as temporary:
        policy.save_lora(str(temporary))
        (temporary / "README.md").write_text(model_card(policy, run, recipe, step), encoding="utf-8")
    return folder


def model_card(policy: Policy, run: Path, recipe: Recipe, step: int) -> str:
    """The card of a run after `step` rollouts, with its first and newest scores."""
    scores = [record["score"] for record in read_lines(run / "evaluations.jsonl")] or [float("nan")]
    m = recipe.model
    revision = f", revision={m.revision!r}" if m.revision else ""
    device, dtype = ("cpu", "float32") if m.dtype == "float32" else ("cuda", "bfloat16" if m.dtype == "auto" else m.dtype)
    playground = m.path == "playground"
    return CARD.format(
        name=recipe.name,
        base=m.path,
        objective=recipe.objective.type,
        rank=recipe.lora.rank,
        alpha=recipe.lora.alpha,
        rewards=", ".join(f"{name} x {reward.weight:g}" for name, reward in recipe.reward_table().items()),
        steps=step,
        prompts=recipe.rollout.prompts,
        images=recipe.rollout.images_per_prompt,
        seed=recipe.seed,
        before=f"{scores[0]:.3f}",
        after=f"{scores[-1]:.3f}",
        protocol=recipe.protocol(),
        load=LOAD_PLAYGROUND if playground else LOAD.format(base=m.path, revision=revision, dtype=dtype, device=device),
        folder=run / "lora",
        prompt="a red circle left of a blue square" if playground else "a photo of a red bench left of a blue bicycle",
        solver_steps=recipe.evaluate.steps,
        guidance=recipe.evaluate.guidance,
        options="".join(f", {name}={value!r}" for name, value in policy.model.call_options.items()),
    )
