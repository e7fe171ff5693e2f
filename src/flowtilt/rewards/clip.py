"""CLIP models that judge images: how well features of an image and of a text agree.

    clip-l      OpenAI's ViT-L/14: ClipScore, Aesthetic, GenEval's colours
    pickscore   ViT-H/14, trained on the choices of Pick-a-Pic's users
    hpsv2       ViT-H/14, trained on Human Preference Dataset v2

Each is loaded once a process and shared. ClipScore and Aesthetic share the model but not the features of
an image: they resize it differently, and features are the same only where the pixels are.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from flowtilt.errors import UserError
from flowtilt.io import weights
from flowtilt.rewards import keymap, openclip
from flowtilt.rewards.about import find_weights
from flowtilt.rewards.networks import Network, no_tokens
from flowtilt.rewards.pixels import normalize

IMAGES = 64
"""In one forward pass."""
TOKENS = 77
"""Of a text, its start and end included; what is longer is cut."""
TEXTS = 4096
"""Whose features are kept."""


class CLIP:
    """A frozen model and its tokenizer.

    Args:
        model: in eval mode.
        tokenizer: its end token is the one at which the model reads a text's features.
    """

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer):
        self.model = model
        self.tokenizer = tokenizer
        self.logit_scale = float(model.logit_scale.detach().exp())
        self._encoded = lru_cache(TEXTS)(self._encode)

    def image_features(self, pixels: Tensor) -> Tensor:
        """Unit vectors [N, D] of square images [N, 3, 224, 224] in [0, 1], not normalised; with a gradient where there is one."""
        normalized = normalize(pixels.to(self.model.device, self.model.dtype))
        with torch.autocast(normalized.device.type, enabled=False):
            parts = [_projected(self.model.get_image_features(pixel_values=part)) for part in normalized.split(IMAGES)]
        return F.normalize(torch.cat(parts), dim=-1)

    def text_features(self, texts: Sequence[str], clean: bool = False) -> Tensor:
        """Unit vectors [N, D]; those of one text are the same bits whatever stands beside it.

        Args:
            clean: texts go through `openclip.clean` first.
        """
        texts = [openclip.clean(text) for text in texts] if clean else texts
        return torch.stack([self._encoded(text) for text in texts]).to(self.model.device)

    @torch.no_grad()
    def _encode(self, text: str) -> Tensor:
        ids = self.tokenizer(text, truncation=True, max_length=TOKENS, return_tensors="pt").input_ids.to(self.model.device)
        with torch.autocast(ids.device.type, enabled=False):
            # causal attention: what would follow the end token changes nothing, so there is no padding
            features = F.normalize(_projected(self.model.get_text_features(input_ids=ids))[0], dim=-1)
        return features.cpu()  # they are kept, and the model may be elsewhere by the next call


def _projected(output: Any) -> Tensor:
    return output.pooler_output


@cache
def load(name: str, device: torch.device | str) -> CLIP:
    """The model of these weights ("clip-l", "pickscore", "hpsv2") in fp32, read once per process and device.

    A folder is in the layout of transformers, a file in that of open_clip's ViT-H/14.

    Raises:
        UserError: weights are missing, damaged, or another model's.
    """
    exact = torch.empty(0, device=device).device
    if device != exact:  # "cuda" and "cuda:0" are one device
        return load(name, exact)
    path = find_weights(name)
    tokenizer = _tokenizer(find_weights("clip-tokenizer"))
    config, tensors = _open_clip(path) if path.is_file() else _folder(path)
    model: Any = keymap.fill(keymap.build(lambda: CLIPModel(config)), tensors, path)
    _check_tokenizer(tokenizer, config, path)
    return CLIP(model.to(exact), tokenizer)


def vit_l14(resolution: int) -> Network:
    """OpenAI's ViT-L/14 as `flowtilt plan` measures it."""
    return _network("ViT-L-14")


def vit_h14(resolution: int) -> Network:
    """LAION's ViT-H/14 as `flowtilt plan` measures it."""
    return _network("ViT-H-14")


def _network(name: Literal["ViT-H-14", "ViT-L-14"]) -> Network:
    model: Any = CLIPModel(openclip.config(name)).eval()
    return Network(
        model,
        IMAGES,
        (3, 224, 224),
        lambda images: model.get_image_features(pixel_values=images),
        lambda: model.get_text_features(input_ids=no_tokens(TOKENS)),
    )


def _folder(folder: Path) -> tuple[CLIPConfig, dict[str, Tensor]]:
    """What a folder in transformers' layout holds."""
    try:
        config = CLIPConfig.from_pretrained(folder, local_files_only=True)
        tensors = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{folder}: can't be read, a file may be cut short: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error
    # older transformers stored these, they only count the positions
    return config, {key: tensor.float() for key, tensor in tensors.items() if not key.endswith(".position_ids")}


def _open_clip(path: Path) -> tuple[CLIPConfig, dict[str, Tensor]]:
    """What an open_clip checkpoint of ViT-H/14 holds, such as HPSv2's in fp16."""
    state = weights.read(path).get("state_dict")
    if not isinstance(state, dict):
        raise UserError(f'{path}: no "state_dict" in it, so it is not HPSv2\'s file; fetch it again')
    return openclip.config("ViT-H-14"), openclip.to_transformers(state, path)


def _tokenizer(folder: Path) -> CLIPTokenizer:
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: the tokenizer can't be read: {' '.join(str(error).split()) or type(error).__name__}") from error


def _check_tokenizer(tokenizer: CLIPTokenizer, config: CLIPConfig, path: Path) -> None:
    """Of a text with another end token every feature would be that of its start."""
    text: Any = config.text_config
    read_at, end = text.eos_token_id, tokenizer.eos_token_id
    if len(tokenizer) > text.vocab_size or (read_at != end and read_at != 2):  # 2: transformers takes the highest token
        raise UserError(
            f"{path}: reads texts at token {read_at}, clip-l's tokenizer ends them with {end} of {len(tokenizer)}; not of one family"
        )
