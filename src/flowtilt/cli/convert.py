"""`flowtilt convert`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from flowtilt.cli.words import count, say
from flowtilt.errors import UserError
from flowtilt.io.files import write_atomic


def add(commands: Any) -> None:
    """The command and its options."""
    convert = commands.add_parser("convert", help="turn a configuration of DiffusionNFT, flow_grpo or RTDMD into a recipe")
    convert.add_argument("file", metavar="FILE", help="config/nft.py:sd3_ocr, config/grpo.py:geneval_sd3, or RTDMD's .yaml; never executed")
    convert.add_argument("--gpus", type=count, metavar="N", help="GPUs that it was run on (the file's)")
    convert.add_argument("-o", "--output", type=Path, metavar="FILE.toml", help="a new file (standard output)")
    convert.set_defaults(call=_convert)


def _convert(args: argparse.Namespace) -> int:
    from flowtilt.convert import convert

    if args.output and args.output.suffix != ".toml":
        raise UserError(f"convert: {args.output} must end in .toml")
    if args.output and args.output.exists():
        raise UserError(f"convert: {args.output} is there already; choose another name")
    found = convert(args.file, args.gpus)
    if not args.output:
        sys.stdout.write(found.toml())
        return 0
    write_atomic(args.output, found.toml())
    for line in found.lines():
        say(line)
    print(f"{args.output}\nread it through, then: flowtilt plan {args.output}; flowtilt train {args.output}")
    return 0
