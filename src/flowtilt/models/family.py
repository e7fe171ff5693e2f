"""The base class of model families: a diffusers pipeline as a `Model`, with what differs between families declared.

A family says how it reads a caption, what its network takes, and where it departs from the defaults below. docs/guides/add-a-model.md shows
one in full.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from flowtilt.errors import UserError
from flowtilt.models import pipeline as common
from flowtilt.models.captions import captions_of
from flowtilt.models.conditioning import Conditioning
from flowtilt.models.guidance import linear
from flowtilt.models.levels import levels_of, mu_by_tokens
from flowtilt.prompts import Caption

ATTENTION: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
"""Ends of the names of an attention's projections."""
JOINT: tuple[str, ...] = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""The same with those of the caption, in a joint attention."""


class Family:
    """A pipeline as a `Model`.

    Args:
        pipeline: as `load_pipeline` gives it; the network's device is where everything is computed.
        resolution: height and width in pixels; none takes the pipeline's own.
        text_length: tokens of a caption; none takes the pipeline's own.
        offload: keep the embeddings of captions on disk, for text encoders that are not on the device.

    Raises:
        UserError: settings that this pipeline can't have, or a text encoder that it lacks.
    """

    lora_targets: Sequence[str] = JOINT
    """Ends of the names of the layers that LoRA adapts."""
    block_lists: ClassVar[Sequence[str]] = ("transformer_blocks",)
    """The network's lists of repeated blocks, in order."""
    encoders: ClassVar[Sequence[str]] = ("text_encoder",)
    """The pipeline's text encoders that can't be left out."""
    patch: ClassVar[int] = 2
    """Latents on a side of one token."""
    least_text: ClassVar[int] = 1
    """The least `text_length`; 0 where it is that of an encoder which can be left out."""
    longest_text: ClassVar[int] = 512
    """The pipeline's own `max_sequence_length`, tokens of a caption."""
    ragged: ClassVar[bool] = False
    """Whether `read` gives as many tokens as the caption has; otherwise it pads all captions alike."""
    row_by_row: ClassVar[bool] = False
    """Whether the network's code goes over rows or their tokens in Python; `flowtilt plan` then measures few of them."""
    negative: ClassVar[str] = ""
    """The caption that guidance leads away from."""
    guidable: ClassVar[bool] = True
    """Whether the stock pipeline has classifier-free guidance."""
    negated: ClassVar[bool] = False
    """Whether the network predicts data minus noise."""
    edits: ClassVar[bool] = False
    """Whether a caption comes with a source image; see `models.editing`."""
    several_passes: ClassVar[bool] = False
    """Whether a batch of unlike captions passes the network several times, which ranks that share its weights can't do in step."""
    one_by_one: ClassVar[bool] = False
    """Whether the stock pipeline has to be called with one prompt at a time, for images that depend on no other prompt."""

    def __init__(self, pipeline: Any, *, resolution: int | None = None, text_length: int | None = None, offload: bool = False):
        self.pipeline = pipeline
        self.network: Any = pipeline.transformer  # diffusers leaves its attributes untyped
        self.blocks: Sequence[nn.Module] = [block for name in self.block_lists for block in getattr(self.network, name)]
        self.device: torch.device = self.network.device
        self.dtype: torch.dtype = self.network.dtype  # kept: asking the network walks over all of its parameters
        for name in self.encoders:
            if getattr(pipeline, name, None) is None:
                raise UserError(f"model: this {type(pipeline).__name__} has no {name}, which reads captions; give a folder that has it")
        self.text_length = self.longest_text if text_length is None else text_length
        if type(self.text_length) is not int or self.text_length < self.least_text:
            least = f"a whole number of tokens of at least {self.least_text}"
            raise UserError(f"model.options.text_length: must be {least}, not {text_length!r}")
        self.scale: int = pipeline.vae_scale_factor
        self.resolution = common.check_resolution(resolution or self.own_resolution(), self.patch * self.scale, self.largest_resolution())
        self.side = self.resolution // self.scale
        self.latent_shape: tuple[int, ...] = self.shape_of_latents()
        self.levels = levels_of(pipeline.scheduler.config, self.mu)
        negative = self.negative if self.edits else None
        self.encode = captions_of(pipeline, self._read, self.device, offload, *self._said(), ragged=self.ragged, negative=negative)
        self.protocol: Mapping[str, object] = {**self.levels.protocol(), "resolution": self.resolution, "text_length": self.text_length}
        self.offload = offload
        self.prepare()

    def _said(self) -> tuple[object, ...]:
        """What decides an embedding besides the encoders."""
        return type(self).__name__, self.text_length, str(self.dtype)

    def _read(self, caption: Caption) -> Mapping[str, Tensor]:
        return self.read(str(caption))

    # what a family must have ------------------------------------------------------------------------------

    def read(self, text: str) -> Mapping[str, Tensor]:
        """What the network reads of one caption, without a batch axis, as the pipeline's own `encode_prompt` makes it."""
        raise NotImplementedError(f"{type(self).__name__}.read: what the network reads of a caption")

    def blank(self, tokens: int) -> dict[str, Tensor]:
        """Tensors like those that `read` gives of a caption of so many tokens, without its numbers; for `flowtilt plan` alone."""
        raise UserError(f"plan: {type(self).__name__} does not say what its network reads of a caption; give it a method blank(tokens)")

    # what it may have otherwise ---------------------------------------------------------------------------

    def prepare(self) -> None:
        """Makes what else the family keeps; called once, when all of the above is known."""

    def inputs(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """The network's arguments by name, for packed latents x in its precision and t [N] as `time` maps it."""
        given = {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in conditioning.tensors().items()}
        return {"hidden_states": x, "timestep": t, **given}

    def pack(self, x: Tensor) -> Tensor:
        """Latents [N, *latent_shape] as the network takes them."""
        return x

    def unpack(self, v: Tensor) -> Tensor:
        """What the network gives, as [N, *latent_shape]."""
        return v

    def time(self, t: Tensor) -> Tensor:
        """t in [0, 1], 1 being noise, as the network takes it."""
        return t

    def mu(self, steps: int) -> float:
        """The pipeline's mu for a scheduler with dynamic shifting."""
        return mu_by_tokens(self.pipeline.scheduler.config, (self.side // self.patch) ** 2)

    def guide(self, v: Tensor, free: Tensor, guidance: float) -> Tensor:
        """The guided velocity, of those with the caption and with the negative one."""
        return linear(v, free, guidance)

    def unscaled(self, latents: Tensor) -> Tensor:
        """Latents as the VAE takes them."""
        config = self.pipeline.vae.config
        return latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0)

    def encode_negative(self) -> Conditioning:
        """What the network reads of the negative caption, one row."""
        return self.encode([self.negative])

    def shape_of_latents(self) -> tuple[int, ...]:
        """Shape of one image's latents, without the batch."""
        return self.network.config.in_channels, self.side, self.side

    def own_resolution(self) -> int:
        """The pipeline's own height and width."""
        return getattr(self.pipeline, "default_sample_size", 1024 // self.scale) * self.scale

    def largest_resolution(self) -> int | None:
        """The largest that the network has positions for; none where there is no limit."""
        return None

    def call_options(self, guidance: float) -> Mapping[str, object]:
        """See `Model.call_options`."""
        size = {"height": self.resolution, "width": self.resolution}
        return {"guidance_scale": guidance, **size, "max_sequence_length": self.text_length}

    def pipeline_latents(self, noise: Tensor) -> Tensor:
        """See `Model.pipeline_latents`."""
        return self.pack(noise)

    def empty(self, *shape: int) -> Tensor:
        """A tensor in the network's precision on its device; the numbers in it are arbitrary."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    # the same for all -------------------------------------------------------------------------------------

    def velocity(self, x: Tensor, t: Tensor, conditioning: Conditioning, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """v at x [N, *latent_shape] and t [] or [N]; see `Model.velocity`."""
        inputs = self.inputs(self.pack(x).to(self.dtype), self.time(t).expand(len(x)), conditioning)
        v = self.unpack(common.call(self.network, weights, **inputs))
        return -v if self.negated else v

    def decode(self, latents: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [0, 1]."""
        return common.decode(self.pipeline.vae, self.unscaled(latents))

    def save_lora(self, folder: str, state: Mapping[str, Tensor], config: Mapping[str, object]) -> None:
        """Writes the LoRA in diffusers' format; see `Model.save_lora`."""
        common.save_lora(self.pipeline, folder, state, config)


class Packed(Family):
    """A family whose network sees each 2 x 2 patch of latents as one token of four times the channels."""

    def shape_of_latents(self) -> tuple[int, ...]:
        """Shape of one image's latents, a quarter of the network's channels."""
        return self.network.config.in_channels // 4, self.side, self.side

    def pack(self, x: Tensor) -> Tensor:
        """[N, C, h, w] as tokens [N, h w / 4, 4 C]."""
        return pixel_unshuffle(x, 2).flatten(2).mT

    def unpack(self, v: Tensor) -> Tensor:
        """Tokens as [N, C, h, w]."""
        return pixel_shuffle(v.mT.unflatten(2, (self.side // 2, self.side // 2)), 2)
