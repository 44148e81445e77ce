"""Images in window layout, built on the host so that no device ever sees a dynamic shape.

The image processor lists patches so that the m * m patches of one merged token are neighbours.
Here the merged tokens are further grouped by attention window, each window padded to the same
number of slots; a window at the border of an image leaves the slots outside it empty.

Deviations, numbered:
 1. transformers keeps only real patches, window after window, and slices at each window's length.
    Fixed windows with a mask give equal results (attention does not depend on the order of keys)
    and static shapes.
"""

from collections.abc import Sequence

import numpy as np

from emor3_jax.models.layout import Encoded, ImageLayout, WindowedImage, check_grid
from emor3_jax.models.qwen2_5_vl.shapes import Qwen25VLVisionShapes


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
) -> WindowedImage:
    """Groups the patches of one image by attention window.

    Args:
      patches: float[N, C] in the order of transformers' image processor.
      grid: (1, rows, columns) in patches, N = rows * columns.
      shapes: for the sizes of window and merge.

    Raises:
      ValueError: if the grid is a video's, does not merge evenly, or does not hold N patches.
    """
    rows, columns = check_grid(patches, grid, shapes)
    merge, unit, side = shapes.spatial_merge_size, shapes.merge_unit, shapes.window_side
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
    return WindowedImage(
        out.reshape(w, size, -1), coords.reshape(w, size, 2), mask.reshape(w, size), slot
    )


class Qwen25VLLayout(ImageLayout):
    """Layout of images and positions; images are grouped by attention window."""

    processor_class = "Qwen2_5_VLProcessor"

    def bucket(self, grid: Sequence[int]) -> int:
        """Returns the attention windows of an image of this grid."""
        return count_windows(grid, self.shapes.vision)

    def arrange(self, patches: np.ndarray, grid: Sequence[int]) -> Encoded:
        """Groups the patches of one image by attention window."""
        image = window_layout(patches, grid, self.shapes.vision)
        return Encoded(image, tuple(grid), image.slot_of_token, len(image.mask))
