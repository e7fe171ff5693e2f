"""What the rest of flowtilt asks of a model family. A model is one file that fulfils `Model`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Conditioning:
    """What a network reads of N captions: named tensors, each with first axis N."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def select(self, index: Tensor) -> "Conditioning":
        """The rows `index` [M], repeats allowed."""
        return Conditioning({name: x[index.to(x.device)] for name, x in self.tensors.items()})

    def join(self, other: "Conditioning") -> "Conditioning":
        """These rows, then the other's."""
        return Conditioning({name: torch.cat([x, other.tensors[name]]) for name, x in self.tensors.items()})


class Model(Protocol):
    """A frozen pipeline around the one network that is trained."""

    network: nn.Module
    """The network that predicts velocities; adapters are put on it, everything else stays as it was loaded."""
    latent_shape: tuple[int, ...]
    """Shape of one image's latents, without the batch."""
    shift: float
    """The sigma schedule's shift."""
    lora_targets: Sequence[str]
    """Ends of the names of the layers that LoRA adapts."""
    device: torch.device
    call_options: Mapping[str, object]
    """What a call of the diffusers pipeline must be told to draw what this model draws."""

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Conditioning of N captions; a caption that occurs twice is encoded once."""
        ...

    def velocity(self, x: Tensor, t: Tensor, conditioning: Conditioning, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """v [N, ...] fp32 at x [N, ...] fp32 and t [] or [N] in (0, 1]; `weights` replace the network's own by name."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images [N, 3, H, W] fp32 in [0, 1]; carries a gradient where the caller records one."""
        ...

    def save_lora(self, folder: str, state: Mapping[str, Tensor], config: Mapping[str, object]) -> None:
        """Writes `pytorch_lora_weights.safetensors`, alpha included, as the family's diffusers pipeline loads it."""
        ...


class Drawing(Protocol):
    """A model whose network has several weights, by role: what a sampler draws from."""

    @property
    def model(self) -> Model: ...

    def velocity(self, role: str, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """v [N, ...] fp32 of a role at x_t [N, ...] and t [] or [N]."""
        ...
