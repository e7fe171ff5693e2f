"""The command line. Everything it does is one call in Python; torch is imported only by what needs it."""

import argparse
import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, NoReturn

import flowtilt
from flowtilt.cli import (
    check,
    check_model,
    compare,
    completion,
    convert,
    demo,
    evaluate,
    export,
    pairs,
    plan,
    push,
    recipes,
    rewards,
    sweep,
    train,
    watch,
)
from flowtilt.distributed import signals, torchrun
from flowtilt.errors import UserError, printable
from flowtilt.io.quiet import quieten

EPILOG = """examples:
  flowtilt train playground                      the first run: a laptop's CPU, minutes
  flowtilt train playground rollouts=20 seed=1   override any key of the recipe
  flowtilt init my.toml --from sd35m-geneval     a recipe of your own, every key explained
  flowtilt check sd35m-geneval                   try it on this machine without training: files, memory, hours
  flowtilt watch runs/playground                 see a run in a browser while it goes on
  flowtilt train --resume runs/playground        go on where it was killed, to the same bits
  flowtilt sample "a red circle left of a blue square" --lora runs/playground
  flowtilt evaluate --lora runs/playground --compare base
  flowtilt score my_images/ --prompts prompts.txt --rewards pickscore,hpsv2,geneval
  torchrun --nproc-per-node 2 -m flowtilt train playground
"""


class Once(argparse.Action):
    """Stores a value; an option that is given twice is an error, where argparse would keep the last one silently."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None):
        given = namespace.__dict__.setdefault("once", set())
        if option_string and self.dest in given:
            raise argparse.ArgumentError(self, "given twice, but takes one value")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """argparse whose complaints look like all others, and whose words may come before and after options."""

    _mixing = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register("action", None, Once)
        self.register("action", "store", Once)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self._subparsers or self._mixing:
            return super().parse_known_args(args, namespace)
        self._mixing = True  # by two calls of this very method, one for options and one for the rest
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._mixing = False

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        near = get_close_matches(str(value), known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
        raise argparse.ArgumentError(action, f"there is no {str(value)!r}; {hint}")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = Parser(
        prog="flowtilt",
        description="Online RL for flow-matching image models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"flowtilt {flowtilt.__version__}")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = (
        train,
        check,
        watch,
        demo,
        recipes,
        convert,
        sweep,
        plan,
        compare,
        evaluate,
        rewards,
        export,
        pairs,
        push,
        check_model,
        completion,
    )
    for module in modules:
        module.add(commands)
    return top


@contextmanager
def _paths() -> Iterator[None]:
    """What a system says of a path that it can't use, such as one with a name too long, as an error of the user's."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        raise UserError(f"{str(error.filename)[:60]}…: {error.strerror}") from error


@contextmanager
def _all_ranks(ending: signals.Ending) -> Iterator[None]:
    """Under torchrun, the processes as one: where one fails, all end."""
    if torchrun.place().size == 1:
        ending.status = torchrun.interrupted_status()
        yield
        return
    from flowtilt.distributed.lifeline import fail_together

    quieten()
    with fail_together():
        ending.status = torchrun.interrupted_status()
        yield


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit status: 0, 2 for bad input, 3 when a guard stopped the run, 130 when interrupted."""
    words = sys.argv[1:] if argv is None else argv
    if not words:
        parser().print_help()
    with signals.handled() as ending:
        try:
            args = parser().parse_args(words)
            with _all_ranks(ending), ending.whole(), _paths():
                status = args.call(args)
        except UserError as error:
            if "--debug" in words:
                raise
            print(f"flowtilt: {printable(' '.join(str(error).split()))}", file=sys.stderr)
            status = 2
        except KeyboardInterrupt as interrupt:
            print(f"flowtilt: interrupted{interrupt}", file=sys.stderr)
            status = ending.status
        ending.over()
        return status


if __name__ == "__main__":
    sys.exit(main())
