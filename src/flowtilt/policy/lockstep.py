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

RECORDED, BACKWARD, PLAIN = range(3)
"""What a rank can be about to do: a forward with a graph, a backward, or a forward without one, of a role where weights lie in parts;
after the last of these, a message."""


class Lockstep:
    """Keeps the passes of all ranks in step; once made, it is asked by the policy and the world.

    Args:
        policy: of a model that `shard` has spread.
        world: whose messages wait for the passes of others.
    """

    def __init__(self, policy: Policy, world: World):
        self._policy, self._device = policy, world.device
        self._nothing = policy.model.encode([policy.model.encode.blank])
        self._graphs: list[Tensor] = []
        self._roles = policy.knows() if policy.in_parts else ("current",)
        self._message = PLAIN + len(self._roles)
        policy.around_forward = self.take
        world.before_message = self.meet

    def take(self, needs_grad: bool, role: str, forward: Callable[[], Tensor]) -> Tensor:
        """`forward()`, while the others do the same or help."""
        self._agree(RECORDED if needs_grad else PLAIN + (self._roles.index(role) if role in self._roles else 0))
        v = forward()
        if v.requires_grad:
            v = v.view_as(v)  # its hook comes before FSDP's own, which hangs on what the network returned
            v.register_hook(self._before_backward)
        return v

    def _before_backward(self, gradient: Tensor) -> None:
        self._agree(BACKWARD)
        self._policy.before_backward()

    def meet(self) -> None:
        """Helps until all ranks are about to send a message."""
        while (wanted := self._agree(self._message)) != self._message:
            self._help(wanted)
        self._graphs.clear()

    def _agree(self, own: int) -> int:
        """What all ranks do next: the pass that some of them want, or else the message."""
        wanted = torch.zeros(self._message + 1, device=self._device)
        wanted[own] = 1
        dist.all_reduce(wanted)
        found = wanted.nonzero().flatten().tolist()
        if len(found) > 1 and found[1] != self._message:
            raise RuntimeError(f"ranks want different passes at once: {found}")
        return found[0]

    def _help(self, wanted: int) -> None:
        if wanted == BACKWARD:
            self._policy.before_backward()
            self._policy.help_backward(self._graphs.pop())
            return
        model = self._policy.model
        x, t = torch.zeros(1, *model.latent_shape, device=model.device), torch.full((1,), 0.5, device=model.device)
        role = "current" if wanted == RECORDED else self._roles[wanted - PLAIN]
        with torch.set_grad_enabled(wanted == RECORDED):
            v = self._policy.forward(role, x, t, self._nothing)
        if wanted == RECORDED:
            self._graphs.append(v)
