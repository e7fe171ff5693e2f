"""What has to be on this machine before anything is loaded: packages, a device, files, room. Each function is one step."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from flowtilt.build import evaluation_prompts, judges_of, loras_beneath, rewards_of, training_prompts
from flowtilt.config import Recipe, load_recipe, recipe_names
from flowtilt.errors import UserError
from flowtilt.io import hub
from flowtilt.io.environment import floors, is_older, versions
from flowtilt.io.files import nearest_folder
from flowtilt.io.published import missing_size, total
from flowtilt.lora.stacked import read_onto
from flowtilt.models.opening import folder_of
from flowtilt.plan import Machine, make_plan
from flowtilt.plan.machine import GPUS
from flowtilt.plan.memory import GIB
from flowtilt.plan.plan import Plan
from flowtilt.prompts import Prompt
from flowtilt.rewards.about import built_in, lacking
from flowtilt.rewards.named import Named

NEEDED = ("torch", "diffusers", "transformers", "peft", "huggingface_hub", "safetensors")
ROOM = 5e9
"""Bytes that a run's checkpoints and images should find free."""


def packages() -> str:
    """The versions of what flowtilt computes with; raises UserError where one is missing or too old."""
    found, least = versions(NEEDED), floors()
    for name, version in found.items():
        floor = least.get(name)
        if version is None or (floor and is_older(version, floor)):
            raise UserError(f"{name} {version or 'is missing'}; pip install '{name}>={floor}'" if floor else f"pip install {name}")
    return ", ".join(f"{name} {version}" for name, version in found.items())


def machine(device: torch.device) -> str:
    """The device; raises UserError where other programs hold its memory."""
    if device.type != "cuda":
        return f"no GPU: {os.cpu_count()} CPU cores; the playground runs, a published model needs a GPU"
    free, total = torch.cuda.mem_get_info(device)
    name = torch.cuda.get_device_name(device)
    if free < 0.85 * total:
        raise UserError(f"{name}: {free / GIB:.1f} of {total / GIB:.1f} GiB are free; end what else runs there (`nvidia-smi` lists it)")
    return f"{name}, {total / GIB:.1f} GiB, torch {torch.__version__} for CUDA {torch.version.cuda}"


def planned(recipe: Recipe, device: torch.device) -> tuple[Plan | None, str]:
    """The plan of a recipe for this GPU, and why there is none; hours are of the GPU only where `known` knows it."""
    if device.type != "cuda":
        return None, "memory is planned for GPUs"
    memory = torch.cuda.get_device_properties(device).total_memory / GIB
    try:
        return make_plan(recipe, Machine(known(device) or "h100", memory=memory)), ""
    except UserError as error:
        return None, str(error)


def known(device: torch.device) -> str | None:
    """The name that `plan` has for this GPU, or none."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    return next((gpu for gpu in GPUS if gpu in name), None)


def memory(plan: Plan) -> str:
    """What the plan says of memory; raises UserError where it does not fit."""
    peak, gib = plan.peak, plan.machine.gib
    said = f"the plan needs {peak.total / GIB:.1f} of {gib:.1f} GiB, most in {peak.name}"
    if not plan.fits:
        raise UserError(f"{said}; lower model.resolution or lora.rank, or take a larger GPU (`flowtilt plan` says what takes how much)")
    return said


def model(recipe: Recipe) -> str:
    """Whether the model's files are here; raises UserError with what keeps them away and how to fetch them."""
    path, revision = recipe.model.path, recipe.model.revision
    if os.path.isdir(folder_of(path)) or not hub.is_hub_id(path):
        return f"{path} is on this machine" if os.path.isdir(folder_of(path)) else _no_folder(path)
    try:
        found, files = hub.pipeline(path, revision)
    except Exception as error:
        if hub.is_offline(error) and hub.cached_pipeline(path, revision):
            return f"{path} is in the hub's cache; the hub can't be reached"
        raise UserError(f"{path} {hub.reason(path, error, hub.FETCH)}") from error
    if found.gated and (why := hub.allowed(path)):
        raise UserError(f"{path} {why}")
    access = "its licence is accepted, " if found.gated else ""
    if missing := found.missing(files):
        size = hub.megabytes(sum(file.size for file in missing))
        raise UserError(f"{path}: {access}{size} in {len(missing)} files to download; type `flowtilt download {_name(recipe)}`")
    return f"{path} at {found.commit[:12]}: {access}{len(files)} files, {hub.megabytes(sum(found.files[file].size for file in files))}"


def _no_folder(path: str) -> str:
    raise UserError(f"model {path}: no such folder; give a diffusers pipeline's folder or a hub id as model.path")


def _name(recipe: Recipe) -> str:
    """What `flowtilt download` fetches all of a recipe's files by."""
    ours = recipe.name in recipe_names() and load_recipe(recipe.name).model.path == recipe.model.path
    return recipe.name if ours else recipe.model.path


def rewards(recipe: Recipe) -> str:
    """Whether what each reward reads is here; raises UserError with all that is not."""
    named = {one.name: one for one in (*rewards_of(recipe), *judges_of(recipe))}
    problems = [problem for one in named.values() if (problem := _lacking(one))]
    if problems:
        raise UserError("; ".join(problems))
    return ", ".join(named)


def _lacking(one: Named) -> str:
    about = built_in().get(one.source)
    if about is None:
        return ""  # a file or a server, which loading finds
    size, known = total(map(missing_size, about.weights))
    if size or not known:
        much = f"{'' if known else 'at least '}{hub.megabytes(size)}" if size else "files"
        return f"{one.name}: {much} to download; type `flowtilt download {about.name}`"
    variable = about.variable if one.options.get("server") else ""  # a server that the recipe names needs no variable
    why = lacking(replace(about, variable="") if variable else about)
    return f"{one.name}: {why}" if why else ""


def prompts(recipe: Recipe) -> tuple[list[Prompt], list[Prompt], str]:
    """The prompts to train and to evaluate on, and what to say of them."""
    train = training_prompts(recipe)
    test = evaluation_prompts(recipe, train)
    return train, test, f"{len(train):,} to train on, {len(test):,} to evaluate on"


def loras(places: Sequence[str], init: str | None) -> str:
    """Whether the LoRAs that a recipe starts from are here."""
    below = loras_beneath(places)
    found = [*(lora.source for lora in below), *([read_onto(init, below).source] if init else [])]
    return ", ".join(found)


def disk(recipe: Recipe) -> str:
    """The room for the run's folder; raises UserError where it can't be written or is small."""
    place = Path(recipe.run or "runs").absolute()
    there = nearest_folder(place)
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        raise UserError(f"{there} can't be written; set run to a folder elsewhere")
    if free < ROOM:
        raise UserError(f"{hub.megabytes(free)} free in {there}; free {hub.megabytes(ROOM)} for checkpoints, or set run to another disk")
    return f"{hub.megabytes(free)} free in {there}"
