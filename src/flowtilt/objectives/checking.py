"""A user's own method, held to what a method must return."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowtilt.errors import UserError
from flowtilt.io.user_errors import HINT, describe_error, is_fault
from flowtilt.methods.own import is_users, name_of
from flowtilt.objectives import Objective

if TYPE_CHECKING:
    from flowtilt.policy.roles import Policy


def checked_loss(objective: Objective, policy: "Policy", batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss [N] and metrics [N] of a micro-batch.

    Raises:
        UserError: a user's own method fails, or returns anything else than finite values of these shapes with a gradient.
    """
    if not is_users(objective):
        return objective.loss(policy, batch)
    kind = name_of(objective)
    try:
        found = objective.loss(policy, batch)
    except (UserError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        if not is_fault(error):
            raise
        no_reference = "NoneType" in str(error) and not getattr(objective, "reference", True)
        why = "; v_ref and mean_ref are None without a pull to the reference: declare a key kl, and set it above 0" if no_reference else ""
        why += "; sample_loss is called with (at, batch)" if isinstance(error, TypeError) and "positional argument" in str(error) else ""
        raise UserError(f"objective {kind}: the loss failed: {describe_error(error)}{why} ({HINT})") from error
    loss, metrics = pair_of(kind, found, "loss")
    if why := _wrong(loss, metrics, objective.metrics, len(batch)):
        raise UserError(f"objective {kind}: {why}")
    return loss, metrics


def pair_of(kind: str, found: Any, function: str = "sample_loss") -> tuple[Tensor, dict[str, Tensor]]:
    """What a function of a method returned, where it is a pair.

    Raises:
        UserError: it is anything else.
    """
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], dict):
        raise UserError(f"objective {kind}: {function} must return a pair of a tensor [N] and a dict of metrics, not {_described(found)}")
    return found


def _wrong(loss: Any, metrics: dict[str, Any], names: tuple[str, ...], number: int) -> str | None:
    if not isinstance(loss, Tensor) or loss.shape != (number,) or not loss.is_floating_point():
        return f"loss must be a tensor of floats [{number}], one value per sample, not {_described(loss)}"
    if not loss.requires_grad:
        return "loss has no gradient: it must depend on at.v (of a step on at.mean or at.log_prob), without detach or no_grad"
    if not bool(loss.detach().isfinite().all()):
        return f"loss is not finite for {int((~loss.detach().isfinite()).sum())} of {number} samples"
    if missing := [name for name in names if name not in metrics]:
        return f"sample_loss did not return the metric {missing[0]!r}, which own_metrics declares"
    if more := [name for name in metrics if name not in names]:
        return f"sample_loss returned the metric {more[0]!r}, which own_metrics does not declare"
    for name, value in metrics.items():
        if not isinstance(value, Tensor) or value.shape != (number,):
            return f"metric {name!r} must be a tensor [{number}], one value per sample, not {_described(value)}"
    return None


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"a {type(value).__name__}"
