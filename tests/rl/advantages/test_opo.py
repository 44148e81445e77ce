"""The baseline weighted by lengths, by hand."""

import jax.numpy as jnp
import numpy as np

from emor3_jax.rl.advantages import dr_grpo, opo


def test_by_hand():
    rewards = jnp.float32([[1, 0, 0], [0.1, 0.1, 0.1]])
    # The baseline of the first group is (6 * 1 + 2 * 0 + 4 * 0) / 12.
    found = opo(rewards, jnp.int32([[6, 2, 4], [1, 2, 3]]))
    np.testing.assert_allclose(found, [[0.5, -0.5, -0.5], [0, 0, 0]], rtol=1e-6)
    assert not np.any(found[1])


def test_equal_lengths_give_the_mean():
    rewards = jnp.float32([[1, 0, 0.5, 0.2]])
    found = opo(rewards, jnp.full((1, 4), 7))
    np.testing.assert_allclose(found, dr_grpo(rewards), rtol=1e-6, atol=1e-7)
