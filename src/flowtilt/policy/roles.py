"""The trained network and its weights by role: current (trained), old (collects), ema (kept), reference and teacher (none).

What a role's weights are is the subclass's: LoRAs on a frozen base (`policy.lora`), or all weights (`policy.whole`). Each is a
set of fp32 tensors, and each forward brings those of its role along: weights of the base are never written. `keep` copies a role
as it is now, for as long as images that it sampled are trained on.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from flowtilt.distributed.world import World
from flowtilt.errors import UserError
from flowtilt.lora import Lora
from flowtilt.models.base import Model
from flowtilt.models.conditioning import Conditioning

ROLES: tuple[str, ...] = ("current", "old", "ema")
"""What every policy has; a method may train further ones."""


class Policy(ABC):
    """The trained network.

    Args:
        model: its network has the base's weights.
    """

    in_parts = False
    """Whether each rank holds a part of the trained weights; see `spread`."""

    def __init__(self, model: Model):
        self.model = model
        self._weights: dict[str, dict[str, Tensor]] = {}
        self._trained = {"current"}
        self.parameters: list[Tensor] = []
        """The weights of "current"."""
        self._version = dict.fromkeys(ROLES, 0)
        self._clock = 0
        self._kept: dict[str, tuple[int, dict[str, Tensor]]] = {}
        self._injected_weights: dict[str, Tensor] = {}
        self._stand_ins: dict[str, str] = {}
        self.evaluations = 0
        """Network evaluations so far: samples times forwards, a backward counting as two."""
        self.recomputes = False
        """Whether activations are computed anew in the backward pass: slower, in less memory, to the same bits."""
        self.around_forward: Callable[[bool, str, Callable[[], Tensor]], Tensor] = lambda needs_grad, role, forward: forward()
        """Around every forward, with whether it is recorded for a backward, and its role; see `lockstep`."""

    @abstractmethod
    def knows(self) -> tuple[str, ...]:
        """Every role that has a velocity."""

    @abstractmethod
    def _is_bare(self, role: str) -> bool:
        """Whether a role is the base."""

    @abstractmethod
    def _made(self, role: str) -> dict[str, Tensor]:
        """What takes the place of the network's own weights, by name; with a graph where one is recorded."""

    @abstractmethod
    def save(self, folder: str, role: str = "ema") -> None:
        """Writes a role as plain diffusers loads it."""

    def add_role(self, role: str, seed: int, base_loras: Sequence[Lora] = ()) -> list[Tensor]:
        """Adds a further role that is trained on its own; returns its weights.

        Raises:
            UserError: this policy has none.
        """
        raise UserError(f'there is no further role {role!r} where all weights are trained; set train = "lora"')

    @torch.no_grad()
    def keep(self, role: str, name: str) -> None:
        """Copies a role's weights as they are now into a further role, which nothing trains."""
        self._weights[name] = {key: weight.detach().clone() for key, weight in self._weights[role].items()}
        self._version[name] = self._version[role]
        self._kept.pop(name, None)

    def forget(self, name: str) -> None:
        """Removes a role that `keep` has made."""
        for table in (self._weights, self._version, self._kept):
            table.pop(name, None)

    @contextmanager
    def read_as(self, role: str, other: str) -> Iterator[None]:
        """Inside, who asks for a role's velocity, or whether it equals another, gets those of `other`; `average` still moves the role."""
        self._stand_ins[role] = other
        try:
            yield
        finally:
            del self._stand_ins[role]

    def _bare(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self._injected_weights = {}
        return self.model.velocity(x_t, t, conditioning)

    def _share_base(self, role: str, other: str) -> bool:
        """Whether equal weights of two roles mean equal velocities."""
        return True

    def _same(self, role: str, other: str) -> bool:
        """Whether two roles have equal weights."""
        return all(torch.equal(a, b) for a, b in zip(self._weights[role].values(), self._weights[other].values(), strict=True))

    @property
    def roles(self) -> tuple[str, ...]:
        """Those that have weights of their own."""
        return tuple(self._weights)

    def velocity(self, role: str, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """v [N, ...] of a role, "reference" and "teacher" too; a gradient reaches the weights of a trained one where it is recorded."""
        needs_grad = torch.is_grad_enabled() and role in self._trained
        self.evaluations += len(x_t) * (3 if needs_grad else 1)
        return self.around_forward(needs_grad, role, lambda: self.forward(role, x_t, t, conditioning))

    def forward(self, role: str, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """As `velocity`, neither counted nor in turn."""
        role = self._stand_ins.get(role, role)
        if role not in self.knows():
            raise UserError(f"the policy has no role {role!r}; there are {', '.join(self.knows())}")
        if self._is_bare(role):
            return self._bare(x_t, t, conditioning)
        self._injected_weights = self._weights_for(role)
        return self.model.velocity(x_t, t, conditioning, self._injected_weights)

    def _weights_for(self, role: str) -> dict[str, Tensor]:
        """What takes the place of the network's own weights, by name; kept until the role changes, but for a recorded one."""
        recording = torch.is_grad_enabled() and role in self._trained
        version = self._version.get(role, 0)
        kept = self._kept.get(role)
        if kept and kept[0] == version and not recording:
            return kept[1]
        made = self._made(role)
        if recording:
            return made
        # parameters, as the network's own are: a compiled block is compiled anew for other tensors
        found: dict[str, Tensor] = {name: nn.Parameter(x.detach(), requires_grad=False) for name, x in made.items()}
        self._kept[role] = (version, found)
        return found

    @property
    def can_recompute(self) -> bool:
        """Whether the network has gradient checkpointing, as diffusers' models say."""
        return bool(getattr(self.model.network, "_supports_gradient_checkpointing", False))

    def recompute(self, on: bool = True) -> None:
        """Gradient checkpointing: the network keeps only what enters its blocks, and computes them anew in the backward pass."""
        network: Any = self.model.network
        if not self.can_recompute:
            raise UserError(f"model.recompute: a {type(network).__name__} can't compute its activations anew; set it to false")
        self.recomputes = on
        if not on:
            network.disable_gradient_checkpointing()
            return
        prefixes = {id(module): f"{name}." for name, module in network.named_modules()}

        def block_of(module: nn.Module, *args: object) -> object:
            # by then the network has its own weights again: the block brings the role's along
            prefix = prefixes[id(module)]
            own = {name.removeprefix(prefix): weight for name, weight in self._injected_weights.items() if name.startswith(prefix)}
            return checkpoint(functional_call, module, own, args, use_reentrant=False, preserve_rng_state=False)

        network.enable_gradient_checkpointing(block_of)

    @torch.no_grad()
    def average(self, role: str, decay: float) -> None:
        """role <- decay role + (1 - decay) current."""
        kept = list(self._weights[role].values())
        if decay == 0:
            torch._foreach_copy_(kept, self.parameters)
            self._version[role] = self._version["current"]
        else:
            torch._foreach_lerp_(kept, self.parameters, 1 - decay)
            self._version[role] = self._tick()

    def join_gradients(self, weights: Sequence[Tensor], others: Sequence[Tensor], world: World) -> None:
        """Adds the gradients of a role's weights up over the ranks, and `others` with them, in one message."""
        world.sum_([*(weight.grad for weight in weights if weight.grad is not None), *others])

    def gradient_norm(self, weights: Sequence[Tensor], world: World) -> Tensor:
        """The norm of the whole gradient, which `join_gradients` has joined."""
        return torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])

    def before_backward(self) -> None:  # noqa: B027
        """Called on every rank before a backward pass begins; most have nothing to do."""

    def help_backward(self, v: Tensor) -> None:
        """Takes part in another rank's backward pass: gives gradients of zero, of which .grad does not hear."""
        torch.autograd.grad(v, self.parameters, torch.zeros_like(v), allow_unused=True)

    def joined(self, index: int, part: Tensor) -> Tensor:
        """A tensor of the shape of the trained weight number `index`, whole on the CPU; `part` is what this rank holds of it."""
        return part.detach().cpu()

    def part(self, index: int, whole: Tensor) -> Tensor:
        """The inverse: what this rank holds of it."""
        return whole

    def collect(self, role: str) -> None:  # noqa: B027
        """Called on every rank before the first one saves a role; most have nothing to do."""

    def changed(self, role: str = "current") -> None:
        """To be called after each optimizer step on a role's weights."""
        self._version[role] = self._tick()

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def same_version(self, role: str, other: str) -> bool:
        """Whether two roles have the same weights, known without looking at them."""
        return self._version[self._stand_ins.get(role, role)] == self._version[self._stand_ins.get(other, other)]

    def state(self, role: str) -> dict[str, Tensor]:
        """The weights of a role by name, copies on the CPU."""
        return {name: weight.detach().cpu().clone() for name, weight in self._weights[role].items()}

    @torch.no_grad()
    def load_state(self, role: str, state: Mapping[str, Tensor]) -> None:
        """Puts weights back.

        Raises:
            UserError: other names or shapes than this policy's.
        """
        own = self._weights[role]
        wrong = [name for name in own.keys() | state.keys() if name not in own or name not in state or own[name].shape != state[name].shape]
        if wrong:
            raise UserError(f"weights of {role}: {len(wrong)} tensors do not fit, {min(wrong)} first; they belong to another model or rank")
        for name, weight in own.items():
            weight.copy_(state[name])
        self._version[role] = self._tick()
        for known in self.roles:
            if known != role and self._share_base(known, role) and self._same(known, role):
                self._version[role] = self._version[known]
