"""ImageReward, arXiv 2304.05977: BLIP reads the prompt while looking at the image; a head scores it.

Image            uint8, Pillow's bicubic to 224 on the short side, centre crop, CLIP's normalisation
Vision           ViT-L/16; its 197 tokens, after the last norm, are what the text attends to
Text             BERT-base that sees both ways, at most 35 word pieces: longer prompts are cut
Score            (head(first token) - mean) / std, about N(0, 1) over ordinary generations

The published code (github.com/THUDM/ImageReward) scores every image with every prompt and keeps the
diagonal; here each image meets its own prompt only, which gives the same numbers.
"""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from flowtilt.io import weights
from flowtilt.prompts import Prompt
from flowtilt.rewards import keymap, pixels
from flowtilt.rewards.about import find_weights
from flowtilt.rewards.networks import Network as Planned

SIZE = 224
TOKENS = 35
IMAGES = 32
"""In one forward pass."""
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's output over the authors' images."""
HIDDEN = (1024, 128, 64, 16)
"""The head's widths between BERT's and 1."""

_BLOCK, _NEW_BLOCK = "blip.visual_encoder.blocks.#.", "vision.encoder.layers.#."
NAMES: dict[str, str | None] = {
    "blip.visual_encoder.cls_token": "vision.embeddings.class_embedding",
    "blip.visual_encoder.pos_embed": "vision.embeddings.position_embedding",
    "blip.visual_encoder.patch_embed.proj.*": "vision.embeddings.patch_embedding.*",
    "blip.visual_encoder.norm.*": "vision.post_layernorm.*",
    _BLOCK + "norm#.*": _NEW_BLOCK + "layer_norm#.*",
    _BLOCK + "attn.qkv.*": _NEW_BLOCK + "self_attn.qkv.*",
    _BLOCK + "attn.proj.*": _NEW_BLOCK + "self_attn.projection.*",
    _BLOCK + "mlp.*": _NEW_BLOCK + "mlp.*",
    "blip.text_encoder.embeddings.position_ids": None,
    "blip.text_encoder.*": "text.*",
    "blip.vision_proj.*": None,  # of BLIP's contrastive training; the reward does not use them
    "blip.text_proj.*": None,
    **{f"mlp.layers.{old}.*": f"head.{new}.*" for new, old in enumerate((0, 2, 4, 6, 7))},
}
"""The published names and those of `Network`; see `flowtilt.rewards.keymap.rename`."""


def configs() -> tuple[BlipVisionConfig, BlipTextConfig]:
    """The published architecture, vision and text. `is_decoder` makes the cross-attention, not a causal mask."""
    vision = BlipVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=SIZE,
        patch_size=16,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=30524,
        hidden_size=768,
        encoder_hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=512,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        is_decoder=True,
    )
    return vision, text


class Network(nn.Module):
    """Vision encoder, text encoder and the head, five linear layers without activations."""

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig):
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise((text.hidden_size, *HIDDEN, 1))))

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Scores [N] of normalised images [N, 3, h, w] and the prompts' tokens [N, 35]; the mask is 0 on padding."""
        seen = self.vision(images).last_hidden_state
        read = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        return (self.head(read[:, 0]).squeeze(1) - MEAN) / STD


@cache
def network(path: Path, device: torch.device) -> Network:
    """The frozen network of a file, fp32, read once a process.

    Raises:
        UserError: the file can't be read or holds other weights.
    """
    tensors = keymap.rename(weights.read(path), NAMES, path)
    return keymap.fill(keymap.build(lambda: Network(*configs())), tensors, path).to(device)


def meta_network(resolution: int) -> Planned:
    """The network as `flowtilt plan` measures it."""
    model: Any = Network(*configs()).eval()

    def judge(images: Tensor) -> None:
        # a mask would be looked into, which meta tensors do not allow; it changes no count
        seen = model.vision(images).last_hidden_state
        ids = torch.zeros(len(images), TOKENS, dtype=torch.long)
        model.head(model.text(input_ids=ids, encoder_hidden_states=seen).last_hidden_state[:, 0])

    return Planned(model, IMAGES, (3, SIZE, SIZE), judge)


class ImageReward:
    """Human preference, about -2.3 (bad) to 2 (good).

    Args:
        device: where the network is.

    Raises:
        UserError: weights are missing or not the right ones.
    """

    def __init__(self, *, device: torch.device | str):
        self.network = network(find_weights("imagereward"), torch.device(device))
        self.tokenizer = BertTokenizer.from_pretrained(find_weights("bert"))

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """What may leave the device between two calls."""
        return (self.network,)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores [N] of images [N, 3, H, W] in [0, 1], each with its prompt."""
        return self._score(pixels.bicubic_crop(images, SIZE, "half_even"), prompts)

    def differentiable(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """As calling it, with a gradient: the images are not rounded to 8 bits, before or after the resize."""
        return self._score(pixels.bicubic_crop_tensor(images, SIZE, "half_even"), prompts)

    def _score(self, crops: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        device = next(self.network.parameters()).device
        tokens = self.tokenizer(
            [prompt.text for prompt in prompts], padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(device)
        crops = pixels.normalize(crops.to(device, torch.float32))
        parts = (crops.split(IMAGES), tokens.input_ids.split(IMAGES), tokens.attention_mask.split(IMAGES))
        with torch.autocast(device.type, enabled=False):
            return torch.cat([self.network(*part) for part in zip(*parts, strict=True)])
