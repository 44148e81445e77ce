"""The weight of the entropy bonus, by hand."""

import pytest

from emor3_jax.rl.entropy import EntropyBonus, adapt

HOW = {"target": 0.5, "delta": 0.1, "most": 0.25}


@pytest.mark.parametrize(
    ("coef", "entropy", "wanted"),
    [
        (0.1, 0.4, (0.2, 0.2)),
        (0.2, 0.4, (0.25, 0.25)),
        # Over the target it falls, and does not count.
        (0.2, 0.6, (0.1, 0.0)),
        (0.05, 0.6, (0.0, 0.0)),
    ],
)
def test_by_hand(coef, entropy, wanted):
    found = adapt(EntropyBonus(coef, coef), entropy, **HOW)
    assert tuple(map(float, found)) == pytest.approx(wanted)


def test_a_step_without_tokens_or_with_nan_leaves_the_bonus():
    for entropy, counted in ((0.0, 0.0), (float("nan"), 1.0)):
        found = adapt(EntropyBonus(0.25, 0.0), entropy, counted, **HOW)
        assert tuple(map(float, found)) == (0.25, 0.0)
