"""`flowtilt train` and `sample`."""

import argparse
import json
from pathlib import Path
from typing import Any

from flowtilt.cli.check import run as check_recipe
from flowtilt.cli.words import LORA, TRUST, count, model_keys, model_options, say, seeds
from flowtilt.config import Recipe, load_recipe, recipe_names
from flowtilt.config.held_out import score_name_of
from flowtilt.config.trust import check, of_recipe
from flowtilt.distributed import signals, torchrun
from flowtilt.errors import UserError
from flowtilt.io.files import is_stdout
from flowtilt.io.quiet import quieten
from flowtilt.io.run_folder import RunFolder
from flowtilt.rewards.about import check_options


def add(commands: Any) -> None:
    """The commands and their options."""
    train = commands.add_parser("train", help="train a recipe, or resume a run")
    train.add_argument("recipe", nargs="?", help="name (`flowtilt recipes` lists them) or .toml file")
    train.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="override a key of the recipe (`flowtilt keys` lists them)"
    )
    train.add_argument("--init-lora", metavar="LORA", help="start from a LoRA: a run, folder or file with the recipe's rank and alpha")
    train.add_argument("--resume", type=Path, metavar="RUN", help="folder of a run to resume")
    train.add_argument("--or-resume", action="store_true", help="resume the run in run=FOLDER if there is one, else start it")
    train.add_argument("--changed", action="store_true", help="resume although prompts, reward files or the model have changed")
    train.add_argument("--trust", action="store_true", help=TRUST)
    train.add_argument("--dry-run", action="store_true", help="do not train: run `flowtilt check` on the same recipe")
    train.set_defaults(call=_train)

    sample = commands.add_parser("sample", help="sample prompts, base and tuned side by side from the same noise")
    sample.add_argument("prompts", nargs="+", metavar="PROMPT", help="a caption; several may follow")
    sample.add_argument("--model", help="pipeline folder or hub id (default: the LoRA's own base, else the playground)")
    sample.add_argument(
        "--lora",
        type=Path,
        action="append",
        default=[],
        metavar="RUN",
        help=LORA,
    )
    model_options(sample, "the run's")
    sample.add_argument(
        "--image", type=Path, action="append", default=[], metavar="FILE", help="source image of an edit: one for all prompts, or one each"
    )
    sample.add_argument("--steps", type=int, help="solver steps (default: the recipe's evaluation)")
    sample.add_argument("--guidance", type=float, help="classifier-free guidance, 1 is none")
    sample.add_argument("--solver", help="euler, ddim, dpm1, dpm2, heun or cps")
    sample.add_argument("--eta", type=float, help="share of new noise in a step of cps, at most 1 (the recipe's, else 0.9)")
    sample.add_argument("--seed", type=seeds, default=[0], metavar="N", help="one seed, several as 0,1,2, or a range as 0..4 (0)")
    sample.add_argument("--images", type=count, default=1, metavar="N", help="images per prompt and seed (%(default)s)")
    sample.add_argument("--save-each", type=Path, metavar="FOLDER", help="also write every image, with a table for `flowtilt score`")
    sample.add_argument("--same-noise", action="store_true", help="start all prompts from the same noise")
    sample.add_argument("--no-base", action="store_true", help="sample only the tuned model")
    sample.add_argument("-o", "--output", type=Path, default=Path("sample.png"), help=".png, .jpg or .webp (%(default)s)")
    sample.add_argument("--trust", action="store_true", help=TRUST)
    sample.set_defaults(call=_sample)


def _train(args: argparse.Namespace) -> int:
    quieten()
    if args.recipe and "=" in args.recipe and not Path(args.recipe).exists():
        args.recipe, args.overrides = None, [args.recipe, *args.overrides]
    if args.init_lora:
        args.overrides = [*args.overrides, f"lora.init={json.dumps(args.init_lora)}"]
    if args.dry_run:
        if args.resume or not args.recipe:
            raise UserError("train --dry-run: give a recipe; it checks what a new run would do")
        return check_recipe(args.recipe, args.overrides)
    asked = args.overrides
    if args.or_resume:
        args.resume, args.overrides = _begun(args)
    if args.resume:
        from flowtilt.runs.folder import open_run

        believed = load_recipe(args.recipe, asked) if args.recipe else None
        given = of_recipe(believed) if believed else {}

        def trusted(found: Recipe) -> None:
            check(args.resume, {key: value for key, value in of_recipe(found).items() if given.get(key) != value}, args.trust)

        recipe = open_run(args.resume, args.overrides, believed, trusted)
    elif args.recipe:
        recipe = load_recipe(args.recipe, args.overrides)
    else:
        raise UserError(f"train: which recipe? one of {', '.join(recipe_names())}, a .toml file, or --resume RUN")
    check_options(recipe.reward_table())

    from flowtilt.distributed import world as distributed
    from flowtilt.distributed.sameness import facts
    from flowtilt.runs import folder as runs
    from flowtilt.training.trainer import Trainer

    world, resume = distributed.start(), args.resume
    world.agree({"--resume": str(resume or ""), **facts(recipe)})
    if not resume and (resume := runs.of_job(recipe, world)):
        recipe = runs.open_run(resume, [], recipe)
    trainer = Trainer(recipe, resume, world, changed=args.changed)
    folder = trainer.run_folder
    try:
        summary = trainer.run()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"; go on from the last checkpoint with: flowtilt train --resume {folder}") from None
    signals.current().over()
    if trainer.world.rank:
        return 0
    if summary is None:
        why = f"stopped by a guard: {trainer.stopped_by}" if trainer.stopped_by else "interrupted"
        print(f"{why}\nsaved after {trainer.clock.step} of {recipe.rollouts} rollouts; go on with: flowtilt train --resume {folder}")
        if trainer.stopped_by:  # it was meant to stop, and torchrun starts what failed again
            return 0 if torchrun.may_restart() else 3
        return torchrun.interrupted_status()
    report(recipe, summary, folder)
    return 0


def _begun(args: argparse.Namespace) -> tuple[Path | None, list[str]]:
    """The run to go on with, if it has begun, and the overrides that belong to that."""
    from flowtilt.runs.changing import may_change

    if args.resume or not args.recipe:
        raise UserError("train: --or-resume wants a recipe and run=FOLDER, and no --resume")
    recipe = load_recipe(args.recipe, args.overrides)
    if not recipe.run:
        raise UserError("train: --or-resume goes on with the run in a folder; name it: run=FOLDER")
    if not RunFolder(recipe.run).is_run():
        return None, args.overrides
    return Path(recipe.run), [item for item in args.overrides if may_change(item, recipe)]


def report(recipe: Recipe, summary: dict, folder: Path) -> None:
    """The last lines of a run."""
    from flowtilt.report.loading import load
    from flowtilt.report.numbers import counted
    from flowtilt.report.verdict import judged_change

    changed = judged_change(load(folder))
    before, after = ("not measured" if value is None else f"{value:.3f}" for value in summary["score"].values())
    print(f"{score_name_of(recipe)} {before} -> {after}   ({summary['protocol']})")
    if changed:
        print(changed)
    print(f"{counted(summary['rollouts'], 'rollout')}, {summary['seconds']:.0f} s of training, seed {summary['seed']}")
    kind, trained = ("network", RunFolder(folder).network) if recipe.train == "full" else ("lora", RunFolder(folder).lora)
    print(f"{kind:7} {trained}\nreport  {RunFolder(folder).report}")


def _sample(args: argparse.Namespace) -> int:
    quieten()
    from flowtilt.evaluate.side_by_side import sample

    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps: must be at least 1, not {args.steps}")
    if args.solver is not None:
        from flowtilt.solvers import SAMPLERS

        if args.solver not in SAMPLERS:
            raise UserError(f"--solver: {args.solver!r} is not one of {', '.join(SAMPLERS)}")
    written = sample(
        args.prompts,
        args.output,
        model=args.model,
        loras=args.lora,
        seeds=args.seed,
        copies=args.images,
        save_each=args.save_each,
        **model_keys(args),
        steps=args.steps,
        guidance=args.guidance,
        solver=args.solver,
        eta=args.eta,
        same_noise=args.same_noise,
        base_too=not args.no_base,
        trust=args.trust,
        images=args.image,
    )
    for place in filter(None, (written, args.save_each)):
        say(str(place)) if is_stdout(written) else print(place)
    return 0
