"""`flowtilt completion`: what a shell needs to complete commands, options and recipes."""

import argparse
from typing import Any

from flowtilt.config import recipe_names
from flowtilt.errors import UserError

SHELLS = ("bash", "zsh", "tcsh")
EXAMPLES = """examples:
  source <(flowtilt completion bash)                                 this shell
  flowtilt completion bash > ~/.local/share/bash-completion/completions/flowtilt
  flowtilt completion zsh > "${fpath[1]}/_flowtilt"
"""
FILES = {"recipe", "file", "lora", "loras", "runs", "run", "resume", "output", "images", "init_lora", "json", "model", "source"}
"""Arguments that are files or folders."""


def add(commands: Any) -> None:
    """The command and its options."""
    completion = commands.add_parser(
        "completion",
        help="print a script with which a shell completes flowtilt's commands and options",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    completion.add_argument("shell", choices=SHELLS, help="the shell that reads the script")
    completion.set_defaults(call=_completion)


def _completion(args: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError:
        raise UserError("completion: needs shtab; pip install shtab") from None
    from flowtilt.cli import parser

    top = parser()
    _complete_files(top, shtab.FILE)
    print(shtab.complete(top, args.shell))
    return 0


def _complete_files(parser: argparse.ArgumentParser, files: Any) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_files(command, files)
        elif action.dest == "recipe":
            action.choices = recipe_names()  # of the script alone; a .toml file may be typed as well
        elif action.dest in FILES:
            action.complete = files  # pyright: ignore[reportAttributeAccessIssue]
