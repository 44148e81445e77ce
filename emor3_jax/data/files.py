"""Which files of a folder are images, and which are litter."""

from pathlib import Path

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

_LITTER = ("__macosx", "thumbs.db", "desktop.ini")
_STARTS = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"II*\x00",
    b"MM\x00*",
)


def is_hidden(name: str) -> bool:
    """Recognises files and folders that are no part of a data set, by their names.

    They begin with a dot, as AppleDouble twins (`._x.jpg`) and `.DS_Store` do, or are what archives
    of macOS and folders of Windows leave behind.
    """
    return name.startswith(".") or name.lower() in _LITTER


def is_image(path: Path) -> bool:
    """Recognises image files by their extension, else by their first bytes."""
    if path.suffix.lower() in SUFFIXES:
        return True
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError:
        return False
    return is_image_head(head)


def read_image(path: Path) -> bytes | None:
    """Returns the bytes of a regular file; None where there is none, or nothing can be read.

    A pipe or a device under the name of an image would be read for ever.
    """
    try:
        return path.read_bytes() if path.is_file() else None
    except (OSError, ValueError):
        # ValueError: a NUL in the name.
        return None


def is_image_head(head: bytes) -> bool:
    """Recognises the first 16 bytes of an image in one of the formats of `SUFFIXES`.

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
