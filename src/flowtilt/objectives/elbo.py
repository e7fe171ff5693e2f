"""Policy gradients on the evidence lower bound instead of a likelihood: EPG, PEPG and PAR.

Read off the public code of "rethinking-diffusion-rl" (ICML 2026). A diffusion model's likelihood is out of
reach, its lower bound is an average over x_t of denoising errors; one of them stands for log p(x0).
Shapes   N samples; velocities [N, ...]; ELBO, A and t [N]. Everything fp32, t in (0, 1].
    there                                            here
    elbo = -mean (x0_hat - x0)^2 / sg(w)             elbo(v, v_target, t)
    d = sg(elbo) - elbo_old, rho = sg(exp(d))        _lead
    EPG    policy gradient          -rho A elbo      epg_loss
    PEPG   with the KL inside    -rho (A - d) elbo   pepg_loss
    PAR    regress elbo on A  rho (A - d)^2 / 2      par_loss

A is `scale` times the reward less its group's mean, no standard deviation: `advantage = "none"` in the
recipe. PEPG's gradient is PAR's; the losses differ as numbers only. The code's "noratio" variants have rho = 1.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from flowtilt.methods.elbo import ELBOSettings, EPGSettings, PARSettings, PEPGSettings
from flowtilt.objectives.forward import ForwardProcess, Velocities, x0_error

if TYPE_CHECKING:
    from flowtilt.objectives.batches import TrainingBatch


def elbo(v: Tensor, v_target: Tensor, t: Tensor | float) -> Tensor:
    """-mean (x0_hat - x0)^2 / w for each sample, [N], at most 0; w as in DiffusionNFT, without gradient."""
    return -x0_error(v, v_target, t)


def epg_loss(elbo: Tensor, elbo_old: Tensor, advantages: Tensor, *, ratio: bool = True) -> Tensor:
    """-rho A elbo for each sample, [N].

    Args:
        elbo: the trained policy's, the only one that carries a gradient.
        elbo_old: the data-collecting policy's at the same x_t.
        ratio: false has rho = 1.
    """
    _, rho = _lead(elbo, elbo_old, ratio)
    return -rho * advantages * elbo


def pepg_loss(elbo: Tensor, elbo_old: Tensor, advantages: Tensor, *, ratio: bool = True) -> Tensor:
    """-rho (A - d) elbo for each sample, [N]: the advantage pays for what the policy has moved. Arguments as in `epg_loss`."""
    d, rho = _lead(elbo, elbo_old, ratio)
    return -rho * (advantages - d) * elbo


def par_loss(elbo: Tensor, elbo_old: Tensor, advantages: Tensor, *, ratio: bool = True) -> Tensor:
    """rho (A - (elbo - elbo_old))^2 / 2 for each sample, [N]: least where log p_theta - log p_old = A. Arguments as in `epg_loss`."""
    _, rho = _lead(elbo, elbo_old, ratio)
    return rho * (advantages - (elbo - elbo_old.detach())).square() / 2


def _lead(elbo: Tensor, elbo_old: Tensor, ratio: bool) -> tuple[Tensor, Tensor]:
    """d = elbo - elbo_old and rho = exp(d), [N] each, both without gradient."""
    d = (elbo - elbo_old).detach()
    return d, d.exp() if ratio else torch.ones_like(d)


class _LowerBound(ELBOSettings, ForwardProcess):
    """What the three share. `consistency` as in NFT, 0 there."""

    own_metrics: ClassVar[tuple[str, ...]] = ("log_ratio",)
    surrogate: ClassVar[Callable[..., Tensor]]

    def sample_loss(self, at: Velocities, batch: "TrainingBatch") -> tuple[Tensor, dict[str, Tensor]]:
        new, old = (elbo(v, at.v_target, batch.t) for v in (at.v, at.v_old))
        advantages = self.scale * (batch.advantages + self.consistency)
        return type(self).surrogate(new, old, advantages, ratio=self.ratio), {"log_ratio": (new - old).abs()}


class EPG(EPGSettings, _LowerBound):
    """The ELBO policy gradient with its loss."""

    surrogate = staticmethod(epg_loss)


class PEPG(PEPGSettings, _LowerBound):
    """EPG with the loss of `pepg_loss`."""

    surrogate = staticmethod(pepg_loss)


class PAR(PARSettings, _LowerBound):
    """EPG with the loss of `par_loss`."""

    surrogate = staticmethod(par_loss)
