"""Data loader of the base policy: batches of images with tokenised QA examples."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import jax
import numpy as np

from emor3_jax.embedded import pretrain
from emor3_jax.embedded.dataset import PretrainDataset
from emor3_jax.embedded.faces.images import DeviceImages, take_images
from emor3_jax.models import Policy
from emor3_jax.models.processor import Processor
from emor3_jax.types import Images


class QABatch(NamedTuple):
    """One batch: images, the examples of each kind about them, and label tokens to predict, if any.

    Attributes:
      images: B of them.
      responses, questions, texts: SET responses, other questions about the images, texts to judge.
      labels: int32[B], first tokens of the labels; None for none.
    """

    images: Images
    responses: pretrain.QATokens
    questions: pretrain.QATokens
    texts: pretrain.QATokens
    labels: np.ndarray | None


class ExampleLoader(NamedTuple):
    """Batches of a dataset: rows that are trained on, shuffled, and rows that are held out.

    Attributes:
      dataset: images and QA examples.
      processor: of the policy.
      policy: the policy.
      images: those of the dataset, on the device.
      labels: int32[N], the first token of each image's label; None if it is not to be predicted.
      warp: strength of `augment.warp` on the images that are trained on; 0 leaves them unchanged.
    """

    dataset: PretrainDataset
    processor: Processor
    policy: Policy
    images: DeviceImages
    labels: np.ndarray | None = None
    warp: float = 0.0

    def prefixes(self) -> pretrain.Prefixes:
        """Returns the constant prefixes of the examples."""
        return pretrain.make_prefixes(
            self.processor.tokenizer, self.grid, self.images.slots, self.policy
        )

    @property
    def grid(self) -> tuple[int, int, int]:
        """Size of every image as (1, rows, columns) in patches."""
        return self.images.grid(self.processor.images)

    @property
    def train_rows(self) -> int:
        """Number of rows to train on; those after are held out, and never augmented."""
        return len(self.dataset.images) - self.dataset.held_out

    def shuffled(self, seed: int) -> grain.MapDataset:
        """Returns the rows to train on, endlessly, shuffled anew in each epoch."""
        return grain.MapDataset.range(self.train_rows).seed(seed).shuffle().repeat()

    def held_out(self, batch: int) -> Iterator[np.ndarray]:
        """Yields the held-out rows in batches, the last one smaller."""
        for start in range(self.train_rows, len(self.dataset.images), batch):
            yield np.arange(start, min(start + batch, len(self.dataset.images)))

    def take(
        self, rows: np.ndarray, key: jax.Array | None = None, erase_probability: float = 0.0
    ) -> Images:
        """Returns the images of some rows, augmented if there is a key.

        Args:
          rows: int[B].
          key: of the augmentation; None for none.
          erase_probability: of `augment.erase`.
        """
        return take_images(
            self.images,
            rows,
            key,
            settings=self.processor.images,
            strength=self.warp,
            erase_probability=erase_probability,
        )

    def batches(self, batch: int, seed: int) -> Iterator[QABatch]:
        """Yields batches endlessly; meanwhile threads draw and tokenise the next examples."""
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2 * batch)

        def draw(row: int, rng: np.random.Generator) -> tuple[int, tuple[pretrain.QATokens, ...]]:
            return row, self._tokens(row, rng)

        drawn = self.shuffled(seed).random_map(draw).to_iter_dataset(options)
        for count, found in enumerate(drawn.batch(batch, batch_fn=list)):
            rows, tokens = zip(*found, strict=True)
            yield self._stack(np.asarray(rows), tokens, batch_key(seed, count))

    def held_out_batches(self, batch: int, seed: int) -> Iterator[QABatch]:
        """Yields batches of the held-out rows, the last one smaller."""
        rng = np.random.default_rng(seed)
        for rows in self.held_out(batch):
            yield self._stack(rows, [self._tokens(int(row), rng) for row in rows])

    def _tokens(self, row: int, rng: np.random.Generator) -> tuple[pretrain.QATokens, ...]:
        """Draws and tokenises the examples about one image: SET responses, questions, texts."""
        found = self.dataset.examples(row, rng)
        kinds = (
            [x for x in found if x.kind == "set"],
            [x for x in found if x.with_image and x.kind != "set"],
            [x for x in found if not x.with_image],
        )
        return tuple(
            pretrain.tokenize_examples(self.processor.tokenizer, examples, size)
            for examples, size in zip(kinds, self.dataset.sizes, strict=True)
        )

    def _stack(
        self,
        rows: np.ndarray,
        tokens: Sequence[tuple[pretrain.QATokens, ...]],
        key: jax.Array | None = None,
    ) -> QABatch:
        kinds = (jax.tree.map(lambda *x: np.stack(x), *kind) for kind in zip(*tokens, strict=True))
        labels = None if self.labels is None else self.labels[rows]
        return QABatch(self.take(rows, key), *kinds, labels)


def batch_key(seed: int, count: int) -> jax.Array:
    """Returns the augmentation key of batch number `count`."""
    return jax.random.fold_in(jax.random.key(seed), count)
