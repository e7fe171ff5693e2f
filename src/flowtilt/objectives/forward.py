"""What the forward-process methods share: clean samples noised afresh, velocities of several roles at one x_t.

A method is a subclass with a loss of those velocities. Here are the rest: which roles are asked, the pull to
the reference, NormGuard's hinge, the old policy's pace.

Shapes   N samples; velocities [N, ...]; A and t [N]. Everything fp32, t in (0, 1].
"""

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from flowtilt.flow import add_noise, per_sample, velocity_target
from flowtilt.methods.forward import ForwardSettings, old_policy_decay
from flowtilt.models.guidance import guided
from flowtilt.objectives import PlainAdvantages
from flowtilt.objectives.checking import pair_of
from flowtilt.objectives.guide import guide_pull

if TYPE_CHECKING:
    from flowtilt.config import RolloutSettings
    from flowtilt.objectives.batches import TrainingBatch
    from flowtilt.policy.roles import Policy

LEAST_ERROR = 1e-5
"""The self-normalising weight is never smaller, in units of the latents."""


def x0_error(v: Tensor, v_target: Tensor, t: Tensor | float, adaptive: bool = True) -> Tensor:
    """mean (x0_hat - x0)^2 / w with w = max(mean |x0_hat - x0|, 1e-5) without gradient, [N]; x0_hat - x0 = -t (v - v_target).

    Args:
        adaptive: false has w = 1.
    """
    difference = v - v_target
    off = (per_sample(t, difference) * difference).flatten(1)
    if not adaptive:
        return off.square().mean(1)
    # the reference code takes the mean in float64; over a latent's values fp32 differs in the last bit only
    weight = off.detach().abs().mean(1, dtype=torch.float64).clamp_min(LEAST_ERROR).to(off.dtype)
    return off.square().mean(1) / weight


def velocity_kl(v: Tensor, v_ref: Tensor) -> Tensor:
    """mean (v - v_ref)^2 for each sample, [N]: the pull to the reference."""
    return (v - v_ref.detach()).square().flatten(1).mean(1)


def norm_hinge(v: Tensor, v_ref: Tensor, radius: float = 1.0) -> Tensor:
    """NormGuard, arXiv 2606.27771: max(|v| - radius |v_ref|, 0)^2 for each sample, [N]; |.| is the root mean square.

    It is the mean square distance from v to the ball in which a velocity is no longer than the reference's:
    `velocity_kl` with a ball for a point, and in its unit. The paper says when the hinge acts; the square is ours.
    """
    return (_length(v) - radius * _length(v_ref.detach())).clamp_min(0).square()


def norm_ratio(v: Tensor, v_ref: Tensor) -> Tensor:
    """|v| / |v_ref| for each sample, [N]: 1 at the start; NormGuard's authors found 1.05 to 1.15 where images had lost quality."""
    return _length(v) / _length(v_ref)


def _length(v: Tensor) -> Tensor:
    """Root mean square of each sample, [N]; never 0, where the root has no gradient."""
    return v.square().flatten(1).mean(1).clamp_min(torch.finfo(v.dtype).tiny).sqrt()


class Velocities(NamedTuple):
    """At the same x_t, [N, ...] each: only `v` carries a gradient; `v_ref` is there where the method asks for it."""

    v: Tensor
    v_old: Tensor
    v_ref: Tensor | None
    v_target: Tensor


class ForwardProcess(PlainAdvantages, ForwardSettings):
    """A method that trains clean samples, noised afresh; its fields are the keys of `[objective]`. A subclass gives `sample_loss`."""

    drops_flat: ClassVar[bool] = False
    """Groups whose images score alike are trained on, too: the pulls to other policies are of use there."""
    own_metrics: ClassVar[tuple[str, ...]] = ()
    """Names of the metrics that `sample_loss` returns."""
    needs_old: ClassVar[bool] = True
    """Whether the loss reads v_old."""
    whole_groups: ClassVar[bool] = False
    """Whether the loss reads numbers of whole groups; see objectives/groups.py."""

    @abstractmethod
    def sample_loss(self, at: Velocities, batch: "TrainingBatch") -> tuple[Tensor, dict[str, Tensor]]:
        """The method's own loss [N] and metrics [N]."""

    def keeps(self, rollout: int, settings: "RolloutSettings", seed: int) -> None:
        """The steps of a rollout that are kept for training: none, clean samples are enough."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that `loss` returns."""
        return ("loss", *self.own_metrics, *(("kl", "norm_ratio") if self.reference else ()), *(("guide",) if self.guided else ()))

    def loss(self, policy: "Policy", batch: "TrainingBatch") -> tuple[Tensor, dict[str, Tensor]]:
        """Loss [N] of a micro-batch and its metrics [N], detached."""
        x_t = add_noise(batch.x0, batch.eps, batch.t)
        at = self._velocities(policy, batch, x_t)
        loss, metrics = pair_of(self.type, self.sample_loss(at, batch))
        if self.guided:
            pull = guide_pull(self, policy, batch, x_t, batch.t, at.v, at.v_old if self.needs_old else None)
            metrics |= {"guide": pull.detach()}
            loss = loss + pull
        if self.reference:
            rows = torch.arange(len(batch), device=x_t.device) if batch.referenced is None else batch.referenced.nonzero()[:, 0]
            v, v_ref = at.v[rows], self._reference(policy, batch, x_t, rows) if at.v_ref is None else at.v_ref

            def spread(values: Tensor) -> Tensor:
                """[n] of the rows that ask the reference as [N], whose mean is in expectation that over all rows."""
                return torch.zeros_like(batch.t).index_add(0, rows, values / self.reference_share)

            pull = spread(velocity_kl(v, v_ref))
            metrics |= {"kl": pull, "norm_ratio": spread(norm_ratio(v.detach(), v_ref))}
            if self.pull:
                loss = loss + self.pull_weight(batch) * pull
            if self.norm_guard:
                loss = loss + self.norm_guard * spread(norm_hinge(v, v_ref))
        return loss, {name: value.detach() for name, value in {"loss": loss, **metrics}.items()}

    def _velocities(self, policy: "Policy", batch: "TrainingBatch", x_t: Tensor) -> Velocities:
        v = policy.velocity("current", x_t, batch.t, batch.conditioning)
        with torch.no_grad():
            same = policy.same_version("old", "current") or not self.needs_old
            v_old = v.detach() if same else policy.velocity("old", x_t, batch.t, batch.conditioning)
        v_ref = self._reference(policy, batch, x_t, None) if self.reference and batch.referenced is None else None
        return Velocities(v, v_old, v_ref, velocity_target(batch.x0, batch.eps))

    @torch.no_grad()
    def _reference(self, policy: "Policy", batch: "TrainingBatch", x_t: Tensor, rows: Tensor | None) -> Tensor:
        """The reference's velocity of those rows, or of all."""
        given, scale, t = batch.conditioning, self.reference_guidance, batch.t
        if rows is not None:
            x_t, t, given = x_t[rows], t[rows], given.select(rows.cpu())
        return guided(policy, "reference", given, batch.empty if scale != 1 else None, scale)(x_t, t)

    def pull_weight(self, batch: "TrainingBatch") -> Tensor | float:
        """Weight of the pull to the reference: a number, or one per row, [N]."""
        return self.pull

    def after_rollout(self, policy: "Policy", optimizer_step: int) -> None:
        """Moves the data-collecting policy toward the trained one."""
        policy.average("old", old_policy_decay(self.old_policy, optimizer_step))
