"""Image augmentation of whole batches on the device: affine warp, mirroring, light, erasing."""

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

# Standard deviations at strength 1: radians, log of the scale, log of the aspect ratio, shift as a
# share of the side, log of the contrast, brightness out of 255.
_TURN = 0.12
_SCALE = 0.08
_STRETCH = 0.05
_SHIFT = 0.04
_CONTRAST = 0.25
_BRIGHTNESS = 15.0
# Of the erased rectangle, as in the paper that `erase` names: the least and largest share of the
# image, and the largest ratio of the sides.
_ERASED = (0.02, 0.25)
_OBLONG = 3.0


def warp(images: jax.Array, strength: float, key: jax.Array) -> jax.Array:
    """Returns images, each warped and relit at random; half of them mirrored.

    Args:
      images: float32[B, H, W, C] in [0, 255].
      strength: factor of every change but mirroring; 0 only mirrors.
      key: of the draws.

    Returns:
      float32[B, H, W, C] in [0, 255]. What lies outside of an image is black.
    """
    draws, mirrored = jax.random.split(key)
    amounts = strength * jax.random.normal(draws, (len(images), 7))
    flipped = jax.random.bernoulli(mirrored, shape=(len(images), 1, 1, 1))
    return jax.vmap(_warp_one)(jnp.where(flipped, images[:, :, ::-1], images), amounts)


def _warp_one(image: jax.Array, amounts: jax.Array) -> jax.Array:
    """Warps one image by float32[7] amounts, in standard deviations."""
    turn, scale, stretch, across, down, contrast, brightness = amounts
    sides = jnp.array(image.shape[:2])
    # From coordinates in the new image to those in the old: turned and scaled about the middle.
    cosine, sine = jnp.cos(_TURN * turn), jnp.sin(_TURN * turn)
    scales = jnp.exp(_SCALE * scale + jnp.array([-1, 1]) * _STRETCH * stretch)
    matrix = scales[:, None] * jnp.array([[cosine, -sine], [sine, cosine]])
    middle = (sides - 1) / 2
    coords = jnp.moveaxis(jnp.indices(image.shape[:2]), 0, -1) - middle
    # In full precision: matrix units of GPU and TPU round coordinates to fractions of a pixel.
    coords = jnp.einsum("ij,hwj->ihw", matrix, coords, precision=jax.lax.Precision.HIGHEST)
    coords += (middle + _SHIFT * sides * jnp.stack([down, across]))[:, None, None]

    def sample(channel: jax.Array) -> jax.Array:
        return map_coordinates(channel, list(coords), order=1, mode="constant")

    image = jax.vmap(sample, in_axes=-1, out_axes=-1)(image)
    mean = jnp.mean(image)
    image = mean + jnp.exp(_CONTRAST * contrast) * (image - mean) + _BRIGHTNESS * brightness
    return jnp.clip(image, 0.0, 255.0)


def erase(images: jax.Array, probability: float, key: jax.Array) -> jax.Array:
    """Returns images, some with a random rectangle replaced by the image's mean.

    Zhong et al., 2020, "Random erasing data augmentation" (arXiv:1708.04896). A rectangle that
    would cross a border is moved inside.

    Args:
      images: float32[B, H, W, C].
      probability: that an image has a rectangle erased, in [0, 1].
      key: of the draws.
    """
    count, height, width, _ = images.shape
    chosen, area, ratio, corner = jax.random.split(key, 4)
    chosen = jax.random.bernoulli(chosen, probability, (count, 1))
    area = jax.random.uniform(area, (count, 1), minval=_ERASED[0], maxval=_ERASED[1])
    ratio = jnp.exp(jnp.log(_OBLONG) * jax.random.uniform(ratio, (count, 1), minval=-1.0))
    # [B, 2]: rows and columns, in pixels.
    sides = jnp.array([height, width])
    size = jnp.sqrt(area * height * width) * jnp.concatenate([ratio**0.5, ratio**-0.5], axis=-1)
    size = jnp.minimum(jnp.round(size), sides)
    start = jnp.floor(jax.random.uniform(corner, (count, 2)) * (sides - size + 1))

    def inside(axis: int) -> jax.Array:
        index = jnp.arange(images.shape[1 + axis])
        return (index >= start[:, axis, None]) & (index < (start + size)[:, axis, None]) & chosen

    erased = inside(0)[:, :, None] & inside(1)[:, None, :]
    mean = jnp.mean(images, axis=(1, 2), keepdims=True)
    return jnp.where(erased[..., None], mean, images)
