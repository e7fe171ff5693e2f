"""Every model family by every check, and every method on every family: whether it trains, and resumes to the same bits.

    python benchmarks/families.py checks
    python benchmarks/families.py methods
    python benchmarks/families.py table      # the checks as docs/reference/models.md has them

The pipelines are the tests' small ones: the true classes, with random weights. `checks` are those of `flowtilt check-model`. Of a method
two rollouts are trained; then the run goes on from its first checkpoint, and both LoRAs are compared.
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

from flowtilt import Trainer
from flowtilt.config import ModelSettings
from flowtilt.conformance import Conformance
from flowtilt.io.environment import processor, versions
from flowtilt.io.files import write_json
from flowtilt.io.user_errors import describe_error
from flowtilt.methods import built_in
from flowtilt.runs import checkpoint
from flowtilt.runs.folder import open_run

RESULTS = Path(__file__).parent / "results" / "families.json"
CPU = torch.device("cpu")
CPS = {"rollout": {"solver": "cps", "eta": 0.7, "steps": 3}}
OWN: dict[str, dict[str, Any]] = {"acdmd": {"rewards": {"red": 0.0}, **CPS, "objective": {"fake_updates": 2}}, "rtdmd": CPS}
"""What a recipe of some methods has beside the others', by method."""
LEFT_OUT = ("dpo-offline",)
"""Reads pairs of a file and samples nothing."""
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


def red(images: torch.Tensor, prompts: list[Any]) -> torch.Tensor:
    """A reward: the mean of the first channel."""
    return images[:, 0].mean((1, 2))


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
        shutil.rmtree(folder / name)
    return found


def _trained(kind: str, name: str, settings: ModelSettings, size: int, folder: Path) -> str:
    run, half = folder / name / kind, folder / name / f"{kind}-resumed"
    try:
        Trainer(_recipe(kind, name, settings, size, folder), rewards={"red": red}, run=str(run)).run()
        shutil.copytree(run, half)
        for late in ("step-000002",):
            shutil.rmtree(half / "checkpoints" / late)
        Trainer(open_run(half, []), resume=half, rewards={"red": red}).run()
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
    return {
        "name": "x",
        "model": {**settings.model_dump(exclude_unset=True), "resolution": size, "dtype": "float32"},
        "prompts": str(prompts),
        "rewards": own.get("rewards", {"red": 1.0}),
        "rollout": {"prompts": 2, "images_per_prompt": 2, "steps": 3, **own.get("rollout", {})},
        "objective": {"type": kind, **own.get("objective", {})},
        "lora": {"rank": 2, "alpha": 4.0, **({"on": [str(folder / name / "acdmd")]} if kind == "rtdmd" else {})},
        "evaluate": {"every": 0, "images": 1, "steps": 2, "samples": 0},
        "checkpoint": {"every": 1, "keep": 3},
        "rollouts": 2,
    }


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
    parser.add_argument("what", choices=["checks", "methods", "table"])
    what = parser.parse_args().what
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if what == "table":
        print(table(results["checks"]["families"]))
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"FLOWTILT_CAPTIONS": f"{folder}/captions", "FLOWTILT_TRUSTED": f"{folder}/trusted"}
        found = {"checks": checks, "methods": methods}[what](Path(folder))
    results[what] = {
        "families": found,
        "command": "python " + " ".join(["benchmarks/families.py", *sys.argv[1:]]),
        "machine": f"{processor()}, 1 thread, Python {platform.python_version()}",
        "packages": versions(),
    }
    write_json(RESULTS, results)


if __name__ == "__main__":
    main()
