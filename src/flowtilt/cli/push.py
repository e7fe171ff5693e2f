"""`flowtilt push`."""

import argparse
from pathlib import Path
from typing import Any

from flowtilt.io.quiet import quieten


def add(commands: Any) -> None:
    """The command and its options."""
    push = commands.add_parser("push", help="upload a run's LoRA, model card, recipe and report to the Hugging Face hub")
    push.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    push.add_argument("repo", metavar="OWNER/NAME", help="model repository, made if it is not there")
    push.add_argument("--private", action="store_true", help="make it private, if it is new")
    push.set_defaults(call=_push)


def _push(args: argparse.Namespace) -> int:
    quieten()
    from flowtilt.runs.push import push

    print(push(args.run, args.repo, private=args.private))
    return 0
