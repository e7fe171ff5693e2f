"""How a run scales over processes: bytes between them, weak and strong scaling, a killed rank.

    python benchmarks/scale.py                                                  # CPUs, gloo: the playground on 1, 2, 4 and 8 processes
    python benchmarks/scale.py --gpus 8                                         # GPUs, NCCL: the playground's network, which is tiny
    python benchmarks/scale.py --gpus 8 --recipe sd35m-pickscore model=/models/sd35m prompts=prompts.txt    # what you will train
    python benchmarks/scale.py --gpus 8 --json scale.json                       # writes there instead of to benchmarks/results

Sections, each of which can be left out with --skip:
- bytes: what gloo really sends in a rollout (what each process has written, as the kernel counts it, which on Linux is `wchar` of
  /proc/self/io), beside what `flowtilt plan` computes; with a replicated and with a sharded base. On CPUs alone.
- strong: the same rollout on more processes. weak: as many images for each process. In both, network evaluations per core-second, or
  per GPU-second; the first rollout is not timed.
- uneven: shares that differ, with a sharded base.
- killed: torchrun restarts a run one of whose ranks was killed; its LoRA is compared with that of an undisturbed run, to the bit.
"""

import argparse
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from flowtilt.io.environment import processor
from flowtilt.io.quiet import quieten

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
"""torchrun of this Python, also where its folder is not on the PATH."""
RESULTS = Path(__file__).parent / "results" / "scale.json"
SIZES = (1, 2, 4, 8)
QUICK = [
    "rollout.steps=4",
    "objective.times_per_image=1",
    "evaluate.every=0",
    "evaluate.images=8",
    "micro_batch=32",  # holds a rank's share: the number of passes then does not depend on which images an update draws
    "model.recompute=false",
]
ROLLOUTS = 3


def work(case: dict[str, Any]) -> None:
    """Rollouts of a case on this rank; the first rank writes what they took to `case["out"]`."""
    import torch

    from flowtilt import Trainer, load_recipe

    torch.set_num_threads(1)
    trainer = Trainer(load_recipe(case["recipe"], [*case["overrides"], f"run={case['out']}.run"]))
    world = trainer.world
    trainer._step()
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    sent, cores, begin, before = _written(), time.process_time(), time.perf_counter(), trainer.clock.network_evaluations
    for _ in range(case["rollouts"]):
        trainer._step()
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    mine = {
        "bytes": (_written() - sent) / case["rollouts"],
        "core_seconds": (time.process_time() - cores) / case["rollouts"],
        "seconds": (time.perf_counter() - begin) / case["rollouts"],
    }
    evaluations = (trainer.clock.network_evaluations - before) / case["rollouts"]
    ranks = world.gather_json([mine])
    if world.rank == 0:
        found = {"processes": world.size, "network_evaluations": evaluations, "images": trainer.recipe.rollout.images(), "ranks": ranks}
        Path(case["out"]).write_text(json.dumps(found))


def _written() -> int:
    """Bytes that this process has written, to sockets too."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return int(next(line.split()[1] for line in lines if line.startswith("wchar")))


def run(case: dict[str, Any], size: int, gpus: bool) -> dict[str, Any]:
    """A case on `size` processes: forked from this one on CPUs, started by torchrun on GPUs, where a fork has no CUDA."""
    with tempfile.TemporaryDirectory() as folder:
        case = {**case, "out": f"{folder}/out.json"}
        if gpus:
            words = [sys.executable, __file__, "--work", json.dumps(case)]
            subprocess.run([*TORCHRUN, "--standalone", "--nproc-per-node", str(size), *words[1:]], check=True)
        else:
            _forked(case, size)
        return json.loads(Path(case["out"]).read_text())


def _forked(case: dict[str, Any], size: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(size):
        if pid := os.fork():
            ranks.append(pid)
            continue
        status = 1
        try:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            work(case)
            status = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    if any(os.waitpid(pid, 0)[1] for pid in ranks):
        raise SystemExit(f"scale: a rank failed: {case['overrides']} on {size} processes")


def planned(case: dict[str, Any], size: int) -> dict[str, float]:
    """What `flowtilt plan` says that one rank sends in a rollout, by kind."""
    from flowtilt import load_recipe
    from flowtilt.plan import Machine, make_plan

    # a CPU's base is fp32 unless the recipe says otherwise
    recipe = load_recipe(case["recipe"], ["model.dtype=float32", *case["overrides"]])
    plan = make_plan(recipe, Machine("h100", gpus=size))
    return {name: one.sent for name, one in plan.messages.items()}


def measured_bytes(sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Sent and planned, with a replicated and with a sharded base."""
    rows = []
    for kind, more in (("replicated", []), ("sharded", ['shard="base"'])):
        for size in (size for size in sizes if size > 1):
            case = {"recipe": "playground", "overrides": [*QUICK, "rollout.prompts=4", "rollout.images_per_prompt=8", *more], "rollouts": 2}
            found, plan = run(case, size, gpus=False), planned(case, size)
            sent = sum(rank["bytes"] for rank in found["ranks"]) / size
            computed = sum(plan.values())
            rows.append({"base": kind, "processes": size, "sent": sent, "planned": computed, "off": computed / sent - 1, "by_kind": plan})
            print(f"bytes, {kind} base, {size} processes: sent {sent:,.0f}, planned {computed:,.0f} ({100 * (computed / sent - 1):+.1f} %)")
    return rows


def scaling(kind: str, recipe: str, overrides: list[str], sizes: tuple[int, ...], gpus: bool, images: int) -> list[dict[str, Any]]:
    """The same rollout on more processes, or as many images for each."""
    rows: list[dict[str, Any]] = []
    for size in sizes:
        prompts = (images // 8) * (size if kind == "weak" else 1)
        case = {
            "recipe": recipe,
            "overrides": [*overrides, f"rollout.prompts={prompts}", "rollout.images_per_prompt=8"],
            "rollouts": ROLLOUTS,
        }
        found = run(case, size, gpus)
        seconds = max(rank["seconds"] for rank in found["ranks"])
        core = size * seconds if gpus else sum(rank["core_seconds"] for rank in found["ranks"])
        row = {"processes": size, "images": found["images"], "seconds": seconds, "per_core_second": found["network_evaluations"] / core}
        row["efficiency"] = row["per_core_second"] / rows[0]["per_core_second"] if rows else 1.0
        rows.append(row)
        unit = "GPU-second" if gpus else "core-second"
        print(f"{kind}, {size} processes: {row['per_core_second']:.1f} network evaluations a {unit}, efficiency {row['efficiency']:.2f}")
    return rows


def killed(size: int) -> dict[str, Any]:
    """A rank is killed after the first checkpoint; torchrun begins anew, and the run ends as one that nobody disturbed."""
    overrides = [*QUICK, "rollout.prompts=4", "rollout.images_per_prompt=8", "rollouts=8", "checkpoint.every=2"]
    with tempfile.TemporaryDirectory() as folder:
        digests = []
        for name in ("whole", "killed"):
            place = Path(folder) / name
            words = [*TORCHRUN, "--standalone", "--nproc-per-node", str(size), "--max-restarts", "1"]
            process = subprocess.Popen([*words, "-m", "flowtilt", "train", "playground", *overrides, f"run={place}"])
            if name == "killed":
                while not list(place.glob("checkpoints/step-*/*")) and process.poll() is None:
                    time.sleep(0.2)
                os.kill(_children(process.pid)[-1], signal.SIGKILL)
            if process.wait():
                raise SystemExit(f"scale: the {name} run ended with {process.returncode}")
            (lora,) = place.glob("lora/*.safetensors")
            digests.append(hashlib.sha256(lora.read_bytes()).hexdigest())
    print(f"killed, {size} processes: {'equal' if len(set(digests)) == 1 else 'OTHER'} bits")
    return {"processes": size, "equal_bits": len(set(digests)) == 1}


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def main() -> None:
    parser = argparse.ArgumentParser(description="bytes between processes, weak and strong scaling, a killed rank")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe that is scaled")
    parser.add_argument("--recipe", default="playground")
    parser.add_argument("--gpus", type=int, default=0, help="cards of this machine; 0 takes CPUs")
    parser.add_argument("--images", type=int, default=32, help="of a rollout, or for each process where the scaling is weak")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of processes (1 2 4 8, up to --gpus)")
    parser.add_argument("--skip", nargs="*", default=[], choices=["bytes", "strong", "weak", "uneven", "killed"])
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(json.loads(args.work))
        return
    sizes = tuple(args.sizes or (size for size in SIZES if not args.gpus or size <= args.gpus))
    gpus = args.gpus > 0
    overrides = [*(QUICK if args.recipe == "playground" else []), *args.overrides]
    quieten()
    if not gpus:
        import flowtilt.cli  # noqa: F401  # what is imported once is forked
        from flowtilt.plan import make_plan  # noqa: F401
    found: dict[str, Any] = json.loads(args.json.read_text()) if args.json.is_file() else {}
    found |= {"machine": f"{processor()}, {os.cpu_count()} cores", "gpus": args.gpus, "recipe": args.recipe}

    def save(name: str, value: Any) -> None:
        found[name] = value
        args.json.write_text(json.dumps(found, indent=1) + "\n")

    if "bytes" not in args.skip and not gpus:
        save("bytes", measured_bytes(sizes))
    for kind in ("strong", "weak"):
        if kind not in args.skip:
            save(kind, scaling(kind, args.recipe, overrides, sizes, gpus, args.images))
    if "uneven" not in args.skip and sizes[-1] > 1:
        case = {
            "recipe": args.recipe,
            "overrides": [*overrides, "rollout.prompts=3", "rollout.images_per_prompt=5", 'shard="base"', "micro_batch=2"],
        }
        save("uneven", run({**case, "rollouts": 1}, min(4, sizes[-1]), gpus))
    if "killed" not in args.skip and sizes[-1] > 1:
        save("killed", killed(min(4, sizes[-1])))


if __name__ == "__main__":
    main()
