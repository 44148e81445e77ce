"""Pictures as they might have been taken: turned, moved, scaled, mirrored, in other light, hidden.

Whole batches at once, on the device.
"""

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
# Of what is hidden, as in the paper that `erase` names: the least and largest share of the picture,
# and the largest ratio of the sides.
_HIDDEN = (0.02, 0.25)
_OBLONG = 3.0


def warp(pictures: jax.Array, strength: float, key: jax.Array) -> jax.Array:
    """Returns pictures, each changed at random; half of them mirrored.

    Args:
      pictures: float32[B, H, W, C] in [0, 255].
      strength: factor of every change but mirroring; 0 only mirrors.
      key: of the draws.

    Returns:
      float32[B, H, W, C] in [0, 255]. What lies outside of a picture is black.
    """
    draws, mirrored = jax.random.split(key)
    amounts = strength * jax.random.normal(draws, (len(pictures), 7))
    flipped = jax.random.bernoulli(mirrored, shape=(len(pictures), 1, 1, 1))
    return jax.vmap(_warp)(jnp.where(flipped, pictures[:, :, ::-1], pictures), amounts)


def _warp(picture: jax.Array, amounts: jax.Array) -> jax.Array:
    """Changes one picture by float32[7] amounts, each 1 at a standard deviation."""
    turn, scale, stretch, across, down, contrast, brightness = amounts
    sides = jnp.array(picture.shape[:2])
    # From a place in the new picture to one in the old: turned and scaled about the middle.
    cosine, sine = jnp.cos(_TURN * turn), jnp.sin(_TURN * turn)
    scales = jnp.exp(_SCALE * scale + jnp.array([-1, 1]) * _STRETCH * stretch)
    matrix = scales[:, None] * jnp.array([[cosine, -sine], [sine, cosine]])
    middle = (sides - 1) / 2
    places = jnp.moveaxis(jnp.indices(picture.shape[:2]), 0, -1) - middle
    # In full precision: a GPU's and a TPU's matrix units round places to fractions of a pixel.
    places = jnp.einsum("ij,hwj->ihw", matrix, places, precision=jax.lax.Precision.HIGHEST)
    places += (middle + _SHIFT * sides * jnp.stack([down, across]))[:, None, None]

    def sample(channel: jax.Array) -> jax.Array:
        return map_coordinates(channel, list(places), order=1, mode="constant")

    picture = jax.vmap(sample, in_axes=-1, out_axes=-1)(picture)
    mean = jnp.mean(picture)
    picture = mean + jnp.exp(_CONTRAST * contrast) * (picture - mean) + _BRIGHTNESS * brightness
    return jnp.clip(picture, 0.0, 255.0)


def erase(pictures: jax.Array, chance: float, key: jax.Array) -> jax.Array:
    """Returns pictures, of which some have a rectangle hidden behind the picture's mean.

    Zhong et al., 2020, "Random erasing data augmentation" (arXiv:1708.04896). A rectangle that
    would reach over a border is moved inside.

    Args:
      pictures: float32[B, H, W, C].
      chance: of a picture to have something hidden, in [0, 1].
      key: of the draws.
    """
    count, height, width, _ = pictures.shape
    chosen, area, ratio, corner = jax.random.split(key, 4)
    chosen = jax.random.bernoulli(chosen, chance, (count, 1))
    area = jax.random.uniform(area, (count, 1), minval=_HIDDEN[0], maxval=_HIDDEN[1])
    ratio = jnp.exp(jnp.log(_OBLONG) * jax.random.uniform(ratio, (count, 1), minval=-1.0))
    # [B, 2]: rows and columns, in pixels.
    sides = jnp.array([height, width])
    size = jnp.sqrt(area * height * width) * jnp.concatenate([ratio**0.5, ratio**-0.5], axis=-1)
    size = jnp.minimum(jnp.round(size), sides)
    start = jnp.floor(jax.random.uniform(corner, (count, 2)) * (sides - size + 1))

    def inside(axis: int) -> jax.Array:
        place = jnp.arange(pictures.shape[1 + axis])
        return (place >= start[:, axis, None]) & (place < (start + size)[:, axis, None]) & chosen

    hidden = inside(0)[:, :, None] & inside(1)[:, None, :]
    mean = jnp.mean(pictures, axis=(1, 2), keepdims=True)
    return jnp.where(hidden[..., None], mean, pictures)
