"""Images in window layout, built on the host so that no device ever sees a dynamic shape.

The image processor lists patches so that the m * m patches of one merged token are neighbours.
Here the merged tokens are further grouped by attention window, each window padded to the same
number of slots; a window at the border of an image leaves the slots outside it empty.

Deviations, numbered:
 1. transformers keeps only real patches, window after window, and slices at each window's length.
    Fixed windows with a mask give equal results (attention does not depend on the order of keys)
    and static shapes.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import DTypeLike

from emor3_jax.models.processor import Encoded
from emor3_jax.models.qwen2_5_vl.rope import prompt_positions
from emor3_jax.models.qwen2_5_vl.shapes import Qwen25VLShapes, Qwen25VLVisionShapes
from emor3_jax.types import Images


class WindowLayout(NamedTuple):
    """One image in window layout.

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


def count_windows(grid: Sequence[int], shapes: Qwen25VLVisionShapes) -> int:
    """Returns `W`, the attention windows of an image.

    Args:
      grid: (1, rows, columns) in patches.
      shapes: for the window's size.
    """
    _, rows, columns = grid
    span = shapes.window_side * shapes.spatial_merge_size
    return -(-int(rows) // span) * -(-int(columns) // span)


def window_layout(
    patches: np.ndarray, grid: Sequence[int], shapes: Qwen25VLVisionShapes
) -> WindowLayout:
    """Groups the patches of one image by attention window.

    Args:
      patches: float[N, C] in the order of transformers' image processor.
      grid: (1, rows, columns) in patches, N = rows * columns.
      shapes: for the sizes of window and merge.

    Raises:
      ValueError: if the grid is a video's, does not merge evenly, or does not hold N patches.
    """
    frames, rows, columns = (int(x) for x in grid)
    merge, unit, side = shapes.spatial_merge_size, shapes.merge_unit, shapes.window_side
    if frames != 1:
        raise ValueError(f"grid {(frames, rows, columns)}: only still images are supported")
    if rows % merge or columns % merge or rows * columns != len(patches):
        raise ValueError(
            f"grid {(frames, rows, columns)} does not fit {len(patches)} patches merged "
            f"{merge} x {merge}"
        )
    down, across = rows // merge, columns // merge
    row, column = np.divmod(np.arange(down * across), across)
    windows_across = -(-across // side)
    window = row // side * windows_across + column // side
    slot = (window * side**2 + row % side * side + column % side).astype(np.int32)

    w = count_windows(grid, shapes)
    out = np.zeros((w * side**2, unit, patches.shape[-1]), patches.dtype)
    out[slot] = patches.reshape(-1, unit, patches.shape[-1])
    inner_row, inner_column = np.divmod(np.arange(unit), merge)
    coords = np.zeros((w * side**2, unit, 2), np.int32)
    coords[slot, :, 0] = row[:, None] * merge + inner_row
    coords[slot, :, 1] = column[:, None] * merge + inner_column
    mask = np.zeros((w * side**2, unit), bool)
    mask[slot] = True
    size = shapes.window_patches
    return WindowLayout(
        out.reshape(w, size, -1), coords.reshape(w, size, 2), mask.reshape(w, size), slot
    )


def pad_images(layouts: Sequence[WindowLayout], windows: int) -> Images:
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


@dataclasses.dataclass(frozen=True)
class Qwen25VLLayout:
    """The family's `models.processor.ImageLayout`.

    Attributes:
      shapes: of the policy.
    """

    shapes: Qwen25VLShapes

    def bucket(self, grid: Sequence[int]) -> int:
        """Returns the attention windows of an image of this grid."""
        return count_windows(grid, self.shapes.vision)

    def slots(self, bucket: int) -> int:
        """Returns the merged slots of an image of so many windows."""
        return bucket * self.shapes.vision.window_patches // self.shapes.merge_unit

    def arrange(self, patches: np.ndarray, grid: Sequence[int]) -> Encoded:
        """Groups the patches of one image by attention window."""
        image = window_layout(patches, grid, self.shapes.vision)
        return Encoded(image, tuple(grid), image.slot_of_token, len(image.mask))

    def collate(self, images: Sequence[WindowLayout], bucket: int) -> Images:
        """Pads images to the same number of windows, one image a prompt."""
        return Images(*(x[:, None] for x in pad_images(images, bucket)))

    def positions(
        self, tokens: np.ndarray, grids: Sequence[Sequence[int]]
    ) -> tuple[np.ndarray, int]:
        """Returns the rope positions, as transformers' `get_rope_index`."""
        return prompt_positions(tokens, grids, self.shapes)

    def abstract_images(self, prompts: int, bucket: int, dtype: DTypeLike = np.float32) -> Images:
        """Returns the shapes of a batch of still images."""
        vision = self.shapes.vision
        shape = (prompts, 1, bucket, vision.window_patches)
        return Images(
            jax.ShapeDtypeStruct((*shape, vision.frame_dim), dtype),
            jax.ShapeDtypeStruct((*shape, 2), np.int32),
            jax.ShapeDtypeStruct(shape, bool),
        )
