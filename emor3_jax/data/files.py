"""Which files of a folder are images, and which are litter."""

import os
from collections.abc import Iterator
from pathlib import Path

from emor3_jax.errors import UserError
from emor3_jax.files import read_bytes
from emor3_jax.models.images import MAX_IMAGE_BYTES, SUFFIXES, is_image_head

_LITTER = (
    *("__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *("lost+found", "@eadir", "#recycle", "__pycache__"),
)


def is_hidden(name: str) -> bool:
    """Recognises files and folders that are no part of a data set, by their names.

    They begin with a dot, as AppleDouble twins (`._x.jpg`) and `.DS_Store` do, or are what archives
    of macOS, folders of Windows and network storage leave behind.
    """
    return name.startswith(".") or name.lower() in _LITTER


def is_image(path: Path) -> bool:
    """Recognises image files by their extension, else by their first bytes.

    By the extension alone nothing is asked of the disk, which may be slow at many files: a folder
    or a pipe of such a name becomes a row without an image.
    """
    if path.suffix.lower() in SUFFIXES:
        return True
    if not os.path.isfile(path):
        return False
    try:
        with path.open("rb") as file:
            return is_image_head(file.read(16))
    except OSError:
        return False


def read_image(path: Path) -> bytes | None:
    """Returns the bytes of a regular file of at most `MAX_IMAGE_BYTES`.

    None where there is none, or nothing can be read. A pipe or a device under the name of an image
    would be read for ever.
    """
    try:
        return read_bytes(path, MAX_IMAGE_BYTES)
    except (UserError, OSError):
        return None


def walk(root: Path) -> Iterator[Path]:
    """Yields the files below a folder in order, without what is hidden.

    Links to folders are not followed: they may lead in a circle.
    """
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield from (Path(folder, name) for name in sorted(files) if not is_hidden(name))


def leads_up(folder: Path) -> bool:
    """Recognises links to a folder that they lie in, which would be read again within itself."""
    if not folder.is_symlink():
        return False
    target, parent = os.path.realpath(folder), os.path.realpath(folder.parent)
    return os.path.commonpath((target, parent)) == target
