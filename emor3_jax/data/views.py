"""Views of a source: in other labels, only some rows, several sources as one."""

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from emor3_jax.data.errors import DataError
from emor3_jax.data.labels import normalize
from emor3_jax.data.sources import Row, Source, Texts, sizes_of
from emor3_jax.files import read_lines, show


class Relabelled:
    """A source whose answers and shares are called by another label set.

    Responses to learn from box a label by its old name and are left out, unless that name stays.
    A label without counterpart keeps its name, so that its rows are counted as `unknown_answer`
    and not lost unseen; its shares count for nothing.
    """

    def __init__(self, source: Source, mapping: Mapping[str, str]) -> None:
        """Changes nothing of the rows but their labels.

        Args:
          source: the rows.
          mapping: label → label, as `emor3_jax.data.labels.label_map` returns it.
        """
        self.name = source.name
        self._source = source
        self._mapping = {normalize(own): wanted for own, wanted in mapping.items()}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Row:
        row = self._source[index]
        return row._replace(texts=self._texts(row.texts))

    def texts(self) -> Iterator[Texts]:
        """Yields the texts of all rows, in order."""
        return map(self._texts, self._source.texts())

    def sizes(self) -> np.ndarray:
        """Returns int32[n, 2], as `emor3_jax.data.sources.sizes_of`."""
        return sizes_of(self._source)

    def find(self, row_id: str) -> int:
        """Returns the index of the row with this id; raises KeyError if there is none."""
        return self._source.find(row_id)

    def _texts(self, texts: Texts) -> Texts:
        answer = texts.answer
        if answer is not None:
            answer = self._mapping.get(normalize(answer), answer)
            if normalize(answer) != normalize(texts.answer):
                texts = texts._replace(responses=())
        shares = texts.distribution
        if shares is not None:
            joined: dict[str, float] = {}
            for label, share in shares:
                wanted = self._mapping.get(normalize(label or ""))
                if share is None or share < 0:
                    # Left for the pipeline to count.
                    return texts._replace(answer=answer, distribution=((wanted, share),))
                if wanted is not None:
                    joined[wanted] = joined.get(wanted, 0.0) + share
            shares = tuple(joined.items())
        named = (self._mapping.get(normalize(label)) for label in texts.candidates)
        candidates = tuple(dict.fromkeys(label for label in named if label is not None))
        return texts._replace(answer=answer, distribution=shares, candidates=candidates)


class Subset:
    """Some rows of a source, in its order."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        """Opens a view.

        Args:
          source: the rows.
          indices: int64[n], rising.
        """
        self.name = f"{source.name}[{len(indices)} of {len(source)}]"
        self._source, self._indices = source, np.asarray(indices, np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Row:
        return self._source[int(self._indices[index])]

    def texts(self) -> Iterator[Texts]:
        """Yields the texts of all rows, in order."""
        wanted = iter(self._indices.tolist())
        at = next(wanted, None)
        for index, texts in enumerate(self._source.texts()):
            if index == at:
                yield texts
                at = next(wanted, None)

    def sizes(self) -> np.ndarray:
        """Returns int32[n, 2], as `emor3_jax.data.sources.sizes_of`."""
        return sizes_of(self._source, self._indices)

    def find(self, row_id: str) -> int:
        """Returns the index of the row with this id; raises KeyError if there is none."""
        wanted = self._source.find(row_id)
        at = int(np.searchsorted(self._indices, wanted))
        if at == len(self._indices) or self._indices[at] != wanted:
            raise KeyError(row_id)
        return at


def balanced_subset(
    texts: Sequence[Texts], labels: Sequence[str], size: int, seed: int
) -> np.ndarray:
    """Draws rows so that every label has as many as every other, as far as there are enough.

    Labels take turns, each adding a row of its own in an order drawn from the seed, until `size`
    rows are drawn; a label that has no more is passed over.

    Args:
      texts: of all rows; rows whose answer is no label are never drawn.
      labels: the label set.
      size: how many rows, at least 1.
      seed: of the draw; another seed draws others.

    Returns:
      int64[size], rising indices.

    Raises:
      DataError: if there are fewer rows.
    """
    rows: dict[str, list[int]] = {normalize(label): [] for label in labels}
    for index, each in enumerate(texts):
        if (key := normalize(each.answer or "")) in rows:
            rows[key].append(index)
    there = sum(map(len, rows.values()))
    if not 1 <= size <= there:
        raise DataError(f"subset={size} must be at least 1 and at most the {there} labelled rows")
    rng = np.random.default_rng(seed)
    turns = itertools.zip_longest(*(rng.permutation(found) for found in rows.values() if found))
    drawn = (index for turn in turns for index in turn if index is not None)
    return np.sort(np.fromiter(itertools.islice(drawn, size), np.int64))


def natural_subset(
    texts: Sequence[Texts], labels: Sequence[str], size: int, seed: int
) -> np.ndarray:
    """Draws rows in the mix that the data has, whatever their labels.

    Args:
      texts, labels, size, seed: as in `balanced_subset`.

    Returns:
      int64[size], rising indices.

    Raises:
      DataError: if there are fewer rows.
    """
    known = {normalize(label) for label in labels}
    rows = [i for i, each in enumerate(texts) if normalize(each.answer or "") in known]
    if not 1 <= size <= len(rows):
        raise DataError(
            f"subset={size} must be at least 1 and at most the {len(rows)} labelled rows"
        )
    drawn = np.random.default_rng(seed).permutation(np.asarray(rows, np.int64))
    return np.sort(drawn[:size])


SUBSETS = {"class": balanced_subset, "natural": natural_subset}
"""How a subset is drawn: as many rows of each label, or in the mix of the data."""


def read_ids(path: str | Path, source: Source) -> np.ndarray:
    """Returns the rows that a file names, one id a line, as rising indices int64[n].

    Raises:
      DataError: if the file is missing or names a row that the source does not have.
    """
    names = [line for line in read_lines(path, lambda why: DataError(f"ids: {why}")) if line]
    found, unknown = set(), []
    for name in names:
        try:
            found.add(source.find(name))
        except KeyError:
            unknown.append(name)
    if unknown or not found:
        named = ", ".join(map(show, unknown[:3])) or "none at all"
        raise DataError(
            f"ids={str(path)!r} names {len(unknown)} rows of {len(names)} that {source.name} does "
            f"not have, such as {named}; give the data set that the list was made of"
        )
    return np.asarray(sorted(found), np.int64)


class Joined:
    """Several sources as one: a row's id is that of its source with the source's name before it.

    Attributes:
      starts: int64[parts + 1], where each part begins.
    """

    def __init__(self, parts: Mapping[str, Source]) -> None:
        """Opens the view.

        Args:
          parts: name → rows; names hold no "/".
        """
        self.name = "+".join(parts)
        self._names, self._parts = list(parts), list(parts.values())
        self.starts = np.cumsum([0, *map(len, self._parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Row:
        part = bisect.bisect_right(self.starts, index) - 1
        row = self._parts[part][index - int(self.starts[part])]
        return row._replace(texts=self._named(part, row.texts))

    def texts(self) -> Iterator[Texts]:
        """Yields the texts of all rows, in order."""
        for part, source in enumerate(self._parts):
            for texts in source.texts():
                yield self._named(part, texts)

    def sizes(self) -> np.ndarray:
        """Returns int32[n, 2], as `emor3_jax.data.sources.sizes_of`."""
        return np.concatenate([sizes_of(part) for part in self._parts])

    def find(self, row_id: str) -> int:
        """Returns the index of the row with this id; raises KeyError if there is none."""
        name, _, rest = row_id.partition("/")
        if name not in self._names:
            raise KeyError(row_id)
        part = self._names.index(name)
        return int(self.starts[part]) + self._parts[part].find(rest)

    def _named(self, part: int, texts: Texts) -> Texts:
        return texts._replace(id=f"{self._names[part]}/{texts.id}")
