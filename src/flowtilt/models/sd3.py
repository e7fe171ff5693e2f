"""The Stable Diffusion 3 family: SD3-Medium, SD3.5-Medium and -Large, and the playground.

SD3 (arXiv 2403.03206) reads three text encoders and predicts v at timestep 1000 t, a float that is
never rounded. Latents are fp32; the network computes in its own dtype and its velocity comes back fp32.
"""

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from torch.func import functional_call
from transformers.utils import logging as transformers_logging

from flowtilt.errors import UserError
from flowtilt.files import digest
from flowtilt.models.base import Conditioning

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
T5_LENGTH = 128
"""DiffusionNFT's, in training and evaluation; diffusers' own default is 256."""
CACHED_BYTES = 256 * 2**20
"""Text embeddings that are kept, in bytes; the oldest go first."""


def load_pipeline(path: str, *, revision: str | None, dtype: str, device: torch.device) -> Any:
    """Loads a folder or hub id; "playground" is the pipeline inside the package.

    Raises:
        UserError: nothing can be loaded from there, or it is no SD3 pipeline.
    """
    if path == "playground":
        from flowtilt.playground import pipeline_path

        path = str(pipeline_path())
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, "model_index.json")):
        raise UserError(f"model {path}: no model_index.json there; give the folder that save_pretrained wrote")
    loggers = [logging for logging in (diffusers_logging, transformers_logging) if logging.is_progress_bar_enabled()]
    for logging in loggers:
        logging.disable_progress_bar()
    try:
        pipeline = StableDiffusion3Pipeline.from_pretrained(path, revision=revision, dtype=DTYPES[dtype])
    except Exception as error:  # the hub, the disk and three libraries each raise their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model {path}: can't be loaded as a Stable Diffusion 3 pipeline: {reason}") from error
    finally:
        for logging in loggers:
            logging.enable_progress_bar()
    pipeline.to(device)
    # eight bits of a bfloat16 are fewer than a picture's eight near white, and every score is of pictures
    pipeline.vae.to(torch.float32)
    return pipeline


def fingerprint(path: str, revision: str | None) -> dict[str, str]:
    """Which weights these are: a hub snapshot's commit, or the SHA-256 of each weights file of a folder."""
    if path == "playground":
        from flowtilt.playground import pipeline_path

        path = str(pipeline_path())
    if os.path.isdir(path):
        return {str(file.relative_to(path)): digest(file) for file in sorted(Path(path).rglob("*.safetensors"))}
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(path, "model_index.json", revision=revision)
    return {"commit": Path(cached).parent.name} if isinstance(cached, str) else {}


@contextmanager
def _no_truncation_warnings() -> Iterator[None]:
    """A T5 of one token, the playground's, says nothing; that captions do not fit into it is no news."""
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(level)


class SD3:
    """An SD3 pipeline as a `Model`.

    Args:
        pipeline: its modules are frozen in place.
        t5_length: tokens of the T5 prompt, 0 to 512; none takes 128, or what the T5 reads, or 0 without one.
        resolution: height and width in pixels; none takes the pipeline's own.
    """

    # of the joint attention alone, as in the public checkpoints: SD3.5-Medium's second attention (attn2) stays as it is
    lora_targets: Sequence[str] = tuple(
        f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    )

    def __init__(self, pipeline: Any, *, t5_length: int | None = None, resolution: int | None = None):
        if t5_length is None:
            t5_length = 0 if pipeline.text_encoder_3 is None else min(T5_LENGTH, pipeline.tokenizer_3.model_max_length)
        if t5_length == 0 and pipeline.text_encoder_3 is not None:
            raise UserError("model.t5_length: 0 would leave out this pipeline's T5; 128 is SD3.5-Medium's")
        self.pipeline = pipeline
        self.t5_length = t5_length
        self.network: Any = pipeline.transformer  # diffusers leaves its attributes untyped
        for module in (self.network, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
            if module is not None:
                module.requires_grad_(False).eval()
        self.device: torch.device = self.network.device
        scale = pipeline.vae_scale_factor
        size = resolution or self.network.config.sample_size * scale
        largest = scale * self.network.config.patch_size * self.network.config.pos_embed_max_size
        if size > largest:
            raise UserError(f"model.resolution: {size} is beyond the {largest} that this network has positions for")
        if size % (scale * self.network.config.patch_size):
            raise UserError(f"model.resolution: {size} is not a multiple of {scale * self.network.config.patch_size}")
        self.latent_shape: tuple[int, ...] = (self.network.config.in_channels, size // scale, size // scale)
        self.shift = float(pipeline.scheduler.config.shift)
        self.call_options: Mapping[str, object] = {"max_sequence_length": t5_length}
        self._cache: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Conditioning of N captions, as the pipeline's own `encode_prompt` makes it; each distinct one is encoded once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._cache]
        for text in new:
            # one at a time: in a batch, roundings would depend on which captions happened to be new together
            with _no_truncation_warnings() if self.t5_length == 1 else nullcontext():
                embeds, _, pooled, _ = self.pipeline.encode_prompt(
                    [text], [text], [text], device=self.device, do_classifier_free_guidance=False, max_sequence_length=self.t5_length
                )
            self._cache[text] = (embeds[0], pooled[0])
        found = [self._cache[text] for text in texts]
        one = sum(x.nbytes for x in found[0])
        while len(self._cache) * one > CACHED_BYTES:
            self._cache.popitem(last=False)
        return Conditioning(
            {"encoder_hidden_states": torch.stack([e for e, _ in found]), "pooled_projections": torch.stack([p for _, p in found])}
        )

    def velocity(self, x: Tensor, t: Tensor, conditioning: Conditioning, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """v at x [N, C, h, w] and t [] or [N]; see `Model.velocity`."""
        dtype = self.network.dtype
        inputs = {
            "hidden_states": x.to(dtype),
            "timestep": (1000 * t).expand(len(x)),
            "return_dict": False,
            **{name: value.to(dtype) for name, value in conditioning.tensors.items()},
        }
        out = functional_call(self.network, dict(weights), (), inputs) if weights else self.network(**inputs)
        return out[0].float()

    def decode(self, latents: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [0, 1]."""
        vae = self.pipeline.vae
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        images = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def save_lora(self, folder: str, state: Mapping[str, Tensor], config: Mapping[str, object]) -> None:
        """Writes the LoRA in diffusers' format; see `Model.save_lora`."""
        self.pipeline.save_lora_weights(folder, transformer_lora_layers=dict(state), transformer_lora_adapter_metadata=dict(config))
