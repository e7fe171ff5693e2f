"""What the methods share that train a rollout's stochastic steps: which are kept, and the Gaussian of each under a role.

A method is a subclass with a loss of those Gaussians. Here are the rest: which steps are stochastic, the old policy's
log-density, the pull to the reference.

Shapes   N steps; means [N, ...]; log-densities, A [N]; std [N, 1, ...] or []. Everything fp32.
"""

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from flowtilt.flow import per_sample
from flowtilt.methods.steps import StepSettings
from flowtilt.objectives import PlainAdvantages
from flowtilt.objectives.checking import pair_of
from flowtilt.objectives.guide import guide_pull
from flowtilt.sampling.trajectory import KeptSteps
from flowtilt.seeding import generator
from flowtilt.solvers import log_prob, sde_step

if TYPE_CHECKING:
    from flowtilt.config import RolloutSettings
    from flowtilt.objectives.batches import TransitionBatch
    from flowtilt.policy.roles import Policy


def step_kl(mean: Tensor, mean_ref: Tensor, std: Tensor) -> Tensor:
    """KL of N(mean, std^2) to N(mean_ref, std^2), averaged over pixels: mean (mean - mean_ref)^2 / (2 std^2), [N].

    The gradient reaches `mean`. std > 0; a deterministic step has no KL, `forward.velocity_kl` is there for it.
    """
    return ((mean - mean_ref.detach()).square() / (2 * std**2)).flatten(1).mean(1)


def path_kl(mean: Tensor, mean_ref: Tensor, std: Tensor, dt: Tensor | float) -> Tensor:
    """-dt times `step_kl`, [N]: FlowGRPO's code has g for std in Flow-SDE's steps, where its published weights are .01 and .04."""
    kl = step_kl(mean, mean_ref, std)
    return -per_sample(dt, kl) * kl


def stochastic_steps(
    rollout: int, *, steps: int, span: tuple[int, int], window: str = "all", size: int = 1, every: int = 1, seed: int = 0
) -> range:
    """Which steps of rollout number `rollout` are stochastic and trained; the others follow the ODE.

    "all": every step of `span`; FlowGRPO's, where span leaves out the last (its code adds noise there and does not train it).
    "random": `size` steps in a row anywhere within `span`, FlowGRPO-Fast's.
    "sliding": `size` steps in a row, one further every so many rollouts, from the noisiest on and round again:
    MixGRPO's (arXiv 2507.21802).

    Args:
        rollout: from 0.
        steps: of the sampler; step 0 starts from noise.
        span: first step and one past the last that may be stochastic.
        size: of the window.
        every: rollouts for which a sliding window stays.
        seed: of the run, for the random window.

    Raises:
        ValueError: a window that does not fit into the span, a span outside the steps, or an unknown window.
    """
    first, end = span
    if not 0 <= first < end <= steps:
        raise ValueError(f"span {first} to {end} does not lie within the {steps} steps")
    if window == "all":
        return range(first, end)
    places = end - first - size + 1
    if size < 1 or places < 1:
        raise ValueError(f"a window of {size} steps does not fit into the {end - first} from {first} to {end}")
    if window == "random":
        start = int(torch.randint(places, (), generator=generator(seed, "window", rollout)))
    elif window == "sliding":
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        start = rollout // every % places
    else:
        raise ValueError(f"window {window!r} is not one of all, random, sliding")
    return range(first + start, first + start + size)


class Gaussians(NamedTuple):
    """A step's distribution N(mean, std^2) under several roles; only `mean` and `log_prob` carry a gradient.

    `mean_ref` is there where the method has a pull to the reference.
    """

    mean: Tensor
    std: Tensor
    log_prob: Tensor
    mean_old: Tensor
    log_prob_old: Tensor
    mean_ref: Tensor | None


class StepProcess(PlainAdvantages, StepSettings):
    """A method that trains a rollout's stochastic steps; its fields are the keys of `[objective]`. A subclass gives `sample_loss`."""

    drops_flat: ClassVar[bool] = True
    """A group whose images score alike is left out: it has no advantage to follow."""
    own_metrics: ClassVar[tuple[str, ...]] = ()
    """Names of the metrics that `sample_loss` returns."""

    @abstractmethod
    def sample_loss(self, at: Gaussians, batch: "TransitionBatch") -> tuple[Tensor, dict[str, Tensor]]:
        """The method's own loss [N] and metrics [N]."""

    def keeps(self, rollout: int, settings: "RolloutSettings", seed: int) -> KeptSteps:
        """The steps of rollout number `rollout`, from 0, that are stochastic, kept and trained."""
        steps = stochastic_steps(
            rollout,
            steps=settings.steps,
            span=self.spanned(settings.steps),
            window=self.window,
            size=self.window_size,
            every=self.window_every,
            seed=seed,
        )
        return KeptSteps(steps, self.sde, self.eta)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that `loss` returns."""
        return ("loss", *self.own_metrics, *(("kl",) if self.reference else ()), *(("guide",) if self.guided else ()))

    def loss(self, policy: "Policy", batch: "TransitionBatch") -> tuple[Tensor, dict[str, Tensor]]:
        """Loss [N] of a micro-batch of steps and its metrics [N], detached."""
        v = batch.velocity(policy, "current")
        mean, std = self._step(batch, v)
        log_new = log_prob(batch.x_next, mean, std)
        # the stored ones went through other batches: with equal weights the ratio is 1, not nearly 1
        same = policy.same_version("old", "current")
        log_old, mean_old = (log_new.detach(), mean.detach()) if same else (batch.log_prob, batch.mean)
        mean_ref = None
        if self.reference:
            with torch.no_grad():
                mean_ref, _ = self._step(batch, batch.velocity(policy, "reference", max(batch.guidance, self.reference_guidance)))
        at = Gaussians(mean, std, log_new, mean_old, log_old, mean_ref)
        loss, metrics = pair_of(self.type, self.sample_loss(at, batch))
        if mean_ref is not None:
            # the published weights belong to g for Flow-SDE's std, and to the whole step's for the others
            dt = batch.sigma_next - batch.sigma
            metrics["kl"] = path_kl(mean, mean_ref, std, dt) if self.sde == "flow" else step_kl(mean, mean_ref, std)
            loss = loss + self.pull * metrics["kl"]
        if self.guided:
            metrics["guide"] = guide_pull(self, policy, batch, batch.x, batch.sigma, v)
            loss = loss + metrics["guide"]
        return loss, {name: value.detach() for name, value in {"loss": loss, **metrics}.items()}

    def _step(self, batch: "TransitionBatch", v: Tensor) -> tuple[Tensor, Tensor]:
        nothing = torch.zeros_like(batch.x)
        _, mean, std = sde_step(batch.x, v, batch.sigma, batch.sigma_next, nothing, self.sde, self.eta, batch.sigma_max)
        return mean, std

    def after_rollout(self, policy: "Policy", optimizer_step: int) -> None:
        """The next rollout is sampled by the trained policy."""
        policy.average("old", 0.0)
