"""Seconds of a rollout on an idle machine and beside busy processes, with OpenMP threads that spin and that wait asleep.

    python benchmarks/busy.py

Each way of waiting has a process of its own, which trains `playground-fast` with a thread for each core. The processes take turns, one
rollout at a time, so that what else the machine does meets all alike. What counts are ratios. In the end their weights are compared.
"""

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

WAYS = {
    "spinning": {"GOMP_SPINCOUNT": "300000"},  # what GNU's runtime does where nothing is set
    "asleep": {},  # what flowtilt sets
    "one thread": {"OMP_NUM_THREADS": "1"},
}
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"


def work() -> None:
    """A rollout for every line that comes in; says how long it took, and what the weights are by then."""
    import torch

    from flowtilt import Trainer, load_recipe
    from flowtilt.io.quiet import quieten
    from flowtilt.training.timing import Phases

    quieten()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(load_recipe("playground-fast", [f"run={scratch}/run"]))
        step = 0
        print(json.dumps([torch.get_num_threads()]), flush=True)
        for _ in sys.stdin:
            step, begin = step + 1, time.perf_counter()
            trainer.method.step(step, Phases(torch.device("cpu")))
            seconds, weights = time.perf_counter() - begin, trainer.policy.state("current")
            bits = hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()
            print(json.dumps([seconds, bits]), flush=True)


class Worker:
    """A process that trains when asked to."""

    def __init__(self, environment: dict[str, str]):
        known = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY", "OMP_NUM_THREADS")
        clean = {name: value for name, value in os.environ.items() if name not in known}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--work"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean | environment
        )
        assert self._process.stdin and self._process.stdout
        self._asks: IO[str] = self._process.stdin
        self._says: IO[str] = self._process.stdout
        (self.threads,) = json.loads(self._says.readline())
        self.bits: list[str] = []

    def rollout(self) -> float:
        """Seconds of the next rollout."""
        self._asks.write("\n")
        self._asks.flush()
        seconds, bits = json.loads(self._says.readline())
        self.bits.append(bits)
        return seconds

    def end(self) -> None:
        self._asks.close()
        self._process.wait()


def measure(workers: dict[str, Worker], rounds: int, seconds: float = 170.0) -> dict[str, list[float]]:
    """Seconds of each worker's rollouts, in turns; no further round is begun after so many seconds."""
    found: dict[str, list[float]] = {name: [] for name in workers}
    end = time.monotonic() + seconds
    for k in range(rounds):
        if time.monotonic() > end:
            break
        for name in list(workers)[:: 1 if k % 2 else -1]:
            found[name].append(round(workers[name].rollout(), 3))
    return found


def spread(values: list[float]) -> list[float]:
    """Least, median and greatest."""
    return [round(value, 3) for value in (min(values), statistics.median(values), max(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="rollouts of each way, idle and busy")
    parser.add_argument("--busy", type=int, default=2, help="busy processes")
    parser.add_argument("--shared", action="store_true", help="notes that others used the machine")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "busy.json")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work()
    from flowtilt.io.environment import processor, versions

    workers = {name: Worker(environment) for name, environment in WAYS.items()}
    measure(workers, 1)
    idle = measure(workers, args.rounds)
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(args.busy)]
    try:
        busy = measure(workers, args.rounds)
    finally:
        for other in others:
            other.kill()
            other.wait()
    for worker in workers.values():
        worker.end()
    cores, threads = os.cpu_count() or 1, workers["asleep"].threads
    # the scheduler shares the cores evenly among the threads that want to run
    fair = (threads + args.busy) / cores if threads + args.busy > cores else 1.0
    slower = {name: [b / statistics.median(idle[name]) for b in busy[name]] for name in WAYS}
    entry = {
        "recipe": "playground-fast",
        "seed": 0,
        "busy_processes": args.busy,
        "threads": {name: worker.threads for name, worker in workers.items()},
        "seconds_idle": idle,
        "seconds_busy": busy,
        "busy_by_idle": {name: spread(values) for name, values in slower.items()},
        "busy_by_idle_of_a_fair_share": round(fair, 2),
        "spinning_by_asleep_idle": spread([a / b for a, b in zip(idle["spinning"], idle["asleep"], strict=True)]),
        "spinning_by_asleep_busy": spread([a / b for a, b in zip(busy["spinning"], busy["asleep"], strict=True)]),
        "one_thread_by_asleep_busy": spread([a / b for a, b in zip(busy["one thread"], busy["asleep"], strict=True)]),
        "same_bits": workers["spinning"].bits == workers["asleep"].bits,
        "within_twice_the_fair_share": statistics.median(slower["asleep"]) <= 2 * fair,
        "machine_shared_with_others": args.shared,
        "command": "python " + " ".join(["benchmarks/busy.py", *sys.argv[1:]]),
        "machine": f"{processor()}, {cores} cores, torch {versions()['torch']}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(entry, indent=1))
    args.output.write_text(json.dumps([entry], indent=1) + "\n")
    sys.exit(not entry["same_bits"])


if __name__ == "__main__":
    main()
