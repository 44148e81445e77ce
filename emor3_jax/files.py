"""Reading of a user's files: regular ones of bounded size; text in UTF-8, with any line ends; JSON.

Every file that the package does not write itself is opened here, so that a pipe, a device, an
archive under another name, another encoding or JSON of a thousand levels is one message.
"""

import csv
import io
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from emor3_jax.errors import UserError

Refusal = Callable[[str], UserError]
"""Makes the error that is raised, from its message: mostly a kind of `UserError`."""

MAX_TEXT_BYTES = 2**31
"""Of a list, a table or JSON lines: FER-2013's csv has 0.3 GB."""

MAX_JSON_BYTES = 2**28
"""Of one JSON file; the largest tokenizers have 0.02 GB, lists of annotations 0.1 GB."""

MAX_TEMPLATE_BYTES = 2**20
"""Of a template."""

_MAGIC = (
    (b"PK\x03\x04", "a zip archive"),
    (b"PK\x05\x06", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"7z\xbc\xaf'\x1c", "a 7z archive"),
    (b"Rar!", "a rar archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"PAR1", "a parquet file"),
    (b"ARROW1", "an arrow file"),
    (b"%PDF", "a PDF"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
    (b"SQLite format 3", "an SQLite file"),
    (b"\xd0\xcf\x11\xe0", "an old Office document"),
)
_LFS = b"version https://git-lfs.github.com/spec/"
_HTML = (b"<!doctype html", b"<html")
_BOMS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)


def is_file(path: str | Path) -> bool:
    """Recognises regular files; no name, such as one with a NUL or 10,000 letters, is an error."""
    return os.path.isfile(path)


def is_folder(path: str | Path) -> bool:
    """Recognises folders; no name is an error."""
    return os.path.isdir(path)


def expand_user(path: str | Path) -> Path:
    """Returns a path with "~" replaced; as it is, where there is no such user."""
    return Path(os.path.expanduser(path))


def open_regular(path: str | Path, most: int, error: Refusal = UserError) -> int:
    """Opens a regular file for reading; never waits.

    Args:
      path: the file.
      most: its size in bytes, at most.
      error: makes what is raised.

    Returns:
      A file descriptor.

    Raises:
      UserError: as `error` makes it, if it is missing, another kind of thing, or larger.
    """
    shown = show(path)
    if "\0" in str(path):
        raise error(f"{shown} holds a NUL, which no name of a file does")
    try:
        # A pipe would else be waited for until somebody writes to it.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as cause:
        why = getattr(cause, "strerror", None) or str(cause)
        raise error(f"{shown} cannot be read: {why}") from cause
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, a socket or a device"
            raise error(f"{shown} is {kind}, not a file")
        if status.st_size > most:
            raise error(
                f"{shown} has {status.st_size} bytes, over the {most} that are read of such a file"
            )
    except BaseException:
        os.close(handle)
        raise
    return handle


def read_bytes(path: str | Path, most: int, error: Refusal = UserError) -> bytes:
    """Returns the bytes of a regular file; the arguments and errors are those of `open_regular`."""
    with open(open_regular(path, most, error), "rb") as file:
        # A file may grow while it is read.
        return file.read(most)


def read_text(path: str | Path, error: Refusal = UserError, most: int = MAX_TEXT_BYTES) -> str:
    """Returns a text file's contents with each line's end as "\\n", without a byte-order mark.

    Args:
      path: the file, in UTF-8.
      error: makes what is raised.
      most: its size in bytes, at most.

    Raises:
      UserError: as `error` makes it, if it cannot be read or is no text in UTF-8; naming the file,
        what it is instead, and the way out.
    """
    data = read_bytes(path, most, error)
    if what := _recognise(data):
        raise error(f"{show(path)} is {what}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise error(
            f"{show(path)} is no UTF-8 text ({cause.reason} at byte {cause.start}), perhaps GBK or "
            "Latin-1; save it as UTF-8"
        ) from cause
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: str | Path, error: Refusal = UserError) -> list[str]:
    """Returns the lines of a text file; otherwise as `read_text`.

    Only a line feed, a carriage return or both end a line: other characters at which Python's
    `splitlines` cuts may stand in a JSON text or a file's name.
    """
    lines = read_text(path, error).split("\n")
    return lines[:-1] if lines and not lines[-1] else lines


def read_rows(path: str | Path, error: Refusal = UserError) -> Iterator[list[str]]:
    """Yields the rows of a table whose fields stand between commas, semicolons or tabs.

    The separator is the one that the first line holds most of. Fields are stripped, empty lines
    passed over; the file is never in memory as a whole.

    Args:
      path: the file, in UTF-8.
      error: makes what is raised.

    Raises:
      UserError: as `error` makes it, as `read_text`, or if a quote is never closed.
    """
    handle = open_regular(path, MAX_TEXT_BYTES, error)
    with open(handle, "rb") as binary:
        head = binary.read(4096)
        if what := _recognise(head):
            raise error(f"{show(path)} is {what}")
        binary.seek(0)
        first = head.splitlines()[0] if head else b""
        separator = max(",;\t", key=lambda each: first.count(each.encode()))
        file = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
        try:
            for row in csv.reader(file, delimiter=separator):
                if row:
                    yield [field.strip() for field in row]
        except UnicodeDecodeError as cause:
            raise error(
                f"{show(path)} is no UTF-8 text ({cause.reason}), perhaps GBK or Latin-1; save it "
                "as UTF-8"
            ) from cause
        except csv.Error as cause:
            raise error(
                f"{show(path)} is no table: {cause}; perhaps a quote is never closed, or it is a "
                "file of another kind"
            ) from cause


def read_json(
    path: str | Path,
    error: Refusal = UserError,
    kind: type | None = None,
    *,
    finite: bool = True,
) -> Any:
    """Returns the contents of a JSON file.

    Args:
      path: the file.
      error: makes what is raised.
      kind: `dict` or `list`, if the file must hold one.
      finite: as of `parse_json`.

    Raises:
      UserError: as `error` makes it, as `read_text` and `parse_json`.
    """
    text = read_text(path, error, MAX_JSON_BYTES)
    return parse_json(text, show(path), error, kind, finite=finite)


def parse_json(
    text: str,
    where: str,
    error: Refusal = UserError,
    kind: type | None = None,
    *,
    finite: bool = True,
) -> Any:
    """Parses a JSON text.

    Args:
      text: the text.
      where: names it in errors.
      error: makes what is raised.
      kind: `dict` or `list`, if it must be one.
      finite: refuse NaN and Infinity, which the package's own files may hold.

    Raises:
      UserError: as `error` makes it, if it is no JSON, of too many levels, holds a number that is
        none (NaN, Infinity, 1e400) or half of a character, or is of another kind.
    """
    try:
        found = (
            json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
            if finite
            else json.loads(text)
        )
        if "\\u" in text:
            # Half of a pair of surrogates, which no file or tokenizer can hold.
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError as cause:
        raise error(f"{where} is no JSON: too many brackets within each other") from cause
    except UnicodeEncodeError as cause:
        raise error(f"{where} is no JSON: it escapes half of a character") from cause
    except ValueError as cause:
        raise error(f"{where} is no JSON: {cause}; write or download it again") from cause
    if kind is not None and not isinstance(found, kind):
        form = "an object, {…}" if kind is dict else "a list, […]"
        raise error(f"{where} must hold {form}, not {json.dumps(found)[:80]}")
    return found


def head_of(path: str | Path) -> str | None:
    """Returns the fault of a file of a binary format by its first bytes; None if they show none.

    Args:
      path: a regular file that its format's reader could not read.
    """
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        return "is an empty file"
    if head.startswith(_LFS) or head[:20].lstrip().lower().startswith(_HTML):
        return f"is {_recognise(head)}"
    what = next((what for magic, what in _MAGIC if head.startswith(magic)), None)
    return what and f"is {what} under another name"


def is_utf8(text: str) -> bool:
    """Recognises texts that UTF-8 can hold: none has a lone surrogate.

    Bytes of a command line or of a file's name that are no UTF-8 become such.
    """
    return not any(0xD800 <= ord(char) < 0xE000 for char in text)


def printable(text: str) -> str:
    """Returns a text on one line, with what would steer a terminal, or cannot be shown, escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def show(path: object) -> str:
    """Returns a path as it is shown: on one line, cut, bytes that are no UTF-8 written out."""
    text = printable(os.fsencode(str(path)).decode("utf-8", "backslashreplace"))
    return text if len(text) <= 300 else text[:300] + "…"


def leaves_folder(name: str) -> bool:
    """Recognises paths that are absolute, here or on Windows, or lead out of their folder by "..".

    Args:
      name: a path as a list of images gives it.
    """
    parts: Sequence[str] = name.replace("\\", "/").split("/")
    if (not parts[0] and len(parts) > 1) or (len(parts[0]) == 2 and parts[0][1] == ":"):
        return True
    depth = 0
    for part in parts:
        depth += -1 if part == ".." else part not in ("", ".")
        if depth < 0:
            return True
    return False


def _recognise(data: bytes) -> str | None:
    """Returns the kind of a file that is no text in UTF-8, by its first bytes, and the way out."""
    for magic, encoding in _BOMS:
        if data.startswith(magic):
            return f"a text in {encoding}; save it as UTF-8"
    for magic, what in _MAGIC:
        if data.startswith(magic):
            return f"{what}, not a text; unpack or convert it"
    if data[257:262] == b"ustar":
        return "a tar archive, not a text; unpack it"
    if data.startswith(_LFS):
        return "a pointer of Git LFS, not the file itself; fetch it by git lfs pull"
    if data[:20].lstrip().lower().startswith(_HTML):
        return "a web page, perhaps that of an error; download the file itself"
    if b"\0" in data[:4096]:
        return "no text but bytes, perhaps UTF-16 without a mark; save it as UTF-8"
    return None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:40]} is too large")
    return number
