"""Metrics of images that need no model: closed forms, invariances, and that a texture does not fall into step with the samples."""

import pytest
import torch

from flowtilt.training.image_metrics import BLANK, FEATURES, SAME, image_features, image_metrics


def flat(value, number=1, side=64):
    return torch.full((number, 3, side, side), value)


def noisy(number, side=64, seed=0, around=0.5, spread=0.1):
    rng = torch.Generator().manual_seed(seed)
    return (around + spread * torch.randn(number, 3, side, side, generator=rng)).clamp(0.02, 0.98)


def measured(images, groups):
    return image_metrics(image_features(images), torch.tensor(groups))


@pytest.mark.parametrize("side", [32, 64, 200, 512])
def test_saturated_is_the_share_of_values_at_the_first_or_last_of_8_bits(side):
    images = flat(0.5, 4, side)
    images[0] = 0
    images[1] = 1
    images[2, 0] = 0.999
    found = image_features(images)
    assert found.shape == (4, FEATURES)
    torch.testing.assert_close(found[:, 0], torch.tensor([1.0, 1.0, 1 / 3, 0.0]))
    assert measured(images, [0, 0, 1, 1])["images/saturated"] == pytest.approx(7 / 12)


@pytest.mark.parametrize("period", [2, 8, 16])
def test_a_texture_does_not_fall_into_step_with_the_samples(period):
    """Half of each period is white: whatever the sampling, about half must be found."""
    images = flat(0.5, 1, 512)
    images[..., torch.arange(512) % period < period // 2] = 1
    assert measured(images, [0])["images/saturated"] == pytest.approx(0.5, abs=0.02)


def test_an_image_is_blank_by_its_own_channels_contrast():
    images = torch.cat([flat(0.16), noisy(1, spread=BLANK / 2), noisy(1, spread=0.1)])
    two_colours = flat(0.2)
    two_colours[:, 2, :32] = 0.9  # one channel tells
    red = torch.tensor([0.9, 0.1, 0.1]).view(1, 3, 1, 1).expand(1, 3, 64, 64)  # channels differ, places do not
    assert measured(torch.cat([images, two_colours, red]), [0] * 5)["images/blank"] == pytest.approx(3 / 5)


def test_diversity_is_the_distance_from_the_groups_own_mean():
    """Two flat images, 2a apart, lie a from their mean; what groups have in common does not count."""
    images = torch.cat([flat(0.3), flat(0.5), flat(0.8), flat(0.8)])
    found = measured(images, [0, 0, 1, 1])
    assert found["images/diversity"] == pytest.approx(0.05, abs=1e-6) and found["groups/identical_images"] == 0.5


def test_groups_count_alike_whatever_their_sizes():
    images = torch.cat([flat(0.3), flat(0.5), flat(0.8, 6)])
    assert measured(images, [0, 0, *[1] * 6])["groups/identical_images"] == pytest.approx(0.5)


def test_images_that_differ_by_little_noise_are_the_same():
    alike = flat(0.5, 4) + 0.01 * torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    unlike = noisy(4, side=8, spread=3 * SAME)
    assert measured(alike, [0] * 4)["groups/identical_images"] == 1
    assert measured(unlike, [0] * 4)["groups/identical_images"] == 0


def test_the_order_of_images_and_who_looked_at_them_does_not_matter():
    images, groups = noisy(12, side=32), torch.arange(12) // 4
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    parts = torch.cat([image_features(part) for part in images[order].split(5)])
    whole = image_metrics(image_features(images), groups)
    assert image_metrics(parts, groups[order]) == pytest.approx(whole)


@pytest.mark.filterwarnings("ignore:std")
def test_a_rank_without_images_has_no_features():
    assert image_features(torch.empty(0, 3, 32, 32)).shape == (0, FEATURES)
