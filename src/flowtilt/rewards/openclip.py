"""open_clip's checkpoints and captions in terms of transformers' CLIP.

    open_clip                                        transformers
    visual.proj, text_projection (width x embed)     …_projection.weight, transposed
    attn.in_proj_{weight,bias}                       {q,k,v}_proj: three equal parts of its rows
    visual.ln_pre                                    vision_model.pre_layrnorm (spelt so)

The activation is not in a checkpoint: ViT-H-14 of LAION uses the exact GELU, OpenAI's ViT-L-14 x sigmoid(1.702 x).
"""

import html
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor
from transformers import CLIPConfig

from flowtilt.rewards import keymap

_BLOCK = {
    "attn.in_proj_*": "self_attn.{q,k,v}_proj.*",
    "attn.out_proj.*": "self_attn.out_proj.*",
    "ln_#.*": "layer_norm#.*",
    "mlp.c_fc.*": "mlp.fc1.*",
    "mlp.c_proj.*": "mlp.fc2.*",
}
NAMES: dict[str, str | None] = {
    "logit_scale": "logit_scale",
    "attn_mask": None,  # a buffer that is computed anew
    "visual.proj": "visual_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.*": "vision_model.pre_layrnorm.*",
    "visual.ln_post.*": "vision_model.post_layernorm.*",
    "text_projection": "text_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.*": "text_model.final_layer_norm.*",
    **{f"visual.transformer.resblocks.#.{old}": f"vision_model.encoder.layers.#.{new}" for old, new in _BLOCK.items()},
    **{f"transformer.resblocks.#.{old}": f"text_model.encoder.layers.#.{new}" for old, new in _BLOCK.items()},
}
"""open_clip's names and transformers'; see `flowtilt.rewards.keymap.rename`."""


def to_transformers(state: Mapping[str, Tensor], path: Path = Path("open_clip weights")) -> dict[str, Tensor]:
    """An open_clip state dict as CLIPModel's, in fp32; a prefix "module." is dropped.

    Args:
        path: where it comes from, for messages.

    Raises:
        UserError: a name that open_clip's CLIP does not have.
    """
    renamed = keymap.rename({name.removeprefix("module."): tensor for name, tensor in state.items()}, NAMES, path)
    projections = {name: renamed[name].T.contiguous() for name in ("visual_projection.weight", "text_projection.weight") if name in renamed}
    return renamed | projections


def config(name: Literal["ViT-H-14", "ViT-L-14"]) -> CLIPConfig:
    """The architecture of LAION's ViT-H-14 (986 million parameters) or OpenAI's ViT-L-14 (428 million)."""
    huge = name == "ViT-H-14"
    return CLIPConfig(
        projection_dim=1024 if huge else 768,
        vision_config={
            "image_size": 224,
            "patch_size": 14,
            "hidden_size": 1280 if huge else 1024,
            "intermediate_size": 5120 if huge else 4096,
            "num_hidden_layers": 32 if huge else 24,
            "num_attention_heads": 16,
            "hidden_act": "gelu" if huge else "quick_gelu",
        },
        text_config={
            "vocab_size": 49408,
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "max_position_embeddings": 77,
            "hidden_size": 1024 if huge else 768,
            "intermediate_size": 4096 if huge else 3072,
            "num_hidden_layers": 24 if huge else 12,
            "num_attention_heads": 16 if huge else 12,
            "hidden_act": "gelu" if huge else "quick_gelu",
        },
    )


_LETTERS = str.maketrans(
    {
        **dict.fromkeys("‘’‚‛ʼ", "'"),
        **dict.fromkeys("“”„‟", '"'),
        **{"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "ſt", "ﬆ": "st", "Ĳ": "IJ", "ĳ": "ij", "ŉ": "'n"},
        **{chr(code): unicodedata.normalize("NFKC", chr(code)) for code in (0x3000, *range(0xFF01, 0xFFF0))},
        **dict.fromkeys("\r\u2028\u2029\x85", "\n"),
        **dict.fromkeys((*range(9), 0x0B, 0x0C, *range(0x0E, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)), None),
    }
)


def clean(text: str) -> str:
    """A caption with plain quotes, letters and line breaks, for models that were trained on open_clip's captions.

    What ftfy and open_clip's own cleaning do to prompts, without ftfy's repair of wrongly decoded text.
    Blanks and capitals are left to the tokenizer.
    """
    text = text if "<" in text else html.unescape(text)  # ftfy takes what has "<" for HTML and leaves its entities
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").translate(_LETTERS))
    return html.unescape(html.unescape(text)).strip()
