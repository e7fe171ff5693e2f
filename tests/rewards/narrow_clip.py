"""CLIP weights of a few thousand random numbers, in the very layouts that are published."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from flowtilt.rewards import keymap
from flowtilt.seeding import generator

WORDS = ("cat", "dog", "red")
"""That are one token each in the narrow vocabulary; other words are read letter by letter."""


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """CLIP's way of naming tokens: bytes, bytes at a word's end, merges, start and end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [pair for w in WORDS for pair in (f"{w[0]} {w[1]}", f"{w[:2]} {w[2]}</w>")]
    tokens = [*letters, *(f"{c}</w>" for c in letters), *(m.replace(" ", "") for m in merges), "<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}, merges


def config(act: str = "gelu", logit_scale: float = math.log(100)) -> CLIPConfig:
    """A CLIP of 224 x 224 pixels and 77 tokens that is narrow in everything else."""
    size = len(vocabulary()[0])
    narrow = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": act}
    return CLIPConfig(
        projection_dim=16,
        logit_scale_init_value=logit_scale,
        vision_config=narrow | {"hidden_size": 32, "image_size": 224, "patch_size": 56},
        text_config=narrow | {"hidden_size": 24, "vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1},
    )


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Numbers of a size at which no layer dies or saturates."""
    found = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        noise = torch.randn(shape, generator=generator(seed, "narrow", number))
        norm_weight = len(shape) == 1 and name.endswith("weight")
        found[name] = 1 + 0.1 * noise if norm_weight else 0.2 * noise if len(shape) < 2 else noise / math.sqrt(shape[-1])
    return found


def state(configuration: CLIPConfig, seed: int = 0) -> dict[str, Tensor]:
    """A random state dict in transformers' layout."""
    wanted = keymap.build(lambda: CLIPModel(configuration)).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    return random_state(shapes, seed) | {"logit_scale": torch.tensor(float(configuration.logit_scale_init_value or 0))}


def open_clip_shapes(embed: int, vision: dict[str, int], text: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of open_clip's CLIP.

    Args:
        vision: width, layers, mlp, patch_size, image_size.
        text: width, layers, mlp, vocab_size, context_length.
    """
    v, t = vision["width"], text["width"]
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "visual.class_embedding": (v,),
        "visual.conv1.weight": (v, 3, vision["patch_size"], vision["patch_size"]),
        "visual.positional_embedding": ((vision["image_size"] // vision["patch_size"]) ** 2 + 1, v),
        "visual.proj": (v, embed),
        "positional_embedding": (text["context_length"], t),
        "token_embedding.weight": (text["vocab_size"], t),
        "text_projection": (t, embed),
    }
    norms = {"visual.ln_pre": v, "visual.ln_post": v, "ln_final": t}
    for tower, prefix in ((vision, "visual.transformer"), (text, "transformer")):
        w, mlp = tower["width"], tower["mlp"]
        for layer in range(tower["layers"]):
            block = f"{prefix}.resblocks.{layer}"
            norms |= {f"{block}.ln_1": w, f"{block}.ln_2": w}
            shapes |= {f"{block}.attn.in_proj_weight": (3 * w, w), f"{block}.attn.in_proj_bias": (3 * w,)}
            for name, outer, inner in (("attn.out_proj", w, w), ("mlp.c_fc", mlp, w), ("mlp.c_proj", w, mlp)):
                shapes |= {f"{block}.{name}.weight": (outer, inner), f"{block}.{name}.bias": (outer,)}
    return shapes | {f"{name}.{kind}": (width,) for name, width in norms.items() for kind in ("weight", "bias")}


def narrow_open_clip() -> dict[str, tuple[int, ...]]:
    """The open_clip names and shapes of `config`."""
    vision = {"width": 32, "layers": 2, "mlp": 48, "patch_size": 56, "image_size": 224}
    text = {"width": 24, "layers": 2, "mlp": 48, "vocab_size": len(vocabulary()[0]), "context_length": 77}
    return open_clip_shapes(16, vision, text)


def write_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt."""
    vocab, merges = vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))


def write_folder(folder: Path, configuration: CLIPConfig, seed: int) -> None:
    """config.json and model.safetensors, with the position numbers that older transformers stored too."""
    folder.mkdir(parents=True)
    configuration.save_pretrained(folder)
    stored = state(configuration, seed) | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})


def write_all(folder: Path) -> None:
    """The weights of PickScore, ClipScore, HPSv2 and Aesthetic as they are published, but narrow."""
    write_folder(folder / "openai" / "clip-vit-large-patch14", config("quick_gelu"), seed=1)
    write_tokenizer(folder / "openai" / "clip-vit-large-patch14")
    write_folder(folder / "yuvalkirstain" / "PickScore_v1", config(), seed=2)
    hps = random_state(narrow_open_clip(), seed=3) | {"logit_scale": torch.tensor(math.log(100))}
    torch.save({"epoch": 1, "state_dict": {name: tensor.half() for name, tensor in hps.items()}}, folder / "HPS_v2.1_compressed.pt")
    widths = (16, 1024, 128, 64, 16, 1)
    head: dict[str, tuple[int, ...]] = {}
    for place, inner, outer in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        head |= {f"layers.{place}.weight": (outer, inner), f"layers.{place}.bias": (outer,)}
    torch.save(random_state(head, seed=4), folder / "sac+logos+ava1-l14-linearMSE.pth")
