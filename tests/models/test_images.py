"""Images are opened by content, of few formats, and not decoded beyond a number of pixels."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from support import tiny

from emor3_jax.embedded.tokenizer import train_tokenizer
from emor3_jax.models.errors import ImageError
from emor3_jax.models.images import FORMATS, decode, is_image_head, open_image
from emor3_jax.models.processor import ImageSettings, Processor


def encode(kind: str, width: int = 24, height: int = 16) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def enlarged(kind: str, width: int, height: int) -> bytes:
    """A small file of which the head says another size."""
    data = bytearray(encode(kind))
    if kind == "PNG":
        struct.pack_into(">II", data, 16, width, height)
        struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    elif kind == "GIF":
        struct.pack_into("<HH", data, 6, width, height)
    elif kind == "BMP":
        struct.pack_into("<ii", data, 18, width, height)
    elif kind == "JPEG":
        at = data.index(b"\xff\xc0")
        struct.pack_into(">HH", data, at + 5, height, width)
    elif kind == "TIFF":
        for tag, value in ((256, width), (257, height)):
            at = (
                data.index(struct.pack("<HH", tag, 3))
                if struct.pack("<HH", tag, 3) in data
                else data.index(struct.pack("<HH", tag, 4))
            )
            struct.pack_into("<HHII", data, at, tag, 4, 1, value)
    return bytes(data)


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_that_are_opened(kind):
    data = encode(kind)
    assert is_image_head(data[:16]) and decode(data).size == (24, 16)


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "PCX", "TGA", "PPM", "JPEG2000", "ICNS"])
def test_formats_that_are_not_opened(kind):
    data = b"icns\x00\x00\x00\x08" if kind == "ICNS" else encode(kind)
    assert not is_image_head(data[:16])
    with pytest.raises(ImageError, match=r"cannot decode an image of \d+ bytes: it (is|begins)"):
        decode(data)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "JPEG", "TIFF"])
@pytest.mark.parametrize("size", [(13_000, 13_000), (65_000, 65_000)])
def test_a_bomb_is_refused_by_its_head(kind, size):
    with pytest.raises(ImageError, match=r"over|exceeds"):
        open_image(enlarged(kind, *size))


def test_the_error_names_size_and_field():
    message = r"13000 x 13000 pixels is not decoded: .* over 67108864 \(data\.max_decoded_pixels\)"
    with pytest.raises(ImageError, match=message):
        decode(enlarged("PNG", 13_000, 13_000))


def test_the_limit_is_the_processors():
    tokenizer = train_tokenizer(["which emotion ?"], 300)
    processor = Processor(tokenizer, ImageSettings(patch_size=4), tiny.make_policy().layout)
    data = encode("PNG", 40, 30)
    assert processor.pixels(data).ndim == 3
    with pytest.raises(ImageError, match="40 x 30 pixels is not decoded: it has over 1199"):
        processor.with_decode_limit(1199).with_pixels(256, 1024).pixels(data)
    assert processor.with_decode_limit(1200).pixels(data).ndim == 3
