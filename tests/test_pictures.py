"""Pictures of every kind become the same tensors, and back."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin

from flowtilt import UserError
from flowtilt.io.images import ENDINGS, SHEET, from_pil, read_image, to_bytes, to_pil, to_png


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
    for content, said in ((b"", "not an image"), (b"GIF89a but no more", "not an image"), (whole[: len(whole) // 2], "truncated")):
        path = tmp_path / "x.png"
        path.write_bytes(content)
        with pytest.raises(UserError, match=said) as caught:
            read_image(path)
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        read_image(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match="can't be read"):
        read_image(tmp_path)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (np.array([[0, 0.25, 1.0]], np.float32), [0, 0.25, 1]),
        (np.array([[-0.02, 0.5, 1.05]], np.float32), [0, 0.5, 1]),  # a resized one overshoots
        (np.array([[0, 51, 255]], np.float32), [0, 0.2, 1]),
        (np.array([[0, 13107, 65535]], np.float32), [0, 0.2, 1]),
        (np.array([[0, 51, 255]], np.int32), [0, 0.2, 1]),
        (np.array([[0, 13107, 65535]], np.int32), [0, 0.2, 1]),
        (np.array([[0, 13107, 65535]], np.uint16), [0, 0.2, 1]),
        (np.array([[0, 131]], np.uint16), [0, 131 / 65535]),
        (np.array([[0.0, np.nan]], np.float32), None),
        (np.array([[0.0, np.inf]], np.float32), None),
        (np.array([[-1.0, 1.0]], np.float32), None),
        (np.array([[0, 2**31 - 1]], np.int32), None),
    ],
)
def test_more_than_eight_bits_have_the_range_that_their_values_show_or_none(values, wanted):
    file = saved(Image.fromarray(values), "TIFF")
    if wanted is None:
        with pytest.raises(UserError, match="can't be read"):
            read_image(file)
    else:
        torch.testing.assert_close(read_image(file), torch.tensor(wanted).expand(3, 1, -1))


def test_a_dark_sixteen_bit_pgm_is_dark():
    assert read_image(saved(Image.fromarray(np.array([[0, 131]], np.uint16)), "PPM")).max() == pytest.approx(131 / 65535)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "I;16"])
def test_a_transparent_colour_is_white(mode):
    picture = Image.fromarray(np.zeros((1, 2), np.uint16)) if mode == "I;16" else Image.new(mode, (2, 1))
    assert read_image(saved(picture, transparency=(0, 0, 0) if mode == "RGB" else 0)).eq(1).all()


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_half_transparent_black_is_grey(mode):
    assert read_image(saved(Image.new(mode, (1, 1), (*[0] * (len(mode) - 1), 128)))).flatten().tolist() == pytest.approx([127 / 255] * 3)


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_ending_is_of_a_format_that_is_read(ending, tmp_path):
    Image.init()
    if ending not in Image.EXTENSION or Image.EXTENSION[ending] not in Image.SAVE:
        pytest.skip("this Pillow does not write it")
    picture = Image.new({".pfm": "F", ".pgm": "L", ".pbm": "1", ".j2c": "RGB"}.get(ending, "RGB"), (16, 8))
    picture.save(tmp_path / f"x{ending}")
    assert read_image(tmp_path / f"x{ending}").shape == (3, 8, 16)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "AVIF", "TIFF"])
def test_the_first_frame_of_an_animation_is_read(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    image = read_image(saved(frames[0], format, save_all=True, append_images=frames[1:]))
    torch.testing.assert_close(image.mean((1, 2)), torch.tensor([1.0, 0, 0]), atol=0.05, rtol=0)


BROKEN = [
    b"Exif\x00\x00MM\x00*\x00\x00\x00\x08" + b"\x00\x02" + entries + b"\x00" * 4
    for entries in (
        b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00" + b"\x01\x1a\x00\x05\x00\x00\x00\x01\xff\xff\xff\xf0",  # XResolution elsewhere
        b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00" + b"\x87\x69\x00\x04\x00\x00\x00\x01\x00\x00\xff\xff",  # an IFD beyond the end
        b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00" + b"\x92\x86\x00\x63\xff\xff\xff\xff\x00\x00\x00\x00",  # no such type
    )
]


@pytest.mark.parametrize("exif", BROKEN)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_of_exif_only_the_orientation_is_needed(exif, format):
    assert read_image(saved(Image.new("RGB", (4, 2)), format, exif=exif)).shape == (3, 4, 2)


@pytest.mark.parametrize("exif", [b"Exif\x00\x00", b"Exif\x00\x00nothing", b"Exif\x00\x00MM\x00*\xff\xff\xff\xff"])
def test_exif_that_can_not_be_read_at_all_turns_nothing(exif):
    assert read_image(saved(Image.new("RGB", (4, 2)), "JPEG", exif=exif)).shape == (3, 2, 4)


def test_every_orientation_is_undone_as_pillow_does():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (2, 3, 3), np.uint8))
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = saved(picture, exif=exif)
        with Image.open(BytesIO(file)) as opened:
            assert torch.equal(read_image(file), from_pil(ImageOps.exif_transpose(opened)))


def test_an_eps_named_png_starts_nothing(monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("Ghostscript"))
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("Ghostscript"))
    with pytest.raises(UserError, match="not an image that can be read"):
        read_image(saved(Image.new("RGB", (8, 8)), "EPS"))


def test_a_decoder_that_raises_anything_makes_one_image_unreadable(monkeypatch):
    monkeypatch.setattr(Image.Image, "has_transparency_data", property(lambda _: 1 // 0))
    with pytest.raises(UserError, match=r"can't be read.*division"):
        read_image(to_png(torch.rand(3, 4, 4)))


def test_a_sheet_is_no_image():
    info = PngImagePlugin.PngInfo()
    info.add_text(SHEET, "2 x 2")
    with pytest.raises(UserError, match="a contact sheet"):
        read_image(saved(Image.new("RGB", (8, 8)), pnginfo=info))


def test_a_bomb_is_not_unpacked():
    with pytest.raises(UserError, match=r"9000 x 9000 pixels are too many"):
        read_image(saved(Image.new("1", (9000, 9000))))
