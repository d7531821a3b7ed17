import io

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engram import images
from engram.errors import BadUpload, EngramError, TooLarge

RNG = np.random.default_rng(7)


def png(mode: str, size: tuple[int, int] = (4, 3), **options: object) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, "PNG", **options)
    return out.getvalue()


def decode(data: bytes) -> npt.NDArray[np.uint8]:
    return images.decode(data, max_pixels=10_000, min_side=2)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
@pytest.mark.parametrize("shape", [(6, 4, 3), (6, 4, 1)])
def test_lossless_images_decode_to_their_pixels(format: str, shape: tuple[int, int, int]) -> None:
    pixels = RNG.integers(0, 256, shape, np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels[..., 0] if shape[2] == 1 else pixels).save(out, format, lossless=True)
    found = decode(out.getvalue())
    if format == "WEBP" and shape[2] == 1:  # WebP has no grey: it comes back as RGB
        pixels = np.repeat(pixels, 3, axis=2)
    assert found.dtype == np.uint8
    assert np.array_equal(found, pixels)


def test_a_jpeg_decodes_as_pillow_decodes_it() -> None:
    out = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (17, 9, 3), np.uint8)).save(out, "JPEG", quality=80)
    assert np.array_equal(decode(out.getvalue()), np.asarray(Image.open(io.BytesIO(out.getvalue()))))


def test_black_and_white_becomes_grey_and_a_palette_rgb() -> None:
    assert decode(png("1")).shape == (3, 4, 1)
    assert decode(png("P")).shape == (3, 4, 3)


def test_opaque_alpha_is_dropped_and_transparency_is_refused() -> None:
    out = io.BytesIO()
    Image.new("RGBA", (4, 3), (1, 2, 3, 255)).save(out, "PNG")
    assert decode(out.getvalue())[0, 0].tolist() == [1, 2, 3]
    out = io.BytesIO()
    Image.new("LA", (4, 3), (7, 255)).save(out, "PNG")
    assert decode(out.getvalue()).shape == (3, 4, 1)
    for transparent in (png("RGBA"), png("LA"), png("P", transparency=0), png("RGB", transparency=(0, 0, 0))):
        with pytest.raises(BadUpload, match="transparent"):
            decode(transparent)


def animated(format: str) -> bytes:
    out = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in (0, 100, 200)]
    frames[0].save(out, format, save_all=True, append_images=frames[1:])
    return out.getvalue()


def cmyk() -> bytes:
    out = io.BytesIO()
    Image.new("CMYK", (4, 4)).save(out, "JPEG")
    return out.getvalue()


def png_of_16_bit_colour() -> bytes:
    data = bytearray(png("RGB"))
    data[24] = 16
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a readable"),
        (b"no image at all", "not a readable"),
        (png("RGB")[:40], "not a readable"),
        (png("RGB")[:-30], "not a readable"),
        (png("I;16"), "16 bits"),
        (png_of_16_bit_colour(), "16 bits"),
        (cmyk(), "CMYK"),
        (animated("PNG"), "animated image with 3 frames"),
        (animated("WEBP"), "animated image with 3 frames"),
        (animated("GIF"), "not a readable"),
        (png("RGB", (1, 5)), "1 x 5 pixels; each side needs at least 2"),
        (b"P6\n2 2\n65535\n" + bytes(24), "maximum of 65535"),
        (b"P6\n2 2\n255\n" + bytes(11), "needs 12 bytes of pixels, it has 11"),
        (b"P6\n2 2\n255\n" + bytes(13), "needs 12 bytes of pixels, it has 13"),
        (b"P6\n2\n", "damaged header"),
        (b"P5\n1 1\n255\n\0", "each side needs at least 2"),
    ],
)
def test_an_image_that_cannot_be_an_exemplar_is_refused_with_its_reason(data: bytes, message: str) -> None:
    with pytest.raises(BadUpload, match=message):
        decode(data)


@pytest.mark.parametrize(
    "data",
    [png("RGB", (60_000, 2)), png("L", (101, 100)), b"P6\n60000 2\n255\n", b"P5\n999999999 999999999\n255\n"],
)
def test_an_image_that_is_too_large_is_refused_by_its_header(data: bytes) -> None:
    with pytest.raises(TooLarge, match="pixels"):
        decode(data)


def test_a_ppm_header_may_hold_a_comment() -> None:
    assert decode(b"P5 # grey\n2 2\n255\n" + bytes(4)).shape == (2, 2, 1)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([png("RGB"), png("P"), cmyk(), animated("WEBP"), animated("PNG")]), st.data())
def test_a_damaged_image_never_does_worse_than_a_problem(whole: bytes, data: st.DataObject) -> None:
    content = bytearray(whole[: data.draw(st.integers(1, len(whole)))])
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        pixels = decode(bytes(content))
    except EngramError:
        return
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] in (1, 3)
