"""Images of one size, kept on the device: augmented and cut into patches there.

Vision pretraining takes some hundred thousand images in a few minutes; decoding, warping and
cutting each on the host would take longer than training on them.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emor3_jax.embedded.faces.augment import erase, warp
from emor3_jax.models.errors import ImageError
from emor3_jax.models.processor import ImageSettings, Processor
from emor3_jax.types import Images


class DeviceImages(NamedTuple):
    """Images on the device, and the positions of their patches in window layout.

    Attributes:
      pixels: uint8[N, H, W, 3].
      order: int32[W, L], the patch of each slot.
      coords: int32[W, L, 2], row and column of the patch.
      mask: bool[W, L].
      slots: int32[n], merged slot of each image token.
    """

    pixels: jax.Array
    order: jax.Array
    coords: jax.Array
    mask: jax.Array
    slots: np.ndarray

    def grid(self, settings: ImageSettings) -> tuple[int, int, int]:
        """Returns (1, rows, columns) in patches."""
        _, height, width, _ = self.pixels.shape
        return 1, height // settings.patch_size, width // settings.patch_size


def read_images(images: Sequence[bytes], processor: Processor) -> DeviceImages:
    """Decodes and scales images, and moves them to the device.

    Args:
      images: encoded, at least one; all of one size once scaled.
      processor: of the policy.

    Raises:
      ImageError: if one cannot be decoded or is of another size; names its row.
    """
    pixels = []
    for row, image in enumerate(images):
        try:
            pixels.append(processor.pixels(image))
        except ImageError as error:
            raise ImageError(f"image {row}: {error}") from error
        if pixels[-1].shape != pixels[0].shape:
            raise ImageError(
                f"image {row} scales to {pixels[-1].shape[:2]} pixels (height, width), and "
                f"image 0 to {pixels[0].shape[:2]}: all must be of one shape; crop them"
            )
    patch = processor.images.patch_size
    rows, columns = (side // patch for side in pixels[0].shape[:2])
    numbers = np.arange(rows * columns, dtype=np.float32)[:, None]
    layout = processor.layout
    found = layout.arrange(numbers, (1, rows, columns))
    one = jax.tree.map(lambda x: x[0, 0], layout.collate([found.image], found.bucket))
    return DeviceImages(
        pixels=jnp.asarray(np.stack(pixels)),
        order=jnp.asarray(one.patches[..., 0].astype(np.int32)),
        coords=jnp.asarray(one.coords),
        mask=jnp.asarray(one.mask),
        slots=found.slots,
    )


@partial(jax.jit, static_argnames=("settings", "strength", "erase_probability"))
def take_images(
    images: DeviceImages,
    rows: jax.Array,
    key: jax.Array | None = None,
    *,
    settings: ImageSettings,
    strength: float = 0.0,
    erase_probability: float = 0.0,
) -> Images:
    """Returns some images as a policy's processor and `window_layout` would give them.

    Args:
      images: all images.
      rows: int32[B].
      key: of the augmentation; None for none.
      settings: of the processor that read the images.
      strength: of `warp`; 0 skips it, mirroring included.
      erase_probability: of `erase`.
    """
    pixels = images.pixels[rows].astype(jnp.float32)
    if key is not None:
        warping, erasing = jax.random.split(key)
        pixels = warp(pixels, strength, warping) if strength > 0 else pixels
        pixels = erase(pixels, erase_probability, erasing) if erase_probability > 0 else pixels
    values = (pixels * settings.scale - jnp.array(settings.mean)) / jnp.array(settings.std)
    patches = settings.cut(values)[:, None, images.order]
    batch = (len(rows), 1, *images.mask.shape)
    return Images(
        patches=jnp.where(images.mask[..., None], patches, 0.0),
        coords=jnp.broadcast_to(images.coords, (*batch, 2)),
        mask=jnp.broadcast_to(images.mask, batch),
    )
