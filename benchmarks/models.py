"""Stable Diffusion 3 pipelines with random weights: for measuring a step, not for looking at its images.

    python benchmarks/models.py full FOLDER     # SD3.5-Medium as published: 16 GB in bfloat16
    python benchmarks/models.py lean FOLDER     # the same but for T5's depth, which no timing of the network needs: 7 GB
    python benchmarks/models.py small FOLDER    # the same structure, for a CPU: 18 MB

A pipeline is written to a folder and opened from there, as anybody's model is: a benchmark then runs flowtilt's own
code from the first line on, and one folder serves many commands. Weights are as the libraries initialise them, so every
block keeps the scale of what passes through it and all values stay finite in bfloat16.
"""

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from flowtilt.plan.published import PUBLISHED
from flowtilt.playground.pretrain import tokenizer
from flowtilt.prompts import Prompt

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Shapes:
    """What the modules of a pipeline are built from: configurations, tokens of a prompt for the CLIPs and the T5, shift of the levels."""

    transformer: Config
    vae: Config
    text_encoders: tuple[Config, ...]
    tokens: tuple[int, int] = (77, 512)
    shift: float = 3.0


_, _PARTS = PUBLISHED["stabilityai/stable-diffusion-3.5-medium"]
_CLIP_L, _CLIP_G, _T5 = (_PARTS[name][1] for name in ("text_encoder", "text_encoder_2", "text_encoder_3"))
FULL = Shapes(_PARTS["transformer"][1], _PARTS["vae"][1], (_CLIP_L, _CLIP_G, _T5))
_CLIP_SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "projection_dim": 32}
SMALL = replace(
    FULL,
    transformer={
        **FULL.transformer,
        "sample_size": 16,
        "num_layers": 4,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "joint_attention_dim": 96,
        "caption_projection_dim": 128,
        "pooled_projection_dim": 64,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0, 1),
    },
    vae={**FULL.vae, "block_out_channels": (16, 16, 32, 32), "norm_num_groups": 8, "sample_size": 128},
    text_encoders=(
        {**_CLIP_L, **_CLIP_SIZE},
        {**_CLIP_G, **_CLIP_SIZE},
        {**_T5, "d_model": 96, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 2},
    ),
)
"""Everything that SD3.5-Medium has, narrow and shallow: a second attention in half of its layers, normalised queries and keys,
three text encoders, 16 latent channels, a VAE that shrinks eightfold."""
LEAN = replace(FULL, text_encoders=(_CLIP_L, _CLIP_G, {**_T5, "num_layers": 2}))
SCALES = {"full": FULL, "lean": LEAN, "small": SMALL}


def write(scale: str, folder: Path, seed: int = 0) -> None:
    """Writes a random pipeline of `SCALES` to `folder`, in bfloat16.

    Modules are made one after another on the GPU where there is one, and collected in the computer's memory.
    """
    geometry = SCALES[scale]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # the largest first, while nothing else is there
        *clips, t5 = reversed([_made(lambda config=config: _encoder(config)) for config in reversed(geometry.text_encoders)])
        transformer = _made(lambda: SD3Transformer2DModel.from_config(dict(geometry.transformer)))
        vae = _made(lambda: AutoencoderKL.from_config(dict(geometry.vae)))
    words, letters = _tokenizers(geometry)
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=geometry.shift),
        vae=vae,
        text_encoder=clips[0],
        tokenizer=words,
        text_encoder_2=clips[1],
        tokenizer_2=words,
        text_encoder_3=t5,
        tokenizer_3=letters,
    ).save_pretrained(folder)


def _made(build: Any) -> Any:
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        module: nn.Module = build()
    return module.to("cpu", torch.bfloat16)


def _encoder(config: Config) -> nn.Module:
    if config["model_type"] == "t5":
        return T5EncoderModel(T5Config.from_dict(dict(config)))
    return CLIPTextModelWithProjection(CLIPTextConfig.from_dict(dict(config)))


def _tokenizers(geometry: Shapes) -> tuple[Any, Any]:
    """The playground's words and single letters, padded to the published lengths: what a prompt costs does not depend on its words."""
    with tempfile.TemporaryDirectory() as folder:
        words = tokenizer(Path(folder))
    words.model_max_length = geometry.tokens[0]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -1.0) for letter in "▁abcdefghijklmnopqrstuvwxyz")]
    letters = T5Tokenizer(vocab=vocabulary, extra_ids=0)
    letters.model_max_length = geometry.tokens[1]
    return words, letters


def brightness(images: Tensor, prompts: list[Prompt]) -> Tensor:
    """A reward that costs nothing: the mean of all pixels."""
    return images.mean((1, 2, 3))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="writes a Stable Diffusion 3 pipeline with random weights")
    parser.add_argument("scale", choices=SCALES)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    write(args.scale, args.folder)
