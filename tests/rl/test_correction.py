"""Importance weights of the mismatch between sampler and learner, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from emor3_jax.rl.correction import CORRECTIONS, Correction, mismatch
from emor3_jax.rl.surrogates import Tokens

MASK = np.float32([[[1, 1, 0], [1, 1, 1]]])
RATIOS = np.float32([[[4.0, 0.5, 99.0], [1.0, 2.0, 2.0]]])


def corrected(kind, low=0.6, high=3.0):
    sampler = np.full_like(RATIOS, -1.0)
    tokens = Tokens(
        jnp.zeros(RATIOS.shape),
        old=jnp.asarray(sampler + np.log(RATIOS)),
        sampler=jnp.asarray(sampler),
        weights=jnp.asarray(MASK / 5),
    )
    weight, metrics = Correction(kind, low, high)(tokens)
    return np.asarray(jnp.broadcast_to(weight, RATIOS.shape)) * MASK, metrics


@pytest.mark.parametrize(
    ("kind", "wanted", "masked"),
    [
        ("token_truncate", [[3.0, 0.6, 0], [1, 2, 2]], None),
        ("token_mask", [[0, 0, 0], [1, 2, 2]], 0.4),
        # Products of 2 and 4; geometric means of 1.41 and 1.59.
        ("sequence_truncate", [[2, 2, 0], [3, 3, 3]], None),
        ("sequence_mask", [[2, 2, 0], [0, 0, 0]], 0.6),
        ("geometric_mask", [[4, 0.5, 0], [1, 2, 2]], 0.0),
    ],
)
def test_by_hand(kind, wanted, masked):
    weight, metrics = corrected(kind)
    np.testing.assert_allclose(weight[0], wanted, rtol=1e-5)
    assert metrics.get("correction_masked") == (masked and pytest.approx(masked))


def test_the_geometric_mean_is_masked():
    weight, metrics = corrected("geometric_mask", high=1.5)
    np.testing.assert_allclose(weight[0], [[4, 0.5, 0], [0, 0, 0]], rtol=1e-5)
    assert metrics["correction_masked"] == pytest.approx(0.6)


def test_equal_log_probabilities_change_nothing():
    x = jnp.full((2, 3, 4), -1.5)
    tokens = Tokens(x, old=x, sampler=x, weights=jnp.full(x.shape, 1 / x.size))
    for kind in CORRECTIONS:
        assert np.all(Correction(kind)(tokens)[0] == 1), kind


def test_mismatch_by_hand():
    mask = MASK > 0
    found = mismatch(jnp.log(RATIOS), jnp.zeros(RATIOS.shape), jnp.asarray(mask))
    gaps, weights = np.abs(np.log(RATIOS[mask])), RATIOS[mask]
    assert found["sampler_gap"] == pytest.approx(gaps.mean(), rel=1e-5)
    assert found["sampler_gap_max"] == pytest.approx(np.log(4), rel=1e-5)
    ess = weights.sum() ** 2 / (5 * (weights**2).sum())
    assert found["sampler_ess"] == pytest.approx(ess, rel=1e-5) and ess < 1
