"""Warped and partly erased images: what is kept, what changes, and by how much."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emor3_jax.embedded.faces.augment import erase, warp

IMAGE = np.random.default_rng(0).uniform(0, 255, (24, 32, 3)).astype(np.float32)


def many(image: np.ndarray, count: int) -> jax.Array:
    return jnp.broadcast_to(image, (count, *image.shape))


def test_shape_and_range_are_kept_and_each_image_is_changed_in_its_own_way() -> None:
    out = np.asarray(warp(many(IMAGE, 8), 2.0, jax.random.key(0)))
    assert out.shape == (8, 24, 32, 3)
    assert out.min() >= 0 and out.max() <= 255
    assert len({x.tobytes() for x in out}) == 8


def test_at_strength_0_half_of_the_images_are_mirrored_and_nothing_else() -> None:
    out = np.asarray(warp(many(IMAGE, 200), 0.0, jax.random.key(0)))
    same, mirrored = (
        np.array([np.allclose(x, wanted, atol=1e-3) for x in out])
        for wanted in (IMAGE, IMAGE[:, ::-1])
    )
    assert np.all(same ^ mirrored)
    assert 70 < mirrored.sum() < 130


def test_a_dot_moves_by_a_few_pixels_and_as_much_as_the_strength_says() -> None:
    dot = np.zeros((48, 36, 1), np.float32)
    # Around the middle, where turning and scaling move nothing.
    dot[22:26, 16:20] = 255

    def spread(strength: float) -> tuple[float, float]:
        out = np.asarray(warp(many(dot, 400), strength, jax.random.key(1)))[..., 0]
        light = np.maximum(out - out.mean(axis=(1, 2), keepdims=True) - 40, 0)
        light /= light.sum(axis=(1, 2), keepdims=True)
        down = light.sum(axis=2) @ np.arange(48)
        across = light.sum(axis=1) @ np.arange(36)
        return float(down.std()), float(across.std())

    # 4 % of 48 and of 36 pixels.
    assert spread(1.0) == pytest.approx((1.92, 1.44), rel=0.15)
    assert spread(0.5) == pytest.approx((0.96, 0.72), rel=0.15)


def test_what_lies_outside_is_black() -> None:
    white = np.full((16, 16, 1), 200.0, np.float32)
    out = np.asarray(warp(many(white, 64), 3.0, jax.random.key(2)))[..., 0]
    corners = out[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    # Somewhere a corner was moved in, and it is the darkest of its image.
    assert np.any(corners.min(axis=1) < 0.5 * out.max(axis=(1, 2)))


def test_as_many_images_as_asked_have_one_rectangle_replaced_by_their_mean() -> None:
    out = np.asarray(erase(many(IMAGE, 400), 0.3, jax.random.key(3)))
    mean = IMAGE.mean(axis=(0, 1))
    chosen = 0
    for image in out:
        erased = np.any(image != IMAGE, axis=-1)
        if not erased.any():
            continue
        chosen += 1
        rows, columns = np.flatnonzero(erased.any(axis=1)), np.flatnonzero(erased.any(axis=0))
        # Whole: nothing else differs, and nothing of it is left.
        assert erased.sum() == len(rows) * len(columns)
        assert np.ptp(rows) + 1 == len(rows) and np.ptp(columns) + 1 == len(columns)
        np.testing.assert_allclose(image[erased], np.tile(mean, (erased.sum(), 1)), rtol=1e-5)
        # 2 to 25 % of 768 pixels, sides rounded to pixels.
        assert 10 <= erased.sum() <= 220
    assert 95 < chosen < 145


@pytest.mark.parametrize(("probability", "changed"), ((0.0, 0), (1.0, 50)))
def test_none_or_all_are_erased(probability: float, changed: int) -> None:
    out = np.asarray(erase(many(IMAGE, 50), probability, jax.random.key(4)))
    assert sum(np.any(x != IMAGE) for x in out) == changed
