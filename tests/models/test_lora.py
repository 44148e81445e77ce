"""Low-rank adapters: laid over the kernels they compute what merged kernels do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from emor3_jax.models.lora import Lora, LoraError, init_adapters, modules
from emor3_jax.models.params import cast_matrices
from emor3_jax.types import Images, Prompt

POLICY = tiny.make_policy()
NAMES = ("q_proj", "down_proj", "visual/qkv", "visual/mlp_2")


@pytest.fixture(scope="module")
def base():
    return tiny.strong_params(POLICY)


@pytest.fixture(scope="module")
def adapters(base):
    fresh = init_adapters(base, NAMES, 2, jax.random.key(1))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.float32(rng.normal(0, 0.3, x.shape)), fresh)


@jax.jit
def see_and_read(params) -> jax.Array:
    """Final states of a prompt with an image."""
    rng = np.random.default_rng(2)
    coords = np.stack(np.divmod(np.arange(16), 4), -1).astype(np.int32)[None, None, None]
    patches = rng.normal(size=(1, 1, 1, 16, POLICY.shapes.vision.patch_dim)).astype(np.float32)
    features = POLICY.encode_images(params, Images(patches, coords, np.ones((1, 1, 1, 16), bool)))
    positions = np.broadcast_to(np.arange(7, dtype=np.int32)[None, :, None], (1, 7, 3))
    slots = np.asarray([[-1, 0, 1, 2, 3, -1, -1]], np.int32)
    tokens = rng.integers(8, 60, (1, 7)).astype(np.int32)
    prompt = Prompt(tokens, positions, np.ones((1, 7), bool), slots)
    return POLICY.read_prompt(params, prompt, features)[0]


def test_fresh_adapters_change_nothing(base):
    lora = Lora(base, jnp.float32(4.0))
    fresh = init_adapters(base, NAMES, 2, jax.random.key(1))
    wanted = see_and_read(base)
    for params in (lora.overlay(fresh), lora.merge(fresh)):
        np.testing.assert_array_equal(see_and_read(params), wanted)


def test_overlay_computes_what_merged_kernels_do(base, adapters):
    lora = Lora(base, jnp.float32(0.5))
    merged, beside = see_and_read(lora.merge(adapters)), see_and_read(lora.overlay(adapters))
    np.testing.assert_allclose(beside, merged, atol=2e-5)
    assert np.abs(merged - see_and_read(base)).max() > 0.1
    # By hand: one kernel of one layer.
    kernel = lora.merge(adapters)["model"]["layers"]["self_attn"]["q_proj"]["kernel"][1]
    own = adapters["model"]["layers"]["self_attn"]["q_proj"]
    wanted = base["model"]["layers"]["self_attn"]["q_proj"]["kernel"][1]
    wanted = np.asarray(wanted) + 0.5 * np.asarray(own["lora_a"][1]) @ np.asarray(own["lora_b"][1])
    np.testing.assert_allclose(kernel, wanted, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_through_merged_kernels(base, adapters):
    lora = Lora(base, jnp.float32(0.5))
    weight = jax.random.normal(jax.random.key(3), see_and_read(base).shape)
    ours, theirs = (
        jax.jit(jax.grad(lambda x, put=put: jnp.sum(weight * see_and_read(put(x)))))(adapters)
        for put in (lora.overlay, lora.merge)
    )
    assert jax.tree.structure(ours) == jax.tree.structure(adapters)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


def test_kernels_merged_in_the_compute_type_are_the_merged_ones_rounded(base, adapters):
    lora = Lora(base, jnp.float32(0.5))
    merged, rounded = lora.merge(adapters), lora.merge(adapters, jnp.bfloat16)
    halved = [x for x in jax.tree.leaves(rounded) if x.dtype == jnp.bfloat16]
    assert len(halved) == len(lora.merges(adapters))
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(rounded), strict=True):
        np.testing.assert_array_equal(a.astype(b.dtype), b)
    ours, theirs = (cast_matrices(x, jnp.dtype(jnp.bfloat16)) for x in (rounded, merged))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_what_is_not_adapted_is_the_base_itself(base, adapters):
    merged = Lora(base, jnp.float32(0.5)).merge(adapters)
    theirs = dict(jax.tree_util.tree_leaves_with_path(base))
    other = [
        path
        for path, leaf in jax.tree_util.tree_leaves_with_path(merged)
        if leaf is not theirs[path]
    ]
    assert len(other) == len(NAMES)
    # An adapter for each layer, of rank 2.
    found = adapters["visual"]["merger"]["mlp_2"]
    assert found["lora_a"].shape[-1] == found["lora_b"].shape[-2] == 2
    assert adapters["model"]["layers"]["mlp"]["down_proj"]["lora_a"].shape == (2, 48, 2)


def test_modules_are_named_and_unknown_ones_refused(base):
    assert {"q_proj", "o_proj", "gate_proj", "visual/qkv", "visual/proj"} <= set(modules(base))
    assert "lm_head" not in modules(base)
    with pytest.raises(LoraError, match=r"'query' is no module; choose among .*q_proj"):
        init_adapters(base, ("query",), 2, jax.random.key(0))
    with pytest.raises(LoraError, match="'k_proj' is of 32 x 16, under the rank 17"):
        init_adapters(base, ("k_proj",), 17, jax.random.key(0))
