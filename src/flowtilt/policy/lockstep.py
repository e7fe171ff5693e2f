"""`shard = "base"`: the frozen network lies in parts on all ranks (FSDP2), and all ranks walk through it together.

A block's weights are gathered for as long as the block works, so a pass through the network is a series of messages
to which every rank contributes. But ranks have different numbers of passes, as their shares differ. So each says
before a pass, and before any message of `distributed.World`, what it is about to do, in one tiny sum. Where some are
about to make a pass, those about to send a message make the same pass with one image of zeros; a message goes
out once all of them are about to send it. All ranks see the same sum and therefore do the same: their messages agree in
number and order, none waits for one that never comes, and the loops above know nothing of it.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from flowtilt.distributed.world import World
from flowtilt.policy.roles import Policy

PLAIN, RECORDED, BACKWARD, MESSAGE = range(4)
"""What a rank can be about to do: a forward without and with a graph, a backward, a message."""


class Lockstep:
    """Keeps the passes of all ranks in step; once made, it is asked by the policy and the world.

    Args:
        policy: of a model that `shard` has spread.
        world: whose messages wait for the passes of others.
    """

    def __init__(self, policy: Policy, world: World):
        self._policy, self._device = policy, world.device
        self._nothing = policy.model.encode([""])
        self._graphs: list[Tensor] = []
        policy.around_forward = self.take
        world.before_message = self.meet

    def take(self, needs_grad: bool, forward: Callable[[], Tensor]) -> Tensor:
        """`forward()`, while the others do the same or help."""
        self._agree(RECORDED if needs_grad else PLAIN)
        v = forward()
        if v.requires_grad:
            v = v.view_as(v)  # its hook comes before FSDP's own, which hangs on what the network returned
            v.register_hook(self._before_backward)
        return v

    def _before_backward(self, gradient: Tensor) -> None:
        self._agree(BACKWARD)

    def meet(self) -> None:
        """Helps until all ranks are about to send a message."""
        while (wanted := self._agree(MESSAGE)) != MESSAGE:
            self._help(wanted)
        self._graphs.clear()

    def _agree(self, own: int) -> int:
        """What all ranks do next: the pass that some of them want, or else the message."""
        wanted = torch.zeros(MESSAGE + 1, device=self._device)
        wanted[own] = 1
        dist.all_reduce(wanted)
        found = wanted.nonzero().flatten().tolist()
        if len(found) > 1 and found[1] != MESSAGE:
            raise RuntimeError(f"ranks want different passes at once: {found}")
        return found[0]

    def _help(self, wanted: int) -> None:
        if wanted == BACKWARD:
            v = self._graphs.pop()
            # what it gives is zeros, and .grad does not hear of them
            torch.autograd.grad(v, self._policy.parameters, torch.zeros_like(v), allow_unused=True)
            return
        model = self._policy.model
        x, t = torch.zeros(1, *model.latent_shape, device=model.device), torch.full((1,), 0.5, device=model.device)
        with torch.set_grad_enabled(wanted == RECORDED):
            v = self._policy.forward("current", x, t, self._nothing)
        if wanted == RECORDED:
            self._graphs.append(v)
