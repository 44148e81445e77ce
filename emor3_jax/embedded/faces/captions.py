"""Caption targets of vision pretraining, and the loader of images with them."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import grain
import numpy as np
from transformers import PreTrainedTokenizerBase

from emor3_jax.data.prompts import IMAGE_TOKEN
from emor3_jax.embedded import pretrain
from emor3_jax.embedded.dataset import PretrainDataset
from emor3_jax.embedded.loader import ExampleLoader, batch_key
from emor3_jax.types import Images, Prompt


class CaptionBatch(NamedTuple):
    """A batch of images with their caption targets.

    Attributes:
      images: B of them.
      targets: int32[B, 2], as of `caption_targets`.
    """

    images: Images
    targets: np.ndarray


def first_tokens(tokenizer: PreTrainedTokenizerBase, names: Mapping[str, str]) -> dict[str, int]:
    """Returns the first token of each label's name.

    Args:
      tokenizer: of the policy.
      names: by label, with a leading space where one precedes them.

    Raises:
      ValueError: if two names begin with the same token.
    """
    tokens = {
        label: tokenizer(name, add_special_tokens=False).input_ids[0]
        for label, name in names.items()
    }
    if len(set(tokens.values())) < len(tokens):
        raise ValueError(
            f"some of the names {sorted(names.values())} begin with the same token: {tokens}; a "
            "larger vocabulary (model.vocab_size) keeps them apart"
        )
    return tokens


def caption_targets(dataset: PretrainDataset, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Returns the two tokens to predict from each image.

    Args:
      dataset: gives labels and caption targets.
      tokenizer: of the policy.

    Returns:
      int32[N, 2]: the first token of the label, and the first token of the description after the
      caption prefix (the label's again if the dataset has no caption targets).

    Raises:
      ValueError: if two labels or two caption targets begin with the same token.
    """
    labels = first_tokens(tokenizer, {label: label for label in dataset.labels})
    names = {label: f" {target}" for label, target in dataset.caption_targets.items()}
    captions = first_tokens(tokenizer, names) or labels
    return np.asarray([(labels[label], captions[label]) for label in dataset.labels], np.int32)


class CaptionLoader(NamedTuple):
    """Batches of images with caption targets, from the rows of an `ExampleLoader`.

    Attributes:
      rows: dataset, processor and images.
      targets: int32[N, 2], as of `caption_targets`.
      erase_probability: of `augment.erase` on the images that are trained on.
    """

    rows: ExampleLoader
    targets: np.ndarray
    erase_probability: float = 0.0

    def prompt(self) -> Prompt:
        """Returns `<|vision_start|>`, image, `<|vision_end|>` and the caption prefix; B = 1."""
        slots, prefix = self.rows.images.slots, self.rows.dataset.caption_prefix
        text = f"<|vision_start|>{IMAGE_TOKEN * len(slots)}<|vision_end|>{prefix}"
        tokens = self.rows.processor.tokenizer(text, add_special_tokens=False).input_ids
        return pretrain.make_prompt(tokens, self.rows.grid, slots, self.rows.policy)[0]

    def shifted_prompts(self, seed: int) -> Iterator[Prompt]:
        """Yields `prompt` endlessly, with a random gap in the RoPE positions before the prefix.

        QA examples have a question of up to this many tokens between image and description.

        Args:
          seed: of the gaps.
        """
        prompt = self.prompt()
        questions = (size.tokens - size.reply for size in self.rows.dataset.sizes[:2])
        longest = max(questions)
        rng = np.random.default_rng(seed)
        image_end = np.flatnonzero(prompt.image_slots[0] >= 0)[-1] + 1
        in_prefix = np.arange(prompt.tokens.shape[1]) > image_end
        while True:
            gap = np.where(in_prefix, rng.integers(longest), 0).astype(np.int32)
            yield prompt._replace(positions=prompt.positions + gap[:, None])

    def batches(self, batch: int, seed: int) -> Iterator[CaptionBatch]:
        """Yields batches of augmented images endlessly."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        # Row numbers are batched before they are read: one at a time would be slower than the
        # images themselves.
        batches = self.rows.shuffled(seed).batch(batch).to_iter_dataset(options)
        for count, rows in enumerate(batches):
            images = self.rows.take(rows, batch_key(seed, count), self.erase_probability)
            yield CaptionBatch(images, self.targets[rows])

    def held_out_batches(self, batch: int) -> Iterator[CaptionBatch]:
        """Yields batches of the held-out rows, the last one smaller."""
        for rows in self.rows.held_out(batch):
            yield CaptionBatch(self.rows.take(rows), self.targets[rows])
