"""Images cut into windows of equally many patches, in the order of the image processor.

Deviations, numbered:
 1. transformers keeps only real patches and slices at each image's length. Padding to whole windows
    with a mask gives equal results and static shapes.
"""

from collections.abc import Sequence

import numpy as np

from emor3_jax.models.layout import Encoded, ImageLayout, WindowedImage, check_grid


class Qwen3VLLayout(ImageLayout):
    """Layout of images and positions; windows are a unit of padding alone."""

    processor_class = "Qwen3VLProcessor"

    def bucket(self, grid: Sequence[int]) -> int:
        """Returns the windows that hold an image of this grid."""
        _, rows, columns = grid
        return -(-int(rows) * int(columns) // self.shapes.vision.window_patches)

    def arrange(self, patches: np.ndarray, grid: Sequence[int]) -> Encoded:
        """Cuts the patches of one image into windows."""
        vision = self.shapes.vision
        rows, columns = check_grid(patches, grid, vision)
        merge, size = vision.spatial_merge_size, vision.window_patches
        windows = self.bucket(grid)
        # The m * m patches of a token are neighbours, and the tokens go row by row.
        coords = np.stack(np.divmod(np.arange(rows * columns), columns), axis=-1)
        coords = coords.reshape(rows // merge, merge, columns // merge, merge, 2)
        coords = coords.swapaxes(1, 2).reshape(-1, 2).astype(np.int32)

        def cut(x: np.ndarray) -> np.ndarray:
            out = np.zeros((windows * size, *x.shape[1:]), x.dtype)
            out[: len(x)] = x
            return out.reshape(windows, size, *x.shape[1:])

        slots = np.arange(len(patches) // vision.merge_unit, dtype=np.int32)
        mask = np.ones(len(patches), bool)
        image = WindowedImage(cut(patches), cut(coords), cut(mask), slots)
        return Encoded(image, tuple(grid), slots, windows)
