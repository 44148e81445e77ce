"""The soft gate, by hand."""

import math

import pytest
from support.one_token import one_token

from emor3_jax.rl.surrogates import Sapo


@pytest.mark.parametrize(("ratio", "advantage"), [(1.0, 2.0), (2.0, 2.0), (0.5, -1.0), (3.0, -1.0)])
def test_by_hand(ratio, advantage):
    temperature = 1.0 if advantage > 0 else 1.05
    gate = 1 / (1 + math.exp(-temperature * (ratio - 1)))
    loss, slope, metrics = one_token(Sapo(), ratio, advantage)
    assert loss == pytest.approx(-advantage * 4 / temperature * gate, rel=1e-5)
    assert metrics["gate"] == pytest.approx(4 * gate * (1 - gate), rel=1e-5)
    # d ratio / d logp is the ratio.
    assert slope == pytest.approx(-advantage * metrics["gate"] * ratio, rel=1e-5)


def test_at_a_ratio_of_1_the_slope_is_that_of_the_policy_gradient():
    assert one_token(Sapo(0.3, 5.0), 1.0, 2.0)[1] == pytest.approx(-2.0, rel=1e-5)
    assert one_token(Sapo(0.3, 5.0), 1.0, -2.0)[1] == pytest.approx(2.0, rel=1e-5)
