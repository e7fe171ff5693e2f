"""Everything that is open about speed on one GPU, in one command of at most nine minutes.

    python benchmarks/gpu_session.py --folder /tmp/session            on one GPU, without a network
    python benchmarks/gpu_session.py --folder /tmp/session --small    on a CPU: whether every part runs; its figures mean nothing

SD3.5-Medium's published configuration but for T5's depth, with random weights, and sd35m-geneval's method on one prompt's images
(benchmarks/step.py). The baseline, the plain loop of the reference's structure, is measured in the same session. Each part is a process of
its own, and its result is in the folder's session.json as soon as it ends: a second call goes on with what is missing.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowtilt.io.files import write_json

HERE = Path(__file__).parent
LIMIT = 540
"""Seconds of a session."""
LEAST = 40
"""Seconds without which no part is begun."""


@dataclass(frozen=True)
class Part:
    """One measurement.

    Args:
        name: its key in session.json, and the name of its entries in step.json.
        overrides: of the recipe, on top of those for all.
        options: of benchmarks/step.py.
        needs: a module without which it is left out.
    """

    name: str
    overrides: tuple[str, ...] = ()
    options: tuple[str, ...] = ("--alone",)
    needs: str | None = None


PARTS = (
    Part("baseline", options=("--sizes", "9")),
    Part("fused norms", ("model.fuse_norms=true",)),
    Part("reference on a quarter", ("objective.reference_share=0.25",)),
    Part("both", ("model.fuse_norms=true", "objective.reference_share=0.25")),
    Part("both compiled", ("model.compile=true", "model.fuse_norms=true", "objective.reference_share=0.25")),
    Part("fewer rows", ("model.fuse_norms=true", "objective.times_per_image=4")),
    Part("24 GiB", ("model.fuse_norms=true", "micro_batch=auto"), ("--memory-cap", "24")),
    Part("flash attention 3", ("model.fuse_norms=true", "model.attention=_flash_3"), needs="flash_attn_interface"),
)
"""In the order of what is most worth knowing, should the time not suffice."""


def command(part: Part, model: Path, output: Path, rows: int, small: bool) -> list[str]:
    """What measures a part."""
    geometry = [f"rollout.images_per_prompt={rows}", "rollout.prompts=1"]
    dtype = ["model.dtype=bfloat16", "model.resolution=128", "rollout.steps=4"] if small else []
    size = [] if any(item.startswith("micro_batch") for item in part.overrides) else [f"micro_batch={rows}"]
    own = [item for item in part.overrides if not (small and item.startswith("objective.times_per_image"))]
    times = ["objective.times_per_image=2"] if small else []
    words = [str(HERE / "step.py"), "--model", str(model), "--name", part.name, "--rounds", "1", "--output", str(output), *part.options]
    return [sys.executable, *words, *geometry, *size, *dtype, *times, *own]


def run(words: list[str], limit: float) -> dict[str, Any]:
    """How a process ended: its seconds, and its last line where it failed."""
    begin = time.monotonic()
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"seconds": round(time.monotonic() - begin, 1), "failed": f"not done within {limit:.0f} s"}
    found: dict[str, Any] = {"seconds": round(time.monotonic() - begin, 1), "command": " ".join(words[1:])}
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["without a word"]
        found["failed"] = lines[-1][:500]
    return found


def why_not(part: Part, cuda: bool) -> str | None:
    """Why a part is left out here; none where it is not."""
    if "--memory-cap" in part.options and not cuda:
        return "needs a GPU"
    if part.needs and importlib.util.find_spec(part.needs) is None:
        return f"{part.needs} is not installed"
    return None


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="of the model and of the results")
    parser.add_argument("--small", action="store_true", help="a small model of the same structure, for a CPU")
    parser.add_argument("--rows", type=int, default=18, help="images, and the micro-batch (%(default)s)")
    args = parser.parse_args(words)
    import torch

    cuda, end = torch.cuda.is_available(), time.monotonic() + LIMIT
    if not cuda and not args.small:
        sys.exit("gpu_session: no GPU here; --small tries every part on a CPU")
    args.folder.mkdir(parents=True, exist_ok=True)
    session, output, model = args.folder / "session.json", args.folder / "step.json", args.folder / "model"
    known: dict[str, Any] = json.loads(session.read_text()) if session.is_file() else {}
    device = torch.cuda.get_device_name() if cuda else "CPU"
    known |= {"device": device, "torch": torch.__version__, "rows": args.rows}
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not (model / "model_index.json").is_file():
        told = run([sys.executable, str(HERE / "models.py"), "small" if args.small else "lean", str(model)], end - time.monotonic())
        if "failed" in told:
            sys.exit(f"gpu_session: the model can't be written: {told['failed']}")
    for part in PARTS:
        if "failed" not in known.get(part.name, {"failed": ""}):
            continue
        left = end - time.monotonic()
        if why := why_not(part, cuda):
            known[part.name] = {"left out": why}
        elif left < LEAST:
            print(f"{part.name}: no time is left; the same command goes on with it")
            continue
        else:
            print(f"{part.name} …", flush=True)
            known[part.name] = run(command(part, model, output, args.rows, args.small), left)
        write_json(session, known)
        print(f"{part.name}: {known[part.name]}", flush=True)
    if output.is_file():
        summary(json.loads(output.read_text()))


def summary(entries: list[dict[str, Any]]) -> None:
    """A line for each measurement, against the plain loop of the same session."""
    plain = next((entry["median"] for entry in entries if entry["run"] == "baseline" and entry["method"].startswith("plain")), None)
    for entry in entries:
        if seconds := entry.get("median"):
            against = f", {plain / seconds:.2f} times the plain loop's speed" if plain else ""
            used = f", {entry['utilisation']:.0%} of the peak" if entry.get("utilisation") else ""
            print(f"{entry['run']}, {entry['method']}: {seconds:.2f} s{against}{used}")


if __name__ == "__main__":
    main()
