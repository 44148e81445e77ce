"""Images on the device: as the processor gives them, augmented where asked, refused."""

import io

import jax
import numpy as np
import pytest
from PIL import Image
from support.tiny import make_policy

from emor3_jax.embedded.faces.images import DeviceImages, read_images, take_images
from emor3_jax.models.errors import ImageError
from emor3_jax.models.processor import ImageSettings, Processor

PROCESSOR = Processor(None, ImageSettings(24 * 40, 24 * 40, patch_size=4), make_policy().layout)


def encode(height: int, width: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


# Five windows have empty slots: 24 x 40 pixels in windows of 16.
ENCODED = [encode(24, 40, seed) for seed in range(4)]


@pytest.fixture(scope="module")
def stored() -> DeviceImages:
    return read_images(ENCODED, PROCESSOR)


def test_images_taken_are_those_of_processor_and_layout(stored: DeviceImages) -> None:
    rows = np.array([2, 0, 2])
    images = take_images(stored, rows, settings=PROCESSOR.images)
    for i, row in enumerate(rows):
        encoded = PROCESSOR.encode(ENCODED[row])
        wanted = encoded.image
        assert stored.grid(PROCESSOR.images) == encoded.grid
        np.testing.assert_allclose(images.patches[i, 0], wanted.patches, rtol=1e-6, atol=2e-6)
        np.testing.assert_array_equal(images.coords[i, 0], wanted.coords)
        np.testing.assert_array_equal(images.mask[i, 0], wanted.mask)
        np.testing.assert_array_equal(stored.slots, encoded.slots)
    assert not images.mask.all()


def test_images_are_changed_by_the_key_alone_where_asked(stored: DeviceImages) -> None:
    rows = np.array([1, 3])

    def patches(seed: int | None, **changes: float) -> np.ndarray:
        key = None if seed is None else jax.random.key(seed)
        return np.asarray(
            take_images(stored, rows, key, settings=PROCESSOR.images, **changes).patches
        )

    plain = patches(None)
    np.testing.assert_array_equal(patches(5), plain)
    np.testing.assert_array_equal(patches(None, strength=1.0, erase_probability=1.0), plain)
    for changes in ({"strength": 1.0}, {"erase_probability": 1.0}):
        first, again, other = (patches(seed, **changes) for seed in (5, 5, 6))
        np.testing.assert_array_equal(first, again)
        assert not np.allclose(first, plain) and not np.allclose(first, other)
    empty = ~np.asarray(stored.mask)
    assert np.all(patches(5, strength=1.0, erase_probability=1.0)[:, 0, empty] == 0)


def test_a_damaged_image_is_named_by_its_row() -> None:
    with pytest.raises(ImageError, match="image 2: cannot decode"):
        read_images([*ENCODED[:2], b"not an image"], PROCESSOR)


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(ImageError, match=r"image 1 scales to \(40, 24\).*image 0 to \(24, 40\)"):
        read_images([ENCODED[0], encode(40, 24, 9)], PROCESSOR)
