"""All weights of a network in roles, spread over the ranks by FSDP2: each rank holds a part of every weight of every role.

The network has the weights of one role at a time. A forward puts its role's parts into it, and FSDP gathers them block by block; before
a backward pass the trained role's come back. Gradients are added up over the ranks in fp32 and end in the parts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from flowtilt.distributed.world import World
from flowtilt.errors import UserError
from flowtilt.models.base import Model
from flowtilt.models.conditioning import Conditioning
from flowtilt.policy.whole import WholePolicy

BASE = "reference"
"""What the base's own parts are kept as."""


class SpreadPolicy(WholePolicy):
    """A network all of whose weights are trained, each rank holding its part of them.

    Args:
        model: its network is one that `models.sharded.shard` has spread.
    """

    in_parts = True

    def __init__(self, model: Model, world: World):
        super().__init__(model)
        self._world = world
        self._own: dict[str, Any] = {name: weight for name, weight in model.network.named_parameters() if name in self._dtypes}
        self._base = {name: weight.to_local().detach().clone() for name, weight in self._own.items()}
        self._inside = (BASE, 0)
        self._collected: dict[str, tuple[int, dict[str, Tensor]]] = {}
        for weight in self._own.values():
            weight.requires_grad_(True)
        for module in model.network.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # a sum, as without parts
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no other

    def forward(self, role: str, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """See `Policy.forward`."""
        if role not in self.knows():
            raise UserError(f"the policy has no role {role!r}; there are {', '.join(self.knows())}")
        recorded = torch.is_grad_enabled() and role in self._trained
        self._put(role)
        self._injected_weights = {}
        if recorded:
            self._take_gradients()
        with torch.set_grad_enabled(recorded):
            return self.model.velocity(x_t, t, conditioning)

    @torch.no_grad()
    def _put(self, role: str) -> None:
        """Makes the network's weights those of a role."""
        role = BASE if self._is_bare(role) else role
        wanted = (role, self._version.get(role, 0))
        if self._inside == wanted:
            return
        self._settle()
        parts = self._base if role == BASE else self._weights[role]
        for name, weight in self._own.items():
            weight.to_local().copy_(parts[name])
        self._settle()
        self._inside = wanted

    def _settle(self) -> None:
        """FSDP gathers on a stream of its own, which must not read while the weights change."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    @torch.no_grad()
    def _take_gradients(self) -> None:
        """Adds what backward passes have left to the gradients of the parts, in fp32."""
        for name, part in self._weights["current"].items():
            weight = self._own[name]
            if weight.grad is not None:
                gradient = weight.grad.to_local().float()
                part.grad = gradient if part.grad is None else part.grad + gradient
                weight.grad = None

    def before_backward(self) -> None:
        """The trained role's weights, which FSDP gathers once more."""
        self._put("current")

    def help_backward(self, v: Tensor) -> None:
        """With gradients of zero; this rank's parts get those of the others."""
        v.backward(torch.zeros_like(v))

    def join_gradients(self, weights: Sequence[Tensor], others: Sequence[Tensor], world: World) -> None:
        """Backward passes have joined them."""
        world.sum_(others)  # waits for the passes of all ranks
        self._take_gradients()

    def gradient_norm(self, weights: Sequence[Tensor], world: World) -> Tensor:
        """Of the parts of all ranks."""
        squared = super().gradient_norm(weights, world).square()
        world.sum_([squared])
        return squared.sqrt()

    def changed(self, role: str = "current") -> None:
        """See `Policy.changed`; whole weights that were collected are let go."""
        super().changed(role)
        self._collected.clear()

    def _same(self, role: str, other: str) -> bool:
        """On all ranks."""
        return not self._world.any(not super()._same(role, other))

    # whole weights, for checkpoints and results; every rank takes part -------------------------------------

    def joined(self, index: int, part: Tensor) -> Tensor:
        """See `Policy.joined`; other ranks than the first get nothing."""
        return self._gathered(list(self._own.values())[index], part)

    def part(self, index: int, whole: Tensor) -> Tensor:
        """See `Policy.part`."""
        return self._cut(whole, list(self._weights["current"].values())[index])

    def _gathered(self, like: Any, part: Tensor) -> Tensor:
        spread = DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
        whole = spread.full_tensor()
        return whole.cpu() if self._world.rank == 0 else part.new_empty(0, device="cpu")

    def _cut(self, whole: Tensor, part: Tensor) -> Tensor:
        pieces = whole.chunk(self._world.size)
        return pieces[self._world.rank] if self._world.rank < len(pieces) else part.new_empty(part.shape, device=whole.device)

    @torch.no_grad()
    def collect(self, role: str) -> None:
        """Gathers a role's weights on the first rank, where they are kept until they change."""
        version = self._version[role]
        if self._collected.get(role, (None,))[0] != version:
            whole = {name: self._gathered(self._own[name], part) for name, part in self._weights[role].items()}
            self._collected[role] = (version, whole)

    def state(self, role: str) -> dict[str, Tensor]:
        """See `Policy.state`; every rank takes part, and other ranks than the first get nothing."""
        self.collect(role)
        whole = self._collected[role][1]
        return whole if self._world.rank == 0 else {}

    def whole(self, role: str) -> dict[str, Tensor]:
        """See `WholePolicy.whole`, of a role that was collected; the first rank alone."""
        return {name: weight.to(self._dtypes[name]) for name, weight in self._collected[role][1].items()}

    def load_state(self, role: str, state: Mapping[str, Tensor]) -> None:
        """See `Policy.load_state`: from whole weights."""
        own = self._weights[role]
        wrong = [name for name in own.keys() ^ state.keys()] + [
            name for name in own.keys() & state.keys() if state[name].shape != self._own[name].shape
        ]
        if wrong:
            raise UserError(f"weights of {role}: {len(wrong)} tensors do not fit, {min(wrong)} first; they belong to another model")
        super().load_state(role, {name: self._cut(state[name], part) for name, part in own.items()})
