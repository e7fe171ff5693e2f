"""`flowtilt demo`."""

import argparse
from pathlib import Path
from typing import Any

from flowtilt.cli.words import TRUST, say
from flowtilt.errors import UserError
from flowtilt.io.quiet import quieten


def add(commands: Any) -> None:
    """The command and its options."""
    demo = commands.add_parser("demo", help="open a page that samples your prompts, base and tuned side by side")
    demo.add_argument(
        "lora", type=Path, metavar="RUN", help="what `flowtilt sample --lora` takes: a run, a checkpoint, a LoRA folder or file"
    )
    demo.add_argument("--model", help="pipeline folder or hub id (the run's own base)")
    demo.add_argument("--host", default="127.0.0.1", help="address to listen at; at any other, others can use it (%(default)s)")
    demo.add_argument("--port", type=int, help="(7860, or the next free one)")
    demo.add_argument("--trust", action="store_true", help=TRUST)
    demo.set_defaults(call=_demo)


def _demo(args: argparse.Namespace) -> int:
    quieten()
    from flowtilt.evaluate.demo import gradio, page
    from flowtilt.evaluate.side_by_side import SideBySide

    gradio()  # where it is missing, no model is opened first
    application = page(SideBySide(model=args.model, loras=[args.lora], trust=args.trust), args.lora)
    try:
        _, url, _ = application.launch(
            server_name=args.host, server_port=args.port, prevent_thread_lock=True, quiet=True, share=False, footer_links=[]
        )
    except OSError as error:
        raise UserError(f"demo: can't listen on {args.host}: {error}; choose another with --port") from error
    say(f"demo at {url}; Ctrl-C ends")
    try:
        application.block_thread()
    finally:
        application.close()
    return 0
