"""Recognising and opening image files: by content, of a few formats, of bounded size.

PIL knows some sixty formats, of which some start other programs (EPS) and some are hardly ever
tried. Here only `FORMATS` are opened, and the number of pixels is checked before any is decoded.
"""

import io
import struct
from typing import BinaryIO

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from emor3_jax.models.errors import ImageError

SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".webp",
    ".avif",
)
"""Extensions of images, in any case; other files are images if their first bytes say so."""

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "AVIF")
"""PIL's names of the formats that are opened."""

MAX_DECODED_PIXELS = 2**26
"""Of an image that is decoded, unless a config says otherwise: 8,192 x 8,192."""

MOST_DECODED_PIXELS = 2 * 89_478_485
"""What a config may say at most; PIL refuses images of more."""

MAX_IMAGE_BYTES = 2**28
"""Of an image's file."""

_STARTS = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"II*\x00",
    b"MM\x00*",
)
_NOT_OPENED = (
    (b"%!PS", "an EPS or PostScript file"),
    (b"\xc5\xd0\xd3\xc6", "an EPS file"),
    (b"8BPS", "a Photoshop file"),
    (b"%PDF", "a PDF"),
    (b"\x00\x00\x00\x0cjP  ", "a JPEG 2000 image"),
    (b"<svg", "an SVG drawing"),
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
    (b"<?xml", "an XML file"),
    (b"PK\x03\x04", "a zip archive"),
    (b"version https://git-lfs", "a pointer of Git LFS; fetch the file by git lfs pull"),
)


def is_image_head(head: bytes) -> bool:
    """Recognises the first 16 bytes of an image in one of the formats of `FORMATS`.

    A bitmap must also name its header's size, since two letters alone may be a text.
    """
    if head.startswith(b"BM"):
        return len(head) > 15 and head[14:16] in (
            b"\x28\x00",
            b"\x0c\x00",
            b"\x6c\x00",
            b"\x7c\x00",
        )
    if head[:4] == b"RIFF":
        return head[8:12] == b"WEBP"
    if head[4:8] == b"ftyp":
        return head[8:12] in (b"avif", b"avis", b"mif1")
    return head.startswith(_STARTS)


def open_image(source: bytes | BinaryIO, most: int = MAX_DECODED_PIXELS) -> Image.Image:
    """Returns an image whose head has been read; its pixels are not decoded yet.

    Args:
      source: an encoded image, or a file of one.
      most: pixels that it may have.

    Raises:
      ImageError: if it is none of `FORMATS`, damaged, or of more pixels.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        file.seek(0)
        head = file.read(64)
        size = file.seek(0, io.SEEK_END)
        raise ImageError(f"cannot decode an image of {size} bytes: {_describe(head)}") from error
    except Exception as error:
        # PIL raises OSError, SyntaxError, struct.error, DecompressionBombError and others.
        raise ImageError(f"cannot decode an image: {error}") from error
    if image.width * image.height > most:
        raise ImageError(
            f"an image of {image.width} x {image.height} pixels is not decoded: it has over {most} "
            "(data.max_decoded_pixels)"
        )
    return image


def decode(encoded: bytes, most: int = MAX_DECODED_PIXELS) -> Image.Image:
    """Returns an image, turned as its EXIF tag says.

    Args:
      encoded: the file's bytes.
      most: pixels that it may have.

    Raises:
      ImageError: as `open_image`, or if its pixels cannot be decoded.
    """
    image = open_image(encoded, most)
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception as error:
        raise ImageError(f"cannot decode an image of {len(encoded)} bytes: {error}") from error


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Returns height and width in pixels once an image is turned as its EXIF says.

    Raises:
      ImageError: if its EXIF is damaged.
    """
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error) as error:
        raise ImageError(f"cannot read the EXIF of an image: {error}") from error
    return image.size if turned else image.size[::-1]


def _describe(head: bytes) -> str:
    """Returns the kind of a file that is no image of `FORMATS`, and the way out."""
    if not head:
        return "it is empty"
    for start, what in _NOT_OPENED:
        if head.lstrip().lower().startswith(start.lower()):
            return f"it is {what}; images are {', '.join(FORMATS)}"
    if head[4:8] == b"ftyp":
        return f"it is a HEIC image or a film; save it as JPEG (images are {', '.join(FORMATS)})"
    return f"it begins with {head[:16]!r}; images are {', '.join(FORMATS)}"
