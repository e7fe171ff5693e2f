"""`flowtilt export`."""

import argparse
from pathlib import Path
from typing import Any

from flowtilt.io.quiet import quieten

FORMATS = ("diffusers", "peft", "comfyui", "generator_ema", "pipeline")


def add(commands: Any) -> None:
    """The command and its options."""
    export = commands.add_parser(
        "export", help="export a LoRA, or several joined exactly, for diffusers, PEFT, ComfyUI or RTDMD, or merged into a pipeline"
    )
    export.add_argument("loras", nargs="+", metavar="LORA", help="a run, a checkpoint, a LoRA folder or file; PATH@64 sets its alpha")
    export.add_argument("--to", choices=FORMATS, help='(diffusers; pipeline for a run of train = "full")')
    export.add_argument("--model", help="the base: pipeline folder or hub id (default: that of the first LoRA's run)")
    export.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="a new folder")
    export.set_defaults(call=_export)


def _export(args: argparse.Namespace) -> int:
    quieten()
    from flowtilt.runs.export import export

    print(export(args.loras, args.output, args.to, model=args.model))
    return 0
