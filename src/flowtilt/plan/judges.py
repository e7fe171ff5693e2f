"""The reward models on the meta device: their weights, and what an image costs them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from flowtilt.plan.meter import added, measure, scaled
from flowtilt.plan.network import Weights, weights_of
from flowtilt.rewards import BUILT_IN
from flowtilt.rewards.named import Named

MODELS = {
    "pickscore": ("pickscore",),
    "hpsv2": ("hpsv2",),
    "clipscore": ("clip-l",),
    "aesthetic": ("clip-l",),
    "imagereward": ("imagereward",),
    "geneval": ("mask2former", "clip-l"),
}
"""Which models a built-in reward has; what two rewards share is there once."""
OCR_SECONDS = 0.14
"""Seconds of one core for an image of 512 pixels with side = 512; the default side takes about three times as long (docs/rewards.md)."""


@dataclass(frozen=True)
class Model:
    """A reward's network, fp32.

    Args:
        chunk: images in one forward pass.
        image, prompt: operations for an image, and for a prompt of as many tokens as are read.
        activations: bytes for each image of a chunk.
        crop: bytes of an image as the network reads it.
        whole: all images are made ready at once, not a chunk.
    """

    weights: Weights
    chunk: int
    image: Mapping[str, float]
    prompt: Mapping[str, float]
    activations: float
    crop: int
    whole: bool

    def working(self, images: int, size: int) -> float:
        """Bytes at most while `images` of `size` bytes are judged."""
        part = min(images, self.chunk)
        # resized, less the mean, divided by the deviation: three copies; before that, rounded to 8 bits with two copies
        return max(part * self.activations + 3 * (images if self.whole else part) * self.crop, 2 * images * size)


@dataclass(frozen=True)
class Judging:
    """What the rewards of a rollout or an evaluation ask of a machine.

    Args:
        models: those that work on the device, by name.
        readers: the models of a reward, by its name; the first reads every image.
        beside: what is not counted, by the reward's name.
        off_device: whether a reward works elsewhere while images are drawn, so that they are drawn in parts.
    """

    models: Mapping[str, Model]
    readers: Mapping[str, tuple[str, ...]]
    beside: Mapping[str, str]
    off_device: bool

    def flops(self, images: int, prompts: int) -> dict[str, float]:
        """Operations for `images` of `prompts` distinct captions."""
        models = [self.models[names[0]] for names in self.readers.values()]
        return added(*(scaled(model.image, images) for model in models), *(scaled(model.prompt, prompts) for model in models))


def judging(rewards: Sequence[Named], resolution: int) -> Judging:
    """The models of rewards for images of `resolution` pixels."""
    models: dict[str, Model] = {}
    readers: dict[str, tuple[str, ...]] = {}
    beside: dict[str, str] = {}
    off_device = False
    for one in rewards:
        source = one.source
        if source in MODELS:
            names = MODELS[source]
            models |= {name: _model(name, resolution if name == "mask2former" else 224) for name in names}
            readers[one.name] = names
            if source == "geneval":
                beside[one.name] = "without the colours' crops, whose number depends on the images"
        elif source == "ocr":
            seconds = OCR_SECONDS * (1 if one.options.get("side") == 512 else 3)
            beside[one.name] = f"on the CPU while images are drawn, about {seconds:.2f} s an image and core"
        elif source == "unifiedreward" or "://" in source:
            beside[one.name] = "on its server while images are drawn"
        elif source in BUILT_IN:
            beside[one.name] = "on the CPU"
        else:
            beside[one.name] = "your own: neither its time nor its memory is known"
        off_device |= source in ("ocr", "unifiedreward") or "://" in source
    return Judging(models, readers, beside, off_device)


@cache
def _model(name: str, side: int) -> Model:
    with torch.device("meta"), torch.no_grad():
        return _mask2former(side) if name == "mask2former" else _imagereward() if name == "imagereward" else _clip(name)


def _clip(name: str) -> Model:
    from transformers import CLIPModel

    from flowtilt.rewards import clip, openclip

    model: Any = CLIPModel(openclip.config("ViT-L-14" if name == "clip-l" else "ViT-H-14")).eval()
    text = measure(lambda: model.get_text_features(input_ids=torch.zeros(1, clip.TOKENS, dtype=torch.long))).flops
    return _measured(model, clip.IMAGES, (3, 224, 224), lambda x: model.get_image_features(pixel_values=x), text)


def _imagereward() -> Model:
    from flowtilt.rewards import imagereward

    model: Any = imagereward.Network(*imagereward.configs()).eval()

    def judge(images: torch.Tensor) -> None:
        # a mask would be looked into, which meta tensors do not allow; it changes no count
        seen = model.vision(images).last_hidden_state
        ids = torch.zeros(len(images), imagereward.TOKENS, dtype=torch.long)
        model.head(model.text(input_ids=ids, encoder_hidden_states=seen).last_hidden_state[:, 0])

    return _measured(model, imagereward.IMAGES, (3, imagereward.SIZE, imagereward.SIZE), judge, {})


def _mask2former(side: int) -> Model:
    from flowtilt.rewards.geneval import detect, mask2former

    model = mask2former.Mask2Former(mask2former.config(), mask2former.CLASSES).eval().to("meta")  # one parameter is made on the CPU
    shape = (3, *(size + -size % detect.STRIDE for size in detect.resized(side, side)))
    return _measured(model, detect.IMAGES, shape, model, {}, whole=False)


def _measured(
    model: nn.Module,
    chunk: int,
    shape: tuple[int, ...],
    judge: Callable[[torch.Tensor], object],
    prompt: Mapping[str, float],
    *,
    whole: bool = True,
) -> Model:
    images = torch.empty(chunk, *shape)
    work = measure(lambda: judge(images))
    return Model(
        weights=weights_of(model),
        chunk=chunk,
        image=scaled(work.flops, 1 / chunk),
        prompt=prompt,
        activations=work.peak / chunk,
        crop=images[0].nbytes,
        whole=whole,
    )
