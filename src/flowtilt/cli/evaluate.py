"""`flowtilt evaluate` and `flowtilt score`."""

import argparse
from pathlib import Path
from typing import Any

from flowtilt.cli.words import LORA, TRUST, count, model_keys, model_options, say, words
from flowtilt.errors import UserError
from flowtilt.io.quiet import quieten
from flowtilt.io.run_folder import EvaluationFolder, RunFolder

REWARDS = 'rewards, comma-separated: names, "all" (the eight), file.py:function, or name=http://host:port'


def add(commands: Any) -> None:
    """The commands and their options."""
    evaluate = commands.add_parser("evaluate", help="sample and score sets of prompts, with intervals; resumes after an interrupt")
    evaluate.add_argument("--model", help="pipeline folder or hub id (default: the LoRA's own base, else the playground)")
    evaluate.add_argument(
        "--lora",
        type=Path,
        action="append",
        default=[],
        metavar="RUN",
        help=LORA,
    )
    evaluate.add_argument("--prompts", type=words, default=[], help="sets or files, comma-separated (default: the run's own evaluation)")
    evaluate.add_argument("--rewards", type=words, default=[], help=REWARDS)
    evaluate.add_argument("--images-per-prompt", type=count, metavar="N", help="images per prompt (1)")
    evaluate.add_argument("--images", type=count, metavar="N", help="instead: total number, spread over tags and prompts")
    model_options(evaluate, "the run's")
    evaluate.add_argument("--solver", choices=("euler", "ddim", "dpm1", "dpm2", "heun", "cps"), help="(the recipe's evaluation)")
    evaluate.add_argument("--eta", type=float, help="share of new noise in a step of cps, at most 1 (the recipe's, else 0.9)")
    evaluate.add_argument("--steps", type=count, help="solver steps (the recipe's evaluation)")
    evaluate.add_argument("--guidance", type=float, help="classifier-free guidance, 1 is none (the recipe's evaluation)")
    evaluate.add_argument("--seed", type=int, help="seed of the noise (the run's)")
    evaluate.add_argument("--compare", choices=("base",), help="also sample the base from the same noise, and give paired differences")
    evaluate.add_argument("--compat", action="store_true", help="reproduce upstream's numbers, also where upstream is wrong")
    evaluate.add_argument(
        "--save-images", action="store_true", help="keep every image at its full size; a finished evaluation samples its images once more"
    )
    evaluate.add_argument("--trust", action="store_true", help=TRUST)
    evaluate.add_argument("--micro-batch", type=count, metavar="N", help="images per pass through the network (found by trying)")
    evaluate.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="(evaluation/ in the run, or here if --lora is no run)")
    evaluate.set_defaults(call=_evaluate)

    score = commands.add_parser("score", help="score images that you already have")
    score.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGES", help="files, folders, a run's samples, or a folder in GenEval's layout"
    )
    score.add_argument("--prompts", help="set or file: one prompt per image in the order of the names, or a table that names its images")
    score.add_argument("--rewards", type=words, required=True, help=REWARDS)
    score.add_argument("--images-per-prompt", type=count, default=1, metavar="N", help="consecutive images per prompt (1)")
    score.add_argument("--compat", action="store_true", help="reproduce upstream's numbers, also where upstream is wrong")
    score.add_argument("-o", "--output", type=Path, metavar="FILE", help="also write every image's scores: .jsonl, .csv or a pipe")
    score.set_defaults(call=_score)


def _evaluate(args: argparse.Namespace) -> int:
    quieten()
    if args.images and args.images_per_prompt:
        raise UserError("evaluate: --images and --images-per-prompt exclude each other")
    if args.guidance is not None and not 1 <= args.guidance < float("inf"):
        raise UserError(f"evaluate: --guidance must be at least 1, which is none, not {args.guidance:g}")
    from flowtilt.evaluate.assess import assess
    from flowtilt.report.evaluation.terminal import table

    run = args.lora[0] if len(args.lora) == 1 and RunFolder(args.lora[0]).is_run() else Path()
    output = args.output or run / "evaluation"
    try:
        results = assess(
            output,
            model=args.model,
            loras=args.lora,
            prompts=args.prompts,
            rewards=args.rewards,
            images=args.images,
            images_per_prompt=args.images_per_prompt,
            **model_keys(args),
            solver=args.solver,
            steps=args.steps,
            guidance=args.guidance,
            eta=args.eta,
            seed=args.seed,
            compare_base=args.compare == "base",
            compat=args.compat,
            save_images=args.save_images,
            micro_batch=args.micro_batch or "auto",
            trust=args.trust,
            say=say,
        )
    except KeyboardInterrupt:
        more = "; the same command goes on from there" if EvaluationFolder(output).protocol.is_file() else ""
        raise KeyboardInterrupt(more) from None
    if results:
        print(table(results))
        written = EvaluationFolder(output)
        print(f"results  {written.results}\nreport   {written.report}")
        if args.save_images:
            print(f"images   {output / 'images'}")
    return 0


def _score(args: argparse.Namespace) -> int:
    quieten()
    from flowtilt.io.files import is_stdout, is_stream

    if args.output and args.output.suffix not in (".jsonl", ".csv") and not is_stream(args.output):
        raise UserError(f"score: -o {args.output}: give a .jsonl or .csv file")
    import torch

    from flowtilt.build import load_prompts
    from flowtilt.evaluate.images import judge_images, save_scores, with_columns
    from flowtilt.evaluate.pairs import find_pairs
    from flowtilt.evaluate.results import results_of
    from flowtilt.prompts.files import read_prompts
    from flowtilt.prompts.sets import is_path
    from flowtilt.report.evaluation.terminal import table
    from flowtilt.rewards.comparing import refuse_comparing
    from flowtilt.rewards.facts import ranges_of
    from flowtilt.rewards.named import load_named, parse, with_compat

    file = Path(args.prompts) if args.prompts and is_path(args.prompts) else None
    prompts = read_prompts(file) if file else load_prompts(args.prompts) if args.prompts else None  # read_prompts keeps repeated captions
    pairs = find_pairs(args.images, prompts, args.images_per_prompt, file)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    named = parse(args.rewards)
    rewards, left_out = load_named([with_compat(one) for one in named] if args.compat else named, device=device)
    refuse_comparing(rewards, "score --rewards")
    for name, why in left_out.items():
        say(f"left out: {name}: {why}")
    if args.output and not is_stream(args.output):
        save_scores(args.output, [])  # now, not after an hour: can it be written?
    records = []
    try:
        for record in judge_images(pairs, rewards, device=device):
            records.append(record)
    finally:
        records = with_columns(records, rewards)
        if args.output:
            save_scores(args.output, records)
    unread = [record for record in records if all(value is None for value in record["scores"].values()) and record["note"]]
    for record in unread[:5]:
        say(f"no score: {record['note']}")
    variants = [variant for variant in ("tuned", "base") if any(record["variant"] == variant for record in records)]
    own = say if args.output and is_stdout(args.output) else print  # standard output holds the scores alone
    own(table(results_of(records, variants, {}, ranges_of(rewards))))
    if args.output:
        own(f"scores   {args.output}")
    return 0
