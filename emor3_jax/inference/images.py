"""The images that a policy is asked about: files, folders, addresses, bytes, images of PIL.

An address is fetched over http or https alone, with a bound on its size and its time, however often
it is moved; what comes back is an image or is refused (`models.images`).
"""

import io
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from emor3_jax.data.errors import DataError
from emor3_jax.data.files import is_image, walk
from emor3_jax.errors import UserError
from emor3_jax.files import expand_user, is_folder, read_bytes, show
from emor3_jax.models.images import MAX_IMAGE_BYTES

MAX_FETCHED_BYTES = 2**25
"""Of an image that is fetched: 32 MiB."""

FETCH_SECONDS = 20.0
"""Within which an address must have sent all of it."""

_PIECE = 2**16


class InputImage(NamedTuple):
    """An image that is not read yet.

    Attributes:
      name: of the file or the address; "" without one.
      read: returns its encoded bytes; raises UserError if there are none.
    """

    name: str
    read: Callable[[], bytes]


def expand(images: Iterable[Any]) -> Iterator[InputImage]:
    """Yields images in order, those of a folder one by one.

    Args:
      images: files, folders, addresses, bytes or images of PIL. Of a folder, and of the folders in
        it, the image files are taken, sorted by name; a folder without any yields one entry that
        says so when it is read.
    """
    for each in images:
        if not isinstance(each, str | Path) or is_address(each):
            yield _one(each)
            continue
        path = expand_user(each)
        if not is_folder(path):
            yield _one(each)
            continue
        empty = True
        for file in walk(path):
            if is_image(file):
                empty = False
                yield _one(file)
        if empty:
            yield InputImage(str(each), lambda path=path: _refuse_empty(path))


def is_address(name: str | Path) -> bool:
    """Recognises what is fetched, not read from a disk: a text with "://"."""
    return isinstance(name, str) and "://" in name


def image_bytes(image: Any) -> bytes:
    """Returns an image's encoded bytes.

    Args:
      image: a file, an address, bytes, or an image of PIL.

    Raises:
      UserError: if it cannot be read, is none of these, or is too large.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, Image.Image):
        out = io.BytesIO()
        image.convert("RGB").save(out, "PNG")
        return out.getvalue()
    if is_address(image):
        return fetch(image)
    if isinstance(image, str | Path):
        return read_bytes(expand_user(image), MAX_IMAGE_BYTES)
    raise DataError(
        f"an image of type {type(image).__name__}: give a path, an address, bytes or an image of "
        "PIL"
    )


def fetch(address: str, most: int = MAX_FETCHED_BYTES, seconds: float = FETCH_SECONDS) -> bytes:
    """Downloads the bytes of an address.

    Args:
      address: of http or https, where it is moved to likewise.
      most: its size in bytes, at most.
      seconds: within which all of it must be there.

    Raises:
      UserError: if it is another kind of address, does not answer, or sends too much or too slowly.
    """
    shown = show(address)
    if urllib.parse.urlsplit(address).scheme.lower() not in ("http", "https"):
        raise UserError(f"{shown}: only addresses of http:// and https:// are fetched")
    found: queue.Queue[bytes | Exception] = queue.Queue()

    def run() -> None:
        try:
            found.put(_fetch(address, most, seconds))
        except Exception as error:
            found.put(error)

    # A server that sends its head letter by letter never exceeds the time of a single read.
    threading.Thread(target=run, daemon=True).start()
    try:
        result = found.get(timeout=seconds)
    except queue.Empty:
        raise UserError(
            f"{shown} has not sent its image within {seconds:g} s; download it yourself"
        ) from None
    if isinstance(result, bytes):
        return result
    if isinstance(result, UserError):
        raise result
    if isinstance(result, urllib.error.HTTPError):
        raise UserError(f"{shown} answers {result.code} {show(result.reason)}") from result
    # http.client has errors of its own for an answer that is no HTTP.
    reason = getattr(result, "reason", None) or result
    raise UserError(f"{shown} cannot be fetched: {show(reason)}") from result


def _fetch(address: str, most: int, seconds: float) -> bytes:
    request = urllib.request.Request(address, headers={"User-Agent": "emor3_jax"})
    until, found = time.monotonic() + seconds, io.BytesIO()
    with _opener().open(request, timeout=seconds) as answer:
        while (piece := answer.read1(_PIECE)) and time.monotonic() < until:
            found.write(piece)
            if found.tell() > most:
                raise UserError(f"{show(address)} sends over {most} bytes; give a smaller image")
    return found.getvalue()


def _opener() -> urllib.request.OpenerDirector:
    """Returns an opener of http and https alone: no redirect leads to file:// or ftp://."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.HTTPRedirectHandler,
    ):
        opener.add_handler(handler())
    return opener


def _one(image: Any) -> InputImage:
    name = str(image) if isinstance(image, str | Path) else ""
    return InputImage(name, lambda: image_bytes(image))


def _refuse_empty(path: Path) -> bytes:
    raise UserError(f"{show(path)}: there is no image in this folder, nor in those within it")
