"""`flowtilt watch`."""

import argparse
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowtilt.cli.words import say
from flowtilt.errors import UserError
from flowtilt.io.addresses import bound, in_url, is_loopback

PORT = 8766
EPILOG = """examples:
  flowtilt watch runs/playground-fast
  flowtilt watch runs/nft runs/grpo              both side by side
  ssh -L 8766:localhost:8766 HOST                then http://localhost:8766 here shows what HOST watches
"""


def add(commands: Any) -> None:
    """The command and its options."""
    watch = commands.add_parser(
        "watch",
        help="show runs in a browser while they train",
        description="Serves the pages of runs, updated as the runs log, evaluate and end. Waits for a run that does not exist yet.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    watch.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run; several are shown side by side")
    watch.add_argument("--host", default="127.0.0.1", help="address to listen at; at any other, others can read the runs (%(default)s)")
    watch.add_argument("--port", type=int, help=f"0 takes a free one ({PORT}, or a free one where that is taken)")
    watch.set_defaults(call=_watch)


def _watch(args: argparse.Namespace) -> int:
    for run in args.runs:
        if run.is_file():
            raise UserError(f"watch: {run}: a file; give the folder of a run")
    try:
        from flowtilt.io.listening import Server
        from flowtilt.report.watch.app import app
    except ModuleNotFoundError as error:
        raise UserError(f"watch needs {error.name}: pip install starlette uvicorn") from error
    with _listener(args.host, args.port) as listener:
        for run in args.runs:
            if not run.is_dir():
                say(f"waiting for {run}")
        url = f"http://{in_url(args.host)}:{listener.getsockname()[1]}"
        server = Server(app(args.runs, is_loopback(args.host)), lambda: print(f"watching at {url}; Ctrl-C ends", flush=True))
        with suppress(KeyboardInterrupt):  # uvicorn raises the signal again once it has shut down
            server.run(sockets=[listener])
    return 0


def _listener(host: str, port: int | None) -> Any:
    if port is not None:
        return bound(host, port, "watch")
    try:
        return bound(host, PORT, "watch")
    except UserError:
        return bound(host, 0, "watch")
