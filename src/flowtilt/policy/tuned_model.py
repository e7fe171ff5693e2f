"""What was trained on a pipeline, for sampling: "tuned" has LoRAs added up, or all weights replaced; "base" is without."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from flowtilt.lora import Lora, join
from flowtilt.lora.fit import check, linear_layers, shapes_of
from flowtilt.lora.write import peft_config
from flowtilt.models.base import Model
from flowtilt.models.conditioning import Conditioning
from flowtilt.models.quantized import is_quantized, unmerged
from flowtilt.policy.whole import read_weights


class TunedModel:
    """A model with LoRAs, or with all weights of its network from a file.

    On an fp32 base the sum is merged exactly as `Policy` merges, so that a run's LoRA draws the same bits
    here as in training; on a half-precision base PEFT's layers add it to each activation, in the base's
    precision, as `Policy` does.

    Args:
        model: on a half-precision base its network gets an adapter.
        loras: what adds up.
        whole: weights in the place of the network's own.

    Raises:
        UserError: a LoRA changes a layer that this model lacks, or that has another shape here; so have the weights.
    """

    def __init__(self, model: Model, loras: Sequence[Lora], whole: Path | None = None):
        self.model = model
        shapes = shapes_of(model.network)
        for lora in loras:
            check(lora, shapes)
        self._weights: dict[str, Tensor] = {}
        self._layers: dict[str, Any] = {}  # PEFT types its layers as bare modules
        if whole:
            self._weights = _read_whole(model, whole)
        elif model.network.dtype == torch.float32 and not is_quantized(model):
            self._weights = self._merged(loras)
        elif loras:
            self._layers = self._adapted(join(loras))
            self._activate(False)

    @torch.no_grad()
    def _merged(self, loras: Sequence[Lora]) -> dict[str, Tensor]:
        found = {}
        linear = linear_layers(self.model.network)
        for lora in loras:
            for layer, (a, b) in lora.layers.items():
                weight = found.get(f"{layer}.weight", linear[layer].weight)
                found[f"{layer}.weight"] = torch.addmm(weight, b.to(weight.device), a.to(weight.device), alpha=lora.scale(layer))
        return found

    def _adapted(self, lora: Lora) -> dict[str, Any]:
        network = self.model.network
        device, dtype = self.model.device, network.dtype  # asked once: the network walks over all of its parameters
        with unmerged():
            network.add_adapter(peft_config(lora), adapter_name="stack")
        adapted: dict[str, Any] = {name: m for name, m in network.named_modules() if isinstance(m, LoraLayer)}
        for name, (a, b) in lora.layers.items():
            adapted[name].lora_A["stack"].weight.data = a.to(device, dtype)
            adapted[name].lora_B["stack"].weight.data = b.to(device, dtype)
        return adapted

    def _activate(self, on: bool) -> None:
        for layer in self._layers.values():
            layer.enable_adapters(on)

    def velocity(self, role: str, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """v [N, ...] fp32 of "tuned" or "base" at x_t [N, ...] and t [] or [N]."""
        if role == "base" or not self._layers:
            return self.model.velocity(x_t, t, conditioning, self._weights if role == "tuned" else None)
        self._activate(True)
        try:
            return self.model.velocity(x_t, t, conditioning)
        finally:
            self._activate(False)


def _read_whole(model: Model, file: Path) -> dict[str, Tensor]:
    """All weights of a file, each in the precision and on the device of the network's own."""
    own: dict[str, Tensor] = model.network.state_dict()
    return {name: x.to(own[name].device, own[name].dtype) for name, x in read_weights(file, own).items()}
