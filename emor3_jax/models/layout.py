"""Images and positions laid out on the host, so that no device ever sees a dynamic shape.

An image is cut into windows of equally many patches, the unit in which it is padded; what a window
is, is up to the family.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import DTypeLike

from emor3_jax.models.rope import prompt_positions
from emor3_jax.models.shapes import Shapes
from emor3_jax.models.vision import VisionShapes
from emor3_jax.types import Images


class WindowedImage(NamedTuple):
    """One image in windows.

    Attributes:
      patches: float[W, L, C].
      coords: int32[W, L, 2], row and column of the patch.
      mask: bool[W, L].
      slot_of_token: int32[rows * columns / m**2], the merged slot of each raster merged token.
    """

    patches: np.ndarray
    coords: np.ndarray
    mask: np.ndarray
    slot_of_token: np.ndarray


class Encoded(NamedTuple):
    """One image as a policy reads it.

    Attributes:
      image: host arrays.
      grid: (1, rows, columns) in patches.
      slots: int32[n], merged slot of each image token, in reading order.
      bucket: size to pad to at least, in windows.
    """

    image: WindowedImage
    grid: tuple[int, int, int]
    slots: np.ndarray
    bucket: int


@dataclasses.dataclass(frozen=True)
class ImageLayout(abc.ABC):
    """A family's layout of images and positions, bound to the shapes of a policy.

    Attributes:
      shapes: of the policy.
      processor_class: that transformers reads such a policy's folder with.
    """

    shapes: Shapes
    processor_class = ""

    @abc.abstractmethod
    def bucket(self, grid: Sequence[int]) -> int:
        """Returns the windows of an image of this grid."""

    @abc.abstractmethod
    def arrange(self, patches: np.ndarray, grid: Sequence[int]) -> Encoded:
        """Lays out the patches of one image.

        Args:
          patches: float[N, C], as `Processor.patches` or `Processor.still_patches` returns them.
          grid: (1, rows, columns) in patches.

        Raises:
          ValueError: as `check_grid`.
        """

    def slots(self, bucket: int) -> int:
        """Returns the merged slots of an image of so many windows."""
        return bucket * self.shapes.vision.window_patches // self.shapes.merge_unit

    def collate(self, images: Sequence[WindowedImage], bucket: int) -> Images:
        """Pads `Encoded.image`s to the same number of windows and stacks them, one a prompt."""
        return Images(*(x[:, None] for x in pad_images(images, bucket)))

    def positions(
        self, tokens: np.ndarray, grids: Sequence[Sequence[int]]
    ) -> tuple[np.ndarray, int]:
        """Returns rope positions of an unpadded prompt, int32[n, 3], and the next position.

        As transformers' `get_rope_index`.
        """
        shapes = self.shapes
        merge = shapes.vision.spatial_merge_size
        return prompt_positions(tokens, grids, shapes.image_token_id, merge)

    def abstract_images(self, prompts: int, bucket: int, dtype: DTypeLike = np.float32) -> Images:
        """Returns the shapes of `collate` as `jax.ShapeDtypeStruct`s, for still patches."""
        vision = self.shapes.vision
        shape = (prompts, 1, bucket, vision.window_patches)
        return Images(
            jax.ShapeDtypeStruct((*shape, vision.frame_dim), dtype),
            jax.ShapeDtypeStruct((*shape, 2), np.int32),
            jax.ShapeDtypeStruct(shape, bool),
        )


def check_grid(patches: np.ndarray, grid: Sequence[int], shapes: VisionShapes) -> tuple[int, int]:
    """Returns the rows and columns of an image.

    Args:
      patches: float[N, C].
      grid: (1, rows, columns) in patches.
      shapes: of the tower.

    Raises:
      ValueError: if the grid is a video's, does not merge evenly, or does not hold N patches.
    """
    frames, rows, columns = (int(x) for x in grid)
    merge = shapes.spatial_merge_size
    if frames != 1:
        raise ValueError(f"grid {(frames, rows, columns)}: only still images are supported")
    if rows % merge or columns % merge or rows * columns != len(patches):
        raise ValueError(
            f"grid {(frames, rows, columns)} does not fit {len(patches)} patches merged "
            f"{merge} x {merge}"
        )
    return rows, columns


def pad_images(layouts: Sequence[WindowedImage], windows: int) -> Images:
    """Stacks images, each padded to the same number of windows.

    Args:
      layouts: at least one image.
      windows: `W`; the feature of slot s of image i then lies at i * (W * L / m**2) + s.

    Raises:
      ValueError: if an image has more windows.
    """
    largest = max(len(layout.mask) for layout in layouts)
    if largest > windows:
        raise ValueError(f"an image has {largest} windows, more than the bucket of {windows}")

    def stack(arrays: list[np.ndarray]) -> np.ndarray:
        out = np.zeros((len(arrays), windows, *arrays[0].shape[1:]), arrays[0].dtype)
        for i, array in enumerate(arrays):
            out[i, : len(array)] = array
        return out

    return Images(
        patches=stack([layout.patches for layout in layouts]),
        coords=stack([layout.coords for layout in layouts]),
        mask=stack([layout.mask for layout in layouts]),
    )
