"""Shared parts of the builders: from a folder on disk to a tfds data set, checked once.

A builder reads what the folder says of its images (`scan`), looks at the head of every file,
and writes one record per image with tfds in array_record files: id, label, shares of raters,
attributes, size in pixels, and the image's file. TensorFlow is not needed.

Copy or refer. EmoSet-118K is 118,102 files; to copy them into records doubles the disk they take
and makes the first run wait for the copy. So by default records refer to the images, which stay
where they are and must not move, and a build reads the head of each file. `copy=True`
puts the bytes of the images into a split of their own beside the records (`<split>_pictures`),
for disks that are slow at many small files, or to take one folder to another machine. What has no
image files (FER-2013's csv) is always copied.

A build is found again by what the folder says: other files, labels or splits make another build. A
file that is overwritten by another image under its name is not noticed.
"""

import abc
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from emor3_jax.data.datasets.checks import Checks, log
from emor3_jax.data.errors import DataError
from emor3_jax.data.files import read_image
from emor3_jax.data.generic import in_test
from emor3_jax.data.labels import label_set, normalize
from emor3_jax.data.sources import Row, Texts
from emor3_jax.errors import UserError
from emor3_jax.files import (
    expand_user,
    is_file,
    is_folder,
    leaves_folder,
    open_regular,
    read_json,
    show,
)
from emor3_jax.models.images import MAX_IMAGE_BYTES, open_image, upright_size

logger = logging.getLogger(__name__)

WHOLE = "whole"
"""The only split of a data set that was published without splits."""

_OWN_SPLITS = ("train", "test")
_THREADS = 16
_TAIL = 4096


class Found(NamedTuple):
    """An image as the folder names it.

    Attributes:
      id: names the row within its split.
      label: one of the set; "" where the folder gives none.
      file: the image, relative to the folder; "" where it is not there or no file of its own.
      shares: the share of raters for each label of `Builder.LABELS`, of any sum; or nothing.
      annotation: JSON file of attributes, relative to the folder; "" without.
      values: numbers that the folder gives for the row, such as valence and arousal, by name.
      candidates: labels of which this row's answer is one, in the order of the data; () for all.
      question: asked of this image instead of `Builder.QUESTION`; "" asks that.
      attributes: what else the folder says, a JSON object; "" without.
    """

    id: str
    label: str
    file: str
    shares: tuple[float, ...] = ()
    annotation: str = ""
    values: tuple[tuple[str, float], ...] = ()
    candidates: tuple[str, ...] = ()
    question: str = ""
    attributes: str = ""


@dataclasses.dataclass(eq=False)
class FolderConfig(tfds.core.BuilderConfig):
    """The folder to build from.

    Attributes:
      root: the folder.
      copy: whether records hold the images themselves.
    """

    name: str = ""
    root: str = ""
    copy: bool = False


class LocalDatasetInfo(tfds.core.DatasetInfo):
    """Describes a data set that is built here, and so is not looked for in Google's bucket."""

    def initialize_from_bucket(self) -> None:
        """Does nothing; that of tfds leaves an empty temporary folder behind each time."""


class Builder(tfds.core.GeneratorBasedBuilder):
    """A data set of visual emotion in a folder that the user has downloaded.

    Attributes:
      LABELS: its label set, as `labels.label_set` takes it.
      QUESTION: what is asked of each image.
      PUBLISHED: the numbers of rows that its authors name, by split; another number is logged.
      LABEL_COUNTS: likewise of rows by label, of all splits together.
      PLACEHOLDER: more files of equal bytes than this are a site's "no longer available" image and
        are left out; 0 keeps all.
      IMAGES_IN_FILES: False where images have no files of their own.
      MANUAL_DOWNLOAD_INSTRUCTIONS: page, files, and where to put them.
    """

    VERSION = tfds.core.Version("1.1.0")
    LABELS: str
    QUESTION: str
    PUBLISHED: tuple[tuple[str, int], ...] = ()
    LABEL_COUNTS: tuple[tuple[str, int], ...] = ()
    PLACEHOLDER = 0
    IMAGES_IN_FILES = True

    @classmethod
    @abc.abstractmethod
    def scan(cls, root: Path, checks: Checks) -> dict[str, list[Found]]:
        """Reads what the folder says of its images, without opening them.

        Args:
          root: the folder.
          checks: takes what was noticed.

        Returns:
          Split → images, in a fixed order.

        Raises:
          DataError: if the folder does not have the layout, naming the file and the way out.
        """

    @classmethod
    def own_test(cls, ids: Sequence[str]) -> set[str]:
        """Returns the test ids of a data set without splits: a fifth, by their hash."""
        return {row_id for row_id in ids if in_test(row_id)}

    def image(self, root: Path, found: Found) -> bytes | None:
        """Returns the encoded image, None if it cannot be read."""
        return read_image(root / found.file) if found.file else None

    @property
    def copies(self) -> bool:
        """True if the records hold the images."""
        return self.builder_config.copy or not self.IMAGES_IN_FILES

    def _info(self) -> tfds.core.DatasetInfo:
        text, number = tfds.features.Text, tfds.features.Scalar
        return LocalDatasetInfo(
            builder=self,
            description=self.MANUAL_DOWNLOAD_INSTRUCTIONS,
            # Rows keep the order of the folder, and the images that of the rows.
            disable_shuffling=True,
            features=tfds.features.FeaturesDict(
                {
                    "id": text(),
                    "label": text(),
                    "file": text(),
                    "attributes": text(),
                    "values": text(),
                    "candidates": text(),
                    "question": text(),
                    "shares": tfds.features.Tensor(shape=(None,), dtype=np.float32),
                    "height": number(dtype=np.int32),
                    "width": number(dtype=np.int32),
                    "picture": tfds.features.Image(shape=(None, None, None)),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager
        root = Path(self.builder_config.root)
        checks = Checks(self.name, root)
        splits = {
            split: found for split, found in scan_folder(type(self), root, checks).items() if found
        }
        total = sum(map(len, splits.values()))
        heads = {
            split: self._examine(root, split, found, checks) for split, found in splits.items()
        }
        dropped = set()
        for group in _equal_images(splits, heads, lambda each: self.image(root, each)):
            if self.PLACEHOLDER and len(group) > self.PLACEHOLDER:
                dropped.update((split, each.id) for split, each in group)
            else:
                _note_duplicates(group, checks)
        for split, found in splits.items() if dropped else ():
            kept = [(split, each.id) not in dropped for each in found]
            for each, keep in zip(found, kept, strict=True):
                if not keep:
                    checks.note("placeholder", f"{split}/{each.id}")
            splits[split] = list(itertools.compress(found, kept))
            heads[split] = list(itertools.compress(heads[split], kept))
        self._check_counts(splits, checks)
        checks.finish(total)
        self.found = checks
        generators = {}
        for split, found in splits.items():
            generators[split] = self._generate_examples(root, found, heads[split], False)
            if self.copies:
                images = self._generate_examples(root, found, heads[split], True)
                generators[f"{split}_pictures"] = images
        return generators

    def _check_counts(self, splits: dict[str, list[Found]], checks: Checks) -> None:
        """Notes numbers of rows that are not the published ones."""
        labels = Counter(each.label for found in splits.values() for each in found)
        for split, count in self.PUBLISHED:
            there = labels.total() if split == "all" else len(splits.get(split, ()))
            if there != count:
                checks.note("count", f"{split}: {there} rows, published are {count}")
        for label, count in self.LABEL_COUNTS:
            if labels[label] != count:
                checks.note("count", f"{label}: {labels[label]} rows, published are {count}")

    def _generate_examples(
        self, root: Path, found: Sequence[Found], heads: Sequence["_Head"], images: bool
    ) -> Iterator:
        for number, (each, head) in enumerate(zip(found, heads, strict=True)):
            data = self.image(root, each) if images else None
            yield (
                number,
                {
                    "id": each.id,
                    "label": each.label,
                    "file": each.file,
                    "attributes": "" if images else each.attributes or head.attributes,
                    "values": json.dumps(dict(each.values)) if each.values else "",
                    "candidates": json.dumps(each.candidates) if each.candidates else "",
                    "question": each.question,
                    "shares": [] if images else list(each.shares),
                    "height": head.height,
                    "width": head.width,
                    "picture": io.BytesIO(data or b""),
                },
            )

    def _examine(
        self, root: Path, split: str, found: Sequence[Found], checks: Checks
    ) -> list["_Head"]:
        """Looks at the head of every file; what threads find is noted in the order of the rows."""
        # Without files there is nothing to wait for.
        threads = _THREADS if self.IMAGES_IN_FILES else 1
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            heads = list(pool.map(lambda each: _head(root, each, self), found))
        for each, head in zip(found, heads, strict=True):
            where = f"{split}/{each.id}"
            if self.IMAGES_IN_FILES and not each.file:
                checks.note("missing_file", where)
            elif not head.height:
                checks.note("unreadable", where)
            if each.annotation and not head.attributes:
                checks.note("missing_annotation", where)
            if head.emotion and normalize(head.emotion) != each.label:
                checks.note("other_label", f"{where} ({each.label}, annotation {head.emotion})")
        return heads


class _Head(NamedTuple):
    """Contents of a file's head and annotation; height 0 where no image was found."""

    height: int
    width: int
    key: tuple[int, int]
    attributes: str
    emotion: str


def _head(root: Path, found: Found, builder: Builder) -> _Head:
    height = width = 0
    key = (0, 0)
    if not builder.IMAGES_IN_FILES:
        data = builder.image(root, found)
        if data is not None:
            with open_image(data) as image:
                height, width = upright_size(image)
            key = (len(data), zlib.crc32(data))
    elif found.file and is_file(root / found.file):
        try:
            with open(open_regular(root / found.file, MAX_IMAGE_BYTES), "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - _TAIL))
                key = (size, zlib.crc32(file.read()))
                file.seek(0)
                with open_image(file) as image:
                    height, width = upright_size(image)
        except (UserError, OSError):
            height = width = 0
    attributes, emotion = "", ""
    if found.annotation and not leaves_folder(found.annotation):
        try:
            read = read_json(root / found.annotation, kind=dict)
            emotion = str(read.pop("emotion", "") or "")
            attributes = json.dumps(read, ensure_ascii=False, sort_keys=True)
        except (OSError, UserError):
            attributes = ""
    return _Head(height, width, key, attributes, emotion)


def _equal_images(
    splits: dict[str, list[Found]],
    heads: dict[str, list[_Head]],
    image: Callable[[Found], bytes | None],
) -> Iterator[list[tuple[str, Found]]]:
    """Yields groups of images of equal bytes, each with its split, in the order of the rows.

    Only files of equal size and end are read as a whole. Rows of one file are one image.
    """
    alike: dict[tuple[int, int], list[tuple[str, Found]]] = defaultdict(list)
    for split, found in splits.items():
        files = set()
        for each, head in zip(found, heads[split], strict=True):
            if head.key[0] and (not each.file or each.file not in files):
                alike[head.key].append((split, each))
                files.add(each.file)
    for candidates in alike.values():
        if len(candidates) > 1:
            same: dict[bytes, list[tuple[str, Found]]] = defaultdict(list)
            for split, each in candidates:
                same[hashlib.sha256(image(each) or b"").digest()].append((split, each))
            yield from (group for group in same.values() if len(group) > 1)


def _note_duplicates(group: Sequence[tuple[str, Found]], checks: Checks) -> None:
    """Notes each image of a group but the first as equal to the first."""
    first_split, first = group[0]
    for split, each in group[1:]:
        pair = f"{first_split}/{first.id} = {split}/{each.id}"
        if split != first_split:
            checks.note("duplicate_other_split", pair)
        elif each.label != first.label:
            checks.note("duplicate_other_label", pair)
        else:
            checks.note("duplicate", pair)


def check_root(builder: type[Builder], path: str | Path) -> Path:
    """Returns the folder of a data set.

    Raises:
      DataError: if there is none, with the instructions to get it.
    """
    root = expand_user(path)
    if not path or not is_folder(root):
        raise DataError(
            f"path={show(path)!r}: there is no such folder. {builder.MANUAL_DOWNLOAD_INSTRUCTIONS}"
        )
    return root.resolve()


def build_dataset(
    builder: type[Builder], path: str | Path, data_dir: str | Path, *, copy: bool = False
) -> Builder:
    """Builds a data set below `data_dir`, or finds it there.

    Args:
      builder: of the data set.
      path: the folder that the user has downloaded.
      data_dir: folder of tfds data sets.
      copy: whether records hold the images themselves.

    Raises:
      DataError: if the folder is not there or not what it should be.
    """
    root = check_root(builder, path)
    # The scan is repeated at each start, which takes seconds: so a changed folder is noticed.
    splits = scan_folder(builder, root, Checks(builder.name, root))
    name = _fingerprint(root, copy, splits)
    config = FolderConfig(name=name, root=str(root), copy=copy)
    with _one_at_a_time(Path(data_dir) / f"{builder.name}.{name}.lock"):
        with quiet():
            built = builder(config=config, data_dir=str(data_dir), file_format="array_record")
        checks = Path(built.data_dir) / "checks.json"
        if not checks.is_file():
            files = sum(map(len, splits.values()))
            logger.warning(
                "%s: building, once: looking at %d images in %s", built.name, files, root
            )
            with quiet():
                built.download_and_prepare()
            if not hasattr(built, "found"):
                raise DataError(f"{built.data_dir} is incomplete; delete it and start again")
            built.found.save(checks)
    _log_once(built.name, checks)
    return built


def read_notes(built: Builder) -> dict[str, list[str]]:
    """Returns kind of `checks.FAULTS` or `NOTES` → what was found when a data set was built."""
    return _read_checks(Path(built.data_dir) / "checks.json")


def _read_checks(path: Path) -> dict[str, list[str]]:
    return read_json(
        path, lambda why: DataError(f"{why}; delete {path.parent}, and it is built again"), dict
    )


@contextlib.contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Waits while another program builds the same data set; the lock ends with its program."""
    with contextlib.ExitStack() as stack:
        # A folder that is read alone, or a file system without locks, holds what is built already.
        with contextlib.suppress(OSError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(lock.open("w")), fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps back what tfds says: that it downloads, and that a folder is no known configuration."""
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl.setLevel(level)


@functools.cache
def _log_once(name: str, checks: Path) -> None:
    """Says what the checks found, once in a process however many splits are opened."""
    log(name, _read_checks(checks))


def scan_folder(builder: type[Builder], root: Path, checks: Checks) -> dict[str, list[Found]]:
    """Reads what a folder says of its images; a list in a form that nobody foresaw is refused.

    Args:
      builder: of the data set.
      root, checks: as of `Builder.scan`, which says what is returned and raised.
    """
    try:
        return builder.scan(root, checks)
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise checks.refuse(
            f"its lists cannot be read ({type(error).__name__}: {error}); take them as they were "
            "downloaded"
        ) from error


def _fingerprint(root: Path, copy: bool, splits: dict[str, list[Found]]) -> str:
    digest = hashlib.sha256(f"{root}\n{copy}\n".encode())
    for split, found in splits.items():
        for each in found:
            digest.update(f"{split}\t{each}\n".encode())
    return digest.hexdigest()[:16]


class BuiltSource:
    """One split of a built data set: records, and the images that they refer to.

    Attributes:
      name: of data set and split.
      labels: name of the label set.
      built: the data set.
    """

    def __init__(self, built: Builder, split: str, question: str = "") -> None:
        """Opens a split; the records of all rows are read, the images not.

        Args:
          built: as `build_dataset` returns it.
          split: of the folder, or, where it has none, "whole", "train" or "test": the test split is
            that of `Builder.own_test`.
          question: asked instead of the data set's own; "" asks that.

        Raises:
          DataError: if there is no such split.
        """
        self.name, self.labels = f"{built.name}/{split}", built.LABELS
        self.built = built
        self._root = Path(built.builder_config.root)
        there = [name for name in built.info.splits if not name.endswith("_pictures")]
        wanted = {"val": "validation"}.get(split, split)
        kept = None
        if wanted not in there and there == [WHOLE] and wanted in _OWN_SPLITS:
            wanted, kept = WHOLE, wanted
        if wanted not in there:
            known = there + list(_OWN_SPLITS if there == [WHOLE] else ())
            raise DataError(f"split={split!r}: {built.name} has {', '.join(known)}")
        skip = {"picture": tfds.decode.SkipDecoding()}
        records = built.as_data_source(wanted, decoders=skip)
        self._images = None
        if built.copies:
            self._images = built.as_data_source(f"{wanted}_pictures", decoders=skip)
        names = label_set(built.LABELS)
        self._texts: list[Texts] = []
        self._files: list[str] = []
        self._numbers: list[int] = []
        self._sizes: list[tuple[int, int]] = []
        there = list(enumerate(_all_of(records)))
        if kept is not None:
            test = built.own_test([record["id"].decode() for _, record in there])
            there = [
                (number, record)
                for number, record in there
                if (record["id"].decode() in test) == (kept == "test")
            ]
        for number, record in there:
            shares = tuple(zip(names, map(float, record["shares"]), strict=False)) or None
            self._texts.append(
                Texts(
                    question or record["question"].decode() or built.QUESTION,
                    record["label"].decode() or None,
                    record["id"].decode(),
                    distribution=shares,
                    values=tuple(json.loads(record["values"] or b"{}").items()),
                    candidates=tuple(json.loads(record["candidates"] or b"[]")),
                )
            )
            self._files.append(record["file"].decode())
            self._numbers.append(number)
            self._sizes.append((int(record["height"]), int(record["width"])))
        self._index: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Row:
        return Row([self._image(index)], self._texts[index])

    def _image(self, index: int) -> bytes | None:
        if self._images is not None:
            return self._images[self._numbers[index]]["picture"] or None
        return read_image(self._root / self._files[index]) if self._files[index] else None

    def texts(self) -> Iterator[Texts]:
        """Yields the texts of all rows, in order."""
        yield from self._texts

    def sizes(self) -> np.ndarray:
        """Returns int32[n, 2], height and width of each image in pixels, 0 where unreadable."""
        return np.asarray(self._sizes, np.int32).reshape(-1, 2)

    def find(self, row_id: str) -> int:
        """Returns the index of the row with this id; raises KeyError if there is none."""
        if not self._index:
            self._index = {texts.id: index for index, texts in enumerate(self._texts)}
        return self._index[row_id]


def _all_of(records: Any, chunk: int = 1024) -> Iterator[dict]:
    for start in range(0, len(records), chunk):
        yield from records.__getitems__(list(range(start, min(start + chunk, len(records)))))


# For the scans of the builders.
