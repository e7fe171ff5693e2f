"""Each way of resizing gives the pixels that its reference gives, for every shape of image."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from flowtilt.io.images import to_pil
from flowtilt.rewards.pixels import bicubic_crop, bicubic_crop_tensor, bilinear_crop, fit_longest, normalize
from flowtilt.seeding import generator

WAYS = {"A": bicubic_crop, "A tensor": bicubic_crop_tensor, "B": bilinear_crop, "C": fit_longest}
SIZES = [(512, 512), (1024, 1024), (768, 512), (512, 771), (300, 400), (225, 224), (200, 210), (20, 320), (31, 7)]


def noise(height: int, width: int, count: int = 1) -> Tensor:
    return torch.rand(count, 3, height, width, generator=generator(0, "pixels", height, width))


@pytest.mark.parametrize("size", SIZES)
def test_bicubic_crop_is_transformers_own_bit_by_bit(size):
    images = noise(*size, count=2)
    theirs = CLIPImageProcessorPil()(to_pil(images), return_tensors="pt")["pixel_values"]
    assert torch.equal(normalize(bicubic_crop(images)), theirs)


@pytest.mark.parametrize("size", SIZES)
def test_the_differentiable_crop_is_within_the_rounding_of_the_exact_one(size):
    """Pillow rounds after each of its two passes; the second's weights, of absolute sum 1.25, pass the first's half level on."""
    images = (noise(*size) * 255).round() / 255
    for rounding in ("floor", "half_even"):
        apart = bicubic_crop_tensor(images, 224, rounding) - bicubic_crop(images, 224, rounding)
        assert apart.abs().max() <= (0.5 + 0.5 * 1.25 + 0.05) / 255  # 0.05: Pillow's weights are fixed-point numbers


def test_an_odd_margin_is_halved_as_each_library_does():
    images = (noise(224, 235) * 255).round() / 255  # margin 11
    assert torch.equal(bicubic_crop(images, 224, "floor"), images[..., 5:229])
    assert torch.equal(bicubic_crop(images, 224, "half_even"), images[..., 6:230])
    assert torch.equal(bicubic_crop_tensor(images, 224, "floor"), images[..., 5:229])
    assert torch.equal(bilinear_crop(images), images[..., 6:230])
    images = noise(233, 224)  # margin 9: 4.5 goes to the even 4 either way
    assert torch.equal(bilinear_crop(images), images[..., 4:228, :])


@pytest.mark.parametrize("way", WAYS)
def test_an_image_of_the_right_size_is_left_as_it_is(way):
    images = (noise(224, 224) * 255).round() / 255
    assert torch.equal(WAYS[way](images), images)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2001, 1), (3, 200), (2, 33), (64, 5000)])
def test_every_shape_of_one_colour_becomes_a_square_of_that_colour(way, size):
    colour = torch.tensor([0.2, 0.4, 0.8])[None, :, None, None]  # 51, 102, 204 of 255
    square = WAYS[way](colour.expand(2, 3, *size))
    assert square.shape == (2, 3, 224, 224)
    if way == "C" and size != (1, 1):
        square = square[..., 111:112, :] if size[0] < size[1] else square[..., 111:112]
    torch.testing.assert_close(square, colour.expand_as(square), atol=1e-6, rtol=0)


@pytest.mark.parametrize("way", ["A", "A tensor", "B"])
@pytest.mark.parametrize("size", [(10, 401), (400, 10)])
def test_a_very_long_image_is_cut_about_its_own_centre(way, size):
    """Odd and even lengths: mirrored along its length, the image gives the mirrored crop."""
    images, axis = noise(*size).double(), -1 if size[0] < size[1] else -2
    apart = WAYS[way](images.flip(axis)) - WAYS[way](images).flip(axis)
    assert apart.abs().max() <= (1.5 / 255 if way == "A" else 1e-10)  # half a grey level may go either way


def test_a_very_long_image_gives_what_resizing_all_of_it_would():
    """A ramp over 1000 pixels: half a pixel of the crop, 10 / 224 of the image's, is 0.00005."""
    ramp = torch.linspace(0, 1, 1000).expand(1, 3, 10, 1000)
    whole = F.interpolate(ramp, (224, 22400), mode="bilinear", antialias=True)
    middle = (22400 - 224) // 2
    torch.testing.assert_close(bilinear_crop(ramp), whole[..., middle : middle + 224], atol=6e-5, rtol=0)


def test_bilinear_halving_weighs_four_pixels_as_a_triangle():
    """Output pixel i reads inputs 2 i - 1 to 2 i + 2, so away from the border the first one is at 1."""
    images = noise(448, 448).double()
    kernel = torch.tensor([1, 3, 3, 1], dtype=torch.float64) / 8
    by_hand = F.conv2d(images[:, :, 1:447, 1:447].transpose(0, 1), (kernel[:, None] * kernel)[None, None], stride=2)
    torch.testing.assert_close(bilinear_crop(images)[..., 1:223, 1:223], by_hand.transpose(0, 1))


@pytest.mark.parametrize(
    "size, fitted", [((448, 200), (224, 100)), ((224, 101), (224, 101)), ((100, 224), (100, 224)), ((449, 1000), (101, 224))]
)
def test_the_whole_image_fits_between_black_bars(size, fitted):
    """449 * 0.224 = 100.6 becomes 101; of an odd rest the smaller half comes first."""
    top, left = (224 - fitted[0]) // 2, (224 - fitted[1]) // 2
    inside = torch.zeros(224, 224)
    inside[top : top + fitted[0], left : left + fitted[1]] = 1
    torch.testing.assert_close(fit_longest(torch.ones(1, 3, *size)), inside.expand(1, 3, -1, -1), atol=1e-6, rtol=0)


def test_bicubic_overshoot_is_kept_where_the_reference_keeps_it():
    edge = torch.zeros(1, 3, 448, 448)
    edge[..., 223:] = 1
    fitted = fit_longest(edge)
    assert -0.1 < fitted.min() < -0.01 and 1.01 < fitted.max() < 1.1
    assert bicubic_crop_tensor(edge).min() == 0 and bicubic_crop_tensor(edge).max() == 1


@pytest.mark.parametrize("way", WAYS)
def test_half_precision_is_resized_in_single(way):
    images = noise(50, 60).bfloat16()
    assert WAYS[way](images).dtype == torch.float32
    assert torch.equal(WAYS[way](images), WAYS[way](images.float()))


@pytest.mark.parametrize("way", WAYS)
def test_an_image_with_a_missing_value_does_not_become_a_valid_one(way):
    images = noise(50, 60, count=3)
    images[1, 0, 25, 30] = torch.nan
    missing = WAYS[way](images).isnan().flatten(1).any(1)
    assert missing.tolist() == [False, True, False]


@pytest.mark.parametrize("way", [bicubic_crop_tensor, bilinear_crop, fit_longest])
@pytest.mark.parametrize("size", [(5, 7), (9, 6)])
def test_the_gradient_is_that_of_finite_differences(way, size):
    images = (0.3 + 0.4 * noise(*size).double()).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: way(x, 4), (images,))


def test_normalising_is_clips():
    """Mean and standard deviation of CLIP's training images by channel, as its paper's code states them."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    assert torch.equal(normalize((mean + std).expand(2, 3, 4, 4)), (((mean + std) - mean) / std).expand(2, 3, 4, 4))
