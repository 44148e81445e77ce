"""The engine: whatever is in flight together, each prompt gets the same responses."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emor3_jax.models import decode_attention, decode_kernel
from emor3_jax.rollout import engine
from emor3_jax.rollout.engine import Engine, Plan
from emor3_jax.rollout.sampling import Sampling
from emor3_jax.rollout.slots import InFlight, Lanes, resize_ring, ring_places

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
        Plan(lanes=5, block=4),
        Plan(slots=2, refill=1, lanes=3, block=5),
        Plan(slots=2, refill=1, lanes=1, block=64),
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


@pytest.mark.parametrize(("unroll", "lanes"), [(False, 3), (False, 0), (True, 0)])
def test_responses_do_not_depend_on_the_kernel(four, at_once, monkeypatch, unroll, lanes):
    """Rings of 4, 8 and 12 places, in blocks of 4; layers that lie apart are left to XLA."""
    monkeypatch.setattr(decode_attention, "BLOCK", 4)
    monkeypatch.setattr(decode_kernel, "_CHAINS", 2)
    policy = four.policy.with_compute(decode_attention="ragged_interpret")
    plan = Plan(slots=2, refill=1, lanes=lanes, block=4, halvings=1, unroll=unroll)
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


@pytest.mark.parametrize(
    ("plan", "rule"),
    [
        (Plan(slots=3, refill=2), "refill must divide the slots and the 4 prompts"),
        (Plan(lanes=3), "2 devices' parts must divide refill and lanes"),
        (Plan(slots=2, refill=1), "2 devices' parts must divide refill and lanes"),
    ],
)
def test_a_plan_that_does_not_divide_is_refused(four, plan, rule):
    whole = Engine(four.policy, RULE, plan, G, 2, four.suppressed)
    with pytest.raises(ValueError, match=rule):
        whole.sizes(4)


def make_lanes(places: int) -> Lanes:
    """Two lanes whose keys say their place of the ring."""
    ring = np.arange(2.0 * places, dtype=np.float32).reshape(1, 2, 1, 1, 1, places)
    zeros = np.zeros(2, np.int32)
    return Lanes(*[zeros] * 6, ring, np.swapaxes(ring, -1, -2))


def test_a_ring_keeps_its_newest_places_the_oldest_first():
    # Of four places the second was written last: the order of age is 2, 3, 0, 1.
    for places, wanted, cursor in (
        (6, [2, 3, 0, 1, 0, 0], 4),
        (2, [0, 1], 0),
        (4, [2, 3, 0, 1], 0),
    ):
        lanes = make_lanes(4)
        second = lanes._replace(
            k=np.concatenate([lanes.k, lanes.k + 10]), v=np.concatenate([lanes.v, lanes.v + 10])
        )
        # In one array, and with the layers apart.
        for each in (second, second._replace(k=tuple(second.k), v=tuple(second.v))):
            found, at = resize_ring(each, np.int32(2), places=places)
            assert found.k[0][0].ravel().tolist() == found.v[0][0].ravel().tolist() == wanted
            own = [x + 10 if i < min(places, 4) else 0 for i, x in enumerate(wanted)]
            assert found.k[1][0].ravel().tolist() == found.v[1][0].ravel().tolist() == own
            assert at == cursor


def test_shrinking_keeps_what_goes_on_and_what_waits_to_leave():
    # One part of 4 slots, 2 lanes each; slots 1 and 3 hold prompts, three lanes go on.
    taken = np.asarray([[False, True, False, True]])
    cell = np.asarray([[8, 2, 8, 7, 8, 8, 6, 8]])
    nothing = np.zeros((1, 4), int)
    found = engine.choose_shrink(taken, nothing, cell, 2, (2, 3, 4, 6, 8))
    assert found.slots.tolist() == [[1, 3]]
    assert found.lanes.tolist() == [[1, 3, 6]]
    assert found.cell.tolist() == [[0, 3, 2]] and found.columns == 2
    # A done prompt that has not left stays.
    found = engine.choose_shrink(taken | True, nothing, cell, 2, (2, 3, 4, 6, 8))
    assert found.slots.tolist() == [[0, 1, 2, 3]] and found.cell.tolist() == [[2, 7, 6]]
    # Responses that wait need lanes, too: one in slot 3.
    waiting = np.asarray([[0, 0, 0, 1]])
    found = engine.choose_shrink(taken, waiting, cell, 2, (2, 3, 4, 6, 8))
    assert found.lanes.tolist() == [[1, 3, 6, 0]] and found.cell.tolist() == [[0, 3, 2, 4]]
    assert engine.choose_shrink(taken, waiting + 2, cell, 2, (2, 3, 4, 6, 8)) is None


def test_columns_close_up_when_no_response_waits():
    taken = np.asarray([[True, True]])
    # Of four columns each slot has one left.
    cell = np.asarray([[8, 3, 8, 8, 8, 6, 8, 8]])
    found = engine.choose_shrink(taken, np.zeros((1, 2), int), cell, 4, (2, 4, 8))
    assert found.columns == 1 and found.cell.tolist() == [[0, 1]]


def test_each_part_drops_its_own():
    taken = np.asarray([[False, True], [True, False]])
    cell = np.asarray([[4, 2, 4, 3], [4, 4, 4, 0]])
    found = engine.choose_shrink(taken, np.zeros((2, 2), int), cell, 2, (1, 2, 4))
    assert found.slots.tolist() == [[1], [0]]
    assert found.lanes.tolist() == [[1, 3], [3, 0]]
    # A lane that idles has the number behind the cells.
    assert found.cell.tolist() == [[0, 1], [0, 2]]


@given(st.data())
def test_no_lane_is_lost_and_no_cell_is_shared(data):
    size, columns, parts = 4, 4, 2
    cells = size * columns
    cell = np.full((parts, 8), cells)
    for own in cell:
        live = data.draw(st.lists(st.integers(0, cells - 1), unique=True, max_size=8))
        own[data.draw(st.permutations(range(8)))[: len(live)]] = live
    taken = engine.lanes_of_slots(cell, size, columns) > 0
    found = engine.choose_shrink(taken, np.zeros((parts, size), int), cell, columns, (1, 2, 4, 8))
    if found is None:
        return
    small, wide = found.slots.shape[1], found.columns
    for part in range(parts):
        before = sorted(x // columns for x in cell[part] if x < cells)
        kept = found.cell[part][found.cell[part] < small * wide]
        assert len(set(kept)) == len(kept)
        assert sorted(found.slots[part][x // wide] for x in kept) == before
        # Each lane keeps its slot.
        for lane, new in zip(found.lanes[part], found.cell[part], strict=True):
            if new < small * wide:
                assert cell[part, lane] // columns == found.slots[part][new // wide]


@pytest.mark.parametrize(
    ("lanes", "halvings", "widths"),
    [
        (8, 3, (1, 2, 3, 4, 6, 8)),
        (8, 1, (4, 6, 8)),
        (8, 0, (8,)),
        (6, 2, (3, 6)),
        (5, 2, (5,)),
        (1, 2, (1,)),
    ],
)
def test_lanes_have_a_few_widths(lanes, halvings, widths):
    assert engine.lane_counts(lanes, halvings) == widths


def test_the_first_of_each_part():
    mask = np.asarray([[False, True, True], [True, False, True]])
    assert engine.first_of_each(mask, 1).tolist() == [[1], [0]]
    assert engine.first_of_each(mask, 2).tolist() == [[1, 2], [0, 2]]
    assert engine.first_of_each(mask, 3) is None


def test_the_ring_has_a_few_sizes():
    sizes = engine.ring_sizes(4, 100)
    assert sizes == (4, 8, 16, 32, 64, 100)

    def fitted(now: int, needed: int) -> int:
        flight = InFlight(None, make_lanes(now), np.int32(0))
        return ring_places(engine.fit_ring(flight, needed, sizes).lanes)

    assert [fitted(8, n) for n in (5, 8, 9, 17, 100, 150)] == [8, 8, 16, 32, 100, 100]
    # It shrinks by a quarter or more at once.
    assert [fitted(64, n) for n in (33, 17, 16, 5)] == [64, 64, 16, 8]
