import io
import struct
import tracemalloc

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


def test_blanks_without_end_in_a_ppm_take_no_memory() -> None:
    data = b"P6" + b" " * 2**21 + b"2 2 255 " + bytes(12)
    tracemalloc.start()
    try:
        with pytest.raises(BadUpload, match="in its first 4096 bytes"):
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < len(data)
    finally:
        tracemalloc.stop()


def test_a_comment_may_fill_the_header_of_a_ppm_but_no_more() -> None:
    assert decode(b"P6 #" + b"c" * 4000 + b"\n2 2 255\n" + bytes(12)).shape == (2, 2, 3)
    with pytest.raises(BadUpload, match="in its first 4096 bytes"):
        decode(b"P6 #" + b"c" * 4096 + b"\n2 2 255\n" + bytes(12))


def segment(marker: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def jpeg_of_scans(count: int, side: int = 64) -> bytes:
    """A grey progressive JPEG whose scans, of 12 bytes each, say that all coefficients of one frequency are zero."""
    one_code = bytes([1] + [0] * 15)
    head = b"\xff\xd8" + segment(0xDB, b"\0" + bytes([1] * 64))
    head += segment(0xC2, struct.pack(">BHHBBBB", 8, side, side, 1, 1, 0x11, 0))
    # The only code, a zero bit, begins a run of 64 blocks and six bits more.
    head += segment(0xC4, b"\x10" + one_code + b"\x60")
    blocks = b"\x00\xff\x00" if side == 64 else b""
    return head + b"".join(segment(0xDA, bytes([1, 1, 0, k, k, 0])) + blocks for k in range(1, count + 1)) + b"\xff\xd9"


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded() -> None:
    assert decode(jpeg_of_scans(60)).shape == (64, 64, 1)
    with pytest.raises(TooLarge, match="101 scans; at most 100"):
        decode(jpeg_of_scans(60)[:-2] + jpeg_of_scans(41))
    out = io.BytesIO()
    Image.new("RGB", (64, 64)).save(out, "JPEG", progressive=True)
    assert decode(out.getvalue()).shape == (64, 64, 3)
