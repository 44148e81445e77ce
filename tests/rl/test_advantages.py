"""Group-relative advantages, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from emor3_jax.rl import advantages


def test_population_and_sample_by_hand():
    rewards = jnp.float32([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 2.0]])
    paper = advantages.grpo(rewards)
    # Group 1: mean 1/2, std 1/2. Group 2: mean 1/2, deviations -1/2 x3 and 3/2, std sqrt(3)/2.
    root = np.sqrt(3)
    np.testing.assert_allclose(paper[0], [1, -1, -1, 1], rtol=1e-5)
    np.testing.assert_allclose(paper[1], [-1 / root, -1 / root, -1 / root, root], rtol=1e-5)
    # The sample deviation is larger by sqrt(4 / 3).
    release = advantages.grpo(rewards, std="sample")
    np.testing.assert_allclose(release, np.asarray(paper) * root / 2, rtol=1e-5)


def test_epsilon_by_hand():
    got = advantages.grpo(jnp.float32([[0.0, 2.0]]), epsilon=1.0)
    np.testing.assert_allclose(got, [[-0.5, 0.5]])


@pytest.mark.parametrize("std", ["population", "sample"])
def test_equal_rewards_teach_nothing(std):
    """Exactly 0, for values whose float mean differs from them too."""
    rewards = jnp.repeat(jnp.float32(np.linspace(0.01, 1.1, 200))[:, None], 7, axis=1)
    means = np.asarray(rewards).mean(axis=1)
    assert np.any(means != np.asarray(rewards)[:, 0])
    assert not np.any(advantages.grpo(rewards, std=std))


def test_zero_std_fraction():
    rewards = jnp.float32([[0.1, 0.1], [0.1, 0.2], [0.0, 0.0], [1.0, 0.0]])
    assert advantages.zero_std_fraction(rewards) == 0.5


def test_what_is_refused():
    with pytest.raises(ValueError, match="std='unbiased'"):
        advantages.grpo(jnp.zeros((1, 2)), std="unbiased")
    with pytest.raises(ValueError, match="at least 2 responses per prompt, got 1"):
        advantages.grpo(jnp.zeros((1, 1)), std="sample")
    assert advantages.grpo(jnp.ones((2, 1))).tolist() == [[0.0], [0.0]]
    with pytest.raises(AssertionError):
        advantages.grpo(jnp.zeros(3))
