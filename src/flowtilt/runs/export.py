"""The result of a run, as plain diffusers loads it; and LoRAs in others' formats, or merged."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from flowtilt.build import model_settings, recipe_of
from flowtilt.config import Recipe, load_recipe
from flowtilt.config.trust import is_ours, remember
from flowtilt.errors import UserError
from flowtilt.io.files import whole_folder
from flowtilt.io.run_folder import RunFolder
from flowtilt.io.tensors import save_file
from flowtilt.lora import Lora, join
from flowtilt.lora.comfyui import to_comfyui
from flowtilt.lora.fit import check
from flowtilt.lora.merge import NETWORK, copy_parts, local_folder, network_class, pipeline_folder, shapes_in, tensors_in, to_pipeline
from flowtilt.lora.write import DIFFUSERS, RTDMD_RATIO, add_parents, to_diffusers, to_generator_ema, to_peft
from flowtilt.policy.roles import Policy
from flowtilt.policy.tuned import read_tuned
from flowtilt.policy.whole import WEIGHTS, read_weights
from flowtilt.runs.card import exported, model_card

CARD = "README.md"
FORMATS = {
    "diffusers": 'in diffusers: pipe.load_lora_weights("{folder}")',
    "peft": 'in diffusers: pipe.transformer = peft.PeftModel.from_pretrained(pipe.transformer, "{folder}")',
    "comfyui": "in ComfyUI: copy {folder}/comfyui_lora.safetensors to models/loras and choose it in Load LoRA",
    "generator_ema": "in RTDMD: {folder}/generator_ema.pt with rank {rank} and alpha {alpha:g}, which the file does not tell",
    "pipeline": 'in diffusers: DiffusionPipeline.from_pretrained("{folder}"); here: --model {folder}',
}
"""What a LoRA is written as, and how it is loaded again."""


def write_result(policy: Policy, run: Path, recipe: Recipe, step: int, parents: Sequence[str] = ()) -> Path:
    """Writes the EMA weights to `run`/lora or, of all weights, `run`/transformer, with a model card; the folder is replaced as a whole.

    Args:
        parents: fingerprints of the LoRAs beneath it, of which `lora.stacked.keep` has put copies into the run.
    """
    folder = RunFolder(run).network if recipe.train == "full" else RunFolder(run).lora
    with whole_folder(folder) as temporary:
        policy.save(str(temporary))
        add_parents(temporary / DIFFUSERS, parents)
        (temporary / CARD).write_text(model_card(policy, run, recipe, step), encoding="utf-8")
    return folder


def write_role(policy: Policy, role: str, run: Path, parents: Sequence[str]) -> None:
    """Writes a further role, such as RTDMD's fake score, to `run`/<role>, from where another run goes on with it."""
    with whole_folder(RunFolder(run).role(role)) as temporary:
        policy.save(str(temporary), role)
        add_parents(temporary / DIFFUSERS, parents)


def export(places: Sequence[Path | str], output: Path | str, to: str | None = None, *, model: str | None = None) -> str:
    """Writes one LoRA, or several joined exactly, or a run of all weights, into a new folder; returns a line that says how it is loaded.

    What a LoRA was trained on top of is joined with it, so that what is written needs the base alone.

    Args:
        places: runs, checkpoints, folders or files, as `read_stack` takes them.
        to: one of `FORMATS`; none is diffusers', or of all weights the only one, a pipeline.
        model: hub id or folder of the base; none is that of the first one's run. A base that is on disk is checked to fit.

    Raises:
        UserError: nothing to read, no base to merge into or another one than the LoRA's, a target that is taken, or no space.
    """
    tuned, output = read_tuned(places), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"export: {output} is there already; choose a new folder with -o")
    recipe = recipe_of(tuned.leading) if tuned.leading else None
    base = model_settings(model, recipe) if model or recipe else None
    if tuned.whole and base:
        return _export_whole(tuned.whole, pipeline_folder(base.path, base.revision), output, to)
    loras, to = tuned.loras, to or "diffusers"
    lora = join(loras)
    if to == "pipeline":
        if base is None:
            raise UserError(f"export: {lora.source} does not tell its base; name the pipeline to merge into with --model")
        source = pipeline_folder(base.path, base.revision)
        with whole_folder(output) as temporary:
            to_pipeline(loras, source, temporary)
        return FORMATS[to].format(folder=output)
    if to == "comfyui" and base is None:
        raise UserError(f"export: {lora.source} does not tell its base, whose names ComfyUI has; name it with --model")
    shapes = shapes_in(folder) if base and (folder := local_folder(base.path)) else None
    if shapes is not None:
        check(lora, shapes)
    name = base.path if base and base.path != "playground" else None
    with whole_folder(output) as temporary:
        if to == "diffusers":
            to_diffusers(lora, temporary)
        elif to == "peft":
            to_peft(lora, temporary, name)
        elif to == "comfyui" and base:
            to_comfyui(lora, temporary, network_class(base.path, base.revision), shapes)
        else:
            to_generator_ema(lora, temporary, name)
        if to in ("diffusers", "peft") and len(loras) == 1 + len(loras[-1].parents):
            _take_card(lora, Path(loras[-1].source).parent, temporary, output, to)
    if RunFolder(output).is_run() and is_ours(Path(loras[-1].source).parent.parent):
        remember(output)  # a copy of the user's own recipe is the user's own
    return FORMATS[to].format(folder=output, rank=lora.ranks()[0], alpha=RTDMD_RATIO * lora.ranks()[0])


def _export_whole(weights: Path, base: Path, output: Path, to: str | None) -> str:
    if to not in (None, "pipeline"):
        raise UserError(f'export: {weights} has all weights (train = "full") and no LoRA; write it with --to pipeline')
    with whole_folder(output) as temporary:
        own = tensors_in(base)
        trained = read_weights(weights, own)
        copy_parts(base, temporary, network=("*.safetensors", "*.bin", "*.index.json"))
        save_file(own | trained, temporary / NETWORK / WEIGHTS, {"format": "pt"})
    return FORMATS["pipeline"].format(folder=output)


def _take_card(lora: Lora, own: Path, folder: Path, output: Path, to: str) -> None:
    """Puts the card and the recipe of a run, whose newest LoRA in `own` this is, or is the top of, beside its export."""
    card, recipe = own / CARD, RunFolder(own.parent).recipe
    if own.name != RunFolder.lora or not card.is_file() or not recipe.is_file():
        return
    text = card.read_text(encoding="utf-8")
    rank = lora.ranks()[-1]
    (folder / CARD).write_text(exported(text, load_recipe(recipe, stored=True), rank, rank, output, to), encoding="utf-8")
    shutil.copy(recipe, RunFolder(folder).recipe)
