"""Gives every reader of foreign files thousands of damaged ones. Each must read them or raise UserError; anything else is a fault.

python benchmarks/fuzz.py                        # 10,000 inputs of each reader in benchmarks/fuzzing
python benchmarks/fuzz.py images prompts --inputs 1000 --seed 7
"""

import argparse
import importlib
import json
import logging
import pkgutil
import shlex
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import fuzzing
from hypothesis import HealthCheck, Phase, given, seed, settings

from flowtilt.errors import UserError
from flowtilt.io.environment import processor, versions

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
KEPT = 10
"""Different crashes that are kept of a reader."""


def readers() -> dict[str, ModuleType]:
    """The modules of `fuzzing` by name. Each has `inputs()`, a strategy, and `read(payload, folder)`, which may raise UserError alone."""
    names = [found.name for found in pkgutil.iter_modules(fuzzing.__path__) if not found.name.startswith("_")]
    return {name: importlib.import_module(f"fuzzing.{name}") for name in sorted(names)}


def fuzz(reader: ModuleType, number: int, start: int) -> dict[str, Any]:
    """How many of `number` inputs were read, refused with UserError, or ended otherwise, and the first of those."""
    counts: Counter[str] = Counter()
    crashes: dict[str, str] = {}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:

        @seed(start)
        @settings(
            max_examples=number,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        )
        @given(reader.inputs())
        def attempt(payload: Any) -> None:
            try:
                reader.read(payload, Path(folder))
                counts["values"] += 1
            except UserError as error:
                if "\n" in str(error):
                    crashes.setdefault(f"an error of several lines: {error}", repr(payload)[:500])
                    counts["crashes"] += 1
                else:
                    counts["refused"] += 1
            except Exception as error:
                counts["crashes"] += 1
                frame = error.__traceback__
                while frame and frame.tb_next:
                    frame = frame.tb_next
                place = f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}" if frame else ""
                if len(crashes) < KEPT:
                    crashes.setdefault(f"{type(error).__name__} at {place}: {str(error)[:200]}", repr(payload)[:500])

        attempt()
    kept = [{"error": error, "input": payload} for error, payload in crashes.items()]
    return {
        "inputs": sum(counts.values()),
        **{kind: counts[kind] for kind in ("values", "refused", "crashes")},
        "seconds": round(time.perf_counter() - began, 1),
        "first_crashes": kept,
    }


def main() -> int:
    known = readers()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"of {', '.join(known)} (all)")
    parser.add_argument("--inputs", type=int, default=10_000, help="of each reader (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    args = parser.parse_args()
    if unknown := [name for name in args.readers if name not in known]:
        parser.error(f"no reader {unknown[0]}; there are {', '.join(known)}")
    logging.getLogger("flowtilt").setLevel(logging.CRITICAL)  # what is left out of thousands of files
    results = {}
    for name in args.readers or known:
        found = fuzz(known[name], args.inputs, args.seed)
        command = shlex.join(["python", "benchmarks/fuzz.py", name, "--inputs", str(args.inputs), "--seed", str(args.seed)])
        results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}  # another process may have written its own
        results[name] = {"command": command, "seed": args.seed, **found, "machine": processor(), "packages": versions()}
        print(
            f"{name:10} {found['inputs']:7,} inputs: {found['values']:,} read, {found['refused']:,} refused, {found['crashes']:,} crashes",
            flush=True,
        )
        for crash in found["first_crashes"]:
            print(f"  {crash['error']}\n    {crash['input'][:160]}", flush=True)
        RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    return 1 if any(results[name]["crashes"] for name in args.readers or known) else 0


if __name__ == "__main__":
    sys.exit(main())
