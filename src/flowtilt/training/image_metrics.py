"""What can be told of a rollout's images without a model: how much is saturated, which are blank, which are the same.

A reward that is hacked often shows here first, and where images are gone no reward says why. Shapes: N images of a
rollout, in groups of one prompt each; values in [0, 1].
"""

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from flowtilt.advantages import group_means

SAMPLES = 64
"""About so many rows and columns of an image are looked at: 1,152 images of 512 px take a second on one core."""
SIDE = 8
"""Pixels of a thumbnail's side: enough to tell layouts apart, and small enough to travel between ranks."""
FEATURES = 2 + 3 * SIDE**2
LAST_LEVEL = 1 / 255
"""A value this near to 0 or 1 is the first or last of 8 bits."""
BLANK = 0.02
"""An image is blank where no channel's standard deviation is larger: five levels of 8 bits."""
SAME = 0.01
"""Images are the same where their thumbnails differ by less, root mean square: two and a half levels of 8 bits."""


def image_features(images: Tensor) -> Tensor:
    """What `image_metrics` needs of images [N, 3, H, W]: [N, FEATURES] fp32, on their device.

    First the share of saturated values, then the contrast (the largest standard deviation of a channel), then a thumbnail.
    """
    # odd, or it would fall into step with textures of 8 or 16 pixels, the sizes of a latent and of a patch
    stride = min(images.shape[2:]) // SAMPLES | 1
    seen = images[:, :, ::stride, ::stride].float()
    saturated = ((seen <= LAST_LEVEL) | (seen >= 1 - LAST_LEVEL)).float().flatten(1).mean(1)
    contrast = seen.flatten(2).std(2, correction=0).amax(1)
    return torch.cat([saturated[:, None], contrast[:, None], adaptive_avg_pool2d(seen, SIDE).flatten(1)], 1)


def image_metrics(features: Tensor, groups: Tensor) -> dict[str, float]:
    """Metrics of a whole rollout from the features [N, FEATURES] and groups [N] of all ranks' images."""
    saturated, contrast, thumbnails = features[:, 0], features[:, 1], features[:, 2:].double()
    index = groups.unique(return_inverse=True)[1]
    sizes = index.bincount()
    means = thumbnails.new_zeros(len(sizes), thumbnails.shape[1]).index_add(0, index, thumbnails) / sizes[:, None]
    apart = group_means((thumbnails - means[index]).square().mean(1), groups).sqrt()
    # an image counts one over the size of its group, so that every group counts once
    share = 1 / (sizes[index] * len(sizes))
    return {
        "images/saturated": float(saturated.double().mean()),
        "images/blank": float((contrast < BLANK).double().mean()),
        "images/diversity": float((apart * share).sum()),
        "groups/identical_images": float(((apart < SAME) * share).sum()),
    }
