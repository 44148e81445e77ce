"""Files as other tools write them, and what is no file: read, or named with the way out."""

import gzip
import io
import os
import re
import tarfile
import zipfile
from pathlib import Path

import pytest

import emor3_jax
from emor3_jax.errors import UserError
from emor3_jax.files import (
    leaves_folder,
    parse_json,
    read_bytes,
    read_json,
    read_lines,
    read_rows,
    read_text,
    show,
)

TEXT = "joy, Zärtlichkeit, 喜\nfear\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_marks_and_ends_of_lines_are_no_part_of_a_text(tmp_path, encoding, end):
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.replace("\n", end).encode(encoding))
    assert read_text(path) == TEXT
    assert read_lines(path) == TEXT.split("\n")[:2]


def test_only_line_feeds_and_carriage_returns_end_a_line(tmp_path):
    (tmp_path / "a.txt").write_text("a\u2028b\x0bc\x85d\x1ce")
    assert len(read_lines(tmp_path / "a.txt")) == 1


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.csv", TEXT)
    return file.getvalue()


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.add(__file__, arcname="a.csv")
    return file.getvalue()


NO_TEXTS = {
    "utf-16": (TEXT.encode("utf-16"), r"a text in UTF-16; save it as UTF-8"),
    "utf-16, big end first": (b"\xfe\xff" + TEXT.encode("utf-16-be"), r"a text in UTF-16"),
    "utf-16 without a mark": (
        "joy, fear".encode("utf-16-le"),
        r"no text but bytes, perhaps UTF-16 without a mark",
    ),
    "utf-32": (TEXT.encode("utf-32"), r"a text in UTF-32"),
    "gbk": ("喜怒哀乐".encode("gbk"), r"no UTF-8 text .* perhaps GBK or Latin-1"),
    "latin-1": ("Zärtlichkeit".encode("latin-1"), r"no UTF-8 text .* perhaps GBK or Latin-1"),
    "zip": (_zip(), "a zip archive, not a text; unpack"),
    "gzip": (gzip.compress(b"x"), "a gzip archive"),
    "tar": (_tar(), "a tar archive"),
    "parquet": (b"PAR1\x15\x04", "a parquet file"),
    "pickle": (b"\x80\x04\x95", "a pickle"),
    "png": (b"\x89PNG\r\n\x1a\n\0\0", "a PNG image"),
    "git lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "a pointer of Git LFS.* git lfs pull",
    ),
    "web page": (b"<!DOCTYPE html><title>404</title>", "a web page"),
}


@pytest.mark.parametrize("kind", NO_TEXTS)
def test_what_is_no_text_in_utf_8_is_named(tmp_path, kind):
    data, message = NO_TEXTS[kind]
    path = tmp_path / "a.csv"
    path.write_bytes(data)
    for read in (read_text, read_lines, read_json, lambda path: list(read_rows(path))):
        with pytest.raises(UserError, match=rf"a\.csv is {message}") as raised:
            read(path)
        assert str(raised.value).isprintable()


def test_what_is_no_regular_file_of_bounded_size_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 2**40)
    for name, message in (
        ("/dev/zero", "a pipe, a socket or a device, not a file"),
        (tmp_path / "pipe", "a pipe, a socket or a device, not a file"),
        (tmp_path, "is a folder, not a file"),
        (tmp_path / "loop", "cannot be read: Too many levels"),
        (tmp_path / "gone", "cannot be read: No such file"),
        (tmp_path / ("x" * 5000), "cannot be read: File name too long"),
        (tmp_path / "large", r"has 1099511627776 bytes, over the \d+ that are read"),
        ("n\0l", r"n\\x00l holds a NUL"),
    ):
        for read in (read_text, read_json, lambda path: list(read_rows(path))):
            with pytest.raises(UserError, match=message):
                read(name)
    (tmp_path / "a").write_bytes(b"abc")
    assert read_bytes(tmp_path / "a", 3) == b"abc"
    with pytest.raises(UserError, match="3 bytes, over the 2"):
        read_bytes(tmp_path / "a", 2)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_tables_of_spreadsheets(tmp_path, separator):
    path = tmp_path / "a.csv"
    text = f'file{separator}label\r\n"a{separator}b.png"{separator} joy\r\n\r\n'
    path.write_bytes(text.encode("utf-8-sig"))
    assert list(read_rows(path)) == [["file", "label"], [f"a{separator}b.png", "joy"]]


def test_a_quote_that_is_never_closed_is_named(tmp_path):
    (tmp_path / "a.csv").write_text('a,b\n"' + "x" * 200_000)
    with pytest.raises(UserError, match=r"a\.csv is no table: .* quote"):
        list(read_rows(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "too many brackets"),
        ('{"a": ' * 100_000, "too many brackets"),
        ("", "is no JSON"),
        ('{"a": 1,}', "is no JSON"),
        ("1e400", "too large"),
        ("-1e400", "too large"),
        ("1" + "0" * 5000, "is no JSON: .*digits"),
        ("Infinity", "Infinity is no number"),
        ('"\\udc00"', "half of a character"),
        ("[1]", r"must hold an object, \{…\}, not \[1\]"),
    ],
)
def test_json_that_is_none_is_named(text, message):
    with pytest.raises(UserError, match=f"a.json .*{message}"):
        parse_json(text, "a.json", UserError, dict)


def test_paths_that_leave_their_folder():
    inside = ("a.png", "a/b.png", "./a", "a/../b", "a\\b.png", "..a/b", "a..", "a:b/c")
    outside = ("/a", "../a", "a/../../b", "..", "\\a", "..\\a", "C:\\a", "c:/a", "\\\\host\\a")
    assert not any(map(leaves_folder, inside)) and all(map(leaves_folder, outside))


# Modules that read what the package has written itself, or bytes that were read before.
OWN = {"data/datasets/base.py", "models/tokenizer.py", "models/images.py"}


def test_no_other_module_reads_users_files():
    package = Path(emor3_jax.__file__).parent
    reads = r"json\.loads?\(|\.read_(text|bytes)\(|csv\.reader|Image\.open\(|expanduser"
    found = {
        file.relative_to(package).as_posix()
        for room in ("data", "models", "evaluation", "prepare")
        for file in (package / room).rglob("*.py")
        if re.search(reads, file.read_text())
    }
    assert found <= OWN, "read them by files.py or models/images.py"


def test_names_are_shown_on_one_line():
    assert show("a\nb\0\x1b[31m") == "a\\nb\\x00\\x1b[31m"
    assert show(os.fsdecode(b"caf\xe9.png")) == "caf\\xe9.png" and len(show("x" * 999)) == 301
