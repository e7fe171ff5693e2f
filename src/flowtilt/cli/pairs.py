"""`flowtilt pairs`: pairs of images for offline DPO."""

import argparse
from pathlib import Path
from typing import Any

from flowtilt.cli.words import count
from flowtilt.errors import UserError
from flowtilt.io.quiet import quieten


def add(commands: Any) -> None:
    """The command and its options."""
    pairs = commands.add_parser("pairs", help="sample pairs of images to train on with objective.type = dpo-offline")
    pairs.add_argument("source", choices=("playground",), help="model that samples and verifier that prefers")
    pairs.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="a new folder: pairs.jsonl, images, made.json")
    pairs.add_argument("--images", type=count, default=4000, metavar="N", help="images to sample in all (%(default)s)")
    pairs.add_argument("--per-prompt", type=count, default=4, metavar="N", help="images of each prompt, best against worst (%(default)s)")
    pairs.add_argument("--prompts", choices=("playground", "playground-search"), default="playground", help="(%(default)s)")
    pairs.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    pairs.set_defaults(call=_pairs)


def _pairs(args: argparse.Namespace) -> int:
    if args.per_prompt < 2:
        raise UserError("pairs: --per-prompt must be 2 at least, to compare")
    if args.images < args.per_prompt:
        raise UserError(f"pairs: --images {args.images} is less than the {args.per_prompt} of one prompt")
    if args.images % args.per_prompt:
        raise UserError(f"pairs: --images {args.images} is no multiple of --per-prompt {args.per_prompt}; every prompt has as many images")
    if args.output.exists():
        raise UserError(f"pairs: {args.output} is there already; name a new folder")
    quieten()
    import torch

    from flowtilt.build import build_policy
    from flowtilt.config import load_recipe
    from flowtilt.distributed.world import World
    from flowtilt.training.dpo.made import make

    policy = build_policy(load_recipe("playground"), World(0, 1, torch.device("cpu")))
    made = make(args.output, policy, prompts=args.prompts, images=args.images, per_prompt=args.per_prompt, seed=args.seed)
    print(f"{args.output}: {made['pairs']:,} pairs of {made['images']:,} images; {made['ties']:,} prompts gave none, all images alike")
    print(f"{made['network_evaluations']:,} network evaluations")
    print(f"train on them: flowtilt train playground-dpo objective.pairs={args.output}")
    return 0
