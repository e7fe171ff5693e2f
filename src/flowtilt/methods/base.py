"""What every method says of itself, without importing torch.

A method is one class: its keys in a recipe's `[objective]`, its checks of the other tables, its cost, and what the guards
watch. The loss may be in the same class (a user's own method, docs/guides/add-an-objective.md) or in the class that `objective`
names, so that reading a recipe needs no torch (the built-in methods).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from flowtilt.config import Recipe


WEIGHT = 1e6
"""Bound of weights, scales and rates: far above any that makes sense, far below what overflows in fp32."""
NO_CLIP = 1e12
"""Bound of what something is clipped at, so that it may be set to where nothing is clipped."""
LEVELS = 10_000
"""Bound of steps of a sampler, and of what is counted beside them."""
ROLLOUTS = 1_000_000_000
"""Bound of rollouts, and of what counts them."""
BALANCED_EVERY = 10
"""Updates from one weighing of the rewards by their gradients to the next, as MARBLE published it."""
MOST_LAG = 2
"""Bound of a rollout's lag; what it costs to go further was not measured."""
Weight = Annotated[float, Field(ge=-WEIGHT, le=WEIGHT)]


def as_tuple(value: Any) -> Any:
    """A list as a tuple, anything else as it is: TOML's arrays are lists."""
    return tuple(value) if isinstance(value, list) else value


class Table(BaseModel):
    """One table of a recipe: unknown keys and NaN are errors, values are frozen, `flowtilt keys` shows each field's docstring."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)


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


class Contrast(NamedTuple):
    """What a method compares v_theta and v_old by.

    Args:
        metric: 0 where the two are equal.
        unused: what equality means, as the guard's message says it.
    """

    metric: str
    unused: str


class Guard(NamedTuple):
    """A warning of a method's own.

    Args:
        patience: rollouts in a row with a message before the guard fires, once per run.
        check: a rollout's metrics -> the message, or none.
    """

    patience: int
    check: Callable[[Mapping[str, float]], str | None]


class Method(Table):
    """The `[objective]` table of one method. The defaults here are those of a policy gradient or weighted matching on rewards."""

    type: Any = ""
    """The method: a built-in name, or your own class as "file.py:Class"."""

    objective: ClassVar[str] = ""
    """The class with the loss as "module:Class"; empty where this class has it."""
    learner: ClassVar[str] = "flowtilt.training.reinforcement:by_objective"
    """What trains, as "module:function": called with `training.parts.Parts`, it returns a `training.parts.Training`."""
    made: ClassVar[str] = "reinforced"
    """How the model card says that its LoRA was made."""
    samples: ClassVar[bool] = True
    """Whether a step samples images of the recipe's prompts; false where it reads them from files."""
    scores: ClassVar[bool] = True
    """Whether a step scores what it samples."""
    progress: ClassVar[tuple[str, str]] = ("reward/total", "reward")
    """The metric that is shown while a run is going, and what it is called there."""
    hold: ClassVar[str] = "raise objective.kl"
    """How to hold the policy closer to the base, as the guards' advice says it."""
    trains_all_weights: ClassVar[bool] = True
    """Whether `train = "full"` goes with it."""
    kl_of_velocities: ClassVar[bool] = True
    """Whether the metric "kl" is mean (v - v_ref)^2, which the guard "kl" has a threshold for."""
    guided_training: ClassVar[bool] = False
    """Whether a rollout's guidance is part of training, too: each row then passes the network twice."""
    affine: ClassVar[bool] = False
    """Whether the gradient of the loss is affine in the advantages, so that `combine = "marble"` can mix the rewards' gradients."""
    decodes: ClassVar[bool] = True
    """Whether the images of a step are decoded and scored."""
    most_lag: ClassVar[int] = 0
    """The greatest `rollout.lag`: how many rollouts old the policy may be whose images are trained on. 0 is on-policy."""

    @property
    def reference(self) -> bool:
        """Whether the reference is evaluated, one forward pass per trained row."""
        return False

    @property
    def other_roles(self) -> int:
        """How many roles are trained beside "current"."""
        return 0

    @property
    def graph_passes(self) -> int | None:
        """Passes through the network that a row's loss keeps for its backward pass; none is one pass beside those of other roles."""
        return None

    @property
    def followed(self) -> Sequence[str]:
        """Names of the rewards whose gradient goes through the decoder."""
        return ()

    @property
    def trials(self) -> int:
        """How many changed versions of each sample are decoded and scored by the followed rewards."""
        return 0

    @property
    def contrast(self) -> Contrast | None:
        """What is compared with the old policy; none for a method that may be on-policy."""
        return None

    def guards(self) -> Mapping[str, Guard]:
        """The method's own guards by name, beside those for all methods."""
        return {}

    def check(self, recipe: "Recipe") -> None:
        """Raises ValueError, whose message begins with the key, for what the method can't do with the recipe's other tables."""
        if not trained_rewards(recipe):
            raise ValueError("rewards: every weight is 0, so there is nothing to train on")
        if recipe.rollout.images_per_prompt < 2:
            raise ValueError("rollout.images_per_prompt: rewards are compared within a prompt's images, so it takes 2 at least")

    def kept_steps(self, steps: int) -> int:
        """How many of a rollout's solver steps are kept for training; 0 where clean samples are enough."""
        return 0

    def rows_per_image(self, steps: int) -> int:
        """How often each image of a rollout of so many solver steps is trained."""
        return 1

    def passes(self, recipe: "Recipe", step: int) -> Passes:
        """Rows through the network in rollout `step`, from 1, where every image has a score and every update is made."""
        pairs = recipe.rollout.trained() * recipe.rows_per_image()
        return Passes(sample=sampled(recipe), pairs=pairs, old=pairs, reference=pairs if self.reference else 0)


def trained_rewards(recipe: "Recipe") -> list[str]:
    """Names of the rewards with a weight other than 0."""
    return [name for name, reward in recipe.reward_table().items() if reward.weight]


def check_followed(recipe: "Recipe", key: str, names: Iterable[str]) -> None:
    """Raises ValueError where one of the rewards that `key` names, to be followed by their gradient, is not in the recipe."""
    for name in names:
        if name not in recipe.rewards:
            near = get_close_matches(name, recipe.rewards, 1)
            rather = f"did you mean {near[0]!r}?" if near else "add it there, with the weight 0 if it is not to be compared"
            raise ValueError(f"{key}: {name!r} is not in [rewards]; {rather}")


def evaluations_per_image(solver: str, steps: int, guidance: float) -> int:
    """Of one image: Heun's method evaluates twice in every step but the last, every other sampler once; guidance doubles each."""
    return (2 * steps - 1 if solver == "heun" else steps) * (2 if guidance != 1 else 1)


def sampled(recipe: "Recipe") -> int:
    """Network evaluations that sampling a rollout takes."""
    r = recipe.rollout
    return r.images() * evaluations_per_image(r.solver, r.steps, r.guidance)
