"""LoRAs as plain tensors, whatever format they came in: W + scale B A for each layer they name.

`find` says which file of a place is meant, `read` turns it into a `Lora`, `fit` checks one against a network,
`write` and `merge` put it out again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Lora:
    """Low-rank updates of linear layers.

    Args:
        layers: by the layer's name in the network, "transformer_blocks.0.attn.to_q": A [r, in] and B [out, r], fp32, on the CPU.
        alphas: alpha of each layer.
        source: the file, for messages.
    """

    layers: Mapping[str, tuple[Tensor, Tensor]]
    alphas: Mapping[str, float]
    source: str

    def rank(self, layer: str) -> int:
        """r of a layer."""
        return len(self.layers[layer][0])

    def scale(self, layer: str) -> float:
        """What multiplies B A in a layer: alpha / r."""
        return self.alphas[layer] / self.rank(layer)

    def ranks(self) -> list[int]:
        """The ranks that occur."""
        return sorted({self.rank(layer) for layer in self.layers})

    def scales(self) -> list[float]:
        """The scales that occur."""
        return sorted({self.scale(layer) for layer in self.layers})


def join(loras: Sequence[Lora]) -> Lora:
    """One LoRA that adds what several add: A = [A1; A2], B = [s1 B1, s2 B2], alpha = the sum of the ranks.

    Nothing is approximated: B A is s1 B1 A1 + s2 B2 A2. A single one comes back as it is.
    """
    if len(loras) == 1:
        return loras[0]
    layers = {}
    for layer in dict.fromkeys(layer for lora in loras for layer in lora.layers):
        having = [lora for lora in loras if layer in lora.layers]
        a = torch.cat([lora.layers[layer][0] for lora in having])
        b = torch.cat([lora.layers[layer][1] * lora.scale(layer) for lora in having], dim=1)
        layers[layer] = (a, b)
    alphas = {layer: float(len(a)) for layer, (a, _) in layers.items()}
    return Lora(layers, alphas, " + ".join(lora.source for lora in loras))
