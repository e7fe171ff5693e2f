"""What the comparison compares: methods, their grids, budgets, seeds, ablations. Declared before anything is run.

No torch here.
"""

from dataclasses import dataclass
from itertools import product

FACTORS = (0.5, 1.0, 2.0)
"""Learning rates of every grid, as multiples of the method's `rate`."""
SHARE = 3
"""A run of the search's first round spends one part in so many of the budget, one of its second round two."""
NEAR = 0.03
"""Settings whose scores are no further than this below the best one's come into the second round; one evaluation can't tell them apart."""
MOST = 3
"""Of them at most."""
DECIDED_BY = 3
"""The second round goes by the mean of so many last evaluations."""
SEARCH_SEED = 100
"""Of all runs of the search; none of the seeds that are reported."""
TARGET = 0.9
COLLAPSE = 0.1
"""A run has collapsed where its last score is further than this below its best: six standard errors of one evaluation."""
POINTS = 9
"""Evaluations of a whole run, besides the one before."""


@dataclass(frozen=True)
class Method:
    """A method and its search.

    Args:
        recipe: a recipe of the package, from which all that is not searched comes; it has the setting that was chosen.
        rate: the learning rate in the middle of the grid.
        knob: the key of its main setting.
        values: of that.
        pulls: of the policy towards a reference, with each of which the whole grid is tried; none leaves the recipe's.
    """

    recipe: str
    rate: float
    knob: str
    values: tuple[float, ...]
    pulls: tuple[tuple[str, ...], ...] = ((),)

    def grid(self) -> list[tuple[str, ...]]:
        """Overrides of each setting."""
        return [
            (f"optimizer.lr={self.rate * factor:g}", f"objective.{self.knob}={value:g}", *pull)
            for pull, factor, value in product(self.pulls, FACTORS, self.values)
        ]


NO_PULL = "objective.kl=0"


METHODS: dict[str, Method] = {
    "nft": Method("playground", 3e-3, "beta", (0.1, 0.3, 1.0)),
    "grpo": Method("playground-grpo", 3e-3, "clip_range", (1e-4, 3e-4, 1e-3)),
    "awm": Method("playground-awm", 3e-3, "anchor", (0.1, 0.3, 1.0)),
    "epg": Method("playground-epg", 3e-3, "scale", (0.1, 0.5, 2.5)),
    "pepg": Method("playground-pepg", 3e-3, "scale", (0.1, 0.5, 2.5)),
    "ram": Method("playground-ram", 3e-3, "multiplier", (5.0, 15.0, 45.0)),
    "awr": Method("playground-awr", 3e-3, "temperature", (0.3, 1.0, 3.0)),
    "dgpo": Method(
        "playground-dgpo",
        3e-3,
        "beta",
        (30.0, 100.0, 300.0),
        ((NO_PULL, "objective.compare=old"), ("objective.kl=0.02", "objective.compare=base")),
    ),
    "crd": Method(
        "playground-crd",
        3e-3,
        "beta",
        (0.3, 1.0, 3.0),
        ((NO_PULL,), ("objective.kl=0.1", "objective.reference_guidance=4.5")),
    ),
    "dpo": Method("playground-dpo-online", 1e-3, "beta", (30.0, 100.0, 300.0)),
}


@dataclass(frozen=True)
class Variant:
    """One change of DiffusionNFT as the search left it; `question` is what it belongs to."""

    question: str
    label: str
    overrides: tuple[str, ...]


WITHOUT_NEGATIVE = (
    # at beta = 1 and with no advantage beyond the clip, r |v+ error| times the clip is (A + clip) / 2 times v's own error
    "objective.type=epg",
    "objective.ratio=false",
    "objective.scale=0.5",
    "objective.consistency=5.3",
    "objective.kl=0.0",
    "objective.old_policy=linear",
    "objective.times=stratified",
    "objective.times_per_image=2",
)

ABLATIONS: dict[str, Variant] = {
    "old-copy": Variant("pace of the old policy", "copy", ("objective.old_policy=copy",)),
    "old-delayed": Variant("pace of the old policy", "delayed", ("objective.old_policy=delayed",)),
    "beta-0.1": Variant("beta", "0.1", ("objective.beta=0.1",)),
    "beta-0.2": Variant("beta", "0.2", ("objective.beta=0.2",)),
    "beta-0.3": Variant("beta", "0.3", ("objective.beta=0.3",)),
    "beta-1": Variant("beta", "1", ("objective.beta=1",)),
    "no-negative": Variant("negative term", "without", WITHOUT_NEGATIVE),
    "dpm2": Variant("solver of the rollout", "dpm2", ("rollout.solver=dpm2",)),
    "cps": Variant("solver of the rollout", "cps, stochastic with eta 0.5", ("rollout.solver=cps", "rollout.eta=0.5")),
    "not-adaptive": Variant("adaptive weight", "without", ("objective.adaptive=false",)),
    "consistency-0": Variant("consistency", "0", ("objective.consistency=0.0",)),
    "shared-noise": Variant("shared within a prompt's images", "noise", ("objective.shared=noise",)),
    "shared-time": Variant("shared within a prompt's images", "noise level", ("objective.shared=time",)),
    "shared-both": Variant("shared within a prompt's images", "noise and level", ("objective.shared=both",)),
    "variance": Variant("prompts", "by the variance of their rewards", ("prompts_by=variance",)),
}


@dataclass(frozen=True)
class Amount:
    """How much is measured after a run, on noise that nothing was compared on.

    Args:
        images: of each of the two scores, spread over tags and prompts as in an evaluation; fewer than there are test prompts
            leave some of these out of everything.
        copies: of each test prompt, within which diversity is taken.
    """

    images: int
    copies: int


@dataclass(frozen=True)
class Plan:
    """How much of it is done.

    Args:
        budget: network evaluations of a whole run, a backward pass counting two.
        seeds: of the runs that are reported.
        methods: names in `METHODS`.
        settings: settings of each grid that are tried, evenly spread over it; none tries all.
        overrides: of every run; part of the protocol.
        amount: of what is measured after each of them.
    """

    budget: int = 270_000
    seeds: tuple[int, ...] = (0, 1, 2)
    methods: tuple[str, ...] = tuple(METHODS)
    settings: int | None = None
    overrides: tuple[str, ...] = ()
    amount: Amount = Amount(images=360, copies=4)

    @property
    def search_budget(self) -> int:
        """Of each run of the search's first round."""
        return self.budget // SHARE

    @property
    def final_budget(self) -> int:
        """Of each run of the second round, the first round's part included."""
        return 2 * self.budget // SHARE

    def grid(self, method: str) -> list[tuple[str, ...]]:
        whole = METHODS[method].grid()
        if self.settings is None:
            return whole
        return [whole[k * len(whole) // self.settings] for k in range(self.settings)]


QUICK = Plan(
    budget=1_600,
    seeds=(0,),
    settings=2,
    overrides=(
        "rollout.prompts=6",
        "rollout.images_per_prompt=4",
        "rollout.steps=4",
        "optimizer.steps_per_rollout=2",
        "evaluate.images=12",
        "evaluate.steps=4",
        "evaluate.samples=0",
    ),
    amount=Amount(images=24, copies=2),
)
"""Everything in two or three minutes, to see that it works; its figures mean nothing."""
