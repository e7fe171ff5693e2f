"""LoRAs in roles on one frozen base.

A role is A and B on a ground, frozen LoRAs that lie beneath; no adapter is switched. current, old, ema and reference share a
ground; the teacher is the bare base; a method may train further roles, on grounds of their own. On an fp32 base the update comes
merged, W + (alpha / r) B A, which costs one small product a layer instead of two a token. On a half-precision base
merging would round the update away; there PEFT's layers add it to each activation, A and B cast to the base's
precision, which is what diffusers computes with the same LoRA.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor

from flowtilt.errors import UserError
from flowtilt.io.tensors import settle
from flowtilt.lora import Lora, join
from flowtilt.models.base import Model
from flowtilt.models.conditioning import Conditioning
from flowtilt.models.quantized import is_quantized, unmerged
from flowtilt.policy.roles import ROLES, Policy
from flowtilt.seeding import generator

_SLOT = "current"
"""PEFT's one adapter. Its parameters are the trained ones; other roles take their place in a forward."""


def is_mergeable(model: Model) -> bool:
    """Whether LoRAs can be merged into the network's weights exactly: they are fp32, and not quantised."""
    return next(model.network.parameters()).dtype == torch.float32 and not is_quantized(model)


class LoraPolicy(Policy):
    """A network whose LoRA is trained.

    Args:
        model: its network gets an adapter.
        rank, alpha: of LoRA; A starts normal with std 1/rank, B at zero, so every role starts as the reference.
        seed: of A.
        merge: forward by merged weights; none chooses them for an fp32 base that is not quantised.
        below: frozen LoRAs beneath the trained one; the reference is the base with them.

    Raises:
        UserError: a LoRA beneath changes layers that are not trained.
    """

    def __init__(self, model: Model, *, rank: int, alpha: float, seed: int, merge: bool | None = None, base_loras: Sequence[Lora] = ()):
        super().__init__(model)
        self.merge = is_mergeable(model) if merge is None else merge
        network: Any = model.network  # a diffusers model, whose adapters PEFT manages
        settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha}  # PEFT types alpha as an int and computes with any number
        self.config = LoraConfig(**settings, init_lora_weights="gaussian", target_modules=list(model.lora_targets))
        with unmerged():
            network.add_adapter(self.config, adapter_name=_SLOT)
        # PEFT types its layers as bare modules
        self._layers: dict[str, Any] = {name: m for name, m in model.network.named_modules() if isinstance(m, LoraLayer)}
        self._weights[_SLOT] = {}
        for name, layer in self._layers.items():
            for part, module in (("lora_A", layer.lora_A[_SLOT]), ("lora_B", layer.lora_B[_SLOT])):
                module.weight.data = module.weight.data.float()
                self._weights[_SLOT][f"{name}.{part}.weight"] = module.weight
        self._draw(_SLOT, seed, "lora")
        self.parameters = list(self._weights[_SLOT].values())
        for role in ("old", "ema"):
            self._weights[role] = {name: weight.detach().clone() for name, weight in self._weights[_SLOT].items()}
        base_tensors = self._base_tensors_of(base_loras)
        self._base_tensors: dict[str, dict[str, tuple[Tensor, ...]]] = {role: base_tensors for role in (*ROLES, "reference")} | {
            "teacher": {}
        }
        self._adapt(not self.merge)

    def add_role(self, role: str, seed: int, base_loras: Sequence[Lora] = ()) -> list[Tensor]:
        """A further LoRA on the same base, trained on its own, of the same rank and alpha, B at zero; returns its weights.

        Args:
            seed: of A, which differs from that of "current" for an equal seed.
            below: frozen LoRAs beneath it.

        Raises:
            UserError: as for the policy's own `below`.
        """
        self._weights[role] = {name: torch.zeros_like(weight) for name, weight in self._weights[_SLOT].items()}
        self._draw(role, seed, role)
        self._base_tensors[role] = self._base_tensors_of(base_loras)
        self._version[role] = self._tick()
        self._trained.add(role)
        weights = list(self._weights[role].values())
        for weight in weights:
            weight.requires_grad_(True)
        return weights

    @torch.no_grad()
    def _draw(self, role: str, seed: int, purpose: str) -> None:
        for number, name in enumerate(self._layers):
            a = self._weights[role][f"{name}.lora_A.weight"]
            a.copy_(torch.randn(a.shape, generator=generator(seed, purpose, 2 * number)) / len(a))

    @torch.no_grad()
    def _base_tensors_of(self, loras: Sequence[Lora]) -> dict[str, tuple[Tensor, ...]]:
        """By layer: the base's weight with the LoRAs merged in, or their joint A and B as PEFT's layers multiply them."""
        beyond = sorted({layer for lora in loras for layer in lora.layers} - self._layers.keys())
        if beyond:
            ends = ", ".join(self.model.lora_targets)
            first = next(lora for lora in loras if beyond[0] in lora.layers)
            where = f"lora {first.source}: changes {len(beyond)} layers that are not trained, {beyond[0]} first"
            raise UserError(f"{where}; those that are end in {ends}")
        base_tensors: dict[str, tuple[Tensor, ...]] = {}
        for lora in loras if self.merge else [join(loras)] if loras else []:
            for name, (a, b) in lora.layers.items():
                weight, scale = self._layers[name].base_layer.weight, lora.scale(name)
                a, b = a.to(weight.device), b.to(weight.device)
                if self.merge:
                    (base_loras,) = base_tensors.get(name, (weight,))
                    base_tensors[name] = (torch.addmm(base_loras, b, a, alpha=scale),)
                else:
                    base_tensors[name] = (a, b * (scale / self._layers[name].scaling[_SLOT]))
        return base_tensors

    def keep(self, role: str, name: str) -> None:
        super().keep(role, name)
        self._base_tensors[name] = self._base_tensors[role]

    def forget(self, name: str) -> None:
        super().forget(name)
        self._base_tensors.pop(name, None)

    def knows(self) -> tuple[str, ...]:
        """Every role that has a velocity, "reference" and "teacher" too."""
        return tuple(self._base_tensors)

    def _is_bare(self, role: str) -> bool:
        return role not in self._weights and not self._base_tensors[role]

    def _bare(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self._injected_weights = {}
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

    def _made(self, role: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            found |= self._merged(role, name, layer) if self.merge else self._joint(role, name, layer)
        return found

    def _own(self, role: str, name: str) -> tuple[Tensor, Tensor] | None:
        weights = self._weights.get(role)
        return (weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"]) if weights else None

    def _merged(self, role: str, name: str, layer: Any) -> dict[str, Tensor]:
        (weight,) = self._base_tensors[role].get(name, (layer.base_layer.weight,))
        if own := self._own(role, name):
            a, b = own
            weight = torch.addmm(weight, b, a, alpha=layer.scaling[_SLOT])
        return {f"{name}.base_layer.weight": weight}

    def _joint(self, role: str, name: str, layer: Any) -> dict[str, Tensor]:
        base = layer.base_layer.weight
        parts = [part for part in (self._base_tensors[role].get(name), self._own(role, name)) if part]
        if parts:
            a, b = torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], 1)
        else:
            empty = torch.zeros((), dtype=base.dtype, device=base.device)
            a, b = empty.expand(1, base.shape[1]), empty.expand(base.shape[0], 1)
        return {f"{name}.lora_A.{_SLOT}.weight": a.to(base.dtype), f"{name}.lora_B.{_SLOT}.weight": b.to(base.dtype)}

    def _share_base(self, role: str, other: str) -> bool:
        return self._base_tensors[role] is self._base_tensors[other]

    def save(self, folder: str, role: str = "ema") -> None:
        """See `save_lora`."""
        self.save_lora(folder, role)

    def save_lora(self, folder: str, role: str = "ema") -> None:
        """Writes a role as `pytorch_lora_weights.safetensors`, alpha / rank in B as in `lora.baked`; plain diffusers loads it."""
        scale = self.config.lora_alpha / self.config.r
        state = {name: weight * scale if name.endswith(".lora_B.weight") else weight for name, weight in self.state(role).items()}
        config = {key: sorted(v) if isinstance(v, set) else v for key, v in self.config.to_dict().items()}
        self.model.save_lora(folder, state, config | {"lora_alpha": self.config.r})
        for file in Path(folder).glob("*.safetensors"):
            settle(file)
