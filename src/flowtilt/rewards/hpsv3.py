"""HPSv3, arXiv 2508.03789: Qwen2-VL-7B reads the image and the prompt; a head at a token of its own gives the score.

Image      Pillow's bicubic to multiples of 28 pixels with about 448 x 448 of them, CLIP's normalisation
Text       one user's turn: the image, the question that the model was trained with, and the token <|Reward|> near its end
Score      mu of the head's (mu, log sigma) at that token; no bounds, about -10 to 15 over ordinary images

The published code (github.com/MizzenAI/HPSv3, MIT) numbers all tokens one after the other, image tokens too; `positions = "mrope"` has
Qwen2-VL's own three axes instead, as other ports do, which gives other scores. The body is bfloat16, the head fp32, as published.
"""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from flowtilt.errors import UserError
from flowtilt.io import weights
from flowtilt.io.images import to_pil
from flowtilt.prompts import Prompt
from flowtilt.rewards import RewardOutput, keymap
from flowtilt.rewards.about import find_weights
from flowtilt.rewards.networks import Network as Planned
from flowtilt.rewards.pixels import MEAN, STD

IMAGES = 4
"""In one forward pass."""
PIXELS = 256 * 28 * 28
UNIT, PATCH, FRAMES, MERGED = 28, 14, 2, 2
"""Sides are multiples of the unit: patches of 14 pixels, merged two by two; a picture counts as two frames of a video."""
ROWS = 151658
"""Of the embedding: Qwen2-VL's tokens and one more."""
REWARD = "<|Reward|>"
HIDDEN = (1024, 16)
NAMES: dict[str, str | None] = {"visual.*": "body.visual.*", "model.*": "body.language_model.*", "lm_head.*": None, "rm_head.*": "head.*"}
"""The published names and those of `Network`; see `keymap.rename`."""
# word for word as the model was trained with it, its spaces at the ends of lines included
QUESTION = (
    "\n"
    "You are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall score "
    "to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 being the best. "
    "\n\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical errors, such as abnormal "
    "body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to interpret, "
    "with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements "
    "(e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, composition, "
    "atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or adult "
    "material. If such content is present, the image quality and satisfaction score should be the lowest possible. \n\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) align with "
    "the textual description. The subject should match the description in terms of number, appearance, and behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the image "
    "adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image logically "
    "fit the scenario described in the prompt. The environment should support and enhance the subject without "
    "contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, accessories, "
    "expressions, actions) are faithfully represented in the image. Minor deviations may be acceptable, but critical "
    "attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the image. "
    "The generated content should not introduce elements that conflict with or distort the original description.\n"
    "Textual prompt - {prompt}\n\n\n\n"
    "Please provide the overall ratings of this image: <|Reward|>\n\n"
    "END\n"
)
BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
AFTER = "<|im_end|>\n<|im_start|>assistant\n"
SEEN = "<|image_pad|>"
TOKENS = 760
"""Of the text around a caption of 100 tokens, about."""


def config() -> Qwen2VLConfig:
    """Qwen2-VL-7B-Instruct's architecture with HPSv3's rows."""
    text: dict[str, Any] = {
        "vocab_size": ROWS,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision: dict[str, Any] = {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "mlp_ratio": 4}
    return Qwen2VLConfig(text_config=text, vision_config=vision)


class Network(nn.Module):
    """Qwen2-VL without its language head, and HPSv3's."""

    def __init__(self, config: Qwen2VLConfig):
        super().__init__()
        self.body = Qwen2VLModel(config)
        width: int = config.text_config.hidden_size  # type: ignore[union-attr]
        layers = [nn.Linear(width, HIDDEN[0]), nn.ReLU(), nn.Dropout(0.05), nn.Linear(HIDDEN[0], HIDDEN[1]), nn.ReLU()]
        self.head = nn.Sequential(*layers, nn.Linear(HIDDEN[1], 2))

    def forward(self, patches: Tensor, grid: Tensor, ids: Tensor, mask: Tensor, at: Tensor, mrope: bool) -> Tensor:
        """mu and log sigma [N, 2] of N pictures.

        Args:
            patches: of all pictures, one after the other; see `patches_of`.
            grid: [N, 3], patches of each picture in time, height, width.
            ids, mask: tokens [N, L], padded at their ends, and 1 where there are any.
            at: [N], where each has the token <|Reward|>.
            mrope: whether image tokens have positions of three axes.
        """
        kinds = (ids == self.body.config.image_token_id).int()
        body: Any = self.body  # whose hints name classes of tensors that nothing makes
        positions = body.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid, attention_mask=mask)[0] if mrope else None
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape)
        out = self.body(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            pixel_values=patches,
            image_grid_thw=grid,
            mm_token_type_ids=kinds,
            use_cache=False,
        )
        return self.head(out.last_hidden_state[torch.arange(len(ids), device=ids.device), at].float())


def resized(height: int, width: int) -> tuple[int, int]:
    """Height and width in multiples of 28 that keep the shape as far as that allows and have about 448 x 448 pixels.

    Raises:
        UserError: one side is more than 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise UserError(f"hpsv3: an image of {width} x {height} pixels is too long for Qwen2-VL")
    tall, wide = (round(side / UNIT) * UNIT for side in (height, width))
    scale = math.sqrt(height * width / PIXELS)
    if tall * wide > PIXELS:
        tall, wide = (max(UNIT, math.floor(side / scale / UNIT) * UNIT) for side in (height, width))
    elif tall * wide < PIXELS:
        tall, wide = (math.ceil(side / scale / UNIT) * UNIT for side in (height, width))
    return tall, wide


def patches_of(images: Tensor) -> tuple[Tensor, Tensor]:
    """Patches [N * P, 3 * 2 * 14 * 14] of images [N, 3, H, W] in [0, 1], four that are merged beside each other, and the grid [N, 3]."""
    tall, wide = resized(images.shape[2], images.shape[3])
    # one at a time: Pillow's own bicubic is what the published code resizes with
    small = [picture.resize((wide, tall), Image.Resampling.BICUBIC) for picture in to_pil(images)]
    levels = torch.stack([torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8).view(tall, wide, 3) for one in small])
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    pixels = (levels.permute(0, 3, 1, 2).float() / 255 - mean) / std
    down, across = tall // PATCH, wide // PATCH
    parts = pixels.view(len(images), 3, down // MERGED, MERGED, PATCH, across // MERGED, MERGED, PATCH)
    parts = parts.permute(0, 2, 5, 3, 6, 1, 4, 7)  # blocks of merged patches, patches, then each one's pixels by channel
    parts = parts.unsqueeze(6).expand(*parts.shape[:6], FRAMES, PATCH, PATCH)
    return parts.reshape(len(images) * down * across, -1), torch.tensor([[1, down, across]] * len(images))


@cache
def network(path: Path, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Network:
    """The frozen network of a file, read once a process; its head is fp32.

    Raises:
        UserError: the file can't be read or holds other weights.
    """
    tensors = keymap.rename(_unwrapped(weights.read(path)), NAMES, path, dtype)
    tensors = {name: tensor.float() if name.startswith("head.") else tensor for name, tensor in tensors.items()}
    return keymap.fill(keymap.build(lambda: Network(config())), tensors, path).to(device)


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without "model." before all names, as a checkpoint of a trainer has it."""
    wrapped = all(name.startswith("model.") for name in tensors) and "model.rm_head.0.weight" in tensors
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()} if wrapped else tensors


def meta_network(resolution: int) -> Planned:
    """The network as `flowtilt plan` measures it: one picture at 448 x 448 and a caption of 100 tokens."""
    model: Any = Network(config()).eval()
    model.body.to(torch.bfloat16)
    seen = PIXELS // UNIT**2

    def judge(images: Tensor) -> None:
        number = len(images)
        patches = torch.empty(number * seen * MERGED**2, 3 * FRAMES * PATCH**2, dtype=torch.bfloat16)
        # as Qwen2-VL's own forward pass, whose positions are computed where the grid is, and that is looked into;
        # only the shapes of cosine and sine count
        vision, cells = model.body.visual, seen * MERGED**2
        hidden = vision.patch_embed(patches)
        places = (torch.empty(len(patches), vision.config.embed_dim // vision.config.num_heads),) * 2
        ends = torch.arange(0, (number + 1) * cells, cells, dtype=torch.int32, device="cpu")
        for block in vision.blocks:
            hidden = block(hidden, cu_seqlens=ends, max_seqlen=cells, position_embeddings=places)
        vision.merger(hidden)
        length = seen + TOKENS
        hidden = torch.empty(number, length, model.body.config.text_config.hidden_size, dtype=torch.bfloat16)
        positions = torch.zeros(3, number, length, dtype=torch.long)
        model.head(
            model.body.language_model(inputs_embeds=hidden, position_ids=positions, use_cache=False).last_hidden_state[:, -1].float()
        )

    return Planned(model, IMAGES, (3, math.isqrt(PIXELS), math.isqrt(PIXELS)), judge, whole=False)


class HPSv3:
    """mu as the score, `log_sigma` as a detail.

    Args:
        device: where the network is, 15.5 GB.
        positions: "sequential", as the published code numbers them, or "mrope".

    Raises:
        UserError: weights are missing or not the right ones.
    """

    def __init__(self, *, device: torch.device | str, positions: str = "sequential"):
        if positions not in ("sequential", "mrope"):
            raise UserError(f'hpsv3: no positions {positions!r}; it is "sequential" or "mrope"')
        self._mrope = positions == "mrope"
        self.version = {"positions": positions}
        self.tokenizer: Any = AutoTokenizer.from_pretrained(find_weights("qwen2-vl"))
        self.tokenizer.add_special_tokens({"additional_special_tokens": [REWARD]})
        if self.tokenizer.convert_tokens_to_ids(REWARD) != ROWS - 1:
            raise UserError(f"{find_weights('qwen2-vl')}: not Qwen2-VL's tokenizer; fetch it again with `flowtilt download hpsv3`")
        self.network = network(find_weights("hpsv3"), torch.device(device))

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """What may leave the device between two calls."""
        return (self.network,)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> RewardOutput:
        """Scores of images [N, 3, H, W] in [0, 1], each with its prompt."""
        parts = [self._some(images[start : start + IMAGES], prompts[start : start + IMAGES]) for start in range(0, len(prompts), IMAGES)]
        mu, log_sigma = torch.cat(parts).cpu().unbind(1)
        return RewardOutput(mu, details={"log_sigma": log_sigma})

    def _some(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        device = next(self.network.parameters()).device
        patches, grid = patches_of(images)
        seen = SEEN * (int(grid[0].prod()) // MERGED**2)
        texts = [f"{BEFORE}{seen}<|vision_end|>{question(prompt.text)}{AFTER}" for prompt in prompts]
        tokens = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        found = tokens.input_ids == ROWS - 1
        at = found.shape[1] - 1 - found.flip(1).int().argmax(1)  # the last one: a caption might spell it, too
        arguments = (patches, grid, tokens.input_ids, tokens.attention_mask, at)
        with torch.autocast(device.type, enabled=False):
            return self.network(*(one.to(device) for one in arguments), self._mrope)


def question(caption: str) -> str:
    """What is asked about a picture of this caption, whose special tokens are taken apart."""
    return QUESTION.replace("{prompt}", caption.replace("<|", "< |"))
