"""Group-relative advantages, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emor3_jax.rl import advantages


def combined(rewards, greedy=None):
    """Rewards of one term, of responses of one length."""
    lengths = jnp.ones(rewards.shape, jnp.int32)
    return advantages.RewardTerms(
        rewards, {"accuracy": rewards}, {"accuracy": 1.0}, greedy, lengths
    )


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


def test_numpy_rewards_are_reduced_on_the_host_to_the_same_bits():
    rng = np.random.default_rng(0)
    for b in (1, 3, 7, 48):
        rewards = rng.choice([0.0, 0.1, 1.0], (b, 2)).astype(np.float32)
        with jax.transfer_guard("disallow"):
            found = advantages.zero_std_fraction(rewards), advantages.all_equal(rewards)
        assert isinstance(found[0], np.float32) and isinstance(found[1], np.ndarray)
        np.testing.assert_array_equal(found[1], advantages.all_equal(jnp.asarray(rewards)))
        share = advantages.zero_std_fraction(jnp.asarray(rewards))
        assert found[0] == share == jnp.mean(advantages.all_equal(jnp.asarray(rewards)))


def test_what_is_refused():
    with pytest.raises(ValueError, match="std='unbiased'"):
        advantages.grpo(jnp.zeros((1, 2)), std="unbiased")
    with pytest.raises(ValueError, match="at least 2 responses per prompt, got 1"):
        advantages.grpo(jnp.zeros((1, 1)), std="sample")
    assert advantages.grpo(jnp.ones((2, 1))).tolist() == [[0.0], [0.0]]
    with pytest.raises(AssertionError):
        advantages.grpo(jnp.zeros(3))


REWARDS = [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 2.0]]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        # Group means 1/2 and 1/2.
        ("dr_grpo", [[0.5, -0.5, -0.5, 0.5], [-0.5, -0.5, -0.5, 1.5]]),
        # The mean of the other three: 1/3 or 2/3, and 2/3 or 0.
        ("rloo", [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [-2 / 3, -2 / 3, -2 / 3, 2.0]]),
        # Over the batch: mean 1/2, squares 6 / 8 - 1 / 4 = 1/2.
        ("reinforce_pp", np.asarray([[0.5, -0.5, -0.5, 0.5], [-0.5, -0.5, -0.5, 1.5]]) * 2**0.5),
        # Here the group means are the batch's.
        (
            "reinforce_pp_baseline",
            np.asarray([[0.5, -0.5, -0.5, 0.5], [-0.5, -0.5, -0.5, 1.5]]) * 2**0.5,
        ),
    ],
)
def test_other_estimators_by_hand(name, wanted):
    found = advantages.estimate(name, combined(jnp.float32(REWARDS)), std="sample")
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_a_baseline_tells_groups_apart():
    rewards = jnp.float32([[1.0, 0.0], [3.0, 2.0]])
    # Mean 1.5, variance 1.25 of all; centred in their groups all are 1/2 away.
    found = advantages.reinforce_pp(rewards)
    np.testing.assert_allclose(found, np.asarray([[-0.5, -1.5], [1.5, 0.5]]) / 1.25**0.5, rtol=1e-5)
    found = advantages.reinforce_pp_baseline(rewards)
    np.testing.assert_allclose(found, [[1, -1], [1, -1]], rtol=1e-5)


def test_remax_compares_with_the_greedy_response():
    rewards = combined(jnp.float32(REWARDS), jnp.float32([[1.0], [0.5]]))
    found = advantages.estimate("remax", rewards)
    np.testing.assert_allclose(found, [[0, -1, -1, 0], [-0.5, -0.5, -0.5, 1.5]])
    # One response is enough, since the baseline is no other one of the group.
    assert advantages.remax(jnp.float32([[1.0]]), jnp.float32([[0.25]])).tolist() == [[0.75]]
    with pytest.raises(AssertionError):
        advantages.remax(jnp.float32(REWARDS), jnp.float32([1.0, 0.5]))
    with pytest.raises(ValueError, match="remax needs the rewards of greedy responses"):
        advantages.estimate("remax", combined(jnp.float32(REWARDS)))


@pytest.mark.parametrize("name", sorted(advantages.ESTIMATORS))
def test_every_estimator_gives_nothing_where_nothing_differs(name):
    rewards = jnp.full((3, 7), 0.1, jnp.float32)
    found = advantages.estimate(name, combined(rewards, rewards[:, :1]))
    assert found.shape == (3, 7) and not np.any(found)


def test_the_least_number_of_responses_is_what_the_config_is_told():
    for estimator in advantages.ESTIMATORS.values():
        # Of one response each, a mean over the batch is left.
        rewards = jnp.float32([[0.0] * estimator.responses, [1.0] * estimator.responses])
        rewards = rewards.at[0, 0].set(0.5)
        greedy = jnp.zeros((2, 1)) if estimator.greedy else None
        found = estimator.function(combined(rewards, greedy))
        assert estimator.responses == 1 or np.any(found)
    with pytest.raises(ValueError, match="at least 2 responses"):
        advantages.rloo(jnp.zeros((2, 1)))


def test_all_equal():
    rewards = jnp.float32([[0.1, 0.1], [0.1, 0.2], [0.0, 0.0]])
    assert advantages.all_equal(rewards).tolist() == [True, False, True]


@pytest.mark.parametrize("name", sorted(advantages.ESTIMATORS))
def test_a_group_with_nothing_to_compare_has_no_advantage_and_the_others_have(name):
    estimator = advantages.ESTIMATORS[name]
    rewards = combined(jnp.float32([[1, 1, 1], [1, 1, 1], [0, 1, 2]]), jnp.float32([[0], [1], [1]]))
    useless = estimator.nothing_differs(rewards)
    # Of the first, the greedy response has another reward.
    assert useless.tolist() == [name != "remax", True, False]
    found = np.any(estimator.function(rewards), axis=1)
    # The mean of a batch tells all groups apart from each other.
    assert name in ("reinforce_pp", "gdpo") or found.tolist() == np.invert(useless).tolist()


@pytest.mark.parametrize("name", sorted(advantages.ESTIMATORS))
def test_a_group_with_a_term_that_is_no_number_has_no_advantage_and_is_replaced(name):
    """`rewards.reward` gives such a group rewards of 0, its greedy response another."""
    rewards = combined(jnp.float32([[0, 0], [0, 1], [2, 1]]), jnp.float32([[1], [1], [1]]))
    logged = jnp.float32([[jnp.nan, 1], [0, 1], [2, 1]])
    spoilt = rewards._replace(terms=rewards.terms | {"logged": logged})
    found = advantages.estimate(name, spoilt)
    assert np.any(found, axis=1).tolist() == [False, True, True]
    assert advantages.nothing_to_compare(name, spoilt).tolist() == [True, False, False]
