"""Row operations on trees of arrays, and the properties of what flows between the objects."""

from typing import NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emor3_jax.types import (
    Experience,
    ReplyProbs,
    Samples,
    Scores,
    bucket,
    iterate_parts,
    join,
    split,
    stack_parts,
    take,
)

QUIET = settings(max_examples=15, deadline=None, derandomize=True, database=None)
ROWS = 12


class Pair(NamedTuple):
    """A tree with a leaf in a dict, one that is missing, and one of each rank."""

    number: np.ndarray
    others: dict[str, np.ndarray]
    absent: np.ndarray | None = None


@pytest.fixture(scope="module")
def pair() -> Pair:
    number = np.arange(ROWS, dtype=np.int32)
    return Pair(number, {"wide": np.repeat(number[:, None], 3, axis=1) * 10})


@QUIET
@given(rows=st.lists(st.integers(0, ROWS - 1), min_size=4, max_size=4))
def test_take_returns_any_rows_in_any_order(pair, rows):
    found = take(pair, np.asarray(rows))
    np.testing.assert_array_equal(found.number, rows)
    np.testing.assert_array_equal(found.others["wide"][:, 2], np.asarray(rows) * 10)
    assert found.absent is None and found.number.dtype == np.int32


@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_parts_are_strided_and_hold_each_row_once(pair, count):
    parts = split(pair, count)
    assert len(parts) == count
    for i, part in enumerate(parts):
        np.testing.assert_array_equal(part.number, np.arange(i, ROWS, count))
        np.testing.assert_array_equal(part.others["wide"][:, 0], part.number * 10)
    stacked = jax.jit(lambda x: stack_parts(x, count))(pair)
    for i, part in enumerate(parts):
        jax.tree.map(
            np.testing.assert_array_equal, part, jax.tree.map(lambda x, i=i: x[i], stacked)
        )


def test_a_part_is_made_when_it_is_asked_for(pair):
    parts = iterate_parts(pair, 2)
    assert next(parts).number.tolist() == [0, 2, 4, 6, 8, 10]
    assert next(parts).number.tolist() == [1, 3, 5, 7, 9, 11]
    assert next(parts, None) is None


def test_join_counts_rows_through_all_trees(pair):
    other = jax.tree.map(lambda x: x[:3] + 100, pair)
    found = join([pair, other], np.asarray([14, 0, 12]))
    assert found.number.tolist() == [102, 0, 100]
    assert found.others["wide"][:, 1].tolist() == [120, 0, 100]


@pytest.mark.parametrize(("size", "wanted"), [(0, 8), (8, 8), (9, 16), (40, 40), (41, 40)])
def test_bucket_is_the_smallest_that_holds_or_the_last(size, wanted):
    assert bucket(size, (8, 16, 40)) == wanted


def test_every_leaf_of_an_experience_starts_with_its_prompts():
    """What is not there yet is no leaf; what is there is cut by rows alone."""
    b, g, t = 4, 2, 3
    samples = Samples(
        np.arange(b * g * t).reshape(b, g, t),
        np.zeros((b, g, t), np.float32),
        np.full((b, g), 2),
        np.ones((b, g), bool),
    )
    one = np.ones((b, g), np.float32)
    scores = Scores(one, one, one, {"coherence": one}, one, one, {"brief": one})
    replies = ReplyProbs({"coherence": np.ones((b, g, 5))}, {"coherence": one}, {"coherence": one})
    experience = Experience(None, samples, replies, scores, one)
    first, second = split(experience, 2)
    assert {len(leaf) for leaf in jax.tree.leaves(first)} == {2}
    np.testing.assert_array_equal(second.samples.tokens, samples.tokens[1::2])
    assert second.batch is None and second.advantages is None
    assert set(scores.named()) == {"overall", "format", "accuracy", "coherence", "brief"}
    assert samples.mask.tolist() == [[[True, True, False]] * g] * b


@pytest.mark.parametrize("count", [0, -1, 5])
def test_a_count_that_does_not_divide_the_rows_is_refused(pair, count):
    with pytest.raises(ValueError, match=f"count={count}: must be at least 1 and divide the 12"):
        split(pair, count)


def test_rows_are_indices(pair):
    for rows in (np.ones(ROWS, bool), [1.7]):
        with pytest.raises(ValueError, match="must be integers"):
            take(pair, rows)
    assert len(take(pair, []).number) == 0
    with pytest.raises(ValueError, match=r"trees=\[\]: give at least one"):
        join([], [])
