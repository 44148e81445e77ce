"""One frame of a still image is as good as all of its equal frames."""

import dataclasses
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support import tiny

from emor3_jax.models.policy import Policy
from emor3_jax.models.processor import ImageSettings, Processor
from emor3_jax.models.vision import all_frames
from emor3_jax.types import Images

SETTINGS = ImageSettings(patch_size=4, min_pixels=256, max_pixels=1024)


def photo(height: int = 24, width: int = 40) -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encode(policy: Policy, processor: Processor, image: Image.Image, *, still: bool) -> Images:
    read = processor.still_patches if still else processor.patches
    encoded = policy.layout.arrange(*read(image))
    return policy.layout.collate([encoded.image], encoded.bucket)


def test_frames_are_repeated_within_each_channel():
    # Two channels of two pixels, three frames: (channel, time, pixel).
    shapes = dataclasses.replace(
        tiny.VISION, in_channels=2, temporal_patch_size=3, patch_size=1, spatial_merge_size=2
    )
    found = all_frames(jnp.array([[1.0, 2.0]]), shapes)
    assert found.tolist() == [[1, 1, 1, 2, 2, 2]]
    whole = jnp.arange(6.0)[None]
    assert all_frames(whole, shapes) is whole


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_still_image_gives_the_features_of_its_whole_patches_bit_for_bit(family, dtype):
    policy = tiny.make_policy(family).with_compute(dtype=jnp.dtype(dtype))
    processor = Processor(None, SETTINGS, policy.layout).with_dtype(jnp.dtype(dtype))
    still, whole = (encode(policy, processor, photo(), still=flag) for flag in (True, False))
    assert whole.patches.dtype == np.float32 and still.patches.dtype == jnp.dtype(dtype)
    size = jnp.dtype(dtype).itemsize
    assert whole.patches.nbytes == still.patches.nbytes * 2 * 4 // size
    params = policy.init(jax.random.key(0))
    features = jax.jit(policy.encode_images)
    np.testing.assert_array_equal(features(params, still), features(params, whole))

    def gradient(images: Images) -> dict:
        def total(params: dict) -> jax.Array:
            return jnp.sum(jnp.sin(policy.encode_images(params, images).astype(jnp.float32)))

        return jax.jit(jax.grad(total))(params)

    # The compiler may sum a gradient of the same arrays in another order.
    def close(a: jax.Array, b: jax.Array) -> None:
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6 * float(jnp.abs(b).max()))

    jax.tree.map(close, gradient(still), gradient(whole))


def test_still_patches_are_the_first_frame_rounded_once():
    layout = tiny.make_policy().layout
    processor = Processor(None, SETTINGS, layout)
    file = io.BytesIO()
    photo().save(file, "PNG")
    patches, grid = processor.patches(file.getvalue())
    frames = patches.reshape(len(patches), 3, 2, 16)
    np.testing.assert_array_equal(frames[:, :, 0], frames[:, :, 1])
    still, still_grid = processor.still_patches(file.getvalue())
    assert still_grid == grid == (1, 6, 10)
    np.testing.assert_array_equal(still, frames[:, :, 0].reshape(len(patches), -1))
    rounded, _ = processor.with_dtype(jnp.bfloat16).still_patches(file.getvalue())
    # As the device rounds.
    np.testing.assert_array_equal(rounded, np.asarray(jnp.asarray(still).astype(jnp.bfloat16)))
    assert processor.with_dtype(jnp.bfloat16).with_pixels(256, 512).dtype == jnp.bfloat16


def test_patches_are_seen_inside_their_window_only_where_no_layer_is_full(
    policy, params, image_batch
):
    _, images, _ = image_batch

    @functools.partial(jax.jit, static_argnums=0)
    def gradient_by_patches(policy, patches):
        def first_window(patches):
            features = policy.encode_images(params, images._replace(patches=patches))
            return jnp.sum(features[0, :4] ** 3)

        return jax.grad(first_window)(patches)

    grads = np.asarray(gradient_by_patches(policy, images.patches))
    seen = np.abs(grads).max(axis=-1)[:, 0] > 0
    assert (seen[0] == np.asarray(images.mask[0, 0])).all()
    assert not seen[1].any()
    vision = dataclasses.replace(tiny.VISION, fullatt_block_indexes=())
    windowed = tiny.make_policy(vision=vision)
    grads = np.asarray(gradient_by_patches(windowed, images.patches))
    assert (np.abs(grads[0, 0, 0]).max(axis=-1) > 0).all()
    assert not grads[0, 0, 1].any()
