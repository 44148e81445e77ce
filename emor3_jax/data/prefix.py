"""The image as a judge of other tokens or images reads it, which its questions begin with.

It is encoded beside the prompt of the policy, by the judge's own tokenizer, chat template and image
settings, and padded to sizes of its own. What the row asks is no part of it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from emor3_jax.data.prompts import image_parts
from emor3_jax.models.layout import Encoded, ImageLayout
from emor3_jax.models.processor import Processor
from emor3_jax.types import ImagePrefix, Prompt

_BLOCK = 128
"""Longer prefixes are multiples of it, as attention kernels read them."""


class Prefix(NamedTuple):
    """System turn and image of one row, ready to be padded.

    Attributes:
      tokens: int32[n].
      positions: int32[n, 3], rope positions.
      next_position: the rope position that follows.
      image: the image as the judge reads it.
      image_start: index of the first image token.
    """

    tokens: np.ndarray
    positions: np.ndarray
    next_position: int
    image: Encoded
    image_start: int


class PrefixEncoder:
    """Encodes and pads images for a judge; runs in worker processes too.

    Attributes:
      windows: rising choices of `W`, from which the padded length follows.
    """

    def __init__(self, processor: Processor, windows: Sequence[int]) -> None:
        """Tokenises what is around an image.

        Args:
          processor: of the judge.
          windows: rising choices of `W`.

        Raises:
          DataError: if its chat template does not render an image.
        """
        self.windows = tuple(windows)
        self._processor = processor
        self._before, self._after = image_parts(processor.tokenizer)

    def __call__(self, image: bytes | Image.Image) -> Prefix | None:
        """Returns one image as the judge reads it; None if it has too many windows.

        Args:
          image: encoded, or decoded and upright.

        Raises:
          ImageError: if it cannot be read.
        """
        layout = self._processor.layout
        patches, grid = self._processor.still_patches(image)
        if layout.bucket(grid) > self.windows[-1]:
            return None
        marks = [layout.shapes.image_token_id] * (len(patches) // layout.shapes.merge_unit)
        tokens = np.asarray([*self._before, *marks, *self._after], np.int32)
        positions, following = layout.positions(tokens, [grid])
        image_start = len(self._before)
        return Prefix(tokens, positions, following, layout.arrange(patches, grid), image_start)

    def collate(self, prefixes: Sequence[Prefix], windows: int) -> ImagePrefix:
        """Pads prefixes to a size that holds them all.

        Args:
          prefixes: at least one.
          windows: `W`, at least that of the largest image.
        """
        layout = self._processor.layout
        around = len(self._before) + len(self._after)
        rows = [(x.tokens, x.positions, x.image_start, x.image.slots) for x in prefixes]
        return ImagePrefix(
            pad_prompts(rows, padded_length(layout, around, windows)),
            layout.collate([x.image.image for x in prefixes], windows),
            np.asarray([len(x.tokens) for x in prefixes], np.int32),
            np.asarray([x.next_position for x in prefixes], np.int32),
        )


def padded_length(layout: ImageLayout, around: int, windows: int) -> int:
    """Returns `P` of a prefix whose image has so many windows, at least what these can hold.

    Args:
      layout: of the judge's images.
      around: tokens before and behind those of the image.
      windows: `W`.
    """
    length = around + layout.slots(windows)
    return length if length < _BLOCK else -(-length // _BLOCK) * _BLOCK


def pad_prompts(
    rows: Sequence[tuple[np.ndarray, np.ndarray, int, np.ndarray]], length: int
) -> Prompt:
    """Pads the tokens of prompts with an image each.

    Args:
      rows: tokens int32[n], rope positions int32[n, 3], index of the first image token, and the
        merged slot of each image token.
      length: `P`, at least the longest.
    """
    b = len(rows)
    padded = Prompt(
        tokens=np.zeros((b, length), np.int32),
        positions=np.zeros((b, length, 3), np.int32),
        mask=np.zeros((b, length), bool),
        image_slots=np.full((b, length), -1, np.int32),
    )
    for i, (tokens, positions, start, slots) in enumerate(rows):
        n = len(tokens)
        padded.tokens[i, :n], padded.positions[i, :n], padded.mask[i, :n] = tokens, positions, True
        padded.image_slots[i, start : start + len(slots)] = slots
    return padded
