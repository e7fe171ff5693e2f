"""`flowtilt plan`."""

import argparse
import json
from typing import Any

from flowtilt.cli.words import count
from flowtilt.config import load_recipe
from flowtilt.io.quiet import quieten
from flowtilt.rewards.about import check_options


def add(commands: Any) -> None:
    """The command and its options."""
    plan = commands.add_parser("plan", help="estimate a recipe's memory, work and hours; needs no weights or GPU")
    plan.add_argument("recipe", help="name (`flowtilt recipes` lists them) or .toml file")
    plan.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="override a key of the recipe")
    plan.add_argument("--gpu", help="GPU, for its published peak: h100, h200, a100, l40s, 4090, 3090 (h100)")
    plan.add_argument("--gpus", type=count, metavar="N", help="GPUs in all (1)")
    plan.add_argument("--nodes", type=count, metavar="N", help="machines that hold them (1)")
    plan.add_argument("--hours", type=float, metavar="H", help="propose a geometry that finishes within this time")
    plan.add_argument("--gpu-memory", type=float, metavar="GIB", help="memory of each GPU (its own)")
    plan.add_argument("--utilisation", type=float, metavar="SHARE", help="share of the peak (0.24 as measured, 0.37 with model.compile)")
    plan.add_argument("--link", metavar="LINK", help="between the GPUs of a machine: nvlink, nvlink3, pcie or GB/s (what such GPUs have)")
    plan.add_argument("--network", metavar="LINK", help="network between machines: infiniband, ethernet or GB/s per machine (infiniband)")
    plan.add_argument("--json", action="store_true", help="print all figures as JSON: bytes, operations, hours")
    plan.set_defaults(call=_plan)


def _plan(args: argparse.Namespace) -> int:
    quieten()
    recipe = load_recipe(args.recipe, args.overrides)
    check_options(recipe.reward_table())
    asked = (args.gpu, args.gpus, args.gpu_memory, args.utilisation, args.hours, args.nodes)
    if recipe.model.path == "playground" and not args.json and all(one is None for one in asked):
        print(f"{recipe.name}: needs no GPU (docs/results/playground.md). To plan it for a GPU, name one: --gpu h100")
        from flowtilt.build import judges_of, rewards_of
        from flowtilt.plan.requests import requests_of
        from flowtilt.plan.text import request_line
        from flowtilt.playground.world import SIZE

        for name, found in requests_of(recipe, rewards_of(recipe), judges_of(recipe), SIZE).items():
            print(request_line(name, found))
        return 0
    from flowtilt.plan import Machine, make_plan, proposal
    from flowtilt.plan.text import table

    machine = Machine(
        gpu=args.gpu or "h100",
        gpus=args.gpus or args.nodes or 1,
        nodes=args.nodes or 1,
        inside=args.link,
        between=args.network or "infiniband",
        memory=args.gpu_memory,
        utilisation=args.utilisation,
    )
    if args.hours is not None:
        found = proposal(recipe, machine, args.hours)
        print(json.dumps(found.as_json(), indent=2) if args.json else found.text(args.recipe, args.overrides))
        return 0
    plan = make_plan(recipe, machine)
    print(json.dumps(plan.as_json(), indent=2) if args.json else table(plan))
    return 0
