"""int8 weights: by hand, within their bound, and as the layers read them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from support import tiny

from emor3_jax.models.layers import Dense
from emor3_jax.models.params import Params, cast_for_decoding, leaves, unroll
from emor3_jax.models.quantisation import MOST, SCALE, quantise, quantise_layers

POLICY = tiny.make_policy(tie_word_embeddings=False)


@pytest.fixture(scope="module")
def params() -> Params:
    return tiny.strong_params(POLICY)


def test_by_hand() -> None:
    """A column of each kind: exact, rounded, negative, all zero."""
    kernel = np.float32([[127, 1.0, -0.5, 0], [-3, 0.1, 0.25, 0], [64, -0.3, 0, 0]])
    values, scale = jax.jit(quantise)(kernel)
    np.testing.assert_allclose(scale, [1, 1 / 127, 0.5 / 127, 0], rtol=1e-6)
    # 0.1 * 127 = 12.7, -0.3 * 127 = -38.1, 0.25 / 0.5 * 127 = 63.5: to the even one.
    wanted = [[127, 127, -127, 0], [-3, 13, 64, 0], [64, -38, 0, 0]]
    np.testing.assert_array_equal(values, wanted)
    assert values.dtype == jnp.int8 and scale.dtype == jnp.float32


@settings(deadline=None, max_examples=60)
@given(arrays.arrays(np.float32, (4, 3), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_no_weight_moves_by_more_than_half_a_step(kernel: np.ndarray) -> None:
    values, scale = jax.device_get(jax.jit(quantise)(kernel))
    assert np.abs(values.astype(int)).max() <= MOST
    # Weights that are too small for a scale become 0, and lie under the smallest normal number.
    bound = np.maximum(0.5001 * scale, MOST * np.finfo(np.float32).tiny)
    assert (np.abs(values * scale - kernel) <= bound).all()
    # The largest of each output keeps its size.
    most = np.abs(kernel).max(axis=0)
    assert (np.abs(values).max(axis=0)[most > 1e-30] == MOST).all()
    # Outputs know nothing of each other, nor layers.
    again = jax.device_get(jax.vmap(quantise)(np.stack([kernel[:, :1], kernel[:, 1:2]])))
    np.testing.assert_array_equal(again[0][..., 0], values[:, :2].T)
    np.testing.assert_array_equal(again[1][:, 0], scale[:2])


def test_what_is_not_finite_stays_so_and_spoils_its_own_output_alone() -> None:
    kernel = np.float32([[1, np.nan, np.inf], [2, 1, 1]])
    values, scale = quantise(kernel)
    out = np.ones((1, 2)) @ np.float32(values) * scale
    np.testing.assert_array_equal(np.isfinite(out), [[True, False, False]])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_layer_multiplies_by_the_integers_and_then_by_the_scale(dtype: type) -> None:
    rng = np.random.default_rng(0)
    kernel, x = (np.float32(rng.normal(size=shape)) for shape in ((16, 8), (5, 16)))
    x = np.asarray(jnp.asarray(x, dtype), np.float32)
    values, scale = quantise(kernel)
    bias = np.float32(rng.normal(size=8))
    found = Dense(8, dtype=dtype).apply(
        {"params": {"kernel": values, SCALE: scale, "bias": bias}}, x
    )
    wanted = x @ (np.float32(values) * scale) + bias
    # In bfloat16 the integers are exact: only the sum and the result are rounded.
    tolerance = 2e-6 if dtype == jnp.float32 else 2.0**-7
    np.testing.assert_allclose(np.float32(found), wanted, rtol=tolerance, atol=tolerance)
    assert found.dtype == dtype


def test_the_kernels_of_the_decoders_layers_alone_are_quantised(params: Params) -> None:
    found = dict(leaves(cast_for_decoding(params, jnp.bfloat16, int8=True)))
    before = dict(leaves(params))
    integers = {path for path, x in found.items() if x.dtype == jnp.int8}
    assert integers == {
        path for path in before if path.startswith("model/layers") and path.endswith("kernel")
    }
    assert found.keys() - before.keys() == {path.replace("kernel", SCALE) for path in integers}
    for path in before.keys() - integers:
        matrix = path.endswith(("kernel", "embedding"))
        assert found[path].dtype == (jnp.bfloat16 if matrix else jnp.float32), path
    # By default nothing is.
    plain = cast_for_decoding(params, jnp.bfloat16)
    assert jax.tree.structure(plain) == jax.tree.structure(params)
    # Nor in the type that parameters have already, unless asked for.
    assert cast_for_decoding(params, jnp.float32) is params
    assert cast_for_decoding(plain, jnp.bfloat16) is plain
    same = dict(leaves(cast_for_decoding(params, jnp.float32, int8=True)))
    assert {path for path, x in same.items() if x.dtype == jnp.int8} == integers


def test_the_policy_computes_with_the_weights_that_the_integers_stand_for(params: Params) -> None:
    quantised = jax.jit(quantise_layers)(params)
    tokens = np.random.default_rng(0).integers(8, 60, (2, 1, 6)).astype(np.int32)
    positions = np.broadcast_to(np.arange(6, dtype=np.int32), tokens.shape)

    @jax.jit
    def logits(params: Params) -> jax.Array:
        hidden, _ = POLICY.extend(params, None, tokens, positions, np.ones(tokens.shape, bool))
        return POLICY.logits(params, hidden)

    found, wanted = logits(quantised), logits(tiny.dequantised(jax.device_get(quantised)))
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    moved = np.abs(found - logits(params))
    assert 1e-2 < moved.max() < 1
    # Layer by layer, as `rollout.unroll` decodes.
    apart = unroll(quantised)["model"]["layers_1"]["mlp"]["up_proj"]
    own = quantised["model"]["layers"]["mlp"]["up_proj"]
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[1]), apart, own)
