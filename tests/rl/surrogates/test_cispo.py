"""The clipped ratio as a weight of the log-probability, by hand."""

import math

import pytest
from support.one_token import one_token

from emor3_jax.rl.surrogates import Cispo


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight", "clipped"),
    [
        (1.2, 2.0, 1.2, None),
        # Above the bound the token still has a gradient, of the bound's size, good or bad.
        (1.5, 2.0, 1.3, "high"),
        (1.5, -2.0, 1.3, "high"),
        (0.5, -2.0, 0.8, "low"),
    ],
)
def test_by_hand(ratio, advantage, weight, clipped):
    loss, slope, metrics = one_token(Cispo(clip_low=0.2, clip_high=0.3), ratio, advantage)
    assert loss == pytest.approx(-weight * advantage * math.log(0.5 * ratio), rel=1e-5)
    assert slope == pytest.approx(-weight * advantage, rel=1e-5)
    for name in ("low", "high"):
        assert metrics[f"clip_fraction_{name}"] == (name == clipped)


def test_without_a_lower_bound():
    assert one_token(Cispo(), 0.01, 1.0)[1] == pytest.approx(-0.01, rel=1e-4)
