"""What the rest of flowtilt asks of a model family. A model is one file that fulfils `Model`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from flowtilt.models.captions import Captions


@dataclass(frozen=True)
class Conditioning:
    """What a network reads of N captions, a caption that many images share being held once.

    Args:
        distinct: named tensors, the first axis of each going over distinct captions.
        rows: which of them each of the N is, [N] on the CPU.
    """

    distinct: Mapping[str, Tensor]
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, index: Tensor) -> "Conditioning":
        """The rows `index` [M], repeats allowed."""
        return Conditioning(self.distinct, self.rows[index])

    def join(self, other: "Conditioning") -> "Conditioning":
        """These rows, then the other's."""
        number = len(next(iter(self.distinct.values())))
        distinct = {name: torch.cat([x, other.distinct[name]]) for name, x in self.distinct.items()}
        return Conditioning(distinct, torch.cat([self.rows, number + other.rows]))

    def tensors(self) -> dict[str, Tensor]:
        """The N rows, each repeated wherever it occurs."""
        return {name: x[self.rows.to(x.device)] for name, x in self.distinct.items()}


class Model(Protocol):
    """A frozen pipeline around the one network that is trained.

    Its class is called with the pipeline and the keyword `offload`, and with `resolution`, `t5_length` and `[model]`'s
    `options` where the recipe has them.
    """

    network: Any
    """The network that predicts velocities; adapters are put on it, everything else stays as it was loaded."""
    blocks: Sequence[nn.Module]
    """Its repeated blocks, in order: what is compiled, sharded and recomputed one at a time."""
    latent_shape: tuple[int, ...]
    """Shape of one image's latents, without the batch."""
    shift: float
    """The sigma schedule's shift."""
    lora_targets: Sequence[str]
    """Ends of the names of the layers that LoRA adapts."""
    device: torch.device
    encode: "Captions"
    """Conditioning of N captions, `encode(texts)`; see `models.captions`."""
    pipeline: Any
    """The diffusers pipeline, with its `vae`."""
    protocol: Mapping[str, object]
    """What besides weights and sampler decides an image, by name: shift, resolution, lengths of prompts, …"""

    def velocity(self, x: Tensor, t: Tensor, conditioning: Conditioning, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """v [N, ...] fp32 at x [N, ...] fp32 and t [] or [N] in (0, 1]; `weights` replace the network's own by name."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images [N, 3, H, W] fp32 in [0, 1]; carries a gradient where the caller records one."""
        ...

    def call_options(self, guidance: float) -> Mapping[str, object]:
        """What a call of the diffusers pipeline must be told to draw what this model draws with that classifier-free guidance."""
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
