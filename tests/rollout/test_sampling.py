"""One token: its distribution, the top-p cut, greedy choice."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from benchmarks.top_p import sorted_nucleus
from emor3_jax.rollout import sampling

LOGITS = jnp.asarray([0.3, 2.0, -1.0, 1.2, 0.9, 3.0])
SUPPRESSED = np.asarray([False, False, False, True, False, False])


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8), (1.5, 0.95)])
def test_draws_follow_the_tempered_cut_distribution(temperature, top_p):
    n = 20_000
    tokens, logprobs = sampling.sample(
        jnp.broadcast_to(LOGITS, (n, 6)),
        sampling.noise(jax.random.key(5), jnp.arange(n), jnp.int32(0), jnp.int32(0)),
        sampling.Sampling(1, temperature, top_p, ()),
        SUPPRESSED,
    )
    weights = np.where(SUPPRESSED, 0.0, np.exp(np.asarray(LOGITS, np.float64) / temperature))
    weights /= weights.sum()
    np.testing.assert_allclose(logprobs, np.log(weights[np.asarray(tokens)]), rtol=1e-5)
    ranked = np.sort(weights)[::-1]
    kept = weights >= ranked[np.searchsorted(np.cumsum(ranked), top_p - 1e-9)]
    weights = np.where(kept, weights, 0.0) / weights[kept].sum()
    counts = np.bincount(tokens, minlength=6)
    assert not counts[weights == 0].any()
    possible = weights > 0
    assert stats.chisquare(counts[possible], n * weights[possible]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.4, [0, 0, 0, 1]), (0.5, [0, 0, 1, 1]), (0.71, [0, 1, 1, 1]), (1.0, [1, 1, 1, 1])],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    probs = np.asarray([0.1, 0.2, 0.3, 0.4], np.float32)
    cut = sampling.top_p_filter(jnp.log(probs), top_p)
    np.testing.assert_allclose(cut, probs * kept, rtol=1e-6)


@pytest.mark.parametrize(
    ("probs", "top_p", "kept"),
    [
        # One of the three would do to cross the mass, but none of them comes before the others.
        ([0.4, 0.2, 0.2, 0.2], 0.5, [1, 1, 1, 1]),
        ([0.25, 0.25, 0.25, 0.25], 0.1, [1, 1, 1, 1]),
        ([0.1, 0.3, 0.3, 0.3], 0.35, [0, 1, 1, 1]),
    ],
)
def test_ids_as_probable_as_the_last_one_stay(probs, top_p, kept):
    cut = sampling.top_p_filter(jnp.log(jnp.float32(probs)), top_p)
    np.testing.assert_allclose(cut, np.multiply(probs, kept), rtol=1e-6)


by_sort = jax.jit(sorted_nucleus)
"""The oracle."""
search = jax.jit(sampling.nucleus)


@settings(deadline=None, max_examples=200)
@given(
    logits=st.one_of(
        arrays(np.float32, (2, 40), elements=st.floats(-30, 30, width=32)),
        # Few values, so many ties; the last one is a suppressed id's.
        arrays(np.float32, (2, 40), elements=st.sampled_from([0.0, 0.25, 2.0, 2.5, -1e30])),
    ).filter(lambda x: (x > -1e30).any(axis=-1).all()),
    top_p=st.floats(0.001953125, 0.9990234375, width=32),
    uniform=st.floats(0, 0.9990234375, width=32),
)
def test_the_search_keeps_what_sorting_keeps_and_draws_the_same(logits, top_p, uniform):
    probs = jax.nn.softmax(logits)
    found, wanted = search(probs, top_p), by_sort(probs, top_p)
    np.testing.assert_array_equal(found, wanted)
    share = jnp.full(2, uniform)
    drawn = sampling.invert(found, share)
    np.testing.assert_array_equal(drawn, sampling.invert(wanted, share))


@settings(deadline=None, max_examples=100)
@given(
    counts=arrays(np.int32, 64, elements=st.integers(0, 2**14)).filter(lambda x: x.any()),
    mass=st.integers(1, 64),
)
def test_a_mass_that_is_reached_exactly_is_enough(counts, mass):
    """Every sum of these is exact, and so is the comparison with the mass."""
    probs = jnp.float32(counts) / 2**20
    for top_p in (mass / 64, float(probs.max()), float(jnp.sum(probs))):
        np.testing.assert_array_equal(search(probs, top_p), by_sort(probs, top_p))


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.95, 0.999])
def test_the_search_over_a_whole_vocabulary(top_p):
    rng = np.random.default_rng(1)
    # Peaked, flat, and all alike; some ids suppressed.
    logits = np.float32([2.0, 0.1, 0.0])[:, None] * rng.normal(size=(3, 20_000)).astype(np.float32)
    logits[:, rng.random(20_000) < 0.1] = sampling.NEG_INF
    probs = jax.nn.softmax(logits)
    np.testing.assert_array_equal(search(probs, top_p), by_sort(probs, top_p))


def test_nothing_is_sorted_or_gathered():
    """In a sampled token as the TPU would compute it: passes over the vocabulary alone."""
    rule = sampling.Sampling(1, 1.0, 0.9, ())
    text = (
        jax.jit(partial(sampling.sample, sampling=rule, suppressed=SUPPRESSED))
        .lower(LOGITS[None], jnp.float32([0.5]))
        .as_text()
    )
    assert "stablehlo.while" in text and "stablehlo.sort" not in text
    # The chosen id's log-probability is the only thing that is looked up.
    assert text.count('"stablehlo.gather"') == 1


def test_greedy_takes_the_first_of_equals():
    token, logprob = sampling.sample(
        jnp.float32([0.0, 5.0, 2.0, 2.0]),
        jnp.float32(0.5),
        sampling.Sampling(1, 0, 1.0, ()),
        suppressed=np.asarray([False, True, False, False]),
    )
    assert token == 2
    assert logprob == pytest.approx(2 - np.log(1 + 2 * np.exp(2)), abs=1e-6)


def test_greedy_takes_the_best_allowed_id_whatever_the_key():
    for seed in range(3):
        token, logprob = sampling.sample(
            LOGITS.at[3].set(9.0),
            jax.random.key(seed),
            sampling.Sampling(1, 0, 1.0, ()),
            suppressed=SUPPRESSED,
        )
        assert token == 5
        assert logprob == pytest.approx(
            float(jax.nn.log_softmax(LOGITS[jnp.asarray([0, 1, 2, 4, 5])])[-1]), abs=1e-6
        )


def test_a_draw_never_falls_on_probability_zero():
    probs = jnp.zeros((4096, 5)).at[:, 1].set(1e-8).at[:, 3].set(1e-3)
    tokens = sampling.invert(probs, jax.random.uniform(jax.random.key(0), probs.shape[:-1]))
    assert set(np.asarray(tokens)) <= {1, 3}


def test_rounding_of_a_long_cumulative_sum_draws_nothing_impossible():
    """Aimed at every step of the cumulative sum, also where it steps at an id of probability 0."""
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(4000, 0.3)).astype(np.float32)
    probs[rng.random(4000) < 0.3] = 0
    cumulative = np.asarray(jnp.cumsum(probs))
    assert np.any(np.diff(cumulative)[probs[1:] == 0] != 0)
    aimed = np.unique(np.clip(cumulative / cumulative.max(), 0, 1 - 2**-24))
    for share in (aimed, np.nextafter(aimed, np.float32(0)), np.float32([0.0, 1 - 2**-24])):
        tokens = jax.vmap(sampling.invert, (None, 0))(probs, jnp.asarray(share))
        assert np.all(probs[np.asarray(tokens)] > 0)


def test_inversion_by_hand():
    probs = jnp.float32([0.0, 1.0, 0.0, 2.0, 1.0, 0.0])
    shares = jnp.float32([0.0, 0.24, 0.25, 0.74, 0.75, 0.9999999])
    tokens = jax.vmap(sampling.invert, (None, 0))(probs, shares)
    assert tokens.tolist() == [1, 1, 3, 3, 4, 4]


def test_noise_is_a_number_of_its_own_for_each_token():
    key, rows, lanes = jax.random.key(2), jnp.arange(3)[:, None], jnp.arange(4)
    found = np.stack([sampling.noise(key, rows, lanes, jnp.int32(t)) for t in range(50)])
    assert found.shape == (50, 3, 4)
    assert len(np.unique(found)) == found.size
    assert stats.kstest(found.ravel(), "uniform").pvalue > 1e-3
    # In any company.
    assert sampling.noise(key, jnp.int32(2), jnp.int32(1), jnp.int32(7)) == found[7, 2, 1]
