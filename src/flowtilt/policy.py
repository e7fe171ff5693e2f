"""One frozen base and its LoRA adapters in roles: current (trained), old (collects), ema (kept), reference (none).

A role is a set of fp32 tensors, and each forward brings the weights of its role along: base weights are
never written, no adapter is switched. On an fp32 base the update comes merged, W + (alpha / r) B A, which
costs one small product a layer instead of two a token. On a half-precision base merging would round the
update away; there PEFT's layers add it to each activation, A and B cast to the base's precision, which is
what diffusers computes with the same LoRA.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from flowtilt.errors import UserError
from flowtilt.models.base import Model
from flowtilt.models.conditioning import Conditioning
from flowtilt.seeding import generator

ROLES: tuple[str, ...] = ("current", "old", "ema")
_SLOT = "current"
"""PEFT's one adapter. Its parameters are the trained ones; other roles take their place in a forward."""


class Policy:
    """The trained network.

    Args:
        model: its network gets an adapter.
        rank, alpha: of LoRA; A starts normal with std 1/rank, B at zero, so every role starts as the reference.
        seed: of A.
        merge: forward by merged weights; none chooses them for an fp32 base.
    """

    def __init__(self, model: Model, *, rank: int, alpha: float, seed: int, merge: bool | None = None):
        self.model = model
        self.merge = next(model.network.parameters()).dtype == torch.float32 if merge is None else merge
        network: Any = model.network  # a diffusers model, whose adapters PEFT manages
        settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha}  # PEFT types alpha as an int and computes with any number
        self.config = LoraConfig(**settings, init_lora_weights="gaussian", target_modules=list(model.lora_targets))
        network.add_adapter(self.config, adapter_name=_SLOT)
        # PEFT types its layers as bare modules
        self._layers: dict[str, Any] = {name: m for name, m in model.network.named_modules() if isinstance(m, LoraLayer)}
        self._weights: dict[str, dict[str, Tensor]] = {_SLOT: {}}
        for number, (name, layer) in enumerate(self._layers.items()):
            for part, module in (("lora_A", layer.lora_A[_SLOT]), ("lora_B", layer.lora_B[_SLOT])):
                module.weight.data = module.weight.data.float()
                self._weights[_SLOT][f"{name}.{part}.weight"] = module.weight
            a = layer.lora_A[_SLOT].weight
            a.data = torch.randn(a.shape, generator=generator(seed, "lora", 2 * number)).to(a.device) / rank
        self.parameters: list[Tensor] = list(self._weights[_SLOT].values())
        self._version = dict.fromkeys(ROLES, 0)
        self._clock = 0
        self._kept: dict[str, tuple[int, dict[str, Tensor]]] = {}
        self._brought: dict[str, Tensor] = {}
        self.evaluations = 0
        """Network evaluations so far: samples times forwards, a backward counting as two."""
        self.in_turn: Callable[[bool, Callable[[], Tensor]], Tensor] = lambda recorded, forward: forward()
        """Around every forward, told whether it is recorded for a backward; see `sharding`."""
        for role in ("old", "ema"):
            self._weights[role] = {name: weight.detach().clone() for name, weight in self._weights[_SLOT].items()}
        self._adapt(not self.merge)

    def velocity(self, role: str, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """v [N, ...] of a role ("reference" too); a gradient reaches the LoRA weights of "current" where it is recorded."""
        recorded = torch.is_grad_enabled() and role == "current"
        self.evaluations += len(x_t) * (3 if recorded else 1)
        return self.in_turn(recorded, lambda: self.forward(role, x_t, t, conditioning))

    def forward(self, role: str, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """As `velocity`, neither counted nor in turn."""
        if role == "reference":
            return self._bare(x_t, t, conditioning)
        self._brought = self._weights_for(role)
        return self.model.velocity(x_t, t, conditioning, self._brought)

    def _bare(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self._brought = {}
        self._adapt(False)
        try:
            return self.model.velocity(x_t, t, conditioning)
        finally:
            # a backward pass may still recompute the current role's forward, and wants its layers
            self._adapt(not self.merge)

    def _adapt(self, on: bool) -> None:
        for layer in self._layers.values():
            layer.enable_adapters(on)
        # PEFT couples what is active with what is trained
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def _weights_for(self, role: str) -> dict[str, Tensor]:
        """What takes the place of the network's own weights, by name; kept until the role changes, but for a recorded one."""
        recording = torch.is_grad_enabled() and role == "current"
        kept = self._kept.get(role)
        if kept and kept[0] == self._version[role] and not recording:
            return kept[1]
        found, weights = {}, self._weights[role]
        for name, layer in self._layers.items():
            a, b = weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"]
            base = layer.base_layer.weight
            if self.merge:
                found[f"{name}.base_layer.weight"] = torch.addmm(base, b, a, alpha=layer.scaling[_SLOT])
            else:
                found[f"{name}.lora_A.{_SLOT}.weight"], found[f"{name}.lora_B.{_SLOT}.weight"] = a.to(base.dtype), b.to(base.dtype)
        if not recording:
            self._kept[role] = (self._version[role], found)
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
        if not on:
            network.disable_gradient_checkpointing()
            return
        prefixes = {id(module): f"{name}." for name, module in network.named_modules()}

        def block_of(module: nn.Module, *args: object) -> object:
            # by then the network has its own weights again: the block brings the role's along
            prefix = prefixes[id(module)]
            own = {name.removeprefix(prefix): weight for name, weight in self._brought.items() if name.startswith(prefix)}
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

    def changed(self) -> None:
        """To be called after each optimizer step on `parameters`."""
        self._version["current"] = self._tick()

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def equal(self, role: str, other: str) -> bool:
        """Whether two roles have the same weights, known without looking at them."""
        return self._version[role] == self._version[other]

    def state(self, role: str) -> dict[str, Tensor]:
        """The LoRA weights of a role by PEFT's names, copies on the CPU."""
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
            raise UserError(
                f"LoRA weights of {role}: {len(wrong)} tensors do not fit, {min(wrong)} first; they belong to another model or rank"
            )
        for name, weight in own.items():
            weight.copy_(state[name])
        self._version[role] = self._tick()
        for known in ROLES:
            if known != role and all(torch.equal(a, b) for a, b in zip(own.values(), self._weights[known].values(), strict=True)):
                self._version[role] = self._version[known]

    def save_lora(self, folder: str, role: str = "ema") -> None:
        """Writes a role as `pytorch_lora_weights.safetensors` with its alpha; plain diffusers loads it."""
        config = {key: sorted(v) if isinstance(v, set) else v for key, v in self.config.to_dict().items()}
        self.model.save_lora(folder, self.state(role), config)
