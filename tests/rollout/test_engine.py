"""The engine: whatever is in flight together, each prompt gets the same responses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emor3_jax.models import decode_attention, decode_kernel
from emor3_jax.models.cache import Cache
from emor3_jax.rollout import engine
from emor3_jax.rollout.engine import Plan
from emor3_jax.rollout.sampling import Sampling
from emor3_jax.rollout.slots import Slots, resize_ring

B, G, T = 4, 4, 12
# Many stop ids, so that lengths are ragged; some responses reach T.
RULE = Sampling(T, 1.1, 1.0, (7, 20, 31, 42, 58))


@pytest.fixture(scope="module")
def four(make_setting):
    return make_setting(B)


@pytest.fixture(scope="module")
def at_once(four):
    """All prompts, a cache of full length from the start, nothing dropped."""
    return jax.device_get(four.roll_out_in(Plan(block=T, halvings=0), RULE, 0, G))


@pytest.mark.parametrize(
    "plan",
    [
        Plan(block=4, halvings=2),
        Plan(slots=2, refill=1, block=3, halvings=1),
        Plan(slots=2, refill=2, block=64),
        Plan(slots=4, refill=1, block=4, halvings=1),
        Plan(slots=2, refill=1, block=3, halvings=1, unroll=True),
        Plan(block=4, halvings=2, unroll=True),
    ],
    ids=str,
)
def test_responses_do_not_depend_on_the_plan(four, at_once, plan):
    found = jax.device_get(four.roll_out_in(plan, RULE, 0, G))
    np.testing.assert_array_equal(found.tokens, at_once.tokens)
    np.testing.assert_array_equal(found.lengths, at_once.lengths)
    np.testing.assert_array_equal(found.ended, at_once.ended)
    np.testing.assert_allclose(found.logprobs, at_once.logprobs, atol=2e-5)


@pytest.mark.parametrize("unroll", [False, True])
def test_responses_do_not_depend_on_the_kernel(four, at_once, monkeypatch, unroll):
    """Rings of 4, 8 and 12 places, in blocks of 4; layers that lie apart are left to XLA."""
    monkeypatch.setattr(decode_attention, "BLOCK", 4)
    monkeypatch.setattr(decode_kernel, "_CHAINS", 2)
    policy = four.policy.with_compute(decode_attention="ragged_interpret")
    plan = Plan(slots=2, refill=1, block=4, halvings=1, unroll=unroll)
    found = jax.device_get(four._replace(policy=policy).roll_out_in(plan, RULE, 0, G))
    np.testing.assert_array_equal(found.tokens, at_once.tokens)
    np.testing.assert_array_equal(found.lengths, at_once.lengths)
    np.testing.assert_allclose(found.logprobs, at_once.logprobs, atol=2e-5)


def test_the_case_is_ragged_enough_to_show_something(at_once):
    lengths = at_once.lengths
    assert lengths.min() <= 2 and lengths.max() == T
    assert 0 < (~at_once.ended).sum() < B * G / 2
    assert len(np.unique(lengths)) > 5


def test_sampled_and_scored_log_probabilities_agree_with_prompts_in_turns(four):
    samples = four.roll_out_in(Plan(slots=2, refill=1, block=3), RULE, 3, G)
    scored = four.score(four.params, samples.tokens, samples.lengths, RULE.temperature)
    assert np.abs(np.where(samples.mask, scored - samples.logprobs, 0.0)).max() < 3e-5


def test_keys_leave_with_their_prompt(four):
    """What a reflection goes on from are the keys of the prompts that it is asked about."""
    whole = four.prefix()
    for each in four.finish(Plan(slots=2, refill=1, block=3), RULE, 0, G):
        np.testing.assert_allclose(each.prefix.k, whole.k[:, each.row], atol=1e-5)
        np.testing.assert_allclose(each.prefix.v, whole.v[:, each.row], atol=1e-5)
        np.testing.assert_array_equal(each.prefix.mask, whole.mask[each.row])


def test_a_plan_that_does_not_divide_is_refused(four):
    with pytest.raises(ValueError, match="refill must divide the slots and the 4 prompts"):
        four.roll_out_in(Plan(slots=3, refill=2), RULE, 0, G)


def test_a_ring_keeps_its_newest_places_the_oldest_first():
    # Places 0 to 3 were written last at 1: the order of age is 2, 3, 0, 1.
    x = jnp.arange(4.0)
    cache = Cache(x.reshape(1, 1, 1, 1, 1, 4), x.reshape(1, 1, 1, 1, 4, 1), (x > 1)[None, None])
    for places, wanted, cursor in (
        (6, [2, 3, 0, 1, 0, 0], 4),
        (2, [0, 1], 0),
        (4, [2, 3, 0, 1], 0),
    ):
        found, at = resize_ring(cache, jnp.int32(2), places=places)
        assert found.k.ravel().tolist() == found.v.ravel().tolist() == wanted
        assert at == cursor
    found, _ = resize_ring(cache, jnp.int32(2), places=6)
    assert found.mask.ravel().tolist() == [True, True, False, False, False, False]


def test_shrinking_keeps_what_goes_on_and_what_waits_to_leave():
    ended = np.asarray([[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]], bool)
    taken = np.asarray([False, True, False, True])
    groups, lanes = engine.choose_shrink(taken, ended, 1, (1, 2, 3, 4), 1)
    assert groups.tolist() == [1, 3]
    assert lanes.tolist() == [[1, 0], [0, 3]]
    # Not below the least, nor to what the devices cannot cut.
    groups, lanes = engine.choose_shrink(taken, ended, 4, (3, 4), 1)
    assert groups.tolist() == [1, 3, 0, 2] and lanes.shape == (4, 3)
    assert engine.choose_shrink(taken, ended, 1, (4,), 4) is None
    # A done prompt that has not left stays.
    taken[2] = True
    assert engine.choose_shrink(taken, ended, 1, (4,), 1) is None


@pytest.mark.parametrize(
    ("responses", "halvings", "widths"),
    [
        (8, 3, (1, 2, 3, 4, 6, 8)),
        (8, 1, (4, 6, 8)),
        (8, 0, (8,)),
        (6, 2, (3, 6)),
        (5, 2, (5,)),
        (1, 2, (1,)),
    ],
)
def test_lanes_have_a_few_widths(responses, halvings, widths):
    assert engine.lane_counts(responses, halvings) == widths


def test_the_ring_has_a_few_sizes():
    sizes = engine.ring_sizes(4, 100)
    assert sizes == (4, 8, 16, 32, 64, 100)

    def fitted(now: int, needed: int) -> int:
        cache = Cache(
            jnp.zeros((1, 1, 1, 1, 1, now)), jnp.zeros((1, 1, 1, 1, now, 1)), jnp.ones((1, 1, now))
        )
        slots = Slots(*[None] * 8, cache=cache, cursor=jnp.int32(0))
        return engine.fit_ring(slots, needed, sizes).cache.mask.shape[-1]

    assert [fitted(8, n) for n in (5, 8, 9, 17, 100, 150)] == [8, 8, 16, 32, 100, 100]
    # It shrinks by a quarter or more at once.
    assert [fitted(64, n) for n in (33, 17, 16, 5)] == [64, 64, 16, 8]
