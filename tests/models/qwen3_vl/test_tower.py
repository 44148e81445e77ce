from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from support import tiny

from emor3_jax.models.qwen3_vl.tower import resample
from emor3_jax.types import Images


def test_deepstack_has_mergers_of_its_own():
    policy = tiny.make_policy("qwen3_vl")
    assert policy.shapes.vision.mergers == ("merger", "deepstack_0")
    modules = policy.param_shapes()["visual"].items()
    # What ends in the width of the decoder.
    width = policy.shapes.vision.out_hidden_size
    ending = {name for name, module in modules if name != "blocks" and _width(module) == width}
    assert ending == set(policy.shapes.vision.mergers)


def _width(module: Any) -> int | None:
    last = module.get("linear_fc2")
    return last and last["kernel"].shape[-1]


def at(rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
    coords = jnp.stack(jnp.divmod(jnp.arange(rows * columns), columns), axis=-1)
    return coords[None], jnp.ones((1, rows * columns), bool)


def test_a_table_of_the_images_size_is_taken_as_it_is():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(9, 5)), jnp.float32)
    np.testing.assert_array_equal(resample(table, *at(3, 3))[0], table)


def test_corners_fall_on_corners_and_between_is_linear():
    # 0 1 2 / 3 4 5 / 6 7 8 over 5 rows and 2 columns.
    found = resample(jnp.arange(9.0)[:, None], *at(5, 2))
    assert found[0, :, 0].tolist() == [0, 2, 1.5, 3.5, 3, 5, 4.5, 6.5, 6, 8]


def test_padding_and_one_row_leave_the_grid_as_it_is():
    table = jnp.arange(9.0)[:, None]
    coords, mask = at(1, 3)
    assert resample(table, coords, mask)[0, :, 0].tolist() == [0, 1, 2]
    coords = jnp.concatenate([coords, jnp.full((1, 2, 2), 7)], axis=1)
    mask = jnp.concatenate([mask, jnp.zeros((1, 2), bool)], axis=1)
    padded = resample(table, coords, mask)[0, :, 0]
    assert padded[:3].tolist() == [0, 1, 2] and np.isfinite(padded).all()


def test_every_patch_sees_the_whole_image_and_the_last_features_more_layers():
    policy = tiny.make_policy("qwen3_vl")
    params = tiny.strong_params(policy)
    vision = policy.shapes.vision
    layout, rng = policy.layout, np.random.default_rng(2)
    # 80 patches: two windows.
    patches = rng.normal(size=(80, vision.patch_dim)).astype(np.float32)
    images = layout.collate([layout.arrange(patches, (1, 10, 8)).image], 2)

    def features(params: dict, patches: jax.Array) -> jax.Array:
        """Features of the last and of the first layer, float[2, slots, D]."""
        seen = Images(patches, images.coords, images.mask)
        found = policy.encode_images(params, seen)[0]
        return found.reshape(len(found), 2, -1).swapaxes(0, 1)

    of_patches = jax.jit(jax.jacrev(lambda x: jnp.sum(features(params, x)[:, 0] ** 3, axis=-1)))
    for seen in np.abs(of_patches(images.patches)).max(axis=-1):
        assert ((seen > 0) == images.mask).all()

    # The second layer does not reach the features of the first.
    def of_layers(kernel: jax.Array) -> jax.Array:
        visual = params["visual"]
        mlp = visual["blocks"]["mlp"] | {"linear_fc1": {"kernel": kernel, "bias": bias}}
        changed = params | {"visual": visual | {"blocks": visual["blocks"] | {"mlp": mlp}}}
        return jnp.sum(features(changed, images.patches), axis=(1, 2))

    kernel, bias = (params["visual"]["blocks"]["mlp"]["linear_fc1"][x] for x in ("kernel", "bias"))
    reached = np.abs(jax.jit(jax.jacrev(of_layers))(kernel)).max(axis=(2, 3)) > 0
    assert reached.tolist() == [[True, True], [True, False]]
