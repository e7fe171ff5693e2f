"""Objects in images, as mmdetection's instance segmentation finds them.

Its test-time steps, of mmdetection 2.28 and mmcv 1.7: resize, pad, normalise; then each query's classes and
mask become detections. transformers' image processor does both otherwise and gives other scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from flowtilt.errors import UserError
from flowtilt.io.images import to_bytes
from flowtilt.rewards.about import find_weights
from flowtilt.rewards.geneval import mask2former
from flowtilt.rewards.networks import Network

LONGEST, SHORTEST = 1333, 800
"""The resized image's sides are at most these, and one of them is reached."""
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
PADDING = 128.0
"""Grey level of the padding, before normalisation."""
STRIDE = 32
IMAGES, MASKS = 4, 16
"""Images in one forward pass; masks at the image's size at once."""


@dataclass(frozen=True)
class Detection:
    """One object.

    Args:
        label: index of its class in COCO's order, 0 … 79.
        score: probability of the class times the mean of the mask, in [0, 1].
        box: x1, y1, x2, y2 in pixels of the image; x2 and y2 are exclusive.
        mask: bool [H, W], on the images' device.
    """

    label: int
    score: float
    box: tuple[float, float, float, float]
    mask: Tensor


class Detector:
    """Mask2Former's objects.

    Args:
        device: where the network is.
        channel_order: "upstream_bgr" swaps red and blue, as the training code of DiffusionNFT, RTDMD and
            flow_grpo's reward server does by handing RGB arrays to a function that wants BGR.

    Raises:
        UserError: the weights are missing or not the right ones, or there is no such channel order.
    """

    def __init__(self, device: torch.device | str, *, channel_order: Literal["rgb", "upstream_bgr"] = "rgb"):
        if channel_order not in ("rgb", "upstream_bgr"):
            raise UserError(f'geneval: no channel_order {channel_order!r}; it is "rgb" or "upstream_bgr"')
        self.flip = channel_order == "upstream_bgr"
        self.network = mask2former.network(find_weights("mask2former"), torch.device(device))

    @torch.no_grad()
    def __call__(self, images: Tensor, threshold: Sequence[float]) -> list[list[Detection]]:
        """Each image's objects with a score above its threshold, best first.

        Args:
            images: [N, 3, H, W] in [0, 1].
            threshold: one for each image; a score is compared in fp32 and must be greater.
        """
        found: list[list[Detection]] = []
        device = next(self.network.parameters()).device
        for part in images.split(IMAGES):
            pixels, valid = prepare(part.to(device), flip=self.flip)
            with torch.autocast(device.type, enabled=False):
                classes, masks = self.network(pixels)
            if not (classes.isfinite().all() and masks.isfinite().all()):
                raise UserError("geneval: the detector's output is not finite; fetch its weights again")
            for n in range(len(part)):
                objects = detections(
                    classes[n],
                    masks[n],
                    padded=(pixels.shape[2], pixels.shape[3]),
                    valid=valid,
                    size=(images.shape[2], images.shape[3]),
                    threshold=threshold[len(found)],
                )
                found.append([Detection(o.label, o.score, o.box, o.mask.to(images.device)) for o in objects])
        return found


def resized(height: int, width: int) -> tuple[int, int]:
    """Height and width of the resized image: the largest that keeps the shape and fits; halves round up."""
    scale = min(LONGEST / max(height, width), SHORTEST / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def prepare(images: Tensor, *, flip: bool = False) -> tuple[Tensor, tuple[int, int]]:
    """The network's input [N, 3, H', W'] for images in [0, 1], and height and width without the padding.

    Bilinear without antialiasing, in whole grey levels; OpenCV's own fixed-point arithmetic differs by one
    level at most. Padding is at the right and bottom, to multiples of 32.
    """
    valid = resized(images.shape[2], images.shape[3])
    levels = to_bytes(images.flip(1) if flip else images).float()
    levels = interpolate(levels, valid, mode="bilinear", align_corners=False).round().clamp(0, 255)
    levels = pad(levels, (0, -valid[1] % STRIDE, 0, -valid[0] % STRIDE), value=PADDING)
    mean, std = (levels.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return (levels - mean) / std, valid


def detections(
    class_logits: Tensor,
    mask_logits: Tensor,
    *,
    padded: tuple[int, int],
    valid: tuple[int, int],
    size: tuple[int, int],
    threshold: float,
    most: int = 100,
) -> list[Detection]:
    """One image's objects with a score above the threshold, best first.

    A query may appear under several classes. Nothing is suppressed for overlapping.

    Args:
        class_logits: [queries, classes + 1], the last of them "no object".
        mask_logits: [queries, h, w].
        padded: height and width of the network's input.
        valid: of the part of it that is not padding.
        size: of the image.
        most: pairs of a query and a class that are looked at, the most probable ones.
    """
    classes = class_logits.shape[1] - 1
    probabilities = class_logits.float().softmax(1)[:, :-1].flatten()
    pairs = probabilities.topk(min(most, len(probabilities)), sorted=False).indices
    pairs = pairs[probabilities[pairs] > threshold]  # the score is not greater than the probability
    if not len(pairs):
        return []
    queries, which = (pairs // classes).unique(return_inverse=True)
    enlarged = [_enlarge(part, padded, valid, size) for part in mask_logits.float()[queries].split(MASKS)]
    masks, certainties = (torch.cat(parts) for parts in zip(*enlarged, strict=True))
    scores = probabilities[pairs] * certainties[which]
    found = []
    for k in scores.argsort(descending=True, stable=True).tolist():
        if scores[k] > threshold:
            mask = masks[which[k]].clone()
            found.append(Detection(int(pairs[k]) % classes, float(scores[k]), _box(mask), mask))
    return found


def _enlarge(logits: Tensor, padded: tuple[int, int], valid: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Masks [n, H, W] at the image's size and their certainties [n], the mean probability within."""
    logits = interpolate(logits[None], padded, mode="bilinear", align_corners=False)[..., : valid[0], : valid[1]]
    logits = interpolate(logits, size, mode="bilinear", align_corners=False)[0]
    masks = logits > 0
    return masks, (logits.sigmoid() * masks).flatten(1).sum(1) / (masks.float().flatten(1).sum(1) + 1e-6)


def _box(mask: Tensor) -> tuple[float, float, float, float]:
    """x1, y1, x2, y2 around a mask; zeros where it is empty."""
    rows, columns = (mask.any(axis).nonzero().flatten() for axis in (1, 0))
    if not len(rows):
        return (0.0, 0.0, 0.0, 0.0)
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


def meta_network(resolution: int) -> Network:
    """Mask2Former for square images of so many pixels, as `flowtilt plan` measures it."""
    model = mask2former.Mask2Former(mask2former.config(), mask2former.CLASSES).eval().to("meta")  # one parameter is made on the CPU
    shape = (3, *(size + -size % STRIDE for size in resized(resolution, resolution)))
    return Network(model, IMAGES, shape, model, whole=False)
