"""Every objective on the playground at equal compute: a declared search, seeds, ablations, one file of results.

    python benchmarks/head_to_head.py                      search, run, report: about two hours on two idle cores
    python benchmarks/head_to_head.py ablate report        what DiffusionNFT's parts are worth, after that
    python benchmarks/head_to_head.py --estimate           how long it takes, and nothing else

Settings are chosen on combinations of objects that are in neither the training nor the test prompts; docs/benchmarks.md has the
protocol. Each run is a folder: what is finished is skipped, what was interrupted goes on.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contest.estimate import expected, hours
from contest.jobs import ablation_jobs, main_jobs, search_jobs
from contest.page import with_results, write_plot
from contest.results import declared, entry_of, search_of
from contest.running import Job, run_all
from contest.settings import ABLATIONS, METHODS, QUICK, Plan

from flowtilt.cli.quiet import quieten
from flowtilt.config import load_recipe
from flowtilt.errors import UserError
from flowtilt.files import write_atomic, write_json

ROOT = Path(__file__).parents[1]
STAGES = ("search", "run", "ablate", "report")


class Contest:
    """The comparison in a folder.

    Raises:
        UserError: the folder holds one of another plan.
    """

    def __init__(self, folder: Path, plan: Plan, workers: int, say: Callable[[str], None] = print):
        self.folder, self.plan, self.workers, self.say = folder, plan, workers, say
        kept, told = folder / "plan.json", json.loads(json.dumps(declared(plan)))
        if kept.is_file() and json.loads(kept.read_text()) != told:
            raise UserError(f"{folder}: holds a comparison with another plan; choose another --folder, or the same --budget and --quick")
        write_json(kept, told)

    def search(self) -> None:
        """Tries every setting on a part of the budget."""
        self._run("search", [job for method in self.plan.methods for job in search_jobs(self.folder, self.plan, method)])

    def run(self) -> None:
        """All seeds of each method with the setting that its search has chosen."""
        jobs = [main_jobs(self.folder, self.plan, method, self.chosen(method)) for method in self.plan.methods]
        # a seed of every method before the next seed: what is interrupted compares as many of each
        self._run("runs", [job for same_seed in zip(*jobs, strict=True) for job in same_seed])

    def ablate(self) -> None:
        """All seeds of DiffusionNFT with one change each."""
        self._run(
            "ablations", [job for name in self._variants() for job in ablation_jobs(self.folder, self.plan, name, self.chosen("nft"))]
        )

    def chosen(self, method: str) -> tuple[str, ...]:
        """Overrides of the setting that the search has chosen.

        Raises:
            UserError: the search is not done.
        """
        tried = search_of(self.folder, self.plan, method)
        for setting, record in zip(self.plan.grid(method), tried, strict=True):
            if record.get("chosen"):
                return setting
        raise UserError(f"{self.folder}: the search of {method} is not done; the stage search comes first")

    def results(self) -> dict[str, Any]:
        """Entries of all finished runs, the search, the ablations."""
        plan, entries, ablations = self.plan, [], []
        for method in plan.methods:
            jobs = [job for job in main_jobs(self.folder, plan, method, self.chosen(method)) if job.finished()]
            entries += [entry_of(job, method=method) for job in jobs]
        for name in self._variants() if "nft" in plan.methods else ():
            variant = ABLATIONS[name]
            jobs = [job for job in ablation_jobs(self.folder, plan, name, self.chosen("nft")) if job.finished()]
            told = {"method": "nft", "variant": name, "question": variant.question, "label": variant.label}
            ablations += [entry_of(job, **told) for job in jobs]
        return {
            "plan": declared(plan),
            "base": self._base(),
            "entries": entries,
            "search": {method: search_of(self.folder, plan, method) for method in plan.methods},
            "ablations": ablations,
        }

    def report(self, results: Path, page: Path, plot: Path) -> None:
        """Writes the results' file, the picture, and the page's generated part, of what is finished.

        Raises:
            UserError: nothing is.
        """
        found = self.results()
        runs: dict[str, list[Path]] = {}
        for entry in found["entries"]:
            runs.setdefault(entry["method"], []).append(self.folder / "runs" / f"{entry['method']}-{entry['seed']}")
        if not runs:
            raise UserError(f"{self.folder}: no run is finished yet; the stage run comes first")
        write_json(results, found)
        write_plot(plot, runs)
        if page.is_file():
            write_atomic(page, with_results(page.read_text(encoding="utf-8"), found))
        self.say(f"results  {results}\nplot     {plot}\npage     {page}")

    def _variants(self) -> list[str]:
        """Those that are not what the search has chosen anyway."""
        chosen = self.chosen("nft")
        return [name for name, variant in ABLATIONS.items() if not set(variant.overrides) <= set(chosen)]

    def _base(self) -> dict[str, Any]:
        """What is measured of the base, once."""
        kept = self.folder / "base.json"
        if not kept.is_file():
            from contest.measures import measures_of

            write_json(kept, measures_of(load_recipe("playground", self.plan.overrides), None, self.plan.amount))
        return json.loads(kept.read_text())

    def _run(self, what: str, jobs: list[Job]) -> None:
        self.say(f"{what}: {len(jobs)} runs")
        run_all(jobs, self.workers, self.say, expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"{', '.join(STAGES)} (all but ablate)")
    parser.add_argument("--folder", type=Path, default=Path("runs/head_to_head"), help="of all runs (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (%(default)s)")
    parser.add_argument("--budget", type=int, help=f"network evaluations of a run ({Plan.budget:,})")
    parser.add_argument("--seeds", type=int, nargs="+", help=f"of the runs that are reported ({' '.join(map(str, Plan.seeds))})")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS), help="(all)")
    parser.add_argument("--quick", action="store_true", help="two or three minutes to see that it works; results go into the folder")
    parser.add_argument("--estimate", action="store_true", help="say how long it takes, and do nothing")
    args = parser.parse_args()
    stages = args.stages or ["search", "run", "report"]
    if unknown := [stage for stage in stages if stage not in STAGES]:
        parser.error(f"{unknown[0]} is no stage; there are {', '.join(STAGES)}")
    given = {"budget": args.budget, "seeds": args.seeds and tuple(args.seeds), "methods": tuple(args.methods)}
    plan = dataclasses.replace(QUICK if args.quick else Plan(), **{key: value for key, value in given.items() if value})
    print(hours(plan, stages, args.workers), flush=True)
    if args.estimate:
        return
    quieten()
    base = args.folder if args.quick else ROOT
    try:
        contest = Contest(args.folder.resolve(), plan, args.workers, lambda line: print(line, flush=True))
        for stage in stages:
            if stage == "report":
                plot = base / "docs" / "images" / "head_to_head.svg"
                contest.report(base / "benchmarks" / "results" / "head_to_head.json", base / "docs" / "benchmarks.md", plot)
            else:
                getattr(contest, stage)()
    except UserError as error:
        sys.exit(f"head_to_head: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from there")


if __name__ == "__main__":
    main()
