"""The reward is the size of the file that Pillow writes."""

import pytest
import torch
from torch import Tensor

from flowtilt.io.images import to_pil
from flowtilt.prompts import Prompt
from flowtilt.rewards import load_reward
from flowtilt.rewards.jpeg import compressibility, incompressibility
from flowtilt.seeding import generator


def pictures() -> Tensor:
    """White, a ramp and noise, 512 x 512 pixels."""
    ramp = torch.linspace(0, 1, 512)
    smooth = torch.stack([ramp.expand(512, 512), ramp[:, None].expand(512, 512), (ramp[:, None] + ramp) / 2])
    return torch.stack([torch.ones(3, 512, 512), smooth, torch.rand(3, 512, 512, generator=generator(0, "jpeg"))])


PROMPTS = [Prompt("white"), Prompt("ramp"), Prompt("noise")]


def test_white_and_noise_have_the_upstream_sizes():
    """4.723 and 308 kB by ddpo's code with Pillow 13; two per cent for other builds of libjpeg."""
    white, ramp, noise = incompressibility(pictures(), PROMPTS).tolist()
    assert white == pytest.approx(4.723, rel=0.02) and noise == pytest.approx(308, rel=0.02)
    assert white < ramp < noise


def test_the_score_is_the_file_that_pillow_writes(tmp_path):
    for number, picture in enumerate(to_pil(pictures())):
        picture.save(tmp_path / f"{number}.jpg", quality=95)
    sizes = [(tmp_path / f"{number}.jpg").stat().st_size / 1000 for number in range(3)]
    assert incompressibility(pictures(), PROMPTS).tolist() == pytest.approx(sizes, rel=1e-6)


def test_one_is_minus_the_other_over_500():
    images = pictures()
    torch.testing.assert_close(compressibility(images, PROMPTS), -incompressibility(images, PROMPTS) / 500, atol=0, rtol=0)


def test_images_do_not_depend_on_each_other_or_on_their_prompts():
    images = pictures()
    whole = incompressibility(images, PROMPTS)
    alone = [float(incompressibility(image[None], [Prompt("x")])) for image in images]
    assert whole.tolist() == alone and whole.dtype == torch.float32


def test_floats_are_rounded_to_8_bits_first():
    images = pictures()
    assert torch.equal(incompressibility((images * 255).round() / 255, PROMPTS), incompressibility(images, PROMPTS))


def test_an_image_with_a_missing_value_has_no_score():
    images = pictures()
    images[1, 0, 3, 4] = torch.nan
    assert incompressibility(images, PROMPTS).isnan().tolist() == [False, True, False]
    assert compressibility(images, PROMPTS).isnan().tolist() == [False, True, False]


def test_both_go_by_their_names():
    for name, function in (("jpeg_compressibility", compressibility), ("jpeg_incompressibility", incompressibility)):
        assert torch.equal(load_reward(name, name)(pictures(), PROMPTS), function(pictures(), PROMPTS))
