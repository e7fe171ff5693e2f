"""One AdamW and the weights it moves: gradients of all ranks joined, clipped, one step."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from flowtilt.config import OptimizerSettings
from flowtilt.distributed.world import World
from flowtilt.methods.schedule import value_at
from flowtilt.policy.roles import Policy
from flowtilt.runs import checkpoint
from flowtilt.training.timing import Phases


class RoleOptimizer:
    """Updates of one role; `count` is how many were made.

    Args:
        weights: of that role, which hold this rank's part of the gradient in .grad.
        settings: the learning rate with its schedule, averages, decay and clip.
    """

    def __init__(self, policy: Policy, role: str, weights: Sequence[Tensor], settings: OptimizerSettings, world: World):
        self._policy, self._role, self._settings, self.world = policy, role, settings, world
        self.weights = list(weights)
        self.count = 0
        o = settings
        self._optimizer = torch.optim.AdamW(self.weights, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)

    def clear(self) -> None:
        """A gradient of zeros, to which backward passes add."""
        for weight in self.weights:
            weight.grad = torch.zeros_like(weight)

    def gradient(self) -> list[Tensor]:
        """The gradient that was put into .grad, joined over the ranks; a copy."""
        gradients = [weight.grad.clone() for weight in self.weights if weight.grad is not None]
        self.world.sum_(gradients)
        return gradients

    def step(self, sums: Mapping[str, Tensor], phases: Phases) -> float:
        """Joins gradients and `sums` over the ranks in one message, clips, steps; returns the norm before clipping.

        A gradient that is not finite is left out: it would end in every weight.
        """
        with phases("sync"):
            self._policy.join_gradients(self.weights, list(sums.values()), self.world)
            total = self._policy.gradient_norm(self.weights, self.world)
        for group in self._optimizer.param_groups:
            group["lr"] = self.rate()
        torch.nn.utils.clip_grads_with_norm_(self.weights, self._settings.clip, total)
        norm = float(total)
        if norm < float("inf"):  # false for NaN too
            self._optimizer.step()
            self._policy.changed(self._role)
            self.count += 1
        return norm

    def rate(self) -> float:
        """The learning rate of the next update: linear warm-up, then 1 / (1 + s / half_life), times the schedule's factor."""
        o, s = self._settings, self.count
        rate = o.lr * min(1.0, (s + 1) / (o.warmup + 1)) * value_at(o.schedule, s)
        return rate if o.half_life is None else rate / (1 + s / o.half_life)

    def tensors(self) -> dict[str, Tensor]:
        """What AdamW remembers, for a checkpoint."""
        return {key: self._resized(key, value, self._policy.joined) for key, value in checkpoint.optimizer_tensors(self._optimizer).items()}

    @staticmethod
    def _resized(key: str, value: Tensor, change: Callable[[int, Tensor], Tensor]) -> Tensor:
        """An entry of the optimizer's, changed as a weight is where it is one of a weight's shape; a count of steps is not."""
        return change(int(key.partition(".")[0]), value) if value.ndim else value.cpu()

    def load(self, count: int, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what was saved."""
        self.count = count
        own = {key: self._resized(key, value, self._policy.part) for key, value in tensors.items()}
        checkpoint.load_optimizer(self._optimizer, own)
