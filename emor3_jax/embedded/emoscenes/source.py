"""EmoScenes as a source of rows."""

from collections.abc import Iterator
from pathlib import Path

from emor3_jax.data.errors import DataError
from emor3_jax.data.sources import Row, Texts
from emor3_jax.embedded.emoscenes import builder
from emor3_jax.embedded.emoscenes.responses import right_responses


class EmoScenesSource:
    """One split of EmoScenes, with the same question about every image."""

    def __init__(
        self, split: str, data_dir: str | Path, question: str, responses: bool = False
    ) -> None:
        """Opens a split that `builder.prepare` has drawn.

        Args:
          split: train, validation, test, pretrain, shifted_pretrain or shifted_test.
          data_dir: folder of the drawn data set.
          question: the question about each image.
          responses: also give correct SET responses to each scene, for supervised fine-tuning.

        Raises:
          DataError: if there is no such data set or split.
        """
        self.name = f"emoscenes/{split}"
        self._question, self._responses = question, responses
        try:
            self._records = builder.load(split, data_dir)
        except (FileNotFoundError, ValueError) as error:
            raise DataError(f"split={split!r} in {data_dir}: {error}") from error
        self._index: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Row:
        record = self._records[index]
        return Row([record["image"]], self._texts(record))

    def texts(self) -> Iterator[Texts]:
        """Yields the texts of all rows, in order."""
        for index in range(len(self)):
            yield self._texts(self._records[index])

    def find(self, row_id: str) -> int:
        """Returns the index of the row with this id; raises KeyError if there is none."""
        if not self._index:
            self._index = {texts.id: index for index, texts in enumerate(self.texts())}
        return self._index[row_id]

    def _texts(self, record: dict) -> Texts:
        row_id, responses = record["image_id"].decode(), ()
        if self._responses:
            responses = right_responses(record["scene"].decode(), row_id)
        return Texts(self._question, record["label"].decode(), row_id, responses=responses)
