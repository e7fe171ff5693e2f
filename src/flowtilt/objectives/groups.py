"""CRD (arXiv 2603.14128) and DGPO (arXiv 2510.08425): losses that compare a prompt's images at one noise level.

CRD is known to us through Flow-Factory's code, DGPO through its own. Both need numbers of whole groups, which enter the loss
without gradient. So every update has two passes: one without gradient measures each pair of image and time on its rank, the ranks
exchange these numbers, and the second pass reads what follows from them as constants. That is exact for every micro-batch and
number of processes, and costs one forward pass more than having a group in one batch.

Shapes   N rows; velocities [N, ...]; errors, A and t [N]. e(v) = mean (v - v_target)^2.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from flowtilt.flow import add_noise, velocity_target
from flowtilt.methods.groups import CRDSettings, DGPOSettings, GroupSettings
from flowtilt.objectives.forward import LEAST_ERROR, ForwardProcess, Velocities

if TYPE_CHECKING:
    from flowtilt.objectives.batches import TrainingBatch
    from flowtilt.policy.roles import Policy


def matching_error(v: Tensor, v_target: Tensor) -> Tensor:
    """e(v) = mean (v - v_target)^2 for each sample, [N]."""
    return (v - v_target).square().flatten(1).mean(1)


def normalised_error(v: Tensor, v_target: Tensor) -> Tensor:
    """e(v) / w with w = max(mean |v - v_target|, 1e-5) without gradient, [N]."""
    weight = (v.detach() - v_target).abs().flatten(1).mean(1).clamp_min(LEAST_ERROR)
    return matching_error(v, v_target) / weight


def group_sums(values: Tensor, groups: Tensor) -> Tensor:
    """Sum of `values` [N, T] over each image's group, spread back to [N, T]; `groups` [N] are any integers."""
    _, index = groups.unique(return_inverse=True)
    return values.new_zeros(int(index.max()) + 1, *values.shape[1:]).index_add(0, index, values)[index]


def centring_weights(a: Tensor, groups: Tensor, temperature: float | None) -> Tensor:
    """q [N], which sums to 1 within each group: uniform, or softmax(a / temperature); a negative temperature prefers small a."""
    if temperature is None:
        raw = torch.ones_like(a)
    else:
        logits, index = a / temperature, groups.unique(return_inverse=True)[1]
        highest = torch.full_like(logits, -torch.inf).scatter_reduce(0, index, logits, "amax")
        raw = (logits - highest[index]).exp()  # a small temperature would overflow
    return raw / group_sums(raw[:, None], groups)[:, 0]


def crd_loss(reward: Tensor, centre: Tensor, a: Tensor, a_centre: Tensor, *, beta: float, form: str = "mse") -> Tensor:
    """(5 / beta) (beta (R - centre) - (a - a_centre))^2 for each sample, [N]; "bce" has the cross-entropy of their sigmoids.

    Args:
        reward: R = -(e(v) / w - e(v_old) / w_old) [N]; the only one that carries a gradient.
        centre, a_centre: the group's weighted means of R and a, without gradient.
        a: clip(A) / (2 clip) + 1/2.
    """
    logit, wanted = beta * (reward - centre.detach()), a - a_centre
    if form == "bce":
        return 5 / beta * F.binary_cross_entropy_with_logits(logit, wanted.sigmoid(), reduction="none")
    return 5 / beta * (logit - wanted).square()


def dgpo_loss(error: Tensor, error_old: Tensor, advantages: Tensor, preference: Tensor, *, clip_range: float) -> Tensor:
    """sigmoid(S) A e(v) for each sample, [N]; without gradient where the ratio has moved far enough already.

    Without the clip its gradient is that of -(k / beta) log sigmoid(-S), S = (beta / k) sum over the group of A (e(v) - e(v_ref)).

    Args:
        error: e(v) [N]; the only one that carries a gradient.
        error_old: of the collecting policy.
        preference: S of the row's group and time, without gradient.
        clip_range: c in rho > 1 + c for A > 0, rho < 1 - c otherwise; rho = exp(e(v_old) - e(v)).
    """
    ratio = (error_old - error.detach()).exp()
    done = torch.where(advantages > 0, ratio > 1 + clip_range, ratio < 1 - clip_range)
    return preference.detach().sigmoid() * advantages * torch.where(done, error.detach(), error)


class GroupProcess(GroupSettings, ForwardProcess):
    """A method on clean samples whose loss reads numbers of whole groups. A subclass measures, completes and gives `row_loss`."""

    whole_groups: ClassVar[bool] = True
    needs_old: ClassVar[bool] = False
    """The first pass has measured the old policy's errors."""
    measures: ClassVar[tuple[str, ...]]
    """Names of what `measure` returns."""

    @abstractmethod
    def of_errors(self, at: Velocities) -> dict[str, Tensor]:
        """What is measured of each row, [N] by name, without gradient."""

    @abstractmethod
    def complete(self, measured: Mapping[str, Tensor], advantages: Tensor, groups: Tensor) -> dict[str, Tensor]:
        """Constants of every row [n, T] by name, from what was measured [n, T] of the images of whole groups.

        Args:
            advantages, groups: of the n images.
        """

    @abstractmethod
    def row_loss(self, v: Tensor, v_target: Tensor, batch: "TrainingBatch") -> tuple[Tensor, dict[str, Tensor]]:
        """The method's own loss [N] and metrics [N]; `batch.given` has what was measured and completed."""

    def sample_loss(self, at: Velocities, batch: "TrainingBatch") -> tuple[Tensor, dict[str, Tensor]]:
        return self.row_loss(at.v, at.v_target, batch)

    @torch.no_grad()
    def measure(self, policy: "Policy", batch: "TrainingBatch") -> dict[str, Tensor]:
        """What the first pass measures of each row, [n] by name."""
        x_t = add_noise(batch.x0, batch.eps, batch.t)
        v = policy.velocity("current", x_t, batch.t, batch.conditioning)
        v_old = v if policy.same_version("old", "current") else policy.velocity("old", x_t, batch.t, batch.conditioning)
        v_ref = policy.velocity("reference", x_t, batch.t, batch.conditioning) if self.frozen else None
        return self.of_errors(Velocities(v, v_old, v_ref, velocity_target(batch.x0, batch.eps)))


class CRD(CRDSettings, GroupProcess):
    """Centred reward distillation. The sampler and the policy that R is measured against are one, "old"; the public code has two."""

    measures: ClassVar[tuple[str, ...]] = ("reward", "error_old")
    own_metrics: ClassVar[tuple[str, ...]] = ("implicit_reward",)

    def _wanted(self, advantages: Tensor) -> Tensor:
        return (advantages / self.advantage_clip).clamp(-1, 1) / 2 + 0.5

    def _temperatures(self) -> tuple[float | None, ...]:
        return (None,) if self.centring is None else (self.centring, -self.centring)

    def of_errors(self, at: Velocities) -> dict[str, Tensor]:
        error_old = normalised_error(at.v_old, at.v_target)
        return {"reward": error_old - normalised_error(at.v, at.v_target), "error_old": error_old}

    def complete(self, measured: Mapping[str, Tensor], advantages: Tensor, groups: Tensor) -> dict[str, Tensor]:
        a = self._wanted(advantages)
        found = {}
        for number, temperature in enumerate(self._temperatures()):
            q = centring_weights(a, groups, temperature)[:, None]
            found[f"centre_{number}"] = group_sums(q * measured["reward"], groups)
            found[f"a_centre_{number}"] = group_sums(q * a[:, None], groups).expand_as(measured["reward"])
        return found

    def row_loss(self, v: Tensor, v_target: Tensor, batch: "TrainingBatch") -> tuple[Tensor, dict[str, Tensor]]:
        reward = batch.given["error_old"] - normalised_error(v, v_target)
        a, terms = self._wanted(batch.advantages), range(len(self._temperatures()))
        losses = [
            crd_loss(reward, batch.given[f"centre_{k}"], a, batch.given[f"a_centre_{k}"], beta=self.beta, form=self.form) for k in terms
        ]
        return torch.stack(losses).mean(0), {"implicit_reward": reward.detach().abs()}

    def pull_weight(self, batch: "TrainingBatch") -> Tensor | float:
        """From a thousandth of `kl` at the worst advantage to `kl` at the best."""
        return self.kl * (1e-3 + (1 - 1e-3) * self._wanted(batch.advantages))


class DGPO(DGPOSettings, GroupProcess):
    """Direct group preference optimisation."""

    measures: ClassVar[tuple[str, ...]] = ("error", "error_old", "error_ref")
    own_metrics: ClassVar[tuple[str, ...]] = ("preference", "deviation")

    def of_errors(self, at: Velocities) -> dict[str, Tensor]:
        error_old = matching_error(at.v_old, at.v_target)
        error_ref = error_old if at.v_ref is None else matching_error(at.v_ref, at.v_target)
        return {"error": matching_error(at.v, at.v_target), "error_old": error_old, "error_ref": error_ref}

    def complete(self, measured: Mapping[str, Tensor], advantages: Tensor, groups: Tensor) -> dict[str, Tensor]:
        clipped = advantages.clamp(-self.advantage_clip, self.advantage_clip)[:, None]
        size = group_sums(torch.ones_like(clipped), groups)
        moved = measured["error"] - measured["error_ref"]
        return {"preference": self.beta / size * group_sums(clipped * moved, groups)}

    def row_loss(self, v: Tensor, v_target: Tensor, batch: "TrainingBatch") -> tuple[Tensor, dict[str, Tensor]]:
        given, clipped = batch.given, batch.advantages.clamp(-self.advantage_clip, self.advantage_clip)
        error = matching_error(v, v_target)
        loss = dgpo_loss(error, given["error_old"], clipped, given["preference"], clip_range=self.clip_range)
        off = (given["error_old"] - error.detach()).abs()
        return loss, {"preference": given["preference"].sigmoid(), "deviation": off}
