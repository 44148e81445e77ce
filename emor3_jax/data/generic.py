"""Data sets of anyone's: JSON lines, class folders, and folders of the library `datasets`.

Nothing is built: each is opened as it lies. For parquet files in the release's schema see
`emor3_jax.data.sources.ParquetSource`.
"""

import bisect
import functools
import logging
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from emor3_jax.data.columns import (
    check_answers,
    check_images,
    check_texts,
    features_of,
    id_of,
    label_names,
    shares_of,
    text_of,
    texts_of,
)
from emor3_jax.data.errors import DataError
from emor3_jax.data.files import is_hidden, is_image, leads_up, read_image, walk
from emor3_jax.data.labels import normalize
from emor3_jax.data.sources import (
    Row,
    RowGroups,
    Texts,
    check_paths,
    is_of_split,
    read_row,
    read_texts,
)
from emor3_jax.files import (
    expand_user,
    is_file,
    is_folder,
    leaves_folder,
    open_regular,
    parse_json,
    read_json,
    read_lines,
    show,
)
from emor3_jax.models.images import FORMATS, SUFFIXES

logger = logging.getLogger(__name__)

QUESTION = "Which emotion does this picture evoke?"
"""Asked where neither the data nor the config says what to ask."""

TEST_SHARE = 0.2
"""Of the rows of a data set without splits, chosen by a hash of their ids."""


def in_test(row_id: str) -> bool:
    """Returns whether a row belongs to the test split of a data set without splits of its own."""
    return zlib.crc32(row_id.encode()) < TEST_SHARE * 2**32


@functools.cache
def tell_own_split(name: str, split: str, count: int, total: int) -> None:
    """Logs, once, how many rows a split of `in_test` has, so that none seem lost.

    Args:
      name: of the data set.
      split: "train" or "test".
      count, total: rows of the split, and of the whole data set.
    """
    logger.warning(
        "%s has no splits of its own: split=%r takes %d of its %d rows, about a fifth of which are "
        "the test split; split='whole' takes all",
        name,
        split,
        count,
        total,
    )


class FilesSource:
    """Rows whose images are files.

    Attributes:
      name: of the data set.
      labels: its labels, () where the data does not say them.
    """

    def __init__(
        self, name: str, files: Sequence[Path], texts: Sequence[Texts], labels: Sequence[str] = ()
    ) -> None:
        """Opens no file.

        Args:
          name: of the data set.
          files: an image a row.
          texts: of the rows.
          labels: the label set.
        """
        self.name, self.labels = name, tuple(labels)
        self._files, self._texts = list(files), list(texts)
        self._index: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Row:
        return Row([read_image(self._files[index])], self._texts[index])

    def texts(self) -> Iterator[Texts]:
        """Yields the texts of all rows, in order."""
        yield from self._texts

    def find(self, row_id: str) -> int:
        """Returns the index of the row with this id; raises KeyError if there is none."""
        if not self._index:
            self._index = {texts.id: index for index, texts in enumerate(self._texts)}
        return self._index[row_id]


_MAX_ARROW_BYTES = 2**42
_TRIED = 100
_NAMED = 10
_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing", "dev"}


def open_folders(path: str, split: str, question: str = "") -> FilesSource:
    """Opens class folders, `path/<split>/<label>/*` or `path/<label>/*`.

    A label's folder may hold folders of images; the label is the first of them. Hidden files are
    passed over, and files without the extension of an image are images if their content says so.

    Args:
      path: the folder.
      split: a folder below it; without such a folder, "whole", "train" or "test" of the rows, of
        which the last is a fifth by a hash of the ids.
      question: asked of each image; "" asks `QUESTION`.

    Raises:
      DataError: if there is no such folder, or no folders of images in it.
    """
    root = expand_user(path)
    if not path or not is_folder(root):
        raise DataError(
            f"path={show(path)!r}: there is no such folder; it must hold <split>/<label>/*.jpg or "
            "<label>/*.jpg"
        )
    has_split = is_folder(root / split) and not leaves_folder(split)
    base = root / split if has_split else root
    folders = sorted(p for p in base.iterdir() if p.is_dir() and not is_hidden(p.name))
    splits = [p.name for p in folders if p.name.lower() in _SPLIT_NAMES]
    if not has_split and (split not in ("whole", "train", "test") or splits):
        has = f"{root} has the splits {', '.join(splits)}"
        there = has if splits else f"no such folder in {root}"
        raise DataError(
            f"split={split!r}: {there}; without folders of splits, choose 'whole', 'train' or "
            "'test'"
        )
    files, texts, labels, others, total = [], [], [], [], 0
    for folder in folders:
        images = list(_images(folder, 1, others))
        if not images:
            raise DataError(
                f"{folder} holds no images ({', '.join(SUFFIXES)}); every folder of {base} must "
                "be a label with its images"
            )
        label = normalize(_printable(folder.name))
        if label in labels:
            raise DataError(f"two folders of {base} are the label {label!r}: join them")
        labels.append(label)
        total += len(images)
        for file in images:
            row_id = _printable(file.relative_to(root).as_posix())
            if has_split or split == "whole" or (split == "test") == in_test(row_id):
                files.append(file)
                texts.append(Texts(question or QUESTION, label, row_id))
    if not labels:
        raise DataError(f"{base} holds no folders; it must hold one for each label")
    if not has_split and split != "whole":
        tell_own_split(show(root), split, len(files), total)
    if others:
        logger.warning(
            "%s: %d files are none of the images that are read (%s): %s",
            base,
            len(others),
            ", ".join(FORMATS),
            ", ".join(map(show, others[:_NAMED])) + (", …" if len(others) > _NAMED else ""),
        )
    return FilesSource(f"{root.name}/{split}", files, texts, labels)


def _images(folder: Path, levels: int, others: list[Path]) -> Iterator[Path]:
    """Yields the images of a folder in order, and of as many levels of folders in it.

    Args:
      folder: the folder.
      levels: of folders below it.
      others: takes the files that are no images.
    """
    for path in sorted(p for p in folder.iterdir() if not is_hidden(p.name)):
        if is_image(path):
            yield path
        elif levels and path.is_dir() and not leads_up(path):
            yield from _images(path, levels - 1, others)
        elif not path.is_dir():
            others.append(path)


def _printable(name: str) -> str:
    """Returns a file's name with bytes that are no UTF-8 written out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def open_json_lines(
    path: str,
    question: str = "",
    *,
    columns: Mapping[str, str] | None = None,
    split: str = "",
    outside_files: bool = False,
) -> FilesSource:
    """Opens a file of JSON lines.

    A line is an object with `image`, an image's file relative to the list's folder (a path of
    Windows is read as well); `answer` or `label`; and, if wanted, `question` or `problem`, `id`,
    `distribution`, {label: share}, `response`, a text or a list of them to learn from, and `split`.

    Args:
      path: the file.
      question: asked where a line has none; "" asks `QUESTION`.
      columns: role → field, where the lines have other names.
      split: only the lines whose `split` is this; "" is all.
      outside_files: whether paths of images may be absolute or leave the list's folder by "..".

    Raises:
      DataError: naming the line that is no such object, the split that no line has, or the first
        image, if none of a hundred is there.
    """
    file = expand_user(path)
    if not path or not os.path.lexists(str(file).replace("\0", "")):
        raise DataError(f"path={show(path)!r}: there is no such file; give one of JSON lines")
    names = columns or {}
    files, texts, seen, splits = [], [], set(), set()
    for number, line in enumerate(read_lines(file, DataError), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {file}"
        row = parse_json(line, where, DataError)
        if not isinstance(row, dict):
            raise DataError(f"{where} is no object with a text 'image', the image's file")
        of_split = row.get(names.get("split", "split"))
        splits.add(None if of_split is None else str(of_split))
        if split and str(of_split) != split:
            continue
        image = row.get(names.get("image", "image"))
        if not isinstance(image, str):
            raise DataError(
                f"{where} is no object with a text {names.get('image', 'image')!r}, the image's "
                "file; name another field by columns=image:…"
            )
        if not outside_files and leaves_folder(image):
            raise DataError(
                f"{where}: the image {image[:200]!r} is absolute or leaves the folder of the list; "
                "write paths relative to it, or allow this by outside_files=True"
            )
        texts.append(_json_texts(row, names, where, f"{file.name}:{number}", question or QUESTION))
        if texts[-1].id in seen:
            raise DataError(f"{where}: the id {texts[-1].id!r} was there before")
        seen.add(texts[-1].id)
        files.append(file.parent / image)
    files = _existing(files, file)
    if split and not files:
        there = sorted(name for name in splits if name is not None)
        known = f"its lines are of {', '.join(there)}" if there else "its lines name no split"
        raise DataError(f"split={split!r}: {file}: {known}; leave split '' to take all lines")
    return FilesSource(file.name, files, texts)


def _existing(files: list[Path], of: Path) -> list[Path]:
    """Returns the files, with the separators of Windows changed where these lead nowhere.

    Raises:
      DataError: if none of the first ones is there, as on another machine than the list's.
    """
    first = files[:_TRIED]
    if not first or any(map(is_file, first)):
        return files
    changed = [Path(str(file).replace("\\", "/")) for file in files]
    if any(map(is_file, changed[:_TRIED])):
        return changed
    if len(first) < _TRIED:
        # The pipeline counts and names so few rows.
        return files
    raise DataError(
        f"{of}: none of its first {_TRIED} images is there; the first one tried was "
        f"{show(first[0])}. Paths must be relative to the folder of the list"
    )


def _json_texts(
    row: dict[str, Any], names: Mapping[str, str], where: str, default_id: str, question: str
) -> Texts:
    """Returns the texts of one JSON object; a field that the config names must be there."""
    for role, name in names.items():
        if name not in row:
            raise DataError(f"{where} has no field {name!r}, which columns names as {role}")
    row_id = id_of(row, names.get("id", "id"), where)
    asked = [names["question"]] if "question" in names else ["problem", "question"]
    answers = [names["answer"]] if "answer" in names else ["answer", "label"]
    asked = next((name for name in asked if name in row), None)
    answers = next((name for name in answers if name in row), answers[0])
    return read_texts(
        default_id if row_id is None else row_id,
        text_of(row, asked, where) if asked else question,
        text_of(row, answers, where),
        shares_of(row, names.get("distribution", "distribution"), where),
        texts_of(row, names.get("response", "response"), where),
    )


class HuggingFaceSource:
    """A folder of the library `datasets`, read with pyarrow alone.

    Either what `save_to_disk` writes (arrow files beside a state.json), or the layout of the hub,
    parquet files named by their split. Columns are found by their features: the Image, the
    ClassLabel or the text named label, emotion or answer, and, if there is one, the text named
    question or problem; or as the config names them.

    Attributes:
      name: of folder and split.
      labels: the names of the ClassLabel, in its order; () where labels are texts.
    """

    def __init__(
        self,
        path: str,
        split: str,
        question: str = "",
        cache_bytes: int = 2**30,
        *,
        columns: Mapping[str, str] | None = None,
        outside_files: bool = False,
    ) -> None:
        """Opens the files of a split; reads no images.

        Args:
          path: the folder.
          split: of the data set; "" is the only one, or train.
          question: asked where the data has no such column; "" asks `QUESTION`.
          cache_bytes: memory for row groups of parquet files, in each process that reads.
          columns: role (image, answer, question) → column, where they cannot be told.
          outside_files: whether paths of images may be absolute or leave the folder by "..".

        Raises:
          DataError: if the folder has neither layout, the split is not there, or a column cannot be
            told.
        """
        root = expand_user(path)
        if not path or not is_folder(root):
            raise DataError(f"path={show(path)!r}: there is no such folder")
        self.name, self._anywhere = f"{root.name}/{split or 'train'}", outside_files
        self._question = question or QUESTION
        arrow = _arrow_files(root, split)
        self._rows: _ArrowRows | RowGroups
        if arrow:
            self._rows = _ArrowRows(arrow).check()
            self._folder = arrow[0].parent
        else:
            files = _parquet_files(root, split)
            self._rows = RowGroups(files, cache_bytes)
            self._folder = files[0].parent
        schema, given = self._rows.schema, columns or {}
        for role, name in given.items():
            if role not in ("image", "answer", "question") or name not in schema.names:
                raise DataError(
                    f"columns={role}:{name}: {root} has the columns {', '.join(schema.names)}; "
                    "here image, answer and question can be named"
                )
        images, labels = ("image", "images", "img"), ("label", "labels", "emotion", "answer")
        self._image = given.get("image") or _column(schema, "Image", images, root)
        self._label = given.get("answer") or _column(schema, "ClassLabel", labels, root)
        asked = [name for name in ("problem", "question") if name in schema.names]
        self._asked = given.get("question") or (asked[0] if asked else None)
        self.labels = label_names(schema, self._label)
        for each in self._rows.schemas:
            missing = [x for x in (self._image, *self._text_columns()) if x not in each.names]
            if missing or label_names(each, self._label) != self.labels:
                why = f"has no column {missing[0]!r}" if missing else "names other labels"
                raise DataError(f"{root}: a file of split {split!r} {why}; join files of one form")
            check_images(str(root), each, self._image)
            check_answers(str(root), each, self._label)
            if self._asked:
                check_texts(str(root), each, self._asked)
        check_paths(self._rows, self._image, self._folder, outside_files)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        columns = [self._image, *self._text_columns()]
        row = self._rows.row(index, columns)
        return read_row(row[self._image], self._folder, self._anywhere, self._texts(row, index))

    def texts(self) -> Iterator[Texts]:
        """Yields the texts of all rows, in order, without reading their images."""
        for index, row in enumerate(self._rows.rows(self._text_columns())):
            yield self._texts(row, index)

    def find(self, row_id: str) -> int:
        """Returns the index of the row with this id; raises KeyError if there is none."""
        name, _, row = row_id.rpartition(":")
        if name != self.name or not row.isdecimal() or int(row) >= len(self):
            raise KeyError(row_id)
        return int(row)

    def _text_columns(self) -> list[str]:
        return [self._label, *([self._asked] if self._asked else [])]

    def _texts(self, row: dict[str, Any], index: int) -> Texts:
        answer = row[self._label]
        if self.labels and isinstance(answer, int):
            answer = self.labels[answer] if 0 <= answer < len(self.labels) else None
        asked = row[self._asked] if self._asked else self._question
        return read_texts(f"{self.name}:{index}", asked, answer)


class _ArrowRows:
    """The rows of arrow files, mapped into memory: what is not looked at takes none."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = list(files)
        self._open()

    def _open(self) -> None:
        try:
            self._tables = [_map(file) for file in self._files]
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self._files[0].parent}: cannot be read: {error}") from error
        self._starts = np.cumsum([0, *(table.num_rows for table in self._tables)])
        self.schemas = [table.schema for table in self._tables]
        self.schema = self.schemas[0]

    def check(self) -> "_ArrowRows":
        """Returns itself; raises DataError if an offset leads out of a file, as none is checked."""
        for file, table in zip(self._files, self._tables, strict=True):
            try:
                table.validate(full=True)
            except pa.ArrowException as error:
                raise DataError(f"{file} is damaged: {error}; save the data again") from error
        return self

    def __getstate__(self) -> dict:
        return {"_files": self._files}

    def __setstate__(self, state: dict) -> None:
        self._files = state["_files"]
        self._open()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, index: int, columns: Sequence[str]) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        part = bisect.bisect_right(self._starts, index) - 1
        at = index - int(self._starts[part])
        return {name: self._tables[part][name][at].as_py() for name in columns}

    def rows(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        for table in self._tables:
            for batch in table.select(list(columns)).to_batches():
                yield from batch.to_pylist()


def _map(file: Path) -> pa.Table:
    os.close(open_regular(file, _MAX_ARROW_BYTES, DataError))
    return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()


def _arrow_files(root: Path, split: str) -> list[Path]:
    """Returns the files of `save_to_disk`, [] where the folder has another layout."""
    folder, listed = root, root / "dataset_dict.json"
    if is_file(listed):
        there = read_json(listed, DataError, dict).get("splits")
        if not isinstance(there, list) or not all(isinstance(x, str) for x in there) or not there:
            raise DataError(f"{listed}: splits must be names; save the data again")
        split = split or (there[0] if len(there) == 1 else "train")
        if split not in there or leaves_folder(split):
            raise DataError(f"split={split!r}: {root} has {', '.join(there)}")
        folder = root / split
    if not is_file(folder / "state.json"):
        return []
    state = read_json(folder / "state.json", DataError, dict)
    own = state.get("_split")
    if folder == root and split and split != own:
        is_what = f"is the split {own}" if own else "names no split"
        raise DataError(f"split={split!r}: {root} holds a single one, which {is_what}; leave it ''")
    parts = state.get("_data_files")
    names = [x.get("filename") if isinstance(x, dict) else None for x in parts or ()]
    if not names or not all(isinstance(x, str) and not leaves_folder(x) for x in names):
        raise DataError(
            f"{folder / 'state.json'}: _data_files must name files beside it; save the data again"
        )
    files = [folder / name for name in names]
    if missing := [file.name for file in files if not is_file(file)]:
        raise DataError(f"{folder} lacks {', '.join(missing)}, which its state.json names")
    if state.get("_indices_data_files"):
        raise DataError(
            f"{folder} holds rows in an order of their own (`select` or `shuffle` without "
            "`flatten_indices`); call flatten_indices() before save_to_disk()"
        )
    return files


def _parquet_files(root: Path, split: str) -> list[Path]:
    there = sorted(path for path in walk(root) if path.suffix == ".parquet")
    if not there:
        raise DataError(
            f"{root} holds neither a state.json (save_to_disk) nor parquet files; give the folder "
            "of a data set"
        )

    found = [file for file in there if is_of_split(file, split or "train")]
    if not found and not split and len({file.stem.partition("-")[0] for file in there}) == 1:
        return there
    if not found:
        names = sorted({file.stem.partition("-")[0] for file in there})
        raise DataError(f"split={split!r}: {root} has files of {', '.join(names)}")
    return found


def _column(
    schema: pa.Schema,
    kind: str,
    names: Sequence[str],
    root: Path,
) -> str:
    """Returns the column of a kind: the only one by its feature, else the first by its name."""
    features = features_of(schema).items()
    by_kind = [name for name, feature in features if feature.get("_type") == kind]
    if len(by_kind) == 1:
        return by_kind[0]
    found = [name for name in names if name in (by_kind or schema.names)]
    if not found:
        raise DataError(
            f"{root}: no column of kind {kind} can be told among {', '.join(schema.names)}; name "
            f"one {' or '.join(names)}, or say which by columns=image:…,answer:…"
        )
    return found[0]
