"""The model card of what a run trained: what it is, how it scored, and the code that loads it."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from flowtilt.config import Recipe
from flowtilt.io.run_folder import RunFolder
from flowtilt.lora.stacked import kept
from flowtilt.methods import is_own
from flowtilt.policy.roles import Policy
from flowtilt.runs import folder as runs

BESIDE, WITHIN = "beside this folder", "in this folder"
ON_TOP = "- on top of {others}, which has to be loaded, too; `flowtilt export` joins all in one file\n"
JOINED = "- joined with what it was trained on top of: this one file is all\n"
LOADS = re.compile(r"^pipe\.load_lora_weights\(.*\)$(\n^pipe\.(load_lora_weights|set_adapters)\(.*\)$)*", re.MULTILINE)
HEAD = re.compile(r"\A---\n.*?^---\n", re.MULTILINE | re.DOTALL)

LORA, ALL = "A LoRA of rank {rank} (alpha {rank:g}) on", "All weights of the network of"
REPLACED = "pipe.transformer = type(pipe.transformer).from_pretrained({folder}, dtype=pipe.transformer.dtype).to(pipe.device)"

CARD = """# {name}

{what} {base}, {made} with {objective} by flowtilt.

- rewards: {rewards}
- rollouts: {steps}, of {prompts} prompts x {images} images; seed {seed}
{on_top}- score: {before} before, {after} after ({protocol})
- weights: the exponential moving average

```python
{load}
{add}
{sampling}
image = pipe(prompt={prompt!r}, {options}).images[0]
```

The options are those of the evaluation. With the pipeline's own defaults, which have {defaults}, the same weights usually score lower.

The recipe is in `recipe.toml` {recipe}; `flowtilt train recipe.toml` repeats the run{where}.
"""

LOAD = """import torch
from diffusers import DiffusionPipeline
{loads}
pipe = DiffusionPipeline.from_pretrained({base!r}{revision}, dtype=torch.{dtype}).to("{device}")"""

LOADS_IMAGES = "from diffusers.utils import load_image\n"

LOAD_PLAYGROUND = """from diffusers import StableDiffusion3Pipeline
from flowtilt.playground import pipeline_path

pipe = StableDiffusion3Pipeline.from_pretrained(pipeline_path())"""

LEVELS = """# the noise levels of the evaluation; num_inference_steps={steps} alone may take slightly others
sigmas = [1 - k / {steps} for k in range({steps})]"""

CPS = """from flowtilt.schedulers import CPSScheduler

# the stochastic steps of the evaluation, at its noise levels
pipe.scheduler = CPSScheduler.from_config(pipe.scheduler.config, eta={eta!r})"""

EDITING = "image-to-image"
"""The hub's word for pipelines that take a source image."""
APACHE = "apache-2.0"
LICENSES = {
    "playground": APACHE,
    "stabilityai/stable-diffusion-3-medium-diffusers": "stabilityai-ai-community LICENSE.md",
    "stabilityai/stable-diffusion-3.5-medium": "stabilityai-ai-community LICENSE.md",
    "stabilityai/stable-diffusion-3.5-large": "stabilityai-ai-community LICENSE.md",
    "black-forest-labs/FLUX.1-dev": "flux-1-dev-non-commercial-license LICENSE.md",
    "black-forest-labs/FLUX.1-Kontext-dev": "flux-1-dev-non-commercial-license LICENSE.md",
    "black-forest-labs/FLUX.1-schnell": APACHE,
    "black-forest-labs/FLUX.2-dev": "flux-non-commercial-license",
    "black-forest-labs/FLUX.2-klein-9B": "flux-non-commercial-license LICENSE.md",
    "black-forest-labs/FLUX.2-klein-base-9B": "flux-non-commercial-license LICENSE.md",
    "black-forest-labs/FLUX.2-klein-4B": APACHE,
    "black-forest-labs/FLUX.2-klein-base-4B": APACHE,
    "Qwen/Qwen-Image": APACHE,
    "Qwen/Qwen-Image-2512": APACHE,
    "Qwen/Qwen-Image-Edit": APACHE,
    "Qwen/Qwen-Image-Edit-2509": APACHE,
    "Qwen/Qwen-Image-Edit-2511": APACHE,
    "Tongyi-MAI/Z-Image": APACHE,
    "Tongyi-MAI/Z-Image-Turbo": APACHE,
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": "nscl-v2-custom LICENSE.txt",
    "Alpha-VLLM/Lumina-Image-2.0": APACHE,
    "fal/AuraFlow": APACHE,
    "fal/AuraFlow-v0.2": APACHE,
    "fal/AuraFlow-v0.3": APACHE,
    "lodestones/Chroma1-Base": APACHE,
    "lodestones/Chroma1-HD": APACHE,
}
"""Licences by base, as their publishers state them: the hub's word for it, or a name and perhaps the file of the base that holds it.

A LoRA is bound by that of its base.
"""


def model_card(policy: Policy, run: Path, recipe: Recipe, step: int) -> str:
    """The card of a run after `step` rollouts, with its first and newest scores."""
    before, after = ("not measured" if score is None else f"{score:.3f}" for score in runs.scores(run))
    m = recipe.model
    revision = f", revision={m.revision!r}" if m.revision else ""
    device, dtype = ("cpu", "float32") if m.dtype == "float32" else ("cuda", "bfloat16" if m.dtype == "auto" else m.dtype)
    playground = m.path == "playground"
    base_loras = kept(run)
    e = recipe.evaluate
    cps = e.solver == "cps"
    call = {"num_inference_steps": repr(e.steps)} | ({} if cps or m.levels == "stock" else {"sigmas": "sigmas"})
    call |= {name: repr(value) for name, value in policy.model.call_options(e.guidance).items()}
    edits = getattr(policy.model, "edits", False)
    call |= {"image": 'load_image("photo.png")'} if edits else {}
    return metadata(recipe, edits=edits) + CARD.format(
        name=recipe.name,
        base="the pipeline that comes with flowtilt" if playground else f"`{m.path}`",
        made=recipe.objective.made,
        objective=_method(recipe),
        what=ALL if recipe.train == "full" else LORA.format(rank=recipe.lora.rank),
        rewards=", ".join(f"{name} x {reward.weight:g}" for name, reward in recipe.reward_table().items()),
        steps=step,
        prompts=recipe.rollout.prompts,
        images=recipe.rollout.images_per_prompt,
        seed=recipe.seed,
        before=before,
        after=after,
        protocol=recipe.protocol(),
        load=LOAD_PLAYGROUND
        if playground
        else LOAD.format(loads=LOADS_IMAGES if edits else "", base=m.path, revision=revision, dtype=dtype, device=device),
        on_top=ON_TOP.format(others=" and ".join(f"`{place}`" for place in base_loras)) if base_loras else "",
        add=REPLACED.format(folder=_quoted(RunFolder(run).network))
        if recipe.train == "full"
        else _added([*base_loras, RunFolder(run).lora]),
        recipe=BESIDE,
        where=f" where the file of its method, `{_method(recipe)}`, is, too" if is_own(recipe.objective.type) else "",
        prompt="a red circle left of a blue square"
        if playground
        else "paint the bench red"
        if edits
        else "a photo of a red bench left of a blue bicycle",
        sampling=CPS.format(eta=e.eta) if cps else "" if m.levels == "stock" else LEVELS.format(steps=e.steps),
        options=", ".join(f"{name}={value}" for name, value in call.items()),
        defaults="another scheduler and other text lengths" if cps else "other noise levels and text lengths",
    )


def _method(recipe: Recipe) -> str:
    """The method's name; of a user's own its file and class, without the folders of this machine."""
    return Path(recipe.objective.type).name if is_own(recipe.objective.type) else recipe.objective.type


def metadata(recipe: Recipe, library: str = "diffusers", edits: bool = False) -> str:
    """The block above a card that a hub reads; a base that is no hub id is left out of it.

    Args:
        library: what loads the LoRA: "diffusers" or "peft".
        edits: prompts have source images.
    """
    task = EDITING if edits else "text-to-image"
    path, method = recipe.model.path, recipe.objective.type
    base = path if _is_hub_id(path) else None
    data = ModelCardData(
        base_model=base,
        base_model_relation=("finetune" if recipe.train == "full" else "adapter") if base else None,
        library_name=library,
        pipeline_tag=task,
        tags=[task, *(["lora"] if recipe.train == "lora" else []), "flowtilt", *([] if is_own(method) else [method])],
        **_license(path),
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _license(base: str) -> dict[str, Any]:
    """The licence field; a licence that the hub has no word for is named, with a link to its text, or to the base where that says more."""
    licence = LICENSES.get(base)
    if licence in (None, APACHE):
        return {"license": licence}
    name, _, file = licence.partition(" ")
    page = f"https://huggingface.co/{base}"
    return {"license": "other", "license_name": name, "license_link": f"{page}/blob/main/{file}" if file else page}


def _is_hub_id(path: str) -> bool:
    """Whether a base is OWNER/NAME on the hub, and no folder here."""
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return "/" in path and not Path(path).exists()


def _added(folders: Sequence[Path]) -> str:
    """The lines by which diffusers adds the LoRAs of those folders."""
    if len(folders) == 1:
        return f"pipe.load_lora_weights({_quoted(folders[0])})"
    names = [f"beneath_{number}" for number in range(1, len(folders))] + ["top"]
    lines = [f'pipe.load_lora_weights({_quoted(folder)}, adapter_name="{name}")' for folder, name in zip(folders, names, strict=True)]
    return "\n".join([*lines, f"pipe.set_adapters({json.dumps(names)}, {[1] * len(names)})"])


def exported(text: str, recipe: Recipe, rank: int, alpha: float, output: Path, to: str) -> str:
    """The card of a run for the export of its LoRA, joined with what lies beneath it, to `output` in the format `to`."""
    load = {
        "diffusers": f"pipe.load_lora_weights({_quoted(output)})",
        "peft": f"from peft import PeftModel\n\npipe.transformer = PeftModel.from_pretrained(pipe.transformer, {_quoted(output)})",
    }[to]
    edits = any(f"pipeline_tag: {EDITING}" in head[0] for head in HEAD.finditer(text))
    text = HEAD.sub(lambda _: metadata(recipe, to, edits), text, count=1)
    text = LOADS.sub(lambda _: load, text, count=1)
    text = re.sub(f"^{ON_TOP.format(others='.*')}", JOINED, text, count=1, flags=re.MULTILINE)
    text = re.sub(r"^A LoRA of rank \S+ \(alpha [^)]+\)", f"A LoRA of rank {rank} (alpha {alpha:g})", text, count=1, flags=re.MULTILINE)
    return text.replace(BESIDE, WITHIN)


def _quoted(path: Path) -> str:
    """A path as Python reads it."""
    return json.dumps(str(path), ensure_ascii=False)
