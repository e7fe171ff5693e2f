"""The names of layers in other tools' files, as diffusers' networks have them.

kohya's sd-scripts, ComfyUI and ai-toolkit name layers as the models' original code does: "joint_blocks.0.x_block.attn.qkv"
for SD3, "double_blocks.0.img_attn.qkv" for FLUX.1, kohya with underscores in the place of dots. Queries, keys and values
are one layer there and three here. diffusers' own conversions of SD3 and FLUX.1 checkpoints have the same table.
"""

import re

from torch import Tensor

PREFIXES = ("module.", "base_model.model.", "transformer.", "model.diffusion_model.", "diffusion_model.")
"""Of DDP, PEFT, diffusers, and the models' original code."""
UNDERSCORED = ("lora_unet_", "lora_transformer_")
"""Of kohya's sd-scripts and of OneTrainer, after which dots are underscores."""
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts that torch's wrappers put into names."""

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_SECOND = ("attn2.to_q", "attn2.to_k", "attn2.to_v")

BLOCKS: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "joint_blocks": (
        "transformer_blocks",
        {
            "x_block.attn.qkv": _QKV,
            "x_block.attn.proj": ("attn.to_out.0",),
            "x_block.attn2.qkv": _SECOND,
            "x_block.attn2.proj": ("attn2.to_out.0",),
            "x_block.mlp.fc1": ("ff.net.0.proj",),
            "x_block.mlp.fc2": ("ff.net.2",),
            "x_block.adaLN_modulation.1": ("norm1.linear",),
            "context_block.attn.qkv": _ADDED,
            "context_block.attn.proj": ("attn.to_add_out",),
            "context_block.mlp.fc1": ("ff_context.net.0.proj",),
            "context_block.mlp.fc2": ("ff_context.net.2",),
            "context_block.adaLN_modulation.1": ("norm1_context.linear",),
        },
    ),
    "double_blocks": (
        "transformer_blocks",
        {
            "img_attn.qkv": _QKV,
            "img_attn.proj": ("attn.to_out.0",),
            "img_mlp.0": ("ff.net.0.proj",),
            "img_mlp.2": ("ff.net.2",),
            "img_mod.lin": ("norm1.linear",),
            "txt_attn.qkv": _ADDED,
            "txt_attn.proj": ("attn.to_add_out",),
            "txt_mlp.0": ("ff_context.net.0.proj",),
            "txt_mlp.2": ("ff_context.net.2",),
            "txt_mod.lin": ("norm1_context.linear",),
        },
    ),
    "single_blocks": (
        "single_transformer_blocks",
        {"linear1": (*_QKV, "proj_mlp"), "linear2": ("proj_out",), "modulation.lin": ("norm.linear",)},
    ),
}
"""Original blocks: diffusers' name of them, and of each layer inside, or of the layers that it holds one after the other."""
SWAPPED = ("joint_blocks", "context_block.adaLN_modulation.1")
"""The last block's holds shift and scale, which diffusers has as scale and shift; in other blocks it has six parts, in one order."""
ELSEWHERE = {
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "context_embedder": "context_embedder",
    **{
        f"{old}.{part}": f"time_text_embed.{new}.{linear}"
        for old, new in (("t_embedder.mlp", "timestep_embedder"), ("y_embedder.mlp", "text_embedder"))
        for part, linear in (("0", "linear_1"), ("2", "linear_2"))
    },
    **{
        f"{old}.{part}": f"time_text_embed.{new}.{linear}"
        for old, new in (("time_in", "timestep_embedder"), ("vector_in", "text_embedder"), ("guidance_in", "guidance_embedder"))
        for part, linear in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
    },
}
"""Original layers outside of the blocks."""

_BLOCK = re.compile(r"(joint_blocks|double_blocks|single_blocks)[._](\d+)[._](.+)")
_OWN = re.compile(r"((?:single_)?transformer_blocks)_(\d+)_(.+)")
_INSIDE = {kind: {old.replace(".", "_"): old for old in table} for kind, (_, table) in BLOCKS.items()}
_OUTSIDE = {old.replace(".", "_"): old for old in ELSEWHERE}
_LAYERS = {new.replace(".", "_"): new for _, table in BLOCKS.values() for layers in table.values() for new in layers}


def own_name(key: str) -> str:
    """A tensor's name without what wrappers, PEFT, diffusers and other tools put in front of it."""
    name = ".".join(part for part in key.split(".") if part not in WRAPPERS)
    while prefix := next((prefix for prefix in (*PREFIXES, *UNDERSCORED) if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def to_diffusers(layer: str, a: Tensor, b: Tensor) -> dict[str, tuple[Tensor, Tensor]] | None:
    """A [r, in] and B [out, r] of a layer by diffusers' names: one layer, or those that it holds one after the other.

    A name of diffusers' own, dotted or underscored, is one layer. Nothing is rounded: B's rows are parted, and each part has all of A.

    Returns:
        None where the name is another tool's and means nothing known, or the shape is not that layer's.
    """
    if own := _OWN.fullmatch(layer):
        return {f"{own[1]}.{own[2]}.{_LAYERS[own[3]]}": (a, b)} if own[3] in _LAYERS else None
    if block := _BLOCK.fullmatch(layer):
        kind, number, rest = block.groups()
        old = _INSIDE[kind].get(rest.replace(".", "_"))
        if old is None:
            return None
        blocks, table = BLOCKS[kind]
        parts = _parts(b, len(table[old]), a.shape[1])
        if parts is None:
            return None
        if (kind, old) == SWAPPED and len(b) == 2 * a.shape[1]:
            parts = [_swapped(b)]
        # copies: safetensors writes no tensor that shares its memory with another
        return {f"{blocks}.{number}.{new}": (a.clone(), part.clone()) for new, part in zip(table[old], parts, strict=True)}
    if old := _OUTSIDE.get(layer.replace(".", "_")):
        return {ELSEWHERE[old]: (a, _swapped(b) if ELSEWHERE[old] == "norm_out.linear" else b)}
    return {layer: (a, b)}


def _parts(b: Tensor, number: int, width: int) -> list[Tensor] | None:
    """B's rows by layer: queries, keys and values are as wide as what they read, and what follows takes the rest."""
    if number == 1:
        return [b]
    if number == 3:
        return list(b.split(width)) if len(b) == 3 * width else None
    return list(b.split([width, width, width, len(b) - 3 * width])) if len(b) > 3 * width else None


def _swapped(b: Tensor) -> Tensor:
    return b.roll(len(b) // 2, 0)
