"""Diffusion-DPO, arXiv 2311.12908, for velocities: of two images of a prompt the chosen one is to become likelier than the rejected.

    e(v; x) = mean (v - (eps - x))^2 at x_t = (1 - t) x + t eps           x the chosen image w or the rejected one l, same t and eps
    Delta   = (e(v; w) - e(v_ref; w)) - (e(v; l) - e(v_ref; l))           below 0 where v prefers the chosen one more than v_ref does
    loss    = -log sigmoid(-beta / 2 Delta) + hold_winner e(v; w)

Where v = v_ref the loss is log 2 and d loss / d e_w = beta / 4 = -d loss / d e_l. The loss can fall while both errors grow, the rejected
one's faster; `winner_worse` = e(v; w) - e(v_ref; w) shows it, and `hold_winner` is against it (ours, 0 as published).

Shapes   N pairs and noise levels; images and velocities [N, ...]; errors, t and weights [N]. Everything fp32, t in (0, 1].
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flowtilt.device.micro_batch import parts
from flowtilt.flow import add_noise, velocity_target
from flowtilt.methods.dpo import PairSettings
from flowtilt.models.conditioning import Conditioning
from flowtilt.objectives.forward import velocity_kl
from flowtilt.policy.roles import Policy

METRICS = ("loss", "accuracy", "margin", "winner_worse", "winner_error", "kl")
"""Names of the metrics of `pair_loss`."""


def dpo_loss(e_w: Tensor, e_w_ref: Tensor, e_l: Tensor, e_l_ref: Tensor, beta: float) -> Tensor:
    """-log sigmoid(-beta / 2 Delta) for each pair, [N]; a gradient reaches `e_w` and `e_l` alone.

    Args:
        e_w, e_l: the trained policy's mean squared errors of the chosen and the rejected image, [N].
        e_w_ref, e_l_ref: the reference's, at the same t and eps.
        beta: for means over a latent's values.
    """
    return -F.logsigmoid(-beta / 2 * preference(e_w, e_w_ref, e_l, e_l_ref))


def preference(e_w: Tensor, e_w_ref: Tensor, e_l: Tensor, e_l_ref: Tensor) -> Tensor:
    """Delta, [N]: below 0 where the policy prefers the chosen image more than the reference does."""
    return (e_w - e_w_ref.detach()) - (e_l - e_l_ref.detach())


@dataclass(frozen=True)
class PairBatch:
    """Rows of a pair and a noise level; first axis n."""

    chosen: Tensor
    rejected: Tensor
    eps: Tensor
    t: Tensor
    weight: Tensor
    conditioning: Conditioning

    def __len__(self) -> int:
        return len(self.t)


@dataclass(frozen=True)
class NoisedPairs:
    """Pairs at several noise levels each, M rows that become `PairBatch`es part by part.

    Args:
        chosen, rejected, weight, conditioning: of the pairs, whose first axis is n.
        pair: which of the n each row is, [M] on the CPU.
        t, eps: of the rows, [M] and [M, ...] on the CPU.
    """

    chosen: Tensor
    rejected: Tensor
    weight: Tensor
    conditioning: Conditioning
    pair: Tensor
    t: Tensor
    eps: Tensor

    def __len__(self) -> int:
        return len(self.pair)

    def micro_batches(self, size: int) -> Iterator[PairBatch]:
        """Consecutive parts whose images, two per row, are at most `size`, or two."""
        device = self.chosen.device
        for rows in parts(len(self), max(1, size // 2)):
            pair = self.pair[rows]
            at = pair.to(device)
            yield PairBatch(
                self.chosen[at],
                self.rejected[at],
                self.eps[rows].to(device),
                self.t[rows].to(device),
                self.weight[at],
                self.conditioning.select(pair),
            )


def pair_loss(policy: Policy, batch: PairBatch, settings: PairSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss [N] of a micro-batch, each pair's by its weight, and metrics [N] without a gradient; "kl" is over both images."""
    n = len(batch)
    t = batch.t.repeat(2)
    eps = batch.eps.repeat(2, *(1,) * (batch.eps.ndim - 1))
    x0 = torch.cat([batch.chosen, batch.rejected])
    x_t, target = add_noise(x0, eps, t), velocity_target(x0, eps)
    conditioning = batch.conditioning.select(torch.arange(n).repeat(2))
    v = policy.velocity("current", x_t, t, conditioning)
    with torch.no_grad():
        v_ref = policy.velocity("reference", x_t, t, conditioning)
    (e_w, e_l), (e_w_ref, e_l_ref) = (velocity_kl(of, target).split(n) for of in (v, v_ref))
    delta = preference(e_w, e_w_ref, e_l, e_l_ref).detach()
    loss = batch.weight * (dpo_loss(e_w, e_w_ref, e_l, e_l_ref, settings.beta) + settings.hold_winner * e_w)
    metrics = {
        "loss": loss,
        "accuracy": (delta < 0).to(delta.dtype),
        "margin": -settings.beta / 2 * delta,
        "winner_worse": e_w - e_w_ref,
        "winner_error": e_w,
        "kl": velocity_kl(v, v_ref).view(2, n).mean(0),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}
