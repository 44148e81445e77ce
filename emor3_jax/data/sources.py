"""Sources of rows: random access to images with a question and an answer.

A source never holds all its images in memory, can be sent to another process, and gives the texts
of all rows without the images, so that rows are checked before a run starts.
"""

import bisect
import collections
import concurrent.futures
import contextlib
import itertools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from emor3_jax.data.columns import (
    check_answers,
    check_images,
    check_responses,
    check_shares,
    check_texts,
    is_text,
    label_names,
)
from emor3_jax.data.errors import DataError
from emor3_jax.data.files import is_hidden, read_image
from emor3_jax.files import head_of, is_file, leaves_folder, open_regular, show
from emor3_jax.models.errors import ImageError
from emor3_jax.models.images import MOST_DECODED_PIXELS, open_image, upright_size

IMAGE_MARK = "<image>"
"""Stands in a row's `problem` for its image."""

VIDEO_MARK = "<video>"
"""Stands in it for a video, as in data of other programs; such a row cannot be used."""

MAX_GROUP_BYTES = 2**31
"""Of a row group of a parquet file, uncompressed."""

_MAX_PARQUET_BYTES = 2**42
_TRIED = 100
# A column of texts may be encoded in far less than it takes in memory.
_ROWS_AT_ONCE = 1024


class Texts(NamedTuple):
    """A row without its image.

    Attributes:
      question: what is asked of the image, "" if nothing; None if the field is missing.
      answer: the label; None if the field is missing.
      id: names the row.
      image_moved: whether the image stood elsewhere than at the front of the question.
      images_named: how many images the question names; 0 and 1 both mean the row's image.
      distribution: the share of raters that chose each label, as the data gives it; None if not.
      responses: whole responses to learn from, their box included; () where there is none.
      values: numbers that the data gives for the image, such as valence and arousal, by name.
      candidates: labels among which this row is asked to choose, in this order; () is all labels.
      names_video: whether the question names a video.
    """

    question: str | None
    answer: str | None
    id: str
    image_moved: bool = False
    images_named: int = 1
    distribution: tuple[tuple[str | None, float | None], ...] | None = None
    responses: tuple[str, ...] = ()
    values: tuple[tuple[str, float], ...] = ()
    candidates: tuple[str, ...] = ()
    names_video: bool = False


class Row(NamedTuple):
    """A row: one image and what is asked of it.

    Attributes:
      images: the encoded images; one of them None where it has neither bytes nor a file.
      texts: question, answer and id.
      fault: why its images are not read, one of `encode.REASONS`; "" if they are.
    """

    images: list[bytes | None]
    texts: Texts
    fault: str = ""


class Source(Protocol):
    """Random access to rows."""

    name: str

    def __len__(self) -> int:
        """Returns the number of rows."""

    def __getitem__(self, index: int) -> Row:
        """Returns row `index`, 0 to len - 1."""

    def texts(self) -> Iterator[Texts]:
        """Yields the texts of all rows, in order."""

    def find(self, row_id: str) -> int:
        """Returns the index of the row with this id; raises KeyError if there is none."""


def sizes_of(source: Source, indices: np.ndarray | None = None) -> np.ndarray:
    """Returns the sizes of images, from what the source knows or from the head of each image.

    Args:
      source: the rows; one with a method `sizes` knows them without opening an image.
      indices: int[n], which rows; None is all.

    Returns:
      int32[n, 2], height and width in pixels, 0 where an image is missing or damaged, or a row has
      several.
    """
    if hasattr(source, "sizes"):
        found = source.sizes()
        return found if indices is None else found[indices]
    rows = range(len(source)) if indices is None else indices

    def size(index: int) -> tuple[int, int]:
        images = source[int(index)].images
        try:
            if len(images) == 1 and images[0] is not None:
                with open_image(images[0], MOST_DECODED_PIXELS) as image:
                    return upright_size(image)
        except ImageError:
            pass
        return 0, 0

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return np.asarray(list(pool.map(size, rows)), np.int32).reshape(-1, 2)


class RowGroups:
    """The rows of parquet files of one schema, read by row group and kept while they fit a cache.

    Files much larger than the cache should have small row groups (about 100 rows), since rows are
    visited in random order.

    Attributes:
      schema: of the first file.
      schemas: of all files.
      file_starts: int list, where the rows of each file begin.
    """

    def __init__(self, files: Sequence[Path], cache_bytes: int) -> None:
        """Reads what the files say of themselves.

        Args:
          files: the files, in order.
          cache_bytes: memory for row groups, in each process that reads.

        Raises:
          DataError: if one is no parquet file, or has a row group that cannot be read.
        """
        self._files, self._cache_bytes = list(files), cache_bytes
        # (file, row group in the file), and where each row group begins.
        self._groups: list[tuple[int, int]] = []
        self._starts = [0]
        self.file_starts: list[int] = []
        self.schemas: list[pa.Schema] = []
        for number, file in enumerate(self._files):
            handle = open_regular(file, _MAX_PARQUET_BYTES, DataError)
            size = os.fstat(handle).st_size
            os.close(handle)
            try:
                metadata = pq.read_metadata(file)
                self.schemas.append(metadata.schema.to_arrow_schema())
            except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
                what = head_of(file)
                is_own = what is None or "a parquet file" in what
                why = f"cannot be read as a parquet file: {error}" if is_own else what
                raise DataError(f"{file} {why}") from error
            if not 0 <= metadata.num_rows <= size:
                raise DataError(
                    f"{file} says that it has {metadata.num_rows} rows in {size} bytes, which no "
                    "file of images has; it is damaged"
                )
            self.file_starts.append(self._starts[-1])
            for group in range(metadata.num_row_groups):
                size = metadata.row_group(group).total_byte_size
                if not 0 <= size < MAX_GROUP_BYTES:
                    raise DataError(
                        f"{file}: row group {group} has {size / 2**30:.1f} GiB, over the "
                        f"{MAX_GROUP_BYTES / 2**30:.0f} that arrow reads at once; write the file "
                        "again with row_group_size=100"
                    )
                self._groups.append((number, group))
                self._starts.append(self._starts[-1] + metadata.row_group(group).num_rows)
            if (found := self._starts[-1] - self.file_starts[-1]) != metadata.num_rows:
                raise DataError(
                    f"{file} says that it has {metadata.num_rows} rows, and its row groups "
                    f"{found}; it is damaged: write or download it again"
                )
        self.schema = self.schemas[0]
        self._open()

    def _open(self) -> None:
        self._cache: collections.OrderedDict[int, pa.Table] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._readers: dict[int, pq.ParquetFile] = {}

    def __getstate__(self) -> dict:
        """Leaves out what cannot be sent to another process: open files, lock and cache."""
        dropped = ("_cache", "_lock", "_readers")
        return {name: value for name, value in self.__dict__.items() if name not in dropped}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return self._starts[-1]

    def file_of(self, index: int) -> int:
        """Returns the number of the file that holds a row."""
        return bisect.bisect_right(self.file_starts, index) - 1

    def row(self, index: int, columns: Sequence[str]) -> dict[str, Any]:
        """Returns some columns of a row; the same columns at every call."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        group = bisect.bisect_right(self._starts, index) - 1
        with self._naming(self._groups[group][0]):
            table = self._read(group, columns)
            at = index - self._starts[group]
            there = [name for name in columns if name in table.column_names]
            return {name: table[name][at].as_py() for name in there}

    def rows(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yields some columns of all rows, in order."""
        for number, file in enumerate(self._files):
            with self._naming(number), pq.ParquetFile(file) as reader:
                there = [name for name in columns if name in reader.schema_arrow.names]
                read, said = 0, reader.metadata.num_rows
                for batch in reader.iter_batches(_ROWS_AT_ONCE, columns=there):
                    read += len(batch)
                    yield from batch.to_pylist()
                if there and read != said:
                    raise IndexError(f"it says that it has {said} rows, and has {read}")

    @contextlib.contextmanager
    def _naming(self, number: int) -> Iterator[None]:
        """Turns what arrow says of a damaged file into an error that names it."""
        try:
            yield
        except (pa.ArrowException, OSError, UnicodeDecodeError, IndexError, MemoryError) as error:
            raise DataError(
                f"{self._files[number]} is damaged ({type(error).__name__}: {error}); write or "
                "download it again"
            ) from error

    def _read(self, group: int, columns: Sequence[str]) -> pa.Table:
        with self._lock:
            if group in self._cache:
                self._cache.move_to_end(group)
                return self._cache[group]
            file, number = self._groups[group]
            if file not in self._readers:
                self._readers[file] = pq.ParquetFile(self._files[file])
            reader = self._readers[file]
            there = [name for name in columns if name in reader.schema_arrow.names]
            table = reader.read_row_group(number, columns=there)
            self._cache[group] = table
            held = sum(t.nbytes for t in self._cache.values())
            while held > self._cache_bytes and len(self._cache) > 1:
                _, dropped = self._cache.popitem(last=False)
                held -= dropped.nbytes
            return table


_DEFAULT_COLUMNS = {
    "image": "images",
    "question": "problem",
    "answer": "answer",
    "distribution": "distribution",
    "response": "response",
    "split": "split",
}
_NEEDED = ("image", "question", "answer")


class ParquetSource:
    """Parquet files in the schema that the release trains on, or with columns of other names.

    Columns: `images` (a list of {bytes, path}, one such, or the bytes or path alone), `problem`
    (may contain `<image>`), `answer` (a text, or a number that the file names, as `datasets` does),
    and, if there is one, `distribution` (list of {label, share}), `response` (a text, or a list of
    them, to learn from) and `split`; others are ignored. An image without bytes is read from its
    path, relative to its file's folder.
    """

    def __init__(
        self,
        path: str | Path,
        cache_bytes: int = 2**30,
        *,
        columns: Mapping[str, str] | None = None,
        split: str = "",
        question: str = "",
        outside_files: bool = False,
    ) -> None:
        """Opens the files and checks their schema; reads no images.

        Args:
          path: a file, a glob, or several of them joined by commas.
          cache_bytes: memory for row groups, in each process that reads.
          columns: role → column, where the data has other names.
          split: only the rows whose column `split` holds this, or files that are named by it; "" is
            all rows.
          question: asked where the data has no such column; "" needs one.
          outside_files: whether paths of images may be absolute or leave the folder by "..".

        Raises:
          DataError: if there is no such file, one is no parquet file of this schema, or the split
            cannot be told or has no rows.
        """
        self.name, self._anywhere = str(path), outside_files
        self._columns, self._question = {**_DEFAULT_COLUMNS, **(columns or {})}, question
        self._files = expand_files(self.name)
        self._rows = RowGroups(self._files, cache_bytes)
        self._labels = label_names(self._rows.schema, self._columns["answer"])
        for file, schema in zip(self._files, self._rows.schemas, strict=True):
            self._check_schema(file, schema, columns or {})
        names = [file.name for file in self._files]
        unique = len(set(names)) == len(names)
        self._names = names if unique else [str(file) for file in self._files]
        wanted = ("question", "answer", "distribution", "response")
        self._text_columns = [self._columns[role] for role in wanted]
        check_paths(self._rows, self._columns["image"], self._files[0].parent, outside_files)
        self._indices = self._split(split, "split" in (columns or {}))

    def __len__(self) -> int:
        return len(self._rows) if self._indices is None else len(self._indices)

    def __getitem__(self, index: int) -> Row:
        index = self._index(index)
        row = self._rows.row(index, (self._columns["image"], *self._text_columns))
        folder = self._files[self._rows.file_of(index)].parent
        return read_row(
            row[self._columns["image"]], folder, self._anywhere, self._texts(row, index)
        )

    def texts(self) -> Iterator[Texts]:
        """Yields the texts of all rows, in order, without reading their images."""
        rows = enumerate(self._rows.rows(self._text_columns))
        if self._indices is None:
            yield from (self._texts(row, index) for index, row in rows)
            return
        wanted = set(self._indices.tolist())
        yield from (self._texts(row, index) for index, row in rows if index in wanted)

    def find(self, row_id: str) -> int:
        """Returns the index of the row with this id; raises KeyError if there is none."""
        name, _, row = row_id.rpartition(":")
        if name not in self._names or not row.isdecimal():
            raise KeyError(row_id)
        index = self._rows.file_starts[self._names.index(name)] + int(row)
        if self._indices is None:
            return index
        at = int(np.searchsorted(self._indices, index))
        if at == len(self._indices) or self._indices[at] != index:
            raise KeyError(row_id)
        return at

    def _index(self, index: int) -> int:
        """Returns the row of the files that is row `index` of the split."""
        if self._indices is None:
            return index
        if not 0 <= index < len(self._indices):
            raise IndexError(f"row {index} of {len(self._indices)}")
        return int(self._indices[index])

    def _split(self, split: str, named: bool) -> np.ndarray | None:
        """Returns the rows of a split, int64[n] rising; None for all."""
        if not split:
            return None
        column = self._columns["split"]
        if column not in self._rows.schema.names:
            if all(is_of_split(file, split) for file in self._files):
                return None
            raise DataError(
                f"split={split!r}: {self.name} has no column {column!r}, and its files are not "
                "named by a split; leave split '' and name the files of the split in path"
                + ("" if named else ", or name the column: columns=split:…")
            )
        values = [row[column] for row in self._rows.rows([column])]
        found = np.flatnonzero([value == split for value in values])
        if not len(found):
            there = sorted({str(value) for value in values})
            raise DataError(f"split={split!r}: column {column!r} has {', '.join(there[:20])}")
        return found

    def _texts(self, row: dict[str, Any], index: int) -> Texts:
        file = self._rows.file_of(index)
        row_id = f"{self._names[file]}:{index - self._rows.file_starts[file]}"
        columns = self._columns
        asked = row.get(columns["question"]) if columns["question"] in row else self._question
        answer = row[columns["answer"]]
        if self._labels and isinstance(answer, int):
            answer = self._labels[answer] if 0 <= answer < len(self._labels) else None
        shares, said = row.get(columns["distribution"]), row.get(columns["response"])
        return read_texts(row_id, asked, answer, shares, said)

    def _check_schema(self, file: Path, schema: pa.Schema, given: Mapping[str, str]) -> None:
        """Checks the columns of one file; those that the config names must be there."""
        columns = self._columns
        needed = [role for role in _NEEDED if role != "question" or not self._question]
        for role in dict.fromkeys((*needed, *given)):
            if columns[role] not in schema.names:
                way_out = " or a question= of all" if role == "question" else ""
                raise DataError(
                    f"{file} has no column {columns[role]!r}, only {', '.join(schema.names)}; rows "
                    "need images (list of {bytes, path}), problem and answer, or other columns by "
                    f"name, such as columns=image:photo,answer:emotion{way_out}"
                )
        where = str(file)
        check_images(where, schema, columns["image"])
        check_answers(where, schema, columns["answer"])
        check_texts(where, schema, columns["question"])
        check_responses(where, schema, columns["response"])
        check_shares(where, schema, columns["distribution"])
        if label_names(schema, columns["answer"]) != self._labels:
            raise DataError(
                f"{file} names the numbers of {columns['answer']!r} otherwise than "
                f"{self._files[0]}; open them as data sets of their own"
            )


def is_of_split(file: Path, split: str) -> bool:
    """Returns whether a file is named by a split, as on the hub: train.parquet, train-….parquet."""
    return file.stem == split or file.stem.startswith(f"{split}-") or file.parent.name == split


def expand_files(path: str) -> list[Path]:
    """Returns the files of a path, a glob, or several joined by commas.

    Raises:
      DataError: if a part of it matches no file.
    """
    files: list[Path] = []
    for part in path.split(","):
        found = _glob(part.strip()) if part.strip() else []
        if not found:
            raise DataError(
                f"path={show(path)!r}: no file matches {show(part.strip())!r}; give a parquet "
                "file, a glob, or several joined by commas"
            )
        files.extend(found)
    return files


def _glob(pattern: str) -> list[Path]:
    """Returns the paths that match; "**" does not follow links to folders, which may be circles."""

    def is_plain(part: str) -> bool:
        return not any(letter in part for letter in "*?[")

    if is_file(pattern) or is_plain(pattern):
        return [Path(pattern)] if os.path.lexists(pattern.replace("\0", "")) else []
    parts = Path(pattern).parts
    plain = list(itertools.takewhile(is_plain, parts))
    base = Path(*plain)
    try:
        found = base.glob("/".join(parts[len(plain) :]))
        return sorted(
            path
            for path in found
            if not any(map(is_hidden, path.relative_to(base).parts)) and not path.is_dir()
        )
    except (ValueError, OSError, NotImplementedError):
        return []


def read_row(found: Any, folder: Path, outside_files: bool, texts: Texts) -> Row:
    """Returns a row with its images.

    Args:
      found: as arrow gives them: {bytes, path}, bytes or a path alone, or a list of these.
      folder: to which a path is relative.
      outside_files: whether a path may leave it.
      texts: of the row.
    """
    images = found if isinstance(found, list) else [] if found is None else [found]
    images = [{"path": x} if isinstance(x, str) else x for x in images]
    images = [{"bytes": x} if isinstance(x, bytes) else x or {} for x in images]
    for image in images:
        path = image.get("path")
        if not outside_files and not image.get("bytes") and path and leaves_folder(path):
            return Row([], texts, "outside_file")
    return Row([_image_bytes(image, folder) for image in images], texts)


def _image_bytes(image: dict, folder: Path) -> bytes | None:
    """Returns the bytes of an {bytes, path}, None where it has neither bytes nor a file."""
    if image.get("bytes"):
        return image["bytes"]
    path = image.get("path")
    if not path:
        return None
    found = read_image(folder / path)
    # A path as Windows writes it.
    return read_image(folder / path.replace("\\", "/")) if found is None else found


def check_paths(rows: RowGroups, column: str, folder: Path, outside_files: bool) -> None:
    """Tries the first images of data whose images are files.

    Args:
      rows: of the data.
      column: of paths; others are not looked at.
      folder: to which they are relative.
      outside_files: whether they may leave it.

    Raises:
      DataError: naming the first path, if none of a hundred is there, or it leaves the folder.
    """
    if not is_text(rows.schema.field(column).type):
        return
    first = [row[column] for row in itertools.islice(rows.rows([column]), _TRIED)]
    first = [path for path in first if path]
    if not first:
        return
    outside = [path for path in first if leaves_folder(path)]
    if outside and not outside_files:
        raise DataError(
            f"{folder}: the image {outside[0][:200]!r} is absolute or leaves the folder of its "
            "file; write paths relative to it, or allow this by outside_files=True"
        )
    tried = (folder / path.replace("\\", slash) for path in first for slash in ("\\", "/"))
    if len(first) == _TRIED and not any(map(is_file, tried)):
        raise DataError(
            f"{folder}: none of the first {_TRIED} images is there; the first one tried was "
            f"{show(folder / first[0])}. Paths must be relative to the folder of their file"
        )


def read_texts(
    row_id: str,
    problem: str | None,
    answer: str | None,
    shares: list[dict] | None = None,
    said: str | list[str] | None = None,
) -> Texts:
    """Returns the texts of a row.

    Args:
      row_id: names the row.
      problem: the question, in which `IMAGE_MARK` may stand for the image.
      answer: the label.
      shares: list of {label, share}.
      said: a response to learn from, or several.
    """
    responses = (said,) if isinstance(said, str) else tuple(x for x in said or () if x)
    found = None if shares is None else tuple((x["label"], x["share"]) for x in shares if x)
    if problem is None:
        return Texts(None, answer, row_id, distribution=found, responses=responses)
    named = problem.count(IMAGE_MARK)
    moved = named > 0 and not problem.lstrip().startswith(IMAGE_MARK)
    question = problem.replace(IMAGE_MARK, "").strip()
    video = VIDEO_MARK in problem
    return Texts(question, answer, row_id, moved, named, found, responses, names_video=video)
