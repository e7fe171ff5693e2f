"""Pictures of every kind become the same tensors, and back."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from flowtilt import UserError
from flowtilt.pictures import from_pil, read_image, to_bytes, to_pil, to_png


def saved(picture, format="PNG", **options):
    buffer = BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def test_eight_bit_images_survive_the_round_trip():
    image = torch.arange(256).view(1, 16, 16).expand(3, -1, -1) / 255
    assert torch.equal(read_image(to_png(image)), image)
    assert torch.equal(to_bytes(image[None])[0, 0].flatten(), torch.arange(256).byte())


def test_rounding_is_half_to_even_and_clamped():
    values = torch.tensor([0.5, 1.5, 2.5, -3.0, 300.0]) / 255
    assert to_bytes(values.view(1, 1, 1, 5).expand(1, 3, -1, -1))[0, 0, 0].tolist() == [0, 2, 2, 0, 255]


def test_half_precision_images_are_rounded_in_fp32():
    assert np.asarray(to_pil(torch.full((1, 3, 1, 1), 0.5, dtype=torch.bfloat16))[0]).tolist() == [[[128, 128, 128]]]


def test_sixteen_bits_keep_their_range():
    grey = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    torch.testing.assert_close(read_image(saved(grey))[0, 0], torch.tensor([0.0, 32768 / 65535, 1.0]))


def test_a_dark_sixteen_bit_image_is_not_taken_for_an_eight_bit_one():
    dark = Image.fromarray(np.array([[0, 200]], dtype=np.uint16))
    assert read_image(saved(dark)).max() == pytest.approx(200 / 65535)


def test_alpha_lies_on_white():
    see_through = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    see_through.putpixel((1, 0), (255, 0, 0, 255))
    assert read_image(saved(see_through))[:, 0].T.tolist() == [[1, 1, 1], [1, 0, 0]]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([0, 0, 255])
    assert read_image(saved(palette, transparency=0)).flatten().tolist() == [1, 1, 1]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB", "HSV", "I", "F"])
def test_every_mode_gives_three_channels_in_range(mode):
    image = from_pil(Image.new(mode, (3, 2)))
    assert image.shape == (3, 2, 3) and image.dtype == torch.float32 and 0 <= image.min() <= image.max() <= 1


def test_a_camera_held_upright_is_turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to see it upright
    assert read_image(saved(Image.new("RGB", (4, 2)), "JPEG", exif=exif)).shape == (3, 4, 2)


def test_what_is_no_picture_says_so_in_one_line(tmp_path):
    whole = to_png(torch.rand(3, 64, 64))
    for content, said in ((b"", "not a picture"), (b"GIF89a but no more", "not a picture"), (whole[: len(whole) // 2], "truncated")):
        path = tmp_path / "x.png"
        path.write_bytes(content)
        with pytest.raises(UserError, match=said) as caught:
            read_image(path)
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        read_image(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match="can't be read"):
        read_image(tmp_path)


def test_a_bomb_is_not_unpacked():
    with pytest.raises(UserError, match=r"9000 x 9000 pixels are too many"):
        read_image(saved(Image.new("1", (9000, 9000))))
