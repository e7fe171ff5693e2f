"""`flowtilt compare`."""

import argparse
import math
from pathlib import Path
from typing import Any

from flowtilt.cli.words import say
from flowtilt.config.renamed import hint
from flowtilt.errors import UserError
from flowtilt.io.files import write_json
from flowtilt.io.run_folder import RunFolder

ABOUT = """Which of several runs got further for its compute. Reads the folders of runs, finished or not; it does not train or sample.
Runs whose recipes differ only in the seed are one method, shown as the median and the range of its seeds; the first is the baseline."""
EXAMPLES = """examples:
  flowtilt compare runs/nft-0 runs/nft-1 runs/grpo-0 runs/grpo-1 --target 0.8
  flowtilt compare runs/* --axis seconds --json compare.json
  flowtilt compare --label before=runs/a,runs/b --label after=runs/c,runs/d
"""


def add(commands: Any) -> None:
    """The command and its options."""
    compare = commands.add_parser(
        "compare",
        help="compare runs: score against compute, images from the same noise",
        description=ABOUT,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folder of a run; the first one's method is the baseline")
    compare.add_argument(
        "--label",
        type=_label,
        action="append",
        default=[],
        metavar="NAME=RUN,RUN",
        help="treat these runs as one method of this name, whatever their recipes",
    )
    compare.add_argument(
        "--axis",
        type=_axis,
        choices=("evaluations", "seconds", "rollouts", "optimizer-steps"),
        default="evaluations",
        help="cost to compare by: network evaluations (a backward counts two), training seconds, rollouts, optimizer steps (%(default)s)",
    )
    compare.add_argument(
        "--target",
        type=_score,
        action="append",
        default=[],
        metavar="SCORE",
        help="report the cost of reaching this score; may be repeated (a round score that all methods reached)",
    )
    compare.add_argument("--mixed", action="store_true", help="also compare runs with different evaluations, with a warning")
    compare.add_argument("--json", type=Path, metavar="FILE", help="also write all figures as JSON")
    compare.add_argument("-o", "--output", type=Path, default=Path("compare.html"), metavar="FILE", help="the page (%(default)s)")
    compare.set_defaults(call=_compare)


def _axis(text: str) -> str:
    if text != "steps":
        return text
    hint("compare", "steps", "optimizer-steps", "axis")
    return "optimizer-steps"


def _label(text: str) -> tuple[str, list[Path]]:
    name, sign, runs = text.partition("=")
    paths = [Path(part.strip()) for part in runs.split(",") if part.strip()]
    if not (name.strip() and sign and paths):
        raise argparse.ArgumentTypeError(f"must be NAME=RUN,RUN, not {text}")
    return name.strip(), paths


def _score(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise argparse.ArgumentTypeError(f"must be a number, not {text}")
    return found


def _compare(args: argparse.Namespace) -> int:
    labels = dict(args.label)
    if len(labels) < len(args.label):
        raise UserError("compare: two --label of one name; give all its runs at once, NAME=RUN,RUN")
    if not (args.runs or labels):
        raise UserError("compare: which runs? give the folders that flowtilt train has written")
    from flowtilt.report.compare import as_json, compare, text, write_comparison

    # of runs/*, what else lies there, such as the folder of a sweep
    others = [folder for folder in args.runs if folder.is_dir() and not RunFolder(folder).is_run()]
    if others and len(others) < len(args.runs):
        say(f"compare: left out, as no run: {', '.join(map(str, others))}")
        args.runs = [folder for folder in args.runs if folder not in others]
    found = compare(args.runs, labels=labels, axis=args.axis, targets=args.target, mixed=args.mixed)
    write_comparison(found, args.output)
    if args.json:
        write_json(args.json, as_json(found))
    print(text(found))
    print(f"\npage     {args.output}" + (f"\njson     {args.json}" if args.json else ""))
    return 0
