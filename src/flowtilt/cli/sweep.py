"""`flowtilt sweep`: one run after another over values of keys, then one comparison."""

import argparse
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flowtilt.cli.words import say
from flowtilt.config import Recipe, load_recipe
from flowtilt.distributed import signals, torchrun
from flowtilt.errors import UserError
from flowtilt.io.files import read_errors, renamed, write_json
from flowtilt.io.run_folder import RunFolder
from flowtilt.rewards.about import check_options

ABOUT = """Trains a recipe once for every combination of the values, one run after another, and compares the runs.
The same command again skips what is finished and resumes what was interrupted."""
EXAMPLES = """examples:
  flowtilt sweep playground objective.beta=0.5,1,2 seed=0..2 rollouts=40
  flowtilt sweep my.toml optimizer.lr=1e-3,3e-3 --output runs/lr
  flowtilt sweep playground 'prompts="a,b.txt"' seed=0..4      a value with a comma of its own
"""
RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
MOST = 1000
"""Runs of a sweep."""


def add(commands: Any) -> None:
    """The command and its options."""
    sweep = commands.add_parser(
        "sweep",
        help="train over values of keys, key=a,b,c or seed=0..4, and compare",
        description=ABOUT,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sweep.add_argument("recipe", help="name or .toml file")
    sweep.add_argument("keys", nargs="+", metavar="key=a,b,c", help="values of a key; one value overrides it in every run")
    sweep.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="folder of the runs and the comparison (runs/<name>-sweep)")
    sweep.set_defaults(call=_sweep)


def values(text: str) -> list[str]:
    """What stands between commas, brackets and quotes kept whole; "0..4" is each number from 0 to 4."""
    if found := RANGE.fullmatch(text):
        first, last = int(found[1]), int(found[2])
        if not first <= last < first + MOST:
            raise UserError(f"sweep: {text} must rise, by less than {MOST}")
        return [str(number) for number in range(first, last + 1)]
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        depth += (letter in "[{") - (letter in "]}") if not quote else 0
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def runs_of(keys: Sequence[str]) -> dict[str, list[str]]:
    """The overrides of every run, by the name of its folder.

    Raises:
        UserError: an item is no key=value, no key has several values, or there are too many runs.
    """
    table: dict[str, list[str]] = {}
    for item in keys:
        key, sign, text = item.partition("=")
        if not sign or not key.strip() or not values(text):
            raise UserError(f"sweep: {item!r:.200} is not key=value")
        if key.strip() in table:
            raise UserError(f"sweep: {key.strip()} is given twice; give all its values at once, as in {key.strip()}=a,b")
        table[key.strip()] = values(text)
    varied = [key for key, found in table.items() if len(found) > 1]
    if not varied:
        raise UserError("sweep: nothing varies; give a key several values, as in seed=0..4 or objective.beta=0.5,1")
    if (number := len(list(itertools.product(*table.values())))) > MOST:
        raise UserError(f"sweep: {number} runs are too many; at most {MOST}")
    last = [key.rpartition(".")[2] for key in varied]
    short = {key: name if last.count(name) == 1 else key for key, name in zip(varied, last, strict=True)}

    def each() -> Iterator[tuple[str, list[str]]]:
        for chosen in itertools.product(*table.values()):
            pairs = dict(zip(table, chosen, strict=True))
            name = ",".join(f"{short[key]}={pairs[key]}" for key in varied)
            yield re.sub(r"[^\w.=,+-]+", "_", name)[:150], [f"{key}={value}" for key, value in pairs.items()]

    found = list(each())
    if len({name for name, _ in found}) < len(found):
        raise UserError("sweep: two runs would have the same name; write values that differ in letters and digits")
    return dict(found)


def _sweep(args: argparse.Namespace) -> int:
    if torchrun.place().size > 1:
        raise UserError("sweep: trains in one process; run `torchrun … -m flowtilt train` for each setting, then `flowtilt compare`")
    planned = runs_of(args.keys)
    recipes = {name: load_recipe(args.recipe, overrides) for name, overrides in planned.items()}  # a mistake is found before the first run
    for recipe in recipes.values():
        check_options(recipe.reward_table())
    folder = args.output or Path("runs") / f"{next(iter(recipes.values())).name}-sweep"
    todo = {name: _words(args.recipe, planned[name], folder / name, recipes[name]) for name in planned}
    failed, stopped = [], []
    for number, (name, words) in enumerate(todo.items(), 1):
        say(f"[{number}/{len(todo)}] {name}" + ("" if words else ": finished already"))
        status = train(words) if words else 0
        if status == 130:
            raise KeyboardInterrupt("; the same command goes on")
        (failed if status == 2 else stopped if status else []).append(name)
    if stopped:
        say(f"stopped before the end: {', '.join(stopped)}")
    done = [folder / name for name in planned if name not in failed]
    if done:
        _compare(done, folder)
    if failed:
        raise UserError(f"sweep: {len(failed)} of {len(planned)} runs failed: {', '.join(failed)}; the same command tries them again")
    return 3 if stopped else 0


def _words(source: str, overrides: list[str], run: Path, recipe: Recipe) -> list[str]:
    """How to train this run, or to go on with it; empty where it is finished.

    Raises:
        UserError: the folder has a run of another recipe.
    """
    if not RunFolder(run).is_run():
        return ["train", source, *overrides, f"run={json.dumps(str(run))}"]
    from flowtilt.runs.changing import may_change
    from flowtilt.runs.folder import open_run

    open_run(run, [], recipe)
    with read_errors(run):
        summary = json.loads(RunFolder(run).summary.read_text(encoding="utf-8")) if RunFolder(run).summary.is_file() else {}
    if renamed(summary).get("rollouts") == recipe.rollouts:
        return []
    return ["train", "--resume", str(run), *(item for item in overrides if may_change(item, recipe))]


def train(words: Sequence[str]) -> int:
    """Runs `flowtilt WORDS` in a process of its own; returns its exit status. A signal is passed on, so that the run saves."""
    import subprocess  # no other command needs it

    with signals.current().deferred() as ending:
        child = subprocess.Popen([sys.executable, "-m", "flowtilt", *words])
        passed = False
        while True:
            try:
                status = child.wait(0.2)
                break
            except subprocess.TimeoutExpired:
                if ending.interrupted and not passed:
                    passed = True
                    child.terminate()
        return 130 if ending.interrupted else status


def _compare(runs: Sequence[Path], folder: Path) -> None:
    """Writes compare.html and compare.json; runs that were not evaluated alike are left apart, with a line that says why."""
    from flowtilt.report.compare import as_json, compare, text, write_comparison

    try:
        found = compare(runs, labels={}, axis="evaluations", targets=[], mixed=False)
    except UserError as error:
        say(f"not compared: {error}")
        return
    write_comparison(found, folder / "compare.html")
    write_json(folder / "compare.json", as_json(found))
    print(f"{text(found)}\n\npage     {folder / 'compare.html'}\njson     {folder / 'compare.json'}")
