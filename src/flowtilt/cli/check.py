"""`flowtilt check`, which `flowtilt train --dry-run` is, too."""

import argparse
from collections.abc import Sequence
from typing import Any

from flowtilt.config import load_recipe
from flowtilt.errors import UserError
from flowtilt.io.quiet import quieten
from flowtilt.rewards.about import check_options

ABOUT = """Tries a recipe on this machine in minutes, without training: licence and login, files, versions, memory; then loads, samples two
prompts, scores them, trains one rollout of a few images, loads the LoRA in stock diffusers, and says how many hours the run takes.
One line per trial; the exit status is 2 where one failed. Nothing is left behind."""
EXAMPLES = """examples:
  flowtilt check sd35m-geneval
  flowtilt check my.toml rollout.prompts=24 --price 2.50
"""


def add(commands: Any) -> None:
    """The command and its options."""
    check = commands.add_parser(
        "check",
        help="try a recipe on this machine without training: files, memory, one small rollout, hours",
        description=ABOUT,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("recipe", help="name (`flowtilt recipes` lists them) or .toml file")
    check.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="override a key of the recipe")
    check.add_argument("--price", type=float, metavar="MONEY", help="price of an hour of this machine, for the cost of the run")
    check.set_defaults(call=lambda args: run(args.recipe, args.overrides, args.price))


def run(recipe: str, overrides: Sequence[str], price: float | None = None) -> int:
    """Checks a recipe; returns the exit status.

    Raises:
        UserError: the recipe can't be read, or the price is no price.
    """
    quieten()
    if price is not None and not 0 <= price < float("inf"):
        raise UserError(f"check: --price must be at least 0, not {price:g}")
    found = load_recipe(recipe, overrides)
    check_options(found.reward_table())
    from flowtilt.check import check

    failed = check(found, lambda line: print(line, flush=True), price)
    train = " ".join(["flowtilt train", recipe, *overrides])
    print(f"not ready: {', '.join(failed)}; the same command tries again" if failed else f"ready: {train}")
    return 2 if failed else 0
