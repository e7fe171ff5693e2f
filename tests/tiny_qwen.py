"""Tiny pipelines whose captions a Qwen or Mistral model reads: Qwen-Image, Z-Image, FLUX.2, and stand-ins for their processors."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny_parts import loud, vae
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.feature_extraction_utils import BatchFeature
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer(*more: str) -> Any:
    """A Qwen tokenizer with a token for each byte, its chat's own marks, and `more` of them."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {letter: k for k, letter in enumerate(bytes_to_unicode().values())}
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *more]
    vocabulary |= {mark: 256 + k for k, mark in enumerate(marks)}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=marks[1:], chat_template=CHAT, model_max_length=2048)


VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


class Seeing:
    """Stands in for a processor of Qwen's, which needs torchvision: the tokenizer, and Pillow's image processor.

    Args:
        patch: pixels of a patch of the image.
    """

    def __init__(self, patch: int):
        self.tokenizer = qwen_tokenizer(*VISION)
        self.images = Qwen2VLImageProcessorPil(patch_size=patch, min_pixels=(2 * patch) ** 2, max_pixels=(4 * patch) ** 2)

    def apply_chat_template(self, messages: Any, tokenize: bool, return_dict: bool) -> list[list[int]]:
        """Ids of a system message."""
        return [self.tokenizer(f"<|im_start|>system\n{messages[0]['content'][0]['text']}<|im_end|>\n").input_ids]

    def __call__(self, text: list[str], images: Any = None, return_tensors: str = "pt", **padding: Any) -> BatchFeature:
        """Ids with a slot for each four patches of the one image, and the patches."""
        seen = self.images(images=images, return_tensors="pt") if images is not None else {}
        slots = [int(grid.prod()) // 4 for grid in seen.get("image_grid_thw", [])]
        if slots:
            text = [one.replace("<|image_pad|>", "<|image_pad|>" * slots[0]) for one in text]
        return BatchFeature({**self.tokenizer(text, return_tensors="pt", **padding), **seen})


QWEN: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 256,
    "bos_token_id": 256,
    "eos_token_id": 258,
}


def qwen_image(place: Path, kind: Any = None) -> Path:
    """A Qwen-Image pipeline: Qwen2.5-VL, a VAE of videos with statistics, dynamic shifting with a last level of .02."""
    torch.manual_seed(0)
    channels = torch.linspace(0.5, 2, 16)
    text = Qwen2_5_VLConfig(
        text_config={**QWEN, "vocab_size": 262, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32},
        vision_start_token_id=259, vision_end_token_id=260, image_token_id=261,
    )  # fmt: skip
    parts = {} if kind is None else {"processor": None}
    pipeline = (kind or QwenImagePipeline)(
        transformer=QwenImageTransformer2DModel(
            in_channels=64, out_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=8, z_dim=16, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=(channels - 1).tolist(), latents_std=channels.tolist(),
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(text),
        tokenizer=qwen_tokenizer(*VISION),
        **parts,
    )  # fmt: skip
    loud(pipeline.transformer.proj_out, 4)
    for block in pipeline.transformer.transformer_blocks if kind else ():
        for values in (block.attn.to_v, block.attn.add_v_proj):  # so that a source image shows
            loud(values, 6)
    pipeline.save_pretrained(place)
    return place


def qwen_image_edit(place: Path, plus: bool = False) -> Path:
    """A Qwen-Image-Edit pipeline without its processor, which needs torchvision; `Seeing(14)` stands in for it."""
    return qwen_image(place, kind=QwenImageEditPlusPipeline if plus else QwenImageEditPipeline)


def qwen_image_edit_plus(place: Path) -> Path:
    """The same of -Edit-2509."""
    return qwen_image_edit(place, plus=True)


def qwen_image_21(processor: Any) -> QwenImage21Pipeline:
    """A Qwen-Image-2.1 pipeline, whose constructor asks its processor: Qwen3-VL, a VAE of a factor of 16 with opacity."""
    torch.manual_seed(0)
    text = Qwen3VLConfig(
        text_config={**QWEN, "vocab_size": 262, "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "deepstack_visual_indexes": [0],
        },
        vision_start_token_id=259, vision_end_token_id=260, image_token_id=261,
    )  # fmt: skip
    channels = torch.linspace(0.5, 2, 8)
    pipeline = QwenImage21Pipeline(
        transformer=QwenImage21Transformer2DModel(
            in_channels=8, out_channels=8, num_layers=2, attention_head_dim=16, num_attention_heads=2, context_in_dim=32,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192),
        vae=AutoencoderKLQwenImage21(
            base_dim=8, decoder_base_dim=8, z_dim=8, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False] * 4, latents_mean=(channels - 1).tolist(), latents_std=channels.tolist(),
        ),
        text_encoder=Qwen3VLForConditionalGeneration(text),
        processor=processor,
    )  # fmt: skip
    loud(pipeline.transformer.proj_out, 8)
    return pipeline


def z_image(place: Path) -> Path:
    """A Z-Image pipeline: Qwen3, refiners of image and caption, shift 6."""
    torch.manual_seed(0)
    pipeline = ZImagePipeline(
        transformer=ZImageTransformer2DModel(
            dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32, axes_dims=[4, 6, 6], axes_lens=[1024, 64, 64]
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae(),
        text_encoder=Qwen3Model(Qwen3Config(**QWEN)),
        tokenizer=qwen_tokenizer(),
    )
    for parameter in (pipeline.transformer.x_pad_token, pipeline.transformer.cap_pad_token):
        torch.nn.init.normal_(parameter, std=0.02)
    pipeline.save_pretrained(place)
    return place


def flux2_vae() -> AutoencoderKLFlux2:
    """An autoencoder of a factor of two whose batch norm has statistics."""
    coder = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )
    coder.bn.running_mean.normal_()
    coder.bn.running_var.uniform_(0.5, 2)
    return coder


def flux2_network(guidance: bool) -> Flux2Transformer2DModel:
    """Both kinds of blocks, for captions of 96 channels."""
    return Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=96,
        axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance,
    )  # fmt: skip


def flux2_klein(place: Path) -> Path:
    """A FLUX.2-klein pipeline: hidden layers 9, 18 and 27 of a Qwen3."""
    torch.manual_seed(0)
    pipeline = Flux2KleinPipeline(
        transformer=flux2_network(guidance=False),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=flux2_vae(),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**{**QWEN, "num_hidden_layers": 28, "intermediate_size": 16})),
        tokenizer=qwen_tokenizer(),
        is_distilled=False,
    )
    pipeline.save_pretrained(place)
    return place


def flux2_dev(place: Path) -> Path:
    """A FLUX.2-dev pipeline without its processor, which needs torchvision; `Letters` stands in for it."""
    torch.manual_seed(0)
    text = {"model_type": "mistral", **QWEN, "num_hidden_layers": 31, "intermediate_size": 16}
    eyes = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    pipeline = Flux2Pipeline(
        transformer=flux2_network(guidance=True),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=flux2_vae(),
        text_encoder=Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=eyes)),
        tokenizer=None,
    )
    pipeline.save_pretrained(place)
    return place


class Letters:
    """Stands in for FLUX.2-dev's processor: a token for each letter of the last message."""

    model_max_length = 512
    special_tokens_map: ClassVar[dict[str, str]] = {}

    def get_vocab(self) -> dict[str, int]:
        """Of no words."""
        return {}

    def apply_chat_template(self, messages: Any, max_length: int, **_: Any) -> dict[str, torch.Tensor]:
        """Padded ids and masks of the batch."""
        texts = [conversation[-1]["content"][0]["text"][:max_length] for conversation in messages]
        ids = torch.tensor([[ord(c) % 250 for c in text] + [256] * (max_length - len(text)) for text in texts])
        return {"input_ids": ids, "attention_mask": (ids != 256).long()}
