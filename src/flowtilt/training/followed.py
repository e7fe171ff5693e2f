"""Rewards that a method follows by their gradient through the decoder, at the decoder's own micro-batch."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor

from flowtilt.device.micro_batch import MicroBatch
from flowtilt.device.placement import on_device
from flowtilt.distributed.world import World
from flowtilt.policy.roles import Policy
from flowtilt.prompts import Prompt
from flowtilt.rewards import Reward, modules_of
from flowtilt.rewards.gradient import differentiable, reward_gradient, reward_values


class Followed:
    """R = sum of w_k r_k(decode(latents)), see `rewards.gradient`; asked within `at_hand`.

    Args:
        rewards: r_k by name.
        weights: w_k by name.

    Raises:
        UserError: a reward has no gradient.
    """

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float], policy: Policy, world: World, micro_batch: MicroBatch):
        self._rewards, self._weights, self._policy, self._device, self._micro_batch = rewards, weights, policy, world.device, micro_batch
        self._differentiable = {name: differentiable(name, reward) for name, reward in rewards.items()}

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """The rewards' models are on the device."""
        with ExitStack() as stack:
            for reward in self._rewards.values():
                stack.enter_context(on_device(modules_of(reward), self._device))
            yield

    def gradient(self, latents: Tensor, prompts: Sequence[Prompt], margin: float | None = None) -> tuple[Tensor, Tensor]:
        """R [N] and its gradient [N, ...]; the gradient is 0 from a margin on."""
        given, decode = (self._differentiable, self._weights), self._policy.model.decode
        return self._micro_batch.run_with_backoff(
            "backprop", lambda size: reward_gradient(*given, decode, latents, prompts, margin=margin, chunk=size)
        )

    def values(self, latents: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """R [N] alone."""
        given, decode = (self._differentiable, self._weights), self._policy.model.decode
        return self._micro_batch.run_with_backoff("backprop", lambda size: reward_values(*given, decode, latents, prompts, chunk=size))
