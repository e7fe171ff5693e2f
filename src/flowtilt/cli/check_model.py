"""`flowtilt check-model`."""

import argparse
from typing import Any

from flowtilt.cli.words import words
from flowtilt.errors import UserError
from flowtilt.io.quiet import quieten

ABOUT = """Checks a model family against its stock diffusers pipeline: images with and without guidance, velocities in a batch, LoRAs
saved and loaded both ways, gradient checkpointing, offloading, bfloat16. Computes in fp32. Random weights show as much as real ones."""
EXAMPLES = """examples:
  flowtilt check-model my_family.py:MyFamily --model ./tiny --sizes 32,48
  flowtilt check-model --model Qwen/Qwen-Image       a family that flowtilt has
"""


def add(commands: Any) -> None:
    """The command and its options."""
    check = commands.add_parser(
        "check-model",
        help="check that a model family samples what its diffusers pipeline samples",
        description=ABOUT,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("family", nargs="?", metavar="FILE:CLASS", help="a family of your own (default: the one that flowtilt has)")
    check.add_argument("--model", required=True, help="pipeline folder or hub id")
    check.add_argument("--sizes", type=words, default=["256", "512"], metavar="A,B", help="two resolutions in pixels (256,512)")
    check.add_argument("--steps", type=words, default=["3", "4"], metavar="A,B", help="two numbers of steps (3,4)")
    check.set_defaults(call=_check)


def _check(args: argparse.Namespace) -> int:
    quieten()
    sizes, steps = _pair("--sizes", args.sizes), _pair("--steps", args.steps)
    import torch

    from flowtilt.config import ModelSettings
    from flowtilt.conformance import Conformance

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    right = True
    for check in Conformance(ModelSettings(path=args.model, adapter=args.family), device, sizes, steps).checks():
        print(check, flush=True)
        right = right and check.right
    return 0 if right else 2


def _pair(option: str, given: list[str]) -> tuple[int, int]:
    if len(given) != 2 or not all(one.isdecimal() and int(one) for one in given) or given[0] == given[1]:
        raise UserError(f"check-model: {option} takes two different whole numbers such as 3,4, not {','.join(given)}")
    return int(given[0]), int(given[1])
