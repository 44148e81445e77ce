"""Pictures as they might have been taken: turned, moved, scaled, mirrored, in other light."""

import numpy as np
from PIL import Image

# Standard deviations at strength 1: radians, log of the scale, log of the aspect ratio, shift as a
# share of the side, log of the contrast, brightness out of 255.
_TURN = 0.12
_SCALE = 0.08
_STRETCH = 0.05
_SHIFT = 0.04
_CONTRAST = 0.25
_BRIGHTNESS = 15.0


def warp(picture: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Returns a picture, changed at random; half of them mirrored.

    Args:
      picture: decoded.
      strength: factor of every change but mirroring; 0 only mirrors.
      rng: NumPy generator.

    Returns:
      Grey if the picture is, else RGB; of the same size. What lies outside of it is black.
    """
    picture = picture if picture.mode == "L" else picture.convert("RGB")
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    turn, scale, stretch, across, down, contrast, brightness = strength * rng.normal(size=7)
    wide, high = np.exp(_SCALE * scale + np.array([1, -1]) * _STRETCH * stretch)
    cosine, sine = np.cos(_TURN * turn), np.sin(_TURN * turn)
    # From a place in the new picture to one in the old: turned and scaled about the middle.
    matrix = np.array([[wide * cosine, high * sine], [-wide * sine, high * cosine]])
    middle = (np.array(picture.size) - 1) / 2
    shift = _SHIFT * np.array(picture.size) * (across, down)
    start = middle + shift - matrix @ middle
    data = (*matrix[0], start[0], *matrix[1], start[1])
    picture = picture.transform(
        picture.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR
    )
    values = np.asarray(picture, np.float32)
    mean = values.mean()
    values = mean + np.exp(_CONTRAST * contrast) * (values - mean) + _BRIGHTNESS * brightness
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
