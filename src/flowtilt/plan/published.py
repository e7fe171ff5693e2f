"""Published configurations of pipelines on the hub, at full size: facts, so that planning needs no download.

Each component is its class and what its config.json says beyond the class's defaults. Sources: the repositories' own config.json files
and diffusers' defaults, as public code quotes them; `tests/test_plan_families.py` checks the resulting numbers of parameters.
"""

from collections.abc import Mapping
from typing import Any

Component = tuple[str, Mapping[str, Any]]
"""A class of diffusers or transformers, and its configuration."""

# Stable Diffusion 3 ------------------------------------------------------------------------------------

_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
_LARGE = {
    **_MEDIUM,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "dual_attention_layers": (),
}
_SD3_MEDIUM = {**_MEDIUM, "pos_embed_max_size": 192, "dual_attention_layers": (), "qk_norm": None}

# autoencoders ------------------------------------------------------------------------------------------

_KL = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 1024,
}
_SIXTEEN = {**_KL, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
_SD3_VAE: Component = ("AutoencoderKL", {**_SIXTEEN, "scaling_factor": 1.5305, "shift_factor": 0.0609})
_FLUX_VAE: Component = ("AutoencoderKL", {**_SIXTEEN, "scaling_factor": 0.3611, "shift_factor": 0.1159})
_SDXL_VAE: Component = ("AutoencoderKL", {**_KL, "latent_channels": 4, "scaling_factor": 0.13025})
_FLUX2_VAE: Component = ("AutoencoderKLFlux2", {**_KL, "latent_channels": 32})
_QWEN_VAE: Component = ("AutoencoderKLQwenImage", {})
_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
_SANA_VAE: Component = (
    "AutoencoderDC",
    {
        "encoder_block_types": _BLOCKS,
        "decoder_block_types": _BLOCKS,
        "upsample_block_type": "interpolate",
        "downsample_block_type": "Conv",
        "decoder_act_fns": "silu",
        "scaling_factor": 0.41407,
    },
)

# text encoders -----------------------------------------------------------------------------------------

_CLIP_L = {
    "model_type": "clip_text_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "eos_token_id": 2,
}
_CLIP_G = {**_CLIP_L, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
_CLIP_G |= {"projection_dim": 1280, "hidden_act": "gelu"}
_T5_XXL: Component = (
    "T5EncoderModel",
    {
        "model_type": "t5",
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_heads": 64,
        "num_layers": 24,
        "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
    },
)
_T5_WORDS: Component = ("T5TokenizerFast", {"model_max_length": 512})
_PILE_T5_XL: Component = (
    "UMT5EncoderModel",
    {
        "model_type": "umt5",
        "d_model": 2048,
        "d_ff": 5120,
        "d_kv": 64,
        "num_heads": 32,
        "num_layers": 24,
        "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
    },
)
_QWEN3_4B = {
    "model_type": "qwen3",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
_QWEN3_8B = {**_QWEN3_4B, "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}
_QWEN25_VL_7B: Component = (
    "Qwen2_5_VLForConditionalGeneration",
    {
        "model_type": "qwen2_5_vl",
        "text_config": {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        },
        "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584},
    },
)
_QWEN3_VL_8B: Component = (
    "Qwen3VLForConditionalGeneration",
    {
        "model_type": "qwen3_vl",
        "text_config": {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20]},
        },
        "vision_config": {
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "out_hidden_size": 4096,
            "deepstack_visual_indexes": [8, 16, 24],
        },
    },
)
_QWEN_PROCESSOR: Component = ("Qwen2VLProcessor", {"model_max_length": 131072})
_MISTRAL_SMALL: Component = (
    "Mistral3ForConditionalGeneration",
    {
        "model_type": "mistral3",
        "text_config": {
            "model_type": "mistral",
            "hidden_size": 5120,
            "intermediate_size": 32768,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 131072,
        },
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
    },
)
_GEMMA2_2B: Component = (
    "Gemma2Model",
    {
        "model_type": "gemma2",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 256000,
    },
)

# schedulers --------------------------------------------------------------------------------------------


def _shift(shift: float) -> Component:
    return "FlowMatchEulerDiscreteScheduler", {"shift": shift}


_DYNAMIC: Component = ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "shift": 3.0})
_QWEN_LEVELS: Component = (
    "FlowMatchEulerDiscreteScheduler",
    {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02},
)
_SANA_LEVELS: Component = (
    "DPMSolverMultistepScheduler",
    {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
)

# pipelines ---------------------------------------------------------------------------------------------


def _sd3(network: Mapping[str, Any]) -> tuple[str, dict[str, Component]]:
    return "StableDiffusion3Pipeline", {
        "transformer": ("SD3Transformer2DModel", network),
        "vae": _SD3_VAE,
        "text_encoder": ("CLIPTextModelWithProjection", _CLIP_L),
        "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_G),
        "text_encoder_3": _T5_XXL,
        "tokenizer_3": _T5_WORDS,
        "scheduler": _shift(3.0),
    }


def _flux(guidance: bool) -> tuple[str, dict[str, Component]]:
    return "FluxPipeline", {
        "transformer": ("FluxTransformer2DModel", {"guidance_embeds": guidance}),
        "vae": _FLUX_VAE,
        "text_encoder": ("CLIPTextModel", _CLIP_L),
        "text_encoder_2": _T5_XXL,
        "tokenizer_2": _T5_WORDS,
        "scheduler": _DYNAMIC if guidance else _shift(1.0),
    }


def _klein(layers: int, single: int, heads: int, encoder: Mapping[str, Any]) -> tuple[str, dict[str, Component]]:
    network = {
        "in_channels": 128,
        "num_layers": layers,
        "num_single_layers": single,
        "num_attention_heads": heads,
        "joint_attention_dim": 3 * encoder["hidden_size"],
        "guidance_embeds": False,
    }
    return "Flux2KleinPipeline", {
        "transformer": ("Flux2Transformer2DModel", network),
        "vae": _FLUX2_VAE,
        "text_encoder": ("Qwen3ForCausalLM", encoder),
        "scheduler": _DYNAMIC,
    }


def _z_image(shift: float) -> tuple[str, dict[str, Component]]:
    return "ZImagePipeline", {
        "transformer": ("ZImageTransformer2DModel", {"axes_lens": [1536, 512, 512]}),
        "vae": _FLUX_VAE,
        "text_encoder": ("Qwen3Model", _QWEN3_4B),
        "scheduler": _shift(shift),
    }


def _aura(positions: int) -> tuple[str, dict[str, Component]]:
    return "AuraFlowPipeline", {
        "transformer": ("AuraFlowTransformer2DModel", {"pos_embed_max_size": positions}),
        "vae": _SDXL_VAE,
        "text_encoder": _PILE_T5_XL,
        "scheduler": _shift(1.73),
    }


_KLEIN_4B, _KLEIN_9B = _klein(5, 20, 24, _QWEN3_4B), _klein(8, 24, 32, _QWEN3_8B)
_QWEN_IMAGE = (
    "QwenImagePipeline",
    {
        "transformer": ("QwenImageTransformer2DModel", {}),
        "vae": _QWEN_VAE,
        "text_encoder": _QWEN25_VL_7B,
        "scheduler": _QWEN_LEVELS,
    },
)


def _qwen_edit(plus: bool, **network: bool) -> tuple[str, dict[str, Component]]:
    parts = {"processor": _QWEN_PROCESSOR, "transformer": ("QwenImageTransformer2DModel", network)}
    return f"QwenImageEdit{'Plus' if plus else ''}Pipeline", {**_QWEN_IMAGE[1], **parts}


_QWEN_IMAGE_21 = (
    "QwenImage21Pipeline",
    {
        "transformer": ("QwenImage21Transformer2DModel", {}),
        "vae": ("AutoencoderKLQwenImage21", {}),
        "text_encoder": _QWEN3_VL_8B,
        "processor": _QWEN_PROCESSOR,
        "scheduler": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    },
)
_CHROMA = (
    "ChromaPipeline",
    {"transformer": ("ChromaTransformer2DModel", {}), "vae": _FLUX_VAE, "text_encoder": _T5_XXL, "scheduler": _DYNAMIC},
)

PUBLISHED: Mapping[str, tuple[str, Mapping[str, Component]]] = {
    "stabilityai/stable-diffusion-3.5-medium": _sd3(_MEDIUM),
    "stabilityai/stable-diffusion-3.5-large": _sd3(_LARGE),
    "stabilityai/stable-diffusion-3-medium-diffusers": _sd3(_SD3_MEDIUM),
    "black-forest-labs/FLUX.1-dev": _flux(guidance=True),
    "black-forest-labs/FLUX.1-schnell": _flux(guidance=False),
    "black-forest-labs/FLUX.1-Kontext-dev": ("FluxKontextPipeline", _flux(guidance=True)[1]),
    "black-forest-labs/FLUX.2-klein-4B": _KLEIN_4B,
    "black-forest-labs/FLUX.2-klein-base-4B": _KLEIN_4B,
    "black-forest-labs/FLUX.2-klein-9B": _KLEIN_9B,
    "black-forest-labs/FLUX.2-klein-base-9B": _KLEIN_9B,
    "black-forest-labs/FLUX.2-dev": (
        "Flux2Pipeline",
        {
            "transformer": ("Flux2Transformer2DModel", {}),
            "vae": _FLUX2_VAE,
            "text_encoder": _MISTRAL_SMALL,
            "scheduler": _DYNAMIC,
        },
    ),
    "Qwen/Qwen-Image": _QWEN_IMAGE,
    "Qwen/Qwen-Image-2512": _QWEN_IMAGE,
    "Qwen/Qwen-Image-2.1": _QWEN_IMAGE_21,
    "Qwen/Qwen-Image-Edit": _qwen_edit(plus=False),
    "Qwen/Qwen-Image-Edit-2509": _qwen_edit(plus=True),
    "Qwen/Qwen-Image-Edit-2511": _qwen_edit(plus=True, zero_cond_t=True),
    "Tongyi-MAI/Z-Image": _z_image(6.0),
    "Tongyi-MAI/Z-Image-Turbo": _z_image(3.0),
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": (
        "SanaPipeline",
        {"transformer": ("SanaTransformer2DModel", {}), "vae": _SANA_VAE, "text_encoder": _GEMMA2_2B, "scheduler": _SANA_LEVELS},
    ),
    "Alpha-VLLM/Lumina-Image-2.0": (
        "Lumina2Pipeline",
        {
            "transformer": ("Lumina2Transformer2DModel", {"cap_feat_dim": 2304}),
            "vae": _FLUX_VAE,
            "text_encoder": _GEMMA2_2B,
            "scheduler": _shift(6.0),
        },
    ),
    "fal/AuraFlow": _aura(1024),
    "fal/AuraFlow-v0.2": _aura(9216),
    "fal/AuraFlow-v0.3": _aura(9216),
    "lodestones/Chroma1-HD": _CHROMA,
    "lodestones/Chroma1-Base": _CHROMA,
}
"""By hub id: the pipeline's class and its components by name."""
