"""Rewards in units of their group's mean, by hand."""

import jax.numpy as jnp
import numpy as np

from emor3_jax.rl.advantages import maxrl


def test_by_hand():
    rewards = jnp.float32([[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0.5, 0.5, 0.5, 0.5]])
    wanted = [[3, -1, -1, -1], [1 / 3, 1 / 3, 1 / 3, -1], [0] * 4, [0] * 4]
    np.testing.assert_allclose(maxrl(rewards), wanted, rtol=1e-5)


def test_a_mean_that_is_not_over_0_teaches_nothing():
    assert not np.any(maxrl(jnp.float32([[-1, 0.5], [-1, 1]])))
