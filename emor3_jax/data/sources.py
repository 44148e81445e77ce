"""Sources of rows: random access to images with a question and an answer.

A source never holds all its images in memory, can be sent to another process, and gives the texts
of all rows without the images, so that rows are checked before a run starts.
"""

import bisect
import collections
import concurrent.futures
import glob
import io
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import ExifTags, Image

from emor3_jax.data.errors import DataError

IMAGE_MARK = "<image>"
"""Stands in a row's `problem` for its image."""


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
    """

    question: str | None
    answer: str | None
    id: str
    image_moved: bool = False
    images_named: int = 1
    distribution: tuple[tuple[str | None, float | None], ...] | None = None
    responses: tuple[str, ...] = ()


class Row(NamedTuple):
    """A row: one image and what is asked of it.

    Attributes:
      images: the encoded images; one of them None where it has neither bytes nor a file.
      texts: question, answer and id.
    """

    images: list[bytes | None]
    texts: Texts


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


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Returns height and width in pixels once an image is turned as its EXIF says."""
    turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return image.size if turned else image.size[::-1]


def sizes_of(source: Source, indices: np.ndarray | None = None) -> np.ndarray:
    """Returns the sizes of images, from what the source knows or from the head of each image.

    Args:
      source: the rows; one with a method `sizes` knows them without opening an image.
      indices: int[n], which rows; None is all.

    Returns:
      int32[n, 2], height and width in pixels, 0 where an image is missing or damaged.
    """
    if hasattr(source, "sizes"):
        found = source.sizes()
        return found if indices is None else found[indices]
    rows = range(len(source)) if indices is None else indices

    def size(index: int) -> tuple[int, int]:
        images = source[int(index)].images
        try:
            with Image.open(io.BytesIO(images[0])) as image:
                return upright_size(image)
        except Exception:
            # PIL raises many kinds of errors for a damaged head; there may also be no image.
            return 0, 0

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return np.asarray(list(pool.map(size, rows)), np.int32).reshape(-1, 2)


class RowGroups:
    """The rows of parquet files of one schema, read by row group and kept while they fit a cache.

    Files much larger than the cache should have small row groups (about 100 rows), since rows are
    visited in random order.

    Attributes:
      schema: of the first file.
      file_starts: int list, where the rows of each file begin.
    """

    def __init__(self, files: Sequence[Path], cache_bytes: int) -> None:
        """Reads what the files say of themselves.

        Args:
          files: the files, in order.
          cache_bytes: memory for row groups, in each process that reads.

        Raises:
          DataError: if one is no parquet file.
        """
        self._files, self._cache_bytes = list(files), cache_bytes
        # (file, row group in the file), and where each row group begins.
        self._groups: list[tuple[int, int]] = []
        self._starts = [0]
        self.file_starts: list[int] = []
        for number, file in enumerate(self._files):
            try:
                metadata = pq.read_metadata(file)
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{file} cannot be read as a parquet file: {error}") from error
            if not number:
                self.schema = metadata.schema.to_arrow_schema()
            self.file_starts.append(self._starts[-1])
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group))
                self._starts.append(self._starts[-1] + metadata.row_group(group).num_rows)
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
        table = self._read(group, columns)
        at = index - self._starts[group]
        return {name: table[name][at].as_py() for name in columns if name in table.column_names}

    def rows(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yields some columns of all rows, in order."""
        for file in self._files:
            with pq.ParquetFile(file) as reader:
                there = [name for name in columns if name in reader.schema_arrow.names]
                for batch in reader.iter_batches(columns=there):
                    yield from batch.to_pylist()

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


_TEXT_COLUMNS = ("problem", "answer", "distribution", "response")


class ParquetSource:
    """Parquet files in the schema that the release trains on.

    Columns: `images` (list of {bytes, path}), `problem` (may contain `<image>`), `answer`, and, if
    there is one, `distribution` (list of {label, share}) and `response` (a text, or a list of them,
    to learn from); others are ignored. An image without bytes is read from its path, relative to
    its file's folder.
    """

    def __init__(self, path: str | Path, cache_bytes: int = 2**30) -> None:
        """Opens the files and checks their schema; reads no rows.

        Args:
          path: a file, a glob, or several of them joined by commas.
          cache_bytes: memory for row groups, in each process that reads.

        Raises:
          DataError: if there is no such file, or one is no parquet file of this schema.
        """
        self.name = str(path)
        self._files = _expand(self.name)
        self._rows = RowGroups(self._files, cache_bytes)
        for file in self._files:
            _check_schema(file)
        names = [file.name for file in self._files]
        unique = len(set(names)) == len(names)
        self._names = names if unique else [str(file) for file in self._files]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        row = self._rows.row(index, ("images", *_TEXT_COLUMNS))
        folder = self._files[self._rows.file_of(index)].parent
        images = [image_bytes(image, folder) for image in row["images"] or ()]
        return Row(images, self._texts(row, index))

    def texts(self) -> Iterator[Texts]:
        """Yields the texts of all rows, in order, without reading their images."""
        for index, row in enumerate(self._rows.rows(_TEXT_COLUMNS)):
            yield self._texts(row, index)

    def find(self, row_id: str) -> int:
        """Returns the index of the row with this id; raises KeyError if there is none."""
        name, _, row = row_id.rpartition(":")
        if name not in self._names or not row.isdecimal():
            raise KeyError(row_id)
        return self._rows.file_starts[self._names.index(name)] + int(row)

    def _texts(self, row: dict[str, Any], index: int) -> Texts:
        file = self._rows.file_of(index)
        row_id = f"{self._names[file]}:{index - self._rows.file_starts[file]}"
        shares, said = row.get("distribution"), row.get("response")
        return read_texts(row_id, row["problem"], row["answer"], shares, said)


def _expand(path: str) -> list[Path]:
    files: list[Path] = []
    for part in path.split(","):
        found = sorted(glob.glob(part.strip(), recursive=True)) if part.strip() else []
        if not found:
            raise DataError(
                f"path={path!r}: no file matches {part.strip()!r}; give a parquet file, a glob, or "
                "several joined by commas"
            )
        files.extend(Path(file) for file in found)
    return files


def _check_schema(file: Path) -> None:
    schema = pq.read_schema(file)
    for column in ("images", "problem", "answer"):
        if column not in schema.names:
            raise DataError(
                f"{file} has no column {column!r}, only {', '.join(schema.names)}; rows need "
                "images (list of {bytes, path}), problem and answer"
            )
    images = schema.field("images").type
    fits = pa.types.is_list(images) or pa.types.is_large_list(images)
    fits = fits and pa.types.is_struct(images.value_type)
    if not fits or images.value_type.get_field_index("bytes") < 0:
        raise DataError(f"{file}: column 'images' is {images}, not a list of {{bytes, path}}")
    if "response" in schema.names:
        said = schema.field("response").type
        said = said.value_type if pa.types.is_list(said) or pa.types.is_large_list(said) else said
        fits = pa.types.is_string(said) or pa.types.is_large_string(said) or pa.types.is_null(said)
        if not fits:
            raise DataError(f"{file}: column 'response' is {said}, not a text or a list of texts")
    if "distribution" in schema.names:
        shares = schema.field("distribution").type
        fits = pa.types.is_list(shares) or pa.types.is_large_list(shares)
        fits = fits and pa.types.is_struct(shares.value_type)
        fits = fits and {f.name for f in shares.value_type} >= {"label", "share"}
        if not fits:
            raise DataError(
                f"{file}: column 'distribution' is {shares}, not a list of {{label, share}}"
            )


def image_bytes(image: dict | None, folder: Path) -> bytes | None:
    """Returns the bytes of an {bytes, path}, None where it has neither bytes nor a file.

    Args:
      image: as arrow gives it.
      folder: to which a path is relative.
    """
    if image is None:
        return None
    if image.get("bytes"):
        return image["bytes"]
    path = folder / image["path"] if image.get("path") else None
    return path.read_bytes() if path is not None and path.is_file() else None


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
    return Texts(question, answer, row_id, moved, named, found, responses)
