"""Small random pipelines of the true classes, saved to disk as the published ones are."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tiny_parts import WIDTH, letters, loud, vae
from tiny_qwen import (  # noqa: F401  every family is found here
    Letters,
    Seeing,
    flux2_dev,
    flux2_klein,
    qwen_image,
    qwen_image_21,
    qwen_image_edit,
    qwen_image_edit_plus,
    z_image,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from flowtilt.playground.pretrain import build_text_encoder, tokenizer


def sd35(place: Path) -> Path:
    """A random pipeline with SD3.5-Medium's structure: dual attention, 16 latent channels, shift 3, a T5 that says something."""
    torch.manual_seed(0)
    words = tokenizer(place / "words")
    t5 = letters()
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=160,
            caption_projection_dim=32,
            pooled_projection_dim=128,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
            dual_attention_layers=(0, 1),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=build_text_encoder(words),
        tokenizer=words,
        text_encoder_2=build_text_encoder(words),
        tokenizer_2=words,
        text_encoder_3=T5EncoderModel(T5Config(vocab_size=len(t5), d_model=160, d_kv=8, d_ff=16, num_layers=2, num_heads=2)),
        tokenizer_3=t5,
    )
    pipeline.save_pretrained(place / "pipeline")
    return place / "pipeline"


def flux(place: Path, schnell: bool = False, kind: Any = FluxPipeline) -> Path:
    """A FLUX.1 pipeline with both kinds of blocks; -dev's configuration or -schnell's."""
    torch.manual_seed(0)
    words = tokenizer(place / "words")
    t5 = letters()
    clip = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=words.model_max_length,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    shifting = {"use_dynamic_shifting": False, "shift": 1.0} if schnell else {"use_dynamic_shifting": True, "shift": 3.0}
    pipeline = kind(
        transformer=FluxTransformer2DModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=not schnell,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(**shifting),
        vae=vae(),
        text_encoder=CLIPTextModel(clip),
        tokenizer=words,
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=len(t5), d_model=WIDTH, d_kv=8, d_ff=16, num_layers=2, num_heads=2)),
        tokenizer_2=t5,
    )
    pipeline.save_pretrained(place / "pipeline")
    return place / "pipeline"


def kontext(place: Path) -> Path:
    """FLUX.1-Kontext: -dev's modules in the pipeline that edits."""
    return flux(place, kind=FluxKontextPipeline)


def aura_flow(place: Path) -> Path:
    """An AuraFlow pipeline with both kinds of blocks."""
    torch.manual_seed(0)
    t5 = letters()
    pipeline = AuraFlowPipeline(
        transformer=AuraFlowTransformer2DModel(
            sample_size=8,
            num_mmdit_layers=2,
            num_single_dit_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            caption_projection_dim=32,
            pos_embed_max_size=64,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=vae(latent_channels=4, scaling_factor=0.13025, shift_factor=None),
        text_encoder=UMT5EncoderModel(UMT5Config(vocab_size=len(t5), d_model=WIDTH, d_kv=8, d_ff=16, num_layers=2, num_heads=2)),
        tokenizer=t5,
    )
    loud(pipeline.transformer, 2)
    pipeline.save_pretrained(place)
    return place


GEMMA: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


def sana(place: Path) -> Path:
    """A SANA pipeline: an autoencoder of a factor of 32, Gemma 2, a DPM solver with a shift of 3."""
    torch.manual_seed(0)
    six = {"block_out_channels": (8,) * 6, "layers_per_block": (1,) * 6, "qkv_multiscales": ((),) * 6}
    network = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_cross_attention_heads=2,
        cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=32, sample_size=32,
    )  # fmt: skip
    loud(network, 3)
    pipeline = SanaPipeline(
        transformer=network,
        scheduler=DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"),
        vae=AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=8,
            scaling_factor=0.41407,
            **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in six.items()},
        ),
        text_encoder=Gemma2Model(Gemma2Config(**GEMMA)),
        tokenizer=letters(),
    )
    pipeline.save_pretrained(place)
    return place


def lumina2(place: Path) -> Path:
    """A Lumina-Image 2 pipeline: Gemma 2, refiners of image and caption, grouped keys, shift 6, a VAE of a factor of 8."""
    torch.manual_seed(0)
    network = Lumina2Transformer2DModel(
        in_channels=16, hidden_size=48, num_layers=2, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1, multiple_of=16,
        axes_dim_rope=(8, 8, 8), axes_lens=(300, 64, 64), cap_feat_dim=32, sample_size=8,
    )  # fmt: skip
    pipeline = Lumina2Pipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae(blocks=4),
        text_encoder=Gemma2Model(Gemma2Config(**GEMMA)),
        tokenizer=letters(),
    )
    pipeline.save_pretrained(place)
    return place


def chroma(place: Path) -> Path:
    """A Chroma pipeline with both kinds of blocks."""
    torch.manual_seed(0)
    t5 = letters()
    network = ChromaTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6), approximator_num_channels=64, approximator_hidden_dim=32, approximator_layers=1,
    )  # fmt: skip
    pipeline = ChromaPipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae(),
        text_encoder=T5EncoderModel(T5Config(vocab_size=len(t5), d_model=WIDTH, d_kv=8, d_ff=16, num_layers=2, num_heads=2)),
        tokenizer=t5,
    )
    pipeline.save_pretrained(place)
    return place
