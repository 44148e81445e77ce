"""Each reward term normalised by itself, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emor3_jax.rl.advantages import ESTIMATORS, RewardTerms, gdpo, reinforce_pp

RIGHT = jnp.float32([[1, 1, 0, 0], [0, 0, 0, 0]])
FORMED = jnp.float32([[0, 0, 1, 1], [1, 0, 0, 1]])


def terms(**weights):
    named = {"right": RIGHT, "formed": FORMED, "overall": RIGHT + FORMED}
    total = sum(weight * named[name] for name, weight in weights.items())
    return RewardTerms(total, named, weights)


@pytest.mark.parametrize("call", [gdpo, jax.jit(gdpo)])
def test_by_hand(call):
    """Of the first group the sum is equal everywhere, but the terms are not."""
    # Each term of a group with two of each is ±1, and 0 where all are equal.
    signs = np.float32([[1, 1, -1, -1], [0, 0, 0, 0]]), np.float32([[-1, -1, 1, 1], [1, -1, -1, 1]])
    total = 2 * signs[0] + 1 * signs[1]
    wanted = (total - total.mean()) / total.std()
    np.testing.assert_allclose(call(terms(right=2.0, formed=1.0)), wanted, rtol=1e-5, atol=1e-6)


def test_one_term_is_group_and_batch_normalisation():
    found = gdpo(terms(formed=1.0))
    signs = jnp.float32([[-1, -1, 1, 1], [1, -1, -1, 1]])
    np.testing.assert_allclose(found, reinforce_pp(signs), rtol=1e-5)


def test_terms_without_weight_do_not_count():
    np.testing.assert_array_equal(gdpo(terms(right=1.0, formed=0.0)), gdpo(terms(right=1.0)))
    with pytest.raises(ValueError, match="at least one reward term"):
        gdpo(RewardTerms(RIGHT, {"right": RIGHT}, {}))


def test_a_term_that_is_no_number_spoils_its_own_group_alone():
    given = terms(right=2.0, formed=1.0)
    broken = {**given.terms, "formed": FORMED.at[0, 2].set(jnp.nan)}
    signs = jnp.float32([[0, 0, 0, 0], [1, -1, -1, 1]])
    np.testing.assert_allclose(gdpo(given._replace(terms=broken)), reinforce_pp(signs), rtol=1e-5)


def test_the_sample_deviation_is_an_option():
    found = gdpo(terms(right=2.0, formed=1.0), std="sample")
    assert found.std(ddof=1) == pytest.approx(1.0, rel=1e-4)


def test_a_group_has_something_to_compare_where_one_term_differs():
    nothing_differs = ESTIMATORS["gdpo"].nothing_differs
    assert nothing_differs(terms(right=1.0, formed=1.0)).tolist() == [False, False]
    assert nothing_differs(terms(right=1.0)).tolist() == [False, True]
    # A term that is only logged has a weight of 0.
    assert jax.jit(nothing_differs)(terms(right=1.0, formed=0.0)).tolist() == [False, True]
    spoilt = {"right": RIGHT.at[0, 0].set(jnp.nan)}
    assert nothing_differs(RewardTerms(RIGHT, spoilt, {"right": 1.0})).tolist() == [True, True]
