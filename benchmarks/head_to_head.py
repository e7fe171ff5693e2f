"""Every objective on the playground at equal compute: a declared search, seeds, ablations, one file of results.

    python benchmarks/head_to_head.py                      search, run, report: hours
    python benchmarks/head_to_head.py ablate report        what DiffusionNFT's parts are worth, after that
    python benchmarks/head_to_head.py --estimate           how long it takes, and nothing else

Settings are chosen on combinations of objects that are in neither the training nor the test prompts; docs/results/benchmarks.md has the
protocol. Each run is a folder: what is finished is skipped, what was interrupted goes on. What the file of results holds of the same
plan is not made again either, so that a comparison can be finished on another machine than it was begun on.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from contest.estimate import expected, hours
from contest.jobs import ablation_jobs, main_jobs
from contest.page import drawn, with_results, write_plot
from contest.results import Record, declared, entry_of, kept
from contest.running import Job, run_all
from contest.search import Search
from contest.settings import ABLATIONS, METHODS, QUICK, Plan

from flowtilt.config import load_recipe
from flowtilt.errors import UserError
from flowtilt.io.files import write_atomic, write_json
from flowtilt.io.quiet import quieten

ROOT = Path(__file__).parents[1]
FIGURES = ("score", "final", "chosen")
"""What the page says of a setting."""
EXPERT = "grpo-fast"
"""The method's name on the page, and the recipe's."""
STAGES = ("search", "run", "ablate", "report")


class Contest:
    """The comparison in a folder.

    Args:
        results: file of results; what it has of the same plan counts as made.

    Raises:
        UserError: the folder holds a comparison of another plan.
    """

    def __init__(self, folder: Path, plan: Plan, workers: int, results: Path, say: Callable[[str], None] = print):
        self.folder, self.plan, self.workers, self.say = folder, plan, workers, say
        path = folder / "plan.json"
        if path.is_file() and json.loads(path.read_text()) != declared(plan):
            raise UserError(f"{folder}: holds a comparison with another plan; choose another --folder, or the same --budget and --quick")
        write_json(path, declared(plan))
        self._results = results
        known = json.loads(results.read_text()) if results.is_file() else {}
        self._known: Record = known if known.get("plan") == declared(plan) else {"entries": [], "search": {}, "ablations": []}

    def search(self) -> None:
        """Tries every setting on a part of the budget, then those that are close on more of it."""
        methods = [self._search(method) for method in self.plan.methods]
        self._run("search, first round", [job for method in methods for job in method.first_round()])
        self._run("search, second round", [job for method in methods for job in method.second_round()])

    def run(self) -> None:
        """All seeds of each method with the setting that its search has chosen."""
        jobs = [main_jobs(self.folder, self.plan, method, self.chosen(method)) for method in self.plan.methods]
        # a seed of every method before the next seed: what is interrupted compares as many of each
        self._run("runs", [job for same_seed in zip(*jobs, strict=True) for job in same_seed if not kept(job, self._known["entries"])])

    def ablate(self) -> None:
        """All seeds of DiffusionNFT with one change each."""
        jobs = [ablation_jobs(self.folder, self.plan, name, self.chosen("nft")) for name in self._variants()]
        left = [job for same_seed in zip(*jobs, strict=True) for job in same_seed if not kept(job, self._known["ablations"])]
        self._run("ablations", left)

    def chosen(self, method: str) -> tuple[str, ...]:
        """Overrides of the setting that the search has chosen.

        Raises:
            UserError: the search is not done.
        """
        if setting := self._search(method).chosen():
            return setting
        raise UserError(f"{self.folder}: the search of {method} is not done; the stage search comes first")

    def results(self) -> Record:
        """Entries of all finished runs, the search, the ablations."""
        plan, entries, ablations = self.plan, [], []
        for method in plan.methods:
            if setting := self._search(method).chosen():
                jobs = main_jobs(self.folder, plan, method, setting)
                entries += _entries(jobs, self._known["entries"], {"method": method})
        for name in self._variants() if "nft" in plan.methods else ():
            jobs = ablation_jobs(self.folder, plan, name, self.chosen("nft"))
            told = {"method": "nft", "variant": name, "question": ABLATIONS[name].question, "label": ABLATIONS[name].label}
            ablations += _entries(jobs, self._known["ablations"], told)
        expert = _expert(self._results.with_name("grpo_search.json"), plan)
        return {
            "plan": declared(plan),
            "base": self._base(),
            "entries": entries + expert["entries"],
            "search": {method: self._search(method).tried() for method in plan.methods} | expert["search"],
            "ablations": ablations,
        }

    def report(self, page: Path, plot: Path) -> None:
        """Writes the results' file, the picture, and the page's generated part, of what is finished.

        Raises:
            UserError: nothing is.
        """
        found = self.results()
        if not found["entries"]:
            raise UserError(f"{self.folder}: no run is finished yet; the stage run comes first")
        write_json(self._results, found)
        write_plot(plot, drawn(found["entries"]))
        if page.is_file():
            write_atomic(page, with_results(page.read_text(encoding="utf-8"), found))
        self.say(f"results  {self._results}\nplot     {plot}\npage     {page}")

    def _search(self, method: str) -> Search:
        return Search(self.folder, self.plan, method, self._known["search"].get(method, ()))

    def _variants(self) -> list[str]:
        """Those that are not what the search has chosen anyway."""
        chosen = self.chosen("nft")
        return [name for name, variant in ABLATIONS.items() if not set(variant.overrides) <= set(chosen)]

    def _base(self) -> Record:
        """What is measured of the base, once."""
        if "base" in self._known:
            return self._known["base"]
        path = self.folder / "base.json"
        if not path.is_file():
            from contest.measures import measures_of

            write_json(path, measures_of(load_recipe("playground", self.plan.overrides), None, self.plan.amount))
        return json.loads(path.read_text())

    def _run(self, what: str, jobs: list[Job]) -> None:
        self.say(f"{what}: {len(jobs)} runs")
        run_all(jobs, self.workers, self.say, expected)


def _expert(path: Path, plan: Plan) -> Record:
    """Runs and search of the FlowGRPO that grpo_search.py chose, where it has and with this budget: the same measures, a larger search."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    if not found.get("test") or found["budget"] != plan.search_budget:
        return {"entries": [], "search": {}}
    tried = [{"settings": {"setting": run["setting"]}} | {key: run[key] for key in FIGURES if key in run} for run in found["runs"]]
    return {"entries": [{**entry, "method": EXPERT} for entry in found["test"]], "search": {EXPERT: tried}}


def _entries(jobs: Sequence[Job], known: Sequence[Record], told: Record) -> list[Record]:
    """Of the runs that are finished here or were made before."""
    found = [entry_of(job, **told) if job.finished() else kept(job, known) for job in jobs]
    return [entry for entry in found if entry]


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
        results = base / "benchmarks" / "results" / "head_to_head.json"
        contest = Contest(args.folder.resolve(), plan, args.workers, results, lambda line: print(line, flush=True))
        for stage in stages:
            if stage == "report":
                contest.report(base / "docs" / "results" / "benchmarks.md", base / "docs" / "images" / "head_to_head.svg")
            else:
                getattr(contest, stage)()
    except UserError as error:
        sys.exit(f"head_to_head: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from there")


if __name__ == "__main__":
    main()
