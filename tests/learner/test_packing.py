"""Packing: by hand, and as a property: every token has one position, and comes back from it."""

import hypothesis
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from emor3_jax.learner.packing import join, pack, plan, unpack


def test_a_plan_by_hand():
    # Rows of 6: the response of 5 alone, 4 with 2, 3 with 2 and 1.
    found = plan(np.asarray([[3, 5, 2, 4, 2, 1]]), 6, (6,))
    assert found.source.shape == (1, 3, 6)
    assert found.source[0].tolist() == [
        [6, 7, 8, 9, 10, 30],
        [18, 19, 20, 21, 12, 13],
        [0, 1, 2, 24, 25, -1],
    ]
    assert found.place.tolist() == [[12, 0, 10, 6, 15, 5]]


def test_the_width_with_the_fewest_positions_is_taken():
    lengths = np.full((2, 4), 5)
    # Two to a row of 10 need 20 positions, one to a row of 6 needs 24, three to one of 16 need 32.
    assert plan(lengths, 6, (6, 10, 16)).source.shape == (2, 2, 10)
    # Nothing is gained where two do not fit.
    assert plan(lengths, 6, (6, 9)) is None


def test_every_group_gets_as_many_rows_as_the_fullest_needs():
    lengths = np.asarray([[1, 1, 1, 1], [8, 8, 1, 1]])
    found = plan(lengths, 8, (8,))
    # Three would do; two, half of four, would not.
    assert found is None
    assert plan(lengths, 8, (10,)).source.shape == (2, 2, 10)


@hypothesis.given(
    st.lists(st.lists(st.integers(1, 9), min_size=5, max_size=5), min_size=1, max_size=4),
    st.lists(st.integers(1, 30), max_size=3),
)
@hypothesis.settings(deadline=None, max_examples=200)
def test_tokens_come_back_from_their_positions(lengths, sizes):
    lengths, size = np.asarray(lengths), 9
    found = plan(lengths, size, sizes)
    if found is None:
        return
    b, rows, width = found.source.shape
    assert rows * width < lengths.shape[1] * size
    x = jnp.arange(b * 5 * size).reshape(b, 5, size)
    back = unpack(found, pack(found, x), size)
    mask = np.arange(size) < lengths[..., None]
    np.testing.assert_array_equal(np.asarray(back)[mask], np.asarray(x)[mask])
    used = np.sort(found.source, axis=None)
    assert (used >= 0).sum() == lengths.sum()
    # No response crosses from one row to the next.
    assert (found.place // width == (found.place + lengths - 1) // width).all()


def test_responses_to_two_prompts_side_by_side_by_hand():
    lengths = np.asarray([[2, 1], [3, 0], [1, 1], [1, 2]])
    found = join(lengths, 2, 3, 8)
    assert found.source.tolist() == [
        [[0, 1, 3, 6, 7, 8, -1, -1]],
        [[0, 3, 6, 9, 10, -1, -1, -1]],
    ]
    assert found.place.tolist() == [[0, 2], [3, 6], [0, 1], [2, 3]]
    x = jnp.arange(24).reshape(4, 2, 3)
    packed = pack(found, x)
    assert packed[0, 0, :6].tolist() == [0, 1, 3, 6, 7, 8]
    assert packed[1, 0, :5].tolist() == [12, 15, 18, 21, 22]
    mask = np.arange(3) < lengths[..., None]
    np.testing.assert_array_equal(np.asarray(unpack(found, packed, 3))[mask], np.asarray(x)[mask])
