"""The pretraining data of a base policy: images, their labels, and QA examples about them."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from emor3_jax.data.inference_settings import InferenceSettings
from emor3_jax.embedded.pretrain import Size
from emor3_jax.embedded.tasks import QAExample


class PretrainDataset(NamedTuple):
    """Images, labels, and QA examples drawn at random.

    Attributes:
      images: random access source of encoded images.
      labels: the emotion of each.
      examples: (row, rng) → the five QA examples about that image.
      caption_prefix: the words that every description begins with, whatever the image; may be
        empty.
      caption_targets: the continuation of the prefix, after a space, by label, each with another
        first word; empty if vision pretraining is to predict labels alone.
      corpus: texts for the tokenizer.
      sizes: of the examples: SET responses, other questions about an image, texts to judge.
      held_out: number of rows at the end that are kept for the report.
      settings: what the policy is asked later, its `emor3.json`; None writes none.
    """

    images: Sequence[bytes]
    labels: Sequence[str]
    examples: Callable[[int, np.random.Generator], list[QAExample]]
    caption_prefix: str
    caption_targets: Mapping[str, str]
    corpus: list[str]
    sizes: tuple[Size, Size, Size]
    held_out: int
    settings: InferenceSettings | None = None
