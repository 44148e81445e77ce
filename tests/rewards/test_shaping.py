"""The over-long penalty, by hand."""

import jax.numpy as jnp
import numpy as np

from emor3_jax.rewards.shaping import overlong


def test_penalty_grows_over_the_buffer():
    lengths = jnp.int32([[1, 60, 61, 70, 80]])
    found = overlong(lengths, limit=80, buffer=20)
    np.testing.assert_allclose(found, [[0, 0, -0.05, -0.5, -1]])
    # A buffer of all tokens: no length is free.
    np.testing.assert_allclose(overlong(lengths, limit=80, buffer=80)[0, 0], -1 / 80)
