"""What tiny pipelines have in common: a tokenizer of letters, an autoencoder, and networks whose captions show."""

import torch
from diffusers import (
    AutoencoderKL,
)
from transformers import (
    T5Tokenizer,
)

WIDTH = 48


def letters() -> T5Tokenizer:
    """A T5 tokenizer with a token for each letter."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -1.0) for c in "▁abcdefghijklmnopqrstuvwxyz")]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0)


def vae(blocks: int = 2, **config: float | None) -> AutoencoderKL:
    """An autoencoder of a factor of two, or of more blocks; `config` replaces its 16 channels or FLUX.1's factors."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **{"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, **config},
    )


def loud(network: torch.nn.Module, factor: float) -> None:
    """Multiplies every matrix, so that a caption shows in the image of a network with random weights."""
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim == 2:
                weight *= factor
