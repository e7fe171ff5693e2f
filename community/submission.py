"""A result for community/: makes its folder from a run, and checks one.

    python community/submission.py make RUN FOLDER
    python community/submission.py check FOLDER …

The check ends with status 1 and says all that is wrong, a line each. It runs no code of a submission.
"""

import argparse
import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from flowtilt import UserError, __version__
from flowtilt.config import load_recipe
from flowtilt.io.files import digest, read_lines, write_atomic, write_json
from flowtilt.io.run_folder import RunFolder
from flowtilt.runs.sharing import shared_recipe, shared_report

FILES = ("recipe.toml", "report.html", "evaluations.jsonl")
ALL = {*FILES, "digest.json", "README.md"}
LARGEST = 3 * 2**20
"""Bytes of one file."""


def make(run: Path, folder: Path) -> None:
    """Writes a run's folder for a submission."""
    place = RunFolder(run)
    if not place.summary.is_file():
        raise UserError(f"{run}: has no {RunFolder.summary}; a result is of a run that has ended")
    if folder.exists():
        raise UserError(f"{folder}: is there already")
    folder.mkdir(parents=True)
    write_atomic(folder / "recipe.toml", shared_recipe(run))
    write_atomic(folder / "report.html", shared_report(run))
    shutil.copyfile(place.evaluations, folder / "evaluations.jsonl")
    write_json(folder / "digest.json", claims(folder) | of_run(place))
    print(f"{folder}\nwrite its README.md: what it shows, and how others repeat it")


def of_run(place: RunFolder) -> dict[str, Any]:
    """What only the run itself says."""
    weights = sorted([*place.lora.glob("*.safetensors"), *place.network.glob("*.safetensors")])
    metrics = read_lines(place.metrics)
    environment = json.loads(place.environment.read_text()) if place.environment.is_file() else {}
    return {
        "flowtilt": __version__,
        "network_evaluations": metrics[-1]["network_evaluations"] if metrics else 0,
        "seconds": json.loads(place.summary.read_text())["seconds"],
        "weights": {path.name: digest(path) for path in weights},
        "environment": {key: value for key, value in environment.items() if isinstance(value, str | int | float)},
    }


def claims(folder: Path) -> dict[str, Any]:
    """What follows from a submission's files."""
    recipe = load_recipe(folder / "recipe.toml", stored=True)
    scores = {line["rollout"]: line["score"] for line in read_lines(folder / "evaluations.jsonl")}
    return {
        "name": recipe.name,
        "method": recipe.objective.type,
        "model": recipe.model.path,
        "protocol": recipe.protocol(),
        "seed": recipe.seed,
        "rollouts": max(scores),
        "score": {"before": scores.get(0), "after": scores[max(scores)]},
        "sha256": {name: digest(folder / name) for name in FILES},
    }


def faults(folder: Path) -> list[str]:
    """All that is wrong with a submission."""
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    wrong = [f"no {name}" for name in sorted(ALL - set(found))] + [f"{name}: no file of a submission" for name in found if name not in ALL]
    places = [folder / name for name in found]
    wrong += [f"{path.name}: no plain file" for path in places if path.is_symlink() or not path.is_file()]
    wrong += [f"{path.name}: {path.stat().st_size:,} bytes; at most {LARGEST:,}" for path in places if path.stat().st_size > LARGEST]
    if wrong:
        return wrong
    try:
        told, follows = json.loads((folder / "digest.json").read_text()), claims(folder)
    except (UserError, ValueError, KeyError, TypeError) as error:
        return [" ".join(str(error).split())]
    wrong += [
        f"digest.json: {key} is {told.get(key)!r:.80}, the files say {value!r:.80}"
        for key, value in follows.items()
        if told.get(key) != value
    ]
    after = follows["score"]["after"]
    if not isinstance(after, int | float) or not math.isfinite(after):
        wrong.append("evaluations.jsonl: its last score is no number")
    if not told.get("weights") or not all(re.fullmatch("[0-9a-f]{64}", str(one)) for one in told["weights"].values()):
        wrong.append("digest.json: weights must have the SHA-256 of each file")
    if re.search(r'"(/|~|[A-Za-z]:\\)', (folder / "recipe.toml").read_text()):
        wrong.append("recipe.toml: has a path of one machine")
    if re.search(r'(src|href)="https?://', (folder / "report.html").read_text(errors="replace")):
        wrong.append("report.html: loads something from elsewhere")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    made = verbs.add_parser("make")
    made.add_argument("run", type=Path)
    made.add_argument("folder", type=Path)
    verbs.add_parser("check").add_argument("folders", type=Path, nargs="+")
    args = parser.parse_args()
    if args.verb == "make":
        try:
            make(args.run, args.folder)
        except UserError as error:
            print(f"submission: {error}", file=sys.stderr)
            return 2
        return 0
    found = {folder: faults(folder) for folder in args.folders}
    for folder, wrong in found.items():
        print(f"{folder}: {'all is well' if not wrong else f'{len(wrong)} faults'}", *wrong, sep="\n  ")
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
