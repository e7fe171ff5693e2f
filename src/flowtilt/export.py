"""The result of a run: a LoRA that plain diffusers loads, and the card that says what it is; and LoRAs in others' formats."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from flowtilt.config import Recipe
from flowtilt.errors import UserError
from flowtilt.files import read_lines, whole_folder
from flowtilt.lora import Lora, join
from flowtilt.lora.fit import check
from flowtilt.lora.merge import local_folder, pipeline_folder, shapes_in, to_pipeline
from flowtilt.lora.stacked import kept, leading, read_stack
from flowtilt.lora.write import DIFFUSERS, RTDMD_RATIO, add_parents, to_diffusers, to_generator_ema, to_peft
from flowtilt.policy import Policy
from flowtilt.stack import model_settings, recipe_of
from flowtilt.trust import RECIPE, is_ours, remember

FORMATS = {
    "diffusers": 'in diffusers: pipe.load_lora_weights("{folder}")',
    "peft": 'in diffusers: pipe.transformer = peft.PeftModel.from_pretrained(pipe.transformer, "{folder}")',
    "generator_ema": "in RTDMD: {folder}/generator_ema.pt with rank {rank} and alpha {alpha:g}, which the file does not tell",
    "pipeline": 'in diffusers: DiffusionPipeline.from_pretrained("{folder}"); here: --model {folder}',
}
"""What a LoRA is written as, and how it is loaded again."""

BESIDE, WITHIN = "beside this folder", "in this folder"
ON_TOP = "- on top of {others}, which has to be loaded, too; `flowtilt export` joins all in one file\n"
JOINED = "- joined with what it was trained on top of: this one file is all\n"
LOADS = re.compile(r"^pipe\.load_lora_weights\(.*\)$(\n^pipe\.(load_lora_weights|set_adapters)\(.*\)$)*", re.MULTILINE)

CARD = """---
base_model: {base}
library_name: diffusers
tags: [text-to-image, lora, flowtilt, {objective}]
---
# {name}

A LoRA of rank {rank} (alpha {rank}) on `{base}`, {made} with {objective} by [flowtilt](https://pypi.org/project/flowtilt).

- rewards: {rewards}
- rollouts: {steps}, of {prompts} prompts x {images} images; seed {seed}
{on_top}- score: {before} before, {after} after ({protocol})
- weights: the exponential moving average

```python
{load}
{add}
{sampling}
image = pipe({prompt!r}, {options}).images[0]
```

The recipe is in `recipe.toml` {recipe}; `flowtilt train recipe.toml` repeats the run.
"""

LOAD = """import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({base!r}{revision}, dtype=torch.{dtype}).to("{device}")"""

LOAD_PLAYGROUND = """from diffusers import StableDiffusion3Pipeline
from flowtilt.playground import pipeline_path

pipe = StableDiffusion3Pipeline.from_pretrained(pipeline_path())"""


LEVELS = """# the noise levels of the evaluation; num_inference_steps={steps} alone may take slightly others
sigmas = [1 - k / {steps} for k in range({steps})]"""

CPS = """from flowtilt.schedulers import CPSScheduler

# the stochastic steps of the evaluation, at its noise levels
pipe.scheduler = CPSScheduler.from_config(pipe.scheduler.config, eta={eta!r})"""


def write_lora(policy: Policy, run: Path, recipe: Recipe, step: int, parents: Sequence[str] = ()) -> Path:
    """Writes the EMA weights to `run`/lora with a model card; the folder is replaced as a whole.

    Args:
        parents: fingerprints of the LoRAs beneath it, of which `lora.stacked.keep` has put copies into the run.
    """
    folder = run / "lora"
    with whole_folder(folder) as temporary:
        policy.save_lora(str(temporary))
        add_parents(temporary / DIFFUSERS, parents)
        (temporary / "README.md").write_text(model_card(policy, run, recipe, step), encoding="utf-8")
    return folder


def write_fake(policy: Policy, run: Path, parents: Sequence[str]) -> None:
    """Writes the fake score of a distillation to `run`/fake, from where a second stage goes on with it."""
    with whole_folder(run / "fake") as temporary:
        policy.save_lora(str(temporary), "fake")
        add_parents(temporary / DIFFUSERS, parents)


def model_card(policy: Policy, run: Path, recipe: Recipe, step: int) -> str:
    """The card of a run after `step` rollouts, with its first and newest scores."""
    scores = [record["score"] for record in read_lines(run / "evaluations.jsonl")] or [float("nan")]
    m = recipe.model
    revision = f", revision={m.revision!r}" if m.revision else ""
    device, dtype = ("cpu", "float32") if m.dtype == "float32" else ("cuda", "bfloat16" if m.dtype == "auto" else m.dtype)
    playground = m.path == "playground"
    beneath = kept(run)
    e = recipe.evaluate
    cps = e.solver == "cps"
    call = {"num_inference_steps": repr(e.steps)} if cps else {"sigmas": "sigmas"}
    call |= {name: repr(value) for name, value in policy.model.call_options(e.guidance).items()}
    return CARD.format(
        name=recipe.name,
        base=m.path,
        made="distilled" if recipe.objective.type == "acdmd" else "reinforced",
        objective=recipe.objective.type,
        rank=recipe.lora.rank,
        rewards=", ".join(f"{name} x {reward.weight:g}" for name, reward in recipe.reward_table().items()),
        steps=step,
        prompts=recipe.rollout.prompts,
        images=recipe.rollout.images_per_prompt,
        seed=recipe.seed,
        before=f"{scores[0]:.3f}",
        after=f"{scores[-1]:.3f}",
        protocol=recipe.protocol(),
        load=LOAD_PLAYGROUND if playground else LOAD.format(base=m.path, revision=revision, dtype=dtype, device=device),
        on_top=ON_TOP.format(others=" and ".join(f"`{place}`" for place in beneath)) if beneath else "",
        add=_added([*beneath, run / "lora"]),
        recipe=BESIDE,
        prompt="a red circle left of a blue square" if playground else "a photo of a red bench left of a blue bicycle",
        sampling=CPS.format(eta=e.eta) if cps else LEVELS.format(steps=e.steps),
        options=", ".join(f"{name}={value}" for name, value in call.items()),
    )


def _added(folders: Sequence[Path]) -> str:
    """The lines by which diffusers adds the LoRAs of those folders."""
    if len(folders) == 1:
        return f'pipe.load_lora_weights("{folders[0]}")'
    names = [f"beneath_{number}" for number in range(1, len(folders))] + ["top"]
    lines = [f'pipe.load_lora_weights("{folder}", adapter_name="{name}")' for folder, name in zip(folders, names, strict=True)]
    return "\n".join([*lines, f"pipe.set_adapters({json.dumps(names)}, {[1] * len(names)})"])


def export(places: Sequence[Path | str], output: Path, to: str, *, model: str | None = None) -> str:
    """Writes one LoRA, or several joined exactly, into a new folder; returns a line that says how it is loaded.

    What a LoRA was trained on top of is joined with it, so that what is written needs the base alone.

    Args:
        places: runs, checkpoints, folders or files, as `read_stack` takes them.
        to: one of `FORMATS`.
        model: hub id or folder of the base; none is that of the first one's run. A base that is on disk is checked to fit.

    Raises:
        UserError: nothing to read, no base to merge into or another one than the LoRA's, a target that is taken, or no space.
    """
    loras = read_stack(places)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"export: {output} is there already; choose a new folder with -o")
    recipe = recipe_of(leading(loras))
    base = model_settings(model, recipe) if model or recipe else None
    lora = join(loras)
    if to == "pipeline":
        if base is None:
            raise UserError(f"export: {lora.source} does not tell its base; name the pipeline to merge into with --model")
        source = pipeline_folder(base.path, base.revision)
        with whole_folder(output) as temporary:
            to_pipeline(loras, source, temporary)
        return FORMATS[to].format(folder=output)
    if base and (folder := local_folder(base.path)):
        check(lora, shapes_in(folder))
    name = base.path if base and base.path != "playground" else None
    with whole_folder(output) as temporary:
        if to == "diffusers":
            to_diffusers(lora, temporary)
        elif to == "peft":
            to_peft(lora, temporary, name)
        else:
            to_generator_ema(lora, temporary, name)
        if to != "generator_ema" and len(loras) == 1 + len(loras[-1].parents):
            _take_card(lora, Path(loras[-1].source).parent, temporary, output, to)
    if (output / RECIPE).is_file() and is_ours(Path(loras[-1].source).parent.parent):
        remember(output)  # a copy of the user's own recipe is the user's own
    return FORMATS[to].format(folder=output, rank=lora.ranks()[0], alpha=RTDMD_RATIO * lora.ranks()[0])


def _take_card(lora: Lora, own: Path, folder: Path, output: Path, to: str) -> None:
    """Puts the card and the recipe of a run, whose newest LoRA in `own` this is, or is the top of, beside its export."""
    card, recipe = own / "README.md", own.parent / "recipe.toml"
    if own.name != "lora" or not card.is_file() or not recipe.is_file():
        return
    load = {
        "diffusers": f'pipe.load_lora_weights("{output}")',
        "peft": f'from peft import PeftModel\n\npipe.transformer = PeftModel.from_pretrained(pipe.transformer, "{output}")',
    }[to]
    text = LOADS.sub(lambda _: load, card.read_text(encoding="utf-8"), count=1)
    text = re.sub(f"^{ON_TOP.format(others='.*')}", JOINED, text, count=1, flags=re.MULTILINE)
    size = f"A LoRA of rank {lora.ranks()[-1]} (alpha {lora.ranks()[-1]})"
    text = re.sub(r"^A LoRA of rank \S+ \(alpha [^)]+\)", size, text, count=1, flags=re.MULTILINE)
    (folder / "README.md").write_text(text.replace(BESIDE, WITHIN), encoding="utf-8")
    shutil.copy(recipe, folder / RECIPE)
