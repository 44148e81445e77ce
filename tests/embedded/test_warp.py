"""Warped pictures: what is kept, what changes, and by how much."""

import numpy as np
import pytest
from PIL import Image

from emor3_jax.embedded.warp import warp

GREY = np.random.default_rng(0).integers(0, 256, (24, 32)).astype(np.uint8)


@pytest.mark.parametrize("values", (GREY, np.stack([GREY] * 3, axis=-1)))
def test_size_and_channels_are_kept(values: np.ndarray) -> None:
    out = np.asarray(warp(Image.fromarray(values), 1.0, np.random.default_rng(0)))
    assert out.shape == values.shape and out.dtype == np.uint8


def test_at_strength_0_half_of_the_pictures_are_mirrored_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    found = [np.asarray(warp(Image.fromarray(GREY), 0.0, rng)) for _ in range(200)]
    mirrored = [np.array_equal(x, GREY[:, ::-1]) for x in found]
    assert all(m or np.array_equal(x, GREY) for m, x in zip(mirrored, found, strict=True))
    assert 70 < sum(mirrored) < 130


def test_a_dot_moves_by_a_few_pixels_and_as_much_as_the_strength_says() -> None:
    dot = np.zeros((48, 48), np.uint8)
    # Around the middle, where turning and scaling move nothing.
    dot[22:26, 22:26] = 255

    def spread(strength: float) -> float:
        rng = np.random.default_rng(1)
        places = []
        for _ in range(200):
            out = np.asarray(warp(Image.fromarray(dot), strength, rng), float)
            light = np.maximum(out - out.mean() - 40, 0)
            places.append((light.sum(axis=0) @ np.arange(48)) / light.sum())
        return float(np.std(places))

    # 4 % of 48 pixels.
    assert spread(1.0) == pytest.approx(1.92, rel=0.15)
    assert spread(0.5) == pytest.approx(0.96, rel=0.15)
