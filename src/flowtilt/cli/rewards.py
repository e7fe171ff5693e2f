"""`flowtilt serve-rewards`, `download`, `prompts` and `doctor`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from flowtilt.cli.words import count, say, words
from flowtilt.errors import UserError
from flowtilt.io.quiet import quieten


def add(commands: Any) -> None:
    """The commands and their options."""
    serve = commands.add_parser("serve-rewards", help="serve reward models to other processes over HTTP")
    serve.add_argument("--rewards", type=words, required=True, help="comma-separated: names, or name=file.py:function")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at; any other needs FLOWTILT_REWARD_KEY (%(default)s)")
    serve.add_argument("--port", type=int, default=8765, help="0 takes a free one (%(default)s)")
    serve.add_argument("--device", help="device of the models (the GPU if there is one)")
    serve.add_argument("--max-batch", type=count, default=32, metavar="N", help="images per call of a reward (%(default)s)")
    serve.add_argument("--compat", action="store_true", help="reproduce upstream's numbers, also where upstream is wrong")
    serve.set_defaults(call=_serve)

    download = commands.add_parser("download", help="fetch models, rewards' weights and prompt sets, with checksums")
    download.add_argument(
        "names", nargs="*", default=[], metavar="NAME", help="recipes (all that they need), rewards, prompt sets, or a model's hub id"
    )
    download.add_argument(
        "--to", type=Path, metavar="FOLDER", help="for FLOWTILT_WEIGHTS, FLOWTILT_PROMPTS and model.path to point at (the caches)"
    )
    download.add_argument("--list", action="store_true", help="list what can be downloaded, and what is here")
    download.set_defaults(call=_download)

    prompts = commands.add_parser("prompts", help="list prompt sets, or write training prompts of GenEval's or GenEval 2's form")
    prompts.add_argument("kind", nargs="?", choices=("geneval", "geneval2"), help="generate prompts of this kind")
    prompts.add_argument("--n", type=count, default=50_000, help="number of prompts (%(default)s)")
    prompts.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    prompts.add_argument("--exclude", action="append", default=[], metavar="FILE", help="set or file whose prompts are left out")
    prompts.add_argument("-o", "--output", type=Path, metavar="FILE", help="(standard output)")
    prompts.set_defaults(call=_prompts)

    doctor = commands.add_parser("doctor", help="show what is installed, the device, and what each reward still needs")
    doctor.add_argument(
        "--rewards", type=words, nargs="?", const=["all"], metavar="NAMES", help="load rewards and compare with published reference scores"
    )
    doctor.add_argument(
        "--public",
        action="store_true",
        help="reproduce published numbers: PickScore on DrawBench of SD3.5-Medium and of DiffusionNFT's public LoRA (a GPU, some minutes)",
    )
    doctor.add_argument("--images", type=count, default=50, metavar="N", help="images per number of --public (%(default)s)")
    doctor.add_argument(
        "-o", "--output", type=Path, default=Path("doctor-public"), metavar="FOLDER", help="folder of --public (%(default)s)"
    )
    doctor.set_defaults(call=_doctor)


def _serve(args: argparse.Namespace) -> int:
    quieten()
    import torch

    from flowtilt.rewards.named import parse, with_compat
    from flowtilt.rewards.serving.server import serve
    from flowtilt.rewards.serving.wire import key_from_environment

    rewards = [with_compat(one) if args.compat else one for one in parse(args.rewards)]
    named = {one.name: {"source": one.source, "options": one.options} for one in rewards}
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.device(device)
    except RuntimeError:
        raise UserError(f"serve-rewards: --device {device}: no such device; cpu, cuda or cuda:0") from None
    serve(named, host=args.host, port=args.port, key=key_from_environment(), device=device, max_batch=args.max_batch, tell=say)
    return 0


def _download(args: argparse.Namespace) -> int:
    quieten()
    from flowtilt.cli import catalogue

    if args.list:
        for item in catalogue.listing():
            size = f"{'' if item.whole else '> '}{item.size / 1e6:,.1f} MB" if item.size else "?"
            print(f"{'here' if item.there else '-':5}{item.kind:8} {item.name:16} {size:>13}  {item.about}")
        print("Where there is ? or >, only the hub knows the size: `flowtilt download NAME` says it before it fetches.", file=sys.stderr)
        return 0
    if not args.names:
        raise UserError("download: which? `flowtilt download --list` shows what there is")
    for path in catalogue.get(args.names, args.to):
        print(path)
    return 0


def _prompts(args: argparse.Namespace) -> int:
    from flowtilt.playground import PROMPTS, world
    from flowtilt.prompts import geneval, geneval2, sets

    if args.kind is None:
        listed = {**PROMPTS, **{name: found.about for name, found in sets.SETS.items()}}
        width = max(map(len, listed))
        print("\n".join(f"{name:{width}}  {about}" for name, about in listed.items()))
        return 0
    lists = [world.prompts("test") if source == "playground" else sets.load(source) for source in args.exclude]
    excluded = {prompt.text for prompts in lists for prompt in prompts}
    of = geneval if args.kind == "geneval" else geneval2
    written = of.to_lines(of.generate(args.n, args.seed, excluded))
    if args.output is None:
        sys.stdout.write(written)
        return 0
    from flowtilt.io.files import write_atomic

    write_atomic(args.output, written)
    print(args.output)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    quieten()
    if args.public:
        return _public(args)
    from flowtilt.cli.doctor_report import diagnose
    from flowtilt.rewards.about import of_paper
    from flowtilt.rewards.reference import compare

    names = list(dict.fromkeys(name for given in args.rewards or () for name in (of_paper() if given == "all" else (given,))))
    print("\n".join(diagnose(but=names)))
    failed = False
    for line in compare(names):
        print(line, flush=True)
        failed |= line.startswith(("WRONG", "MISSING"))
    return 1 if failed else 0


def _public(args: argparse.Namespace) -> int:
    from flowtilt.evaluate.public import reproduce

    lines = []
    for line in reproduce(args.output, images=args.images, say=say):
        print(line, flush=True)
        lines.append(line)
    return 1 if any(line.startswith(("WRONG", "MISSING")) for line in lines) else 0
