"""How often a run calls its network, in closed form; `network_evaluations` of metrics.jsonl counts the same."""

from dataclasses import dataclass

from flowtilt.config import Recipe
from flowtilt.config.objectives import ACDMDSettings, GRPOSettings, MatchingSettings, RTDMDSettings
from flowtilt.objectives.forward import old_policy_decay


@dataclass(frozen=True)
class Passes:
    """Rows through the network.

    Args:
        sample: of the rollout.
        pairs: of image and time, each forward and backward.
        old: forward, of the old policy, while training, not where it equals the current one; or of RTDMD's fake score.
        reference: forward, of the network without an adapter, or RTDMD's teacher.
    """

    sample: int
    pairs: int
    old: int
    reference: int

    @property
    def evaluations(self) -> int:
        """As a run logs them, a backward counting as two forwards."""
        return self.sample + 3 * self.pairs + self.old + self.reference

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(self.sample + other.sample, self.pairs + other.pairs, self.old + other.old, self.reference + other.reference)


def evaluations_per_image(solver: str, steps: int, guidance: float) -> int:
    """Of one image: Heun's method asks twice in every step but the last, every other sampler once; guidance doubles each."""
    return (2 * steps - 1 if solver == "heun" else steps) * (2 if guidance != 1 else 1)


def passes_of(recipe: Recipe, step: int) -> Passes:
    """Of rollout `step`, counted from 1, where every image has a score and every update is made."""
    r, o, updates = recipe.rollout, recipe.objective, recipe.optimizer.steps_per_rollout
    images = r.images()
    sample = images * evaluations_per_image(r.solver, r.steps, r.guidance)
    pairs = images * recipe.rows_per_image()
    if isinstance(o, ACDMDSettings):
        return _distillation(recipe, o)
    if isinstance(o, RTDMDSettings):
        return _hybrid(recipe, o)
    if isinstance(o, GRPOSettings):  # guided steps are trained guided, and what the collecting policy said is stored
        pairs *= 2 if r.guidance != 1 else 1
        return Passes(sample=sample, pairs=pairs, old=0, reference=pairs if o.reference else 0)
    # the rollout before left the old policy equal to the current one, which the first update moves
    equal = step == 1 or old_policy_decay(o.old_policy, (step - 1) * updates) == 0
    old = pairs - (images // updates * o.times_per_image if equal else 0)
    return Passes(sample=sample, pairs=pairs, old=old, reference=pairs if o.reference else 0)


def _distillation(recipe: Recipe, o: ACDMDSettings) -> Passes:
    """Each sample stops after 1 to S steps, all equally often but for what is left where S does not divide the images."""
    r = recipe.rollout
    images = r.images()
    simulated = sum(k % r.steps + 1 for k in range(images))
    return Passes(
        sample=(o.fake_updates + 1) * simulated,
        pairs=images * (o.fake_updates * _fake_passes(o) + 1),
        old=images,  # the fake score's in the student's update
        reference=images * _teacher_passes(o),
    )


def _hybrid(recipe: Recipe, o: RTDMDSettings) -> Passes:
    r, updates = recipe.rollout, recipe.optimizer.steps_per_rollout
    images = r.images()
    again = images - images // updates  # the last step anew, once an update has moved the weights that drew it
    return Passes(
        sample=images * r.steps + again,
        pairs=images * (o.trained_steps + 1 + (_fake_passes(o) if o.matching else 0)),
        old=images if o.matching else 0,
        reference=images * _teacher_passes(o) if o.matching else 0,
    )


def _fake_passes(o: MatchingSettings) -> int:
    """Forward and backward passes of the fake score for a sample: consistency looks one step ahead, twice."""
    return 3 if o.consistency else 1


def _teacher_passes(o: MatchingSettings) -> int:
    return 2 if o.teacher_guidance != 1 else 1


def passes_in_all(recipe: Recipe) -> Passes:
    """Of the whole run."""
    total = Passes(0, 0, 0, 0)
    for step in range(1, recipe.steps + 1):
        total += passes_of(recipe, step)
    return total


def evaluations_in_all(recipe: Recipe) -> int:
    """How often a run is evaluated: before, every so many rollouts, and after."""
    every = recipe.evaluate.every
    return 1 + (recipe.steps // every + (recipe.steps % every > 0) if every else 1)
