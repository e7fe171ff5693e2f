"""LoRAs as plain tensors, whatever format they came in: W + scale B A for each layer they name.

`find` says which file of a place is meant, `read` turns it into a `Lora`, `stacked` puts each on top of what it was
trained on, `fit` checks one against a network, `write` and `merge` put it out again.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PARENTS = "flowtilt.parents"
"""Where files say which LoRAs lie beneath: a key of their metadata, a JSON list of fingerprints."""


@dataclass(frozen=True)
class Lora:
    """Low-rank updates of linear layers.

    Args:
        layers: by the layer's name in the network, "transformer_blocks.0.attn.to_q": A [r, in] and B [out, r], fp32, on the CPU.
        alphas: alpha of each layer.
        source: the file, for messages.
        parents: fingerprints of the LoRAs that were beneath it in training, in order; none for one on a bare base.
    """

    layers: Mapping[str, tuple[Tensor, Tensor]]
    alphas: Mapping[str, float]
    source: str
    parents: tuple[str, ...] = ()

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


def baked(lora: Lora, ratio: float = 1.0) -> Lora:
    """The same LoRA with alpha = `ratio` x rank in every layer: what it had beyond that is in B.

    Whoever loads it without its alpha, as most tools do, then has its full strength. A scale that is a power of two, as alpha 64
    of rank 32, changes no bit of W + scale B A; any other rounds each number of B once.
    """
    layers = {layer: (a, b if lora.scale(layer) == ratio else b * (lora.scale(layer) / ratio)) for layer, (a, b) in lora.layers.items()}
    alphas = {layer: ratio * lora.rank(layer) for layer in lora.layers}
    return Lora(layers, alphas, lora.source, lora.parents)


def parents_metadata(parents: Sequence[str]) -> dict[str, str]:
    """The metadata that says what lies beneath a LoRA; empty for one on a bare base."""
    return {PARENTS: json.dumps(list(parents))} if parents else {}


def fingerprint(lora: Lora) -> str:
    """Which LoRA it is, whatever file it came in: SHA-256, hexadecimal, of its layers' names, A, and B with its scale in it, in fp32.

    A file in half precision holds another LoRA, with another fingerprint, than the fp32 one that it was rounded from.
    """
    return _digest(baked(lora))


def is_named(lora: Lora, name: str) -> bool:
    """Whether `name` is this LoRA's fingerprint, or the one that flowtilt 0.1 gave it, of B as it is and alpha."""
    return name in (fingerprint(lora), _digest(lora))


def are_named(loras: Sequence[Lora], names: Sequence[str]) -> bool:
    """Whether `names` are the fingerprints of `loras`, in order."""
    return len(loras) == len(names) and all(map(is_named, loras, names))


def _digest(lora: Lora) -> str:
    found = hashlib.sha256()
    for layer, (a, b) in sorted(lora.layers.items()):
        found.update(f"{layer} {list(a.shape)} {list(b.shape)} {float(lora.alphas[layer]).hex()}\n".encode())
        found.update(a.numpy().tobytes())
        found.update(b.numpy().tobytes())
    return found.hexdigest()


def join(loras: Sequence[Lora]) -> Lora:
    """One LoRA that adds what several add: A = [A1; A2], B = [s1 B1, s2 B2], alpha = the sum of the ranks.

    Nothing is approximated: B A is s1 B1 A1 + s2 B2 A2. What lay beneath the first lies beneath the whole. A single one
    comes back as it is.
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
    return Lora(layers, alphas, " + ".join(lora.source for lora in loras), loras[0].parents)
