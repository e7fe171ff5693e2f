"""What the rest of flowtilt asks of a model family. `models.family.Family` has most of it for any diffusers pipeline."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flowtilt.models.captions import Captions
from flowtilt.models.conditioning import Conditioning
from flowtilt.models.levels import Levels


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
    resolution: int
    """Height and width of an image in pixels."""
    levels: Levels
    """The noise levels of a number of steps, `levels(steps)`, and `levels.at(u, steps)` between them."""
    lora_targets: Sequence[str]
    """Ends of the names of the layers that LoRA adapts."""
    device: torch.device
    encode: Captions
    """Conditioning of N captions, `encode(texts)`; see `models.captions`."""
    pipeline: Any
    """The diffusers pipeline, with its `vae`."""
    protocol: Mapping[str, object]
    """What besides weights and sampler decides an image, by name: shift, resolution, lengths of prompts, …"""

    def encode_negative(self) -> Conditioning:
        """What the network reads of the caption that guidance leads away from, one row."""
        ...

    def guide(self, v: Tensor, free: Tensor, guidance: float) -> Tensor:
        """The guided velocity [N, ...], of those with the caption and with the negative one; `guidance` = 1 is none."""
        ...

    def velocity(self, x: Tensor, t: Tensor, conditioning: Conditioning, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """v [N, ...] fp32 at x [N, ...] fp32 and t [] or [N] in (0, 1]; `weights` replace the network's own by name."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images [N, 3, H, W] fp32 in [0, 1]; carries a gradient where the caller records one."""
        ...

    def call_options(self, guidance: float) -> Mapping[str, object]:
        """What a call of the diffusers pipeline must be told to draw what this model draws with that classifier-free guidance."""
        ...

    def pipeline_latents(self, noise: Tensor) -> Tensor:
        """Noise [N, *latent_shape] as a call of the diffusers pipeline takes it in `latents`."""
        ...

    def save_lora(self, folder: str, state: Mapping[str, Tensor], config: Mapping[str, object]) -> None:
        """Writes `pytorch_lora_weights.safetensors`, alpha included, as the family's diffusers pipeline loads it."""
        ...


class RoleModel(Protocol):
    """A model whose network has several weights, by role: what a sampler draws from."""

    @property
    def model(self) -> Model: ...

    def velocity(self, role: str, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """v [N, ...] fp32 of a role at x_t [N, ...] and t [] or [N]."""
        ...
