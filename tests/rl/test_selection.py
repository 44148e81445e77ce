"""Which tokens are selected, by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from emor3_jax.rl.selection import Selection

KEY = jax.random.key(0)
MASK = jnp.asarray([[[1, 1, 1, 0], [1, 1, 0, 0]]], bool)
LOGPROBS = jnp.float32([[[-1, -2, -3, 9], [-4, -5, 9, 9]]])
ADVANTAGES = jnp.float32([[1, -1]])
# Less their means over the five tokens, 0.2 and -3: products of advantage and log-probability.
COVARIANCE = np.float32([0.8 * 2, 0.8 * 1, 0, -1.2 * -1, -1.2 * -2])


def select(kind, share, entropy=None, key=KEY, **options):
    chosen = Selection(kind, share, **options)(MASK, LOGPROBS, ADVANTAGES, entropy, key)
    assert chosen.dtype == bool and not np.any(chosen & ~MASK)
    return np.asarray(chosen)[np.asarray(MASK)].tolist()


def test_the_highest_entropies():
    entropy = jnp.float32([[[0.1, 0.9, 0.2, 9], [0.8, 0.3, 9, 9]]])
    assert select("top_entropy", 0.4, entropy) == [False, True, False, True, False]
    # At least one, and at most all.
    assert select("top_entropy", 1e-4, entropy) == [False, True, False, False, False]
    assert all(select("top_entropy", 1.0, entropy))


def test_the_highest_covariances():
    wanted = np.sort(COVARIANCE)[-2] <= COVARIANCE
    assert select("kl_cov", 0.4) == wanted.tolist()
    # Without any advantage all are equal: no more are selected.
    equal = Selection("kl_cov", 0.4)(MASK, LOGPROBS, 0 * ADVANTAGES, None, KEY)
    assert np.asarray(equal)[np.asarray(MASK)].tolist() == [True, True, False, False, False]


def test_a_random_share_of_covariances_within_bounds():
    within = (COVARIANCE > 1.0) & (COVARIANCE < 2.0)
    drawn = {tuple(select("clip_cov", 0.2, high=2.0, key=jax.random.key(i))) for i in range(20)}
    assert len(drawn) == within.sum() == 2
    for chosen in drawn:
        assert sum(chosen) == 1 and np.all(~np.asarray(chosen) | within)
    # Nothing lies within these.
    assert not any(select("clip_cov", 1.0, low=4.0, high=5.0))
    assert select("clip_cov", 1.0, high=2.0) == within.tolist()
