"""Mask2Former with a Swin-S backbone for the 80 classes of COCO, from OpenMMLab's file (arXiv 2112.01527).

GenEval's thresholds were tuned on these weights (github.com/djghosh13/geneval), published numbers come from
them; Meta's weights of the same architecture give others. The file has mmdetection 2's names.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerModel, SwinConfig

from flowtilt.errors import UserError
from flowtilt.io import weights
from flowtilt.rewards import keymap
from flowtilt.rewards.about import all_weights

CLASSES = 80

_SWIN = "model.pixel_level_module.encoder.swin."
_NORMS = "model.pixel_level_module.encoder.hidden_states_norms.stage"
_PIXELS = "model.pixel_level_module.decoder."
_QUERIES = "model.transformer_module."
_BLOCK, _NEW_BLOCK = "backbone.stages.#.blocks.#.", _SWIN + "encoder.layers.#.blocks.#."
_DEFORMABLE, _NEW_DEFORMABLE = "panoptic_head.pixel_decoder.encoder.layers.#.", _PIXELS + "encoder.layers.#."
_LAYER, _NEW_LAYER = "panoptic_head.transformer_decoder.layers.#.", _QUERIES + "decoder.layers.#."

NAMES: dict[str, str | None] = {
    "backbone.patch_embed.projection.*": _SWIN + "embeddings.patch_embeddings.projection.*",
    "backbone.patch_embed.norm.*": _SWIN + "embeddings.norm.*",
    _BLOCK + "norm1.*": _NEW_BLOCK + "layernorm_before.*",
    _BLOCK + "norm2.*": _NEW_BLOCK + "layernorm_after.*",
    _BLOCK + "attn.w_msa.qkv.*": _NEW_BLOCK + "attention.{q,k,v}_proj.*",
    _BLOCK + "attn.w_msa.proj.*": _NEW_BLOCK + "attention.o_proj.*",
    _BLOCK + "attn.w_msa.relative_position_bias_table": _NEW_BLOCK + "attention.relative_position_bias.relative_position_bias_table",
    _BLOCK + "attn.w_msa.relative_position_index": None,  # follows from the window's size
    _BLOCK + "ffn.layers.0.0.*": _NEW_BLOCK + "mlp.fc1.*",
    _BLOCK + "ffn.layers.1.*": _NEW_BLOCK + "mlp.fc2.*",
    "backbone.stages.#.downsample.*": _SWIN + "encoder.layers.#.downsample.*",
    **{f"backbone.norm{i}.*": f"{_NORMS}{i + 1}.*" for i in range(4)},
    "panoptic_head.pixel_decoder.input_convs.#.conv.*": _PIXELS + "input_projections.#.0.*",
    "panoptic_head.pixel_decoder.input_convs.#.gn.*": _PIXELS + "input_projections.#.1.*",
    "panoptic_head.pixel_decoder.level_encoding.weight": _PIXELS + "level_embed",
    _DEFORMABLE + "attentions.0.*": _NEW_DEFORMABLE + "self_attn.*",
    _DEFORMABLE + "norms.0.*": _NEW_DEFORMABLE + "self_attn_layer_norm.*",
    _DEFORMABLE + "norms.1.*": _NEW_DEFORMABLE + "final_layer_norm.*",
    _DEFORMABLE + "ffns.0.layers.0.0.*": _NEW_DEFORMABLE + "fc1.*",
    _DEFORMABLE + "ffns.0.layers.1.*": _NEW_DEFORMABLE + "fc2.*",
    "panoptic_head.pixel_decoder.lateral_convs.0.conv.*": _PIXELS + "adapter_1.0.*",
    "panoptic_head.pixel_decoder.lateral_convs.0.gn.*": _PIXELS + "adapter_1.1.*",
    "panoptic_head.pixel_decoder.output_convs.0.conv.*": _PIXELS + "layer_1.0.*",
    "panoptic_head.pixel_decoder.output_convs.0.gn.*": _PIXELS + "layer_1.1.*",
    "panoptic_head.pixel_decoder.mask_feature.*": _PIXELS + "mask_projection.*",
    "panoptic_head.query_embed.*": _QUERIES + "queries_embedder.*",
    "panoptic_head.query_feat.*": _QUERIES + "queries_features.*",
    "panoptic_head.level_embed.*": _QUERIES + "level_embed.*",
    _LAYER + "attentions.0.attn.*": _NEW_LAYER + "cross_attn.*",
    _LAYER + "attentions.1.attn.in_proj_*": _NEW_LAYER + "self_attn.{q,k,v}_proj.*",
    _LAYER + "attentions.1.attn.out_proj.*": _NEW_LAYER + "self_attn.out_proj.*",
    _LAYER + "norms.0.*": _NEW_LAYER + "cross_attn_layer_norm.*",
    _LAYER + "norms.1.*": _NEW_LAYER + "self_attn_layer_norm.*",
    _LAYER + "norms.2.*": _NEW_LAYER + "final_layer_norm.*",
    _LAYER + "ffns.0.layers.0.0.*": _NEW_LAYER + "fc1.*",
    _LAYER + "ffns.0.layers.1.*": _NEW_LAYER + "fc2.*",
    "panoptic_head.transformer_decoder.post_norm.*": _QUERIES + "decoder.layernorm.*",
    **{f"panoptic_head.mask_embed.{2 * i}.*": f"{_QUERIES}decoder.mask_predictor.mask_embedder.{i}.0.*" for i in range(3)},
    "panoptic_head.cls_embed.*": "class_predictor.*",
}
"""mmdetection 2's names and transformers' own; see `flowtilt.rewards.keymap.rename`."""


def _harmless() -> list[Any]:
    """What numpy pickles a number as (its type and its bytes), under numpy 1's name for it and numpy 2's.

    mmcv writes a training run's plain facts beside the weights, and a best score there may be numpy's.
    """
    scalar = np.float64(0).__reduce__()[0]
    kinds = {type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int32, np.int64, np.bool_)}
    return [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"), np.dtype, *kinds]


def config() -> Mask2FormerConfig:
    """The published architecture. `decoder_layers` counts the prediction before the first of nine layers."""
    swin = SwinConfig.from_dict(
        {
            "image_size": 224,
            "patch_size": 4,
            "embed_dim": 96,
            "depths": [2, 2, 18, 2],
            "num_heads": [3, 6, 12, 24],
            "window_size": 7,
            "mlp_ratio": 4.0,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        }
    )
    return Mask2FormerConfig(
        backbone_config=swin,
        num_queries=100,
        hidden_dim=256,
        feature_size=256,
        mask_feature_size=256,
        encoder_layers=6,
        encoder_feedforward_dim=1024,
        decoder_layers=10,
        dim_feedforward=2048,
        num_attention_heads=8,
        dropout=0.0,
        pre_norm=False,
        common_stride=4,
        feature_strides=[4, 8, 16, 32],
    )


class Mask2Former(nn.Module):
    """The network without its training loss, for which transformers' own class wants scipy."""

    def __init__(self, config: Mask2FormerConfig, classes: int):
        super().__init__()
        self.model = Mask2FormerModel(config)
        self.class_predictor = nn.Linear(config.hidden_dim, classes + 1)
        # a norm after the last stage, of which only the backbone's own output, unused here, would depend
        self.model.pixel_level_module.encoder.swin.layernorm = nn.Identity()

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits [N, queries, classes + 1], the last of them "no object", and mask logits [N, queries, H / 4, W / 4].

        Args:
            pixels: normalised images [N, 3, H, W]; H and W multiples of 32.
        """
        out = self.model(pixels, output_hidden_states=True)
        return self.class_predictor(out.transformer_decoder_intermediate_states[-1].transpose(0, 1)), out.masks_queries_logits[-1]


def convert(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """mmdetection 2's state dict in fp32 under the names of `Mask2Former`.

    Raises:
        UserError: it is mmdetection 3's or another model's.
    """
    if any(".cross_attn." in name for name in state):
        wanted = all_weights()["mask2former"].files[0]
        raise UserError(f"{path}: has mmdetection 3's names, which are not supported; use mmdetection 2's file {wanted}")
    tensors = keymap.rename(state, NAMES, path)
    return {name: _columns(tensor) if ".downsample." in name else tensor for name, tensor in tensors.items()}


def _columns(tensor: Tensor) -> Tensor:
    """Patch merging's weights [..., 4 C] in the order of transformers.

    mmdetection lists the four neighbours of each channel, row by row; transformers the channels of each
    neighbour, column by column.
    """
    return tensor.unflatten(-1, (-1, 4)).transpose(-1, -2)[..., [0, 2, 1, 3], :].flatten(-2)


@cache
def network(path: Path, device: torch.device) -> Mask2Former:
    """The frozen network of a file, fp32, read once a process.

    Raises:
        UserError: the file can't be read or is not mmdetection 2's Mask2Former.
    """
    state = weights.read(path, allowed=_harmless())
    state = state.get("state_dict") if isinstance(state, dict) else None
    if not isinstance(state, dict):
        raise UserError(f"{path}: has no state_dict, so it is not mmdetection's file; fetch it again")
    return keymap.fill(keymap.build(lambda: Mask2Former(config(), CLASSES)), convert(state, path), path).to(device)
