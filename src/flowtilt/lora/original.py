"""How the models' original code names layers, by diffusers' names of them: what kohya, ComfyUI and ai-toolkit write.

SD3 has "joint_blocks.0.x_block.attn.qkv" and FLUX.1 "double_blocks.0.img_attn.qkv" for what diffusers has as
"transformer_blocks.0.attn.to_q", to_k and to_v: queries, keys and values are one layer there and three here. diffusers' own
conversions of checkpoints and of LoRAs have the same tables.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Naming:
    """The layers of one network.

    Args:
        blocks: original block -> diffusers' name of it, and of each layer inside, or of the layers that it holds one after the other.
        elsewhere: layers outside of the blocks.
        grouped: keys and values may be narrower than queries.
    """

    blocks: Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]]
    elsewhere: Mapping[str, str]
    grouped: bool = False


def _same(*names: str) -> dict[str, tuple[str, ...]]:
    return {name: (name,) for name in names}


_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_OUT = {"final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear"}
_PATCHES = {"img_in": "x_embedder", "txt_in": "context_embedder"}
_JOINT_ATTENTION = {
    "img_attn.qkv": _QKV,
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.qkv": _ADDED,
    "txt_attn.proj": ("attn.to_add_out",),
}


def _embedders(names: Mapping[str, str], linears: tuple[str, str]) -> dict[str, str]:
    return {f"{old}.{part}": f"{new}.linear_{k}" for old, new in names.items() for k, part in enumerate(linears, 1)}


SD3 = Naming(
    {
        "joint_blocks": (
            "transformer_blocks",
            {
                "x_block.attn.qkv": _QKV,
                "x_block.attn.proj": ("attn.to_out.0",),
                "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
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
    },
    {
        **_OUT,
        "context_embedder": "context_embedder",
        **_embedders(
            {"t_embedder.mlp": "time_text_embed.timestep_embedder", "y_embedder.mlp": "time_text_embed.text_embedder"}, ("0", "2")
        ),
    },
)

FLUX = Naming(
    {
        "double_blocks": (
            "transformer_blocks",
            {
                **_JOINT_ATTENTION,
                "img_mlp.0": ("ff.net.0.proj",),
                "img_mlp.2": ("ff.net.2",),
                "img_mod.lin": ("norm1.linear",),
                "txt_mlp.0": ("ff_context.net.0.proj",),
                "txt_mlp.2": ("ff_context.net.2",),
                "txt_mod.lin": ("norm1_context.linear",),
            },
        ),
        "single_blocks": (
            "single_transformer_blocks",
            {"linear1": (*_QKV, "proj_mlp"), "linear2": ("proj_out",), "modulation.lin": ("norm.linear",)},
        ),
    },
    {
        **_OUT,
        **_PATCHES,
        **_embedders(
            {
                "time_in": "time_text_embed.timestep_embedder",
                "vector_in": "time_text_embed.text_embedder",
                "guidance_in": "time_text_embed.guidance_embedder",
            },
            ("in_layer", "out_layer"),
        ),
    },
)

_MODULATIONS = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
FLUX2 = Naming(
    {
        "double_blocks": (
            "transformer_blocks",
            {
                **_JOINT_ATTENTION,
                "img_mlp.0": ("ff.linear_in",),
                "img_mlp.2": ("ff.linear_out",),
                "txt_mlp.0": ("ff_context.linear_in",),
                "txt_mlp.2": ("ff_context.linear_out",),
            },
        ),
        "single_blocks": ("single_transformer_blocks", {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)}),
    },
    {
        **_OUT,
        **_PATCHES,
        **_embedders(
            {"time_in": "time_guidance_embed.timestep_embedder", "guidance_in": "time_guidance_embed.guidance_embedder"},
            ("in_layer", "out_layer"),
        ),
        **{f"{name}.lin": f"{name}.linear" for name in _MODULATIONS},
    },
)

_NEXT_DIT = ("layers", "noise_refiner", "context_refiner")
_Z_BLOCK = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.out": ("attention.to_out.0",),
    **_same("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0"),
}
Z_IMAGE = Naming(
    {block: (block, _Z_BLOCK) for block in _NEXT_DIT},
    {
        "x_embedder": "all_x_embedder.2-1",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        **{name: name for name in ("cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2")},
    },
)

_LUMINA_BLOCK = {
    "attention.qkv": _QKV,
    "attention.out": ("attn.to_out.0",),
    **{f"feed_forward.w{k}": (f"feed_forward.linear_{k}",) for k in (1, 2, 3)},
    "adaLN_modulation.1": ("norm1.linear",),
}
LUMINA2 = Naming({block: (block, _LUMINA_BLOCK) for block in _NEXT_DIT}, {}, grouped=True)

SAME = Naming(
    {
        "transformer_blocks": (
            "transformer_blocks",
            {
                name: (name,)
                for stream, joint in (("img", (*_QKV, "attn.to_out.0")), ("txt", (*_ADDED, "attn.to_add_out")))
                for name in (*joint, f"{stream}_mod.1", f"{stream}_mlp.net.0.proj", f"{stream}_mlp.net.2")
            },
        ),
    },
    {name: name for name in ("img_in", "txt_in", "proj_out", "norm_out.linear")}
    | {name: name for k in (1, 2) for name in (f"time_text_embed.timestep_embedder.linear_{k}",)},
)
"""Qwen-Image: ComfyUI has diffusers' names."""

BY_NETWORK = {
    "SD3Transformer2DModel": SD3,
    "FluxTransformer2DModel": FLUX,
    "ChromaTransformer2DModel": FLUX,
    "Flux2Transformer2DModel": FLUX2,
    "ZImageTransformer2DModel": Z_IMAGE,
    "Lumina2Transformer2DModel": LUMINA2,
    "QwenImageTransformer2DModel": SAME,
}
"""By the class of diffusers' network."""
