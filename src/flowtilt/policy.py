"""One frozen base and its LoRA adapters in roles: current (trained), old (collects), ema (kept), reference (none).

A role's forward is exact in one of two ways. On an fp32 base the update is merged, W + (alpha / r) B A,
which costs one small product a layer instead of two a token, and base weights are never written. On a
half-precision base merging would round the update away, so PEFT's layers add it to each activation.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from flowtilt.errors import UserError
from flowtilt.models.base import Conditioning, Model
from flowtilt.seeding import generator

ROLES: tuple[str, ...] = ("current", "old", "ema")


class Policy:
    """The trained network.

    Args:
        model: its network gets three adapters.
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
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are the point
            for role in ROLES:
                network.add_adapter(self.config, adapter_name=role)
        # PEFT types its layers as bare modules
        self._layers: dict[str, Any] = {name: m for name, m in model.network.named_modules() if isinstance(m, LoraLayer)}
        self._weights = {role: self._weights_of(role) for role in ROLES}
        for number, (name, a) in enumerate(self._weights["current"].items()):
            if ".lora_A" in name:
                a.data = torch.randn(a.shape, generator=generator(seed, "lora", number)).to(a.device) / rank
        self.parameters: list[Tensor] = list(self._weights["current"].values())
        self._version = dict.fromkeys(ROLES, 0)
        self._clock = 0
        self._merged: dict[str, tuple[int, dict[str, Tensor]]] = {}
        self.evaluations = 0
        """Network evaluations so far: samples times forwards, a backward counting as two."""
        for role in ("old", "ema"):
            self.average(role, 0.0)
        self._activate("reference" if self.merge else "current")

    def _weights_of(self, role: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            for part in ("lora_A", "lora_B"):
                weight = getattr(layer, part)[role].weight
                weight.data = weight.data.float()
                weight.requires_grad_(role == "current")
                found[f"{name}.{part}.weight"] = weight
        return found

    def velocity(self, role: str, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """v [N, ...] of a role ("reference" too); a gradient reaches the LoRA weights of "current" where it is recorded."""
        self.evaluations += len(x_t) * (3 if torch.is_grad_enabled() and role == "current" else 1)
        if self.merge:
            return self.model.velocity(x_t, t, conditioning, self._merged_weights(role))
        with self.role(role):
            return self.model.velocity(x_t, t, conditioning)

    def _merged_weights(self, role: str) -> dict[str, Tensor]:
        if role == "reference":
            return {}
        recording = torch.is_grad_enabled() and role == "current"
        kept = self._merged.get(role)
        if kept and kept[0] == self._version[role] and not recording:
            return kept[1]
        merged = {}
        for name, layer in self._layers.items():
            a, b = layer.lora_A[role].weight, layer.lora_B[role].weight
            merged[f"{name}.base_layer.weight"] = torch.addmm(layer.base_layer.weight, b, a, alpha=layer.scaling[role])
        if not recording:
            self._merged[role] = (self._version[role], merged)
        return merged

    @contextmanager
    def role(self, name: str) -> Iterator[None]:
        """The network itself, called by anybody, has the weights of a role inside this block."""
        before = "reference" if self.merge else "current"
        self._activate(name)
        try:
            yield
        finally:
            self._activate(before)

    def _activate(self, role: str) -> None:
        for layer in self._layers.values():
            layer.enable_adapters(role != "reference")
            if role != "reference":
                layer.set_adapter(role)
        # PEFT couples the active adapter with what is trained; here only "current" ever is
        for name, weights in self._weights.items():
            for weight in weights.values():
                weight.requires_grad_(name == "current")

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
        state = get_peft_model_state_dict(self.model.network, adapter_name=role)
        config = {key: sorted(v) if isinstance(v, set) else v for key, v in self.config.to_dict().items()}
        self.model.save_lora(folder, {k: v.detach().cpu().contiguous() for k, v in state.items()}, config)
