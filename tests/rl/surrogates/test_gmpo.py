"""The geometric mean of clipped ratios, by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emor3_jax.rl.surrogates import Gmpo, Tokens

LOG_RATIOS = jnp.float32([[[0.1, 0.7, -0.9, 5.0]]])
WEIGHTS = jnp.float32([[[1 / 3, 1 / 3, 1 / 3, 0]]])


def loss(log_ratios, advantage):
    tokens = Tokens(
        log_ratios - 1.0,
        old=jnp.full((1, 1, 4), -1.0),
        advantages=jnp.full((1, 1), advantage),
        weights=WEIGHTS,
    )
    return Gmpo()(tokens)


@pytest.mark.parametrize(
    ("advantage", "counted", "clipped"),
    # A good response counts up to 0.4, a bad one from -0.4 on; the last token is padding.
    [(2.0, (0.1, 0.4, -0.9), "high"), (-2.0, (0.1, 0.7, -0.4), "low")],
)
def test_by_hand(advantage, counted, clipped):
    value, metrics = loss(LOG_RATIOS, advantage)
    assert value.shape == (1, 1, 1)
    wanted = -advantage * math.exp(sum(counted) / 3)
    assert float(value.sum()) == pytest.approx(wanted, rel=1e-5)
    for name in ("low", "high"):
        found = float(metrics[f"clip_fraction_{name}"])
        assert found == pytest.approx((name == clipped) / 3, abs=1e-6)
    slope = jax.grad(lambda x: loss(x, advantage)[0].sum())(LOG_RATIOS)
    kept = [[[1.0, 0.0, 1.0, 0.0]]] if advantage > 0 else [[[1.0, 1.0, 0.0, 0.0]]]
    np.testing.assert_allclose(slope, np.float32(kept) * wanted / 3, rtol=1e-5)


def test_it_needs_the_mean_over_responses():
    assert Gmpo().conflict("seq") is None
    assert "policy_update.mean='token'" in Gmpo().conflict("token")
