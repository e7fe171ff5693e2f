"""Every model family by every check, and every method on every family: whether it trains, and resumes to the same bits.

    python benchmarks/families.py checks
    python benchmarks/families.py methods
    python benchmarks/families.py memory
    python benchmarks/families.py table      # checks and memory as docs/reference/models.md has them

The pipelines are the tests' small ones: the true classes, with random weights. `checks` are those of `flowtilt check-model`. Of a method
two rollouts are trained; then the run goes on from its first checkpoint, and both LoRAs are compared. `memory` is `flowtilt plan` of the
published configurations: the smallest card that a run fits.
"""

import argparse
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from small_families import SMALL, opened  # pyright: ignore[reportMissingImports]

from flowtilt import Trainer, load_recipe
from flowtilt.config import ModelSettings
from flowtilt.conformance import Conformance
from flowtilt.io.environment import processor, versions
from flowtilt.io.files import write_json
from flowtilt.io.user_errors import describe_error
from flowtilt.methods import built_in
from flowtilt.plan import Machine, make_plan
from flowtilt.plan.memory import GIB
from flowtilt.runs import checkpoint
from flowtilt.runs.folder import open_run

RESULTS = Path(__file__).parent / "results" / "families.json"
CPU = torch.device("cpu")
CPS = {"rollout": {"solver": "cps", "eta": 0.7, "steps": 3}}
REWARD = "jpeg_incompressibility"
"""Needs no model."""
LIGHT = {"light": f"{Path(__file__).parents[1] / 'tests' / 'shallow.py'}:light"}
OWN: dict[str, dict[str, Any]] = {
    "acdmd": {"rewards": {REWARD: 0.0}, **CPS, "objective": {"fake_updates": 2}},
    "mend": {"rewards": LIGHT, "rollout": {"solver": "euler"}, "objective": {"improve": {"light": 100.0}}},
    "rtdmd": CPS,
}
"""What a recipe of some methods has beside the others', by method."""
LEFT_OUT = ("dpo-offline",)
"""Reads pairs of a file and samples nothing."""
CARDS = ("4090", "l40s", "h100", "h200")
UNGUIDED = "rollout.guidance=1 objective.reference_guidance=1 evaluate.guidance=1"
PLANS = (
    "sd35m rewards.pickscore=1 prompts=pickapic-train",
    "flux-dev",
    "flux-dev model=black-forest-labs/FLUX.1-Kontext-dev",
    "flux2-klein",
    "flux-dev model=black-forest-labs/FLUX.2-dev model.offload=true",
    "qwen-image",
    f"qwen-image model=Qwen/Qwen-Image-2.1 {UNGUIDED}",
    "qwen-image model=Qwen/Qwen-Image-Edit-2511",
    "z-image",
    "sana",
    "z-image model=Alpha-VLLM/Lumina-Image-2.0",
    "z-image model=fal/AuraFlow-v0.3",
    "z-image model=lodestones/Chroma1-HD",
)
"""Recipes with the model of each family in it; what no recipe names is planned at the geometry of a family like it."""
NUMBER = re.compile(r"difference ([\d.e+-]+)")
COLUMNS = {
    "images": "image of",
    "batch": "velocities in one batch",
    "our LoRA there": "a LoRA saved by flowtilt",
    "theirs here": "a LoRA saved by diffusers",
    "bfloat16": "a bfloat16 base",
    "checkpointing": "gradient checkpointing",
    "offload": "offloaded text encoders",
}
"""Of the table, with the beginning of their checks' names."""


def checks(folder: Path) -> dict[str, Any]:
    """Of every family, each check's result."""
    found: dict[str, Any] = {}
    for name in SMALL:
        start = time.perf_counter()
        with opened(name, _made(folder / name)) as (settings, sizes):
            done = [{"check": one.name, "found": one.found, "right": one.right} for one in Conformance(settings, CPU, sizes).checks()]
        found[name] = {"checks": done, "seconds": round(time.perf_counter() - start, 1)}
        print(name, "as it should be" if all(one["right"] for one in done) else "WRONG", flush=True)
    return found


def methods(folder: Path) -> dict[str, Any]:
    """Of every family, what came of each method."""
    Image.new("RGB", (40, 40), (200, 30, 0)).save(folder / "source.png")
    found: dict[str, Any] = {}
    for name in SMALL:
        start = time.perf_counter()
        with opened(name, _made(folder / name)) as (settings, sizes):
            said = {kind: _trained(kind, name, settings, sizes[0], folder) for kind in built_in() if kind not in LEFT_OUT}
        found[name] = {"methods": said, "seconds": round(time.perf_counter() - start, 1)}
        print(name, said, flush=True)
        shutil.rmtree(folder / "runs")
    return found


def _trained(kind: str, name: str, settings: ModelSettings, size: int, folder: Path) -> str:
    run, half = folder / "runs" / kind, folder / "runs" / f"{kind}-resumed"
    try:
        Trainer(_recipe(kind, name, settings, size, folder), run=str(run)).run()
        shutil.copytree(run, half)
        shutil.rmtree(half / "checkpoints" / "step-000002")
        Trainer(open_run(half, []), resume=half).run()
    except Exception as error:
        return describe_error(error)
    whole, resumed = (checkpoint.newest(place) for place in (run, half))
    assert whole and resumed and whole.step == resumed.step == 2
    tensors = [(file, key) for file, kept in whole.tensors.items() for key in kept]
    equal = all(torch.equal(whole.tensors[file][key], resumed.tensors[file][key]) for file, key in tensors)
    trained = any(bool(x.any()) for key, x in whole.tensors["current"].items() if "lora_B" in key)
    return ("trained" if trained else "NOT TRAINED") + (", resumed to the bit" if equal else ", NOT THE SAME BITS")


def _recipe(kind: str, name: str, settings: ModelSettings, size: int, folder: Path) -> dict[str, Any]:
    edits = "kontext" in name or "edit" in name
    prompts = folder / ("edits.jsonl" if edits else "prompts.txt")
    rows = [json.dumps({"prompt": text, "image": "source.png"}) if edits else text for text in ("a cat", "two dogs on a hill")]
    prompts.write_text("\n".join(rows) + "\n")
    own = OWN.get(kind, {})
    times = {"times_per_image": 2} if "times_per_image" in built_in()[kind].model_fields else {}
    return {
        "name": "x",
        "model": {**settings.model_dump(exclude_unset=True), "resolution": size, "dtype": "float32"},
        "prompts": str(prompts),
        "rewards": own.get("rewards", {REWARD: 1.0}),
        "rollout": {"prompts": 2, "images_per_prompt": 2, "steps": 3, **own.get("rollout", {})},
        "objective": {"type": kind, **times, **own.get("objective", {})},
        "lora": {"rank": 2, "alpha": 4.0, **({"on": [str(folder / "runs" / "acdmd")]} if kind == "rtdmd" else {})},
        "evaluate": {"every": 0, "images": 1, "steps": 2, "samples": 0},
        "checkpoint": {"every": 1, "keep": 3},
        "rollouts": 2,
    }


def memory(folder: Path) -> dict[str, Any]:
    """Of every command, the smallest card that its run fits."""
    found: dict[str, Any] = {}
    for command in PLANS:
        start = time.perf_counter()
        name, *overrides = command.split()
        plans = (make_plan(load_recipe(name, overrides), Machine(card)) for card in CARDS)
        fitting = next((plan for plan in plans if plan.fits), None)
        one: dict[str, Any] = {"card": None}
        if fitting:
            one = {
                "card": fitting.machine.gpu,
                "network_gib": round(fitting.costs.network.bytes / GIB, 1),
                "encoders_gib": round(fitting.costs.encoders.bytes / GIB, 1),
                "resolution": fitting.costs.resolution,
                "peak_gib": round(fitting.peak.total / GIB, 1),
                "micro_batch": fitting.micro_batches["train"],
                "recompute": fitting.recompute,
            }
        found[command] = {**one, "seconds": round(time.perf_counter() - start, 1)}
        print(command, found[command], flush=True)
    return found


def memory_table(found: dict[str, Any]) -> str:
    """A command a row."""
    rows = [["`flowtilt plan …`", "network, GiB", "text encoders", "smallest card", "peak, GiB", "rows trained at once"], ["---"] * 6]
    for command, one in found.items():
        again = ", recomputed" if one["card"] and one["recompute"] else ""
        cells = ["", "", "none of these", "", ""]
        if one["card"]:
            cells = [one["network_gib"], one["encoders_gib"], f"`{one['card']}`", one["peak_gib"], f"{one['micro_batch']}{again}"]
        rows.append([f"`{command}`", *map(str, cells)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def table(found: dict[str, Any]) -> str:
    """The checks of all families, one a row: the greatest difference, or "equal" where no bit may differ."""
    rows = [["pipeline", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    for name, one in found.items():
        cells = []
        for start in COLUMNS.values():
            of = [check for check in one["checks"] if check["check"].startswith(start)]
            numbers = [float(match[1]) for check in of if (match := NUMBER.search(check["found"]))]
            cell = f"{max(numbers):.0e}" if numbers else "equal"
            cells.append(cell if of and all(check["right"] for check in of) else f"WRONG {cell}")
        rows.append([name, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Every model family by every check and every method.")
    parser.add_argument("what", choices=["checks", "methods", "memory", "table"])
    what = parser.parse_args().what
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if what == "table":
        print(table(results["checks"]["families"]), memory_table(results["memory"]["families"]), sep="\n\n")
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"FLOWTILT_CAPTIONS": f"{folder}/captions", "FLOWTILT_TRUSTED": f"{folder}/trusted"}
        found = {"checks": checks, "methods": methods, "memory": memory}[what](Path(folder))
    results[what] = {
        "families": found,
        "command": "python " + " ".join(["benchmarks/families.py", *sys.argv[1:]]),
        "machine": f"{processor()}, 1 thread, Python {platform.python_version()}",
        "packages": versions(),
    }
    newest = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    write_json(RESULTS, newest | {what: results[what]})


if __name__ == "__main__":
    main()
