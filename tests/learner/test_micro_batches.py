"""The plan of micro-batches: by hand, and as a property: each prompt once, on its own device."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from emor3_jax.learner.micro_batches import (
    Buckets,
    Packed,
    PlanSpec,
    RowSizes,
    Shape,
    plan_step,
)

LARGEST = Shape(prompt=100, windows=8, length=64)
BUCKETS = Buckets(prompt=(50, 100), windows=(2, 4, 8), length=(8, 16, 32, 64))


def sizes_of(lengths, prompt=None, windows=None) -> RowSizes:
    lengths = np.asarray(lengths)
    b = len(lengths)
    windows = np.ones(b, int) if windows is None else np.asarray(windows)
    prompt = np.ones(b, int) if prompt is None else np.asarray(prompt)
    return RowSizes(lengths, prompt, windows, 4 * windows)


def test_a_plan_by_hand():
    """Each of two parts sorts its own; the micro-batch is as long as the longer of them."""
    lengths = np.asarray([[60, 1], [3, 2], [9, 9], [5, 5], [30, 2], [2, 2], [40, 4], [20, 3]])
    sizes = sizes_of(lengths, [20, 60, 20, 20, 20, 20, 20, 20], [1, 2, 3, 8, 1, 1, 1, 1])
    plan = plan_step(sizes, LARGEST, BUCKETS, PlanSpec(2, 2, 2))
    assert plan.length == 64
    # Update 0 has prompts 0, 2 | 4, 6, update 1 prompts 1, 3 | 5, 7; counted within each part.
    rows = [[micro.rows.tolist() for micro in update] for update in plan.updates]
    assert rows == [[[2, 0], [0, 2]], [[1, 1], [3, 3]]]
    shapes = [[micro.shape for micro in update] for update in plan.updates]
    assert shapes == [
        [Shape(50, 4, 32), Shape(50, 2, 64)],
        [Shape(100, 2, 8), Shape(50, 8, 32)],
    ]
    found = plan.padding(sizes, patches=4)
    assert found["padding/response"] == lengths.sum() / (4 * (32 + 64 + 8 + 32))
    assert found["padding/prompt"] == 200 / (2 * (50 + 50 + 100 + 50))
    assert found["padding/vision"] == 4 * 18 / (2 * 4 * (4 + 2 + 2 + 8))
    padded = 4 * 136 + 2 * 250 + 8 * 16
    assert found["padding/efficiency"] == (lengths.sum() + 200 + 72) / padded
    assert found["padding/shapes"] == 4


def test_packed_groups_are_sorted_by_all_their_tokens():
    # The longest response is in the group with the fewest tokens.
    lengths = [[16, 1, 1, 1], [10, 9, 9, 9], [5, 5, 5, 5], [15, 10, 9, 9]]
    plan = plan_step(sizes_of(lengths), LARGEST, BUCKETS, PlanSpec(1, 2, packed=Packed.GROUPS))
    assert [micro.rows.tolist() for micro in plan.updates[0]] == [[0, 2], [1, 3]]
    # 19 and 20 tokens in two rows of 16 or one of 32; 37 and 43 in four of 16 or two of 32.
    assert [micro.response_tokens(4) for micro in plan.updates[0]] == [64, 128]


def test_groups_that_share_rows_are_as_many_as_memory_allows():
    largest = Shape(prompt=10, windows=1, length=256)
    # Of each part 640 tokens: too many for one row of 482 columns beside four prompts of 10.
    lengths = np.asarray([[200, 50], [1, 29], [100, 60], [150, 50]] + [[80, 80]] * 4)
    sizes = sizes_of(lengths)
    (update,) = plan_step(sizes, largest, Buckets(), PlanSpec(1, 2, 2, Packed.TOGETHER)).updates
    first, second = update
    # The longest go with the shortest: 250 + 30 and 200 + 160 tokens.
    assert first.rows.tolist()[:2] == [0, 1] and second.rows.tolist()[:2] == [3, 2]
    assert sorted(first.rows.tolist()[2:] + second.rows.tolist()[2:]) == [0, 1, 2, 3]
    assert [micro.packing.source.shape for micro in update] == [(2, 1, 384)] * 2
    assert (first.packing.source[0] >= 0).sum() == 280
    # Where an image takes the memory of 200 tokens, each goes alone.
    spec = PlanSpec(1, 2, 2, Packed.TOGETHER, window_tokens=200)
    (update,) = plan_step(sizes, largest, Buckets(), spec).updates
    assert [len(micro.rows) for micro in update] == [2] * 4
    # Nothing is gained where all responses are as long as they can be.
    full = sizes_of(np.full((8, 2), 256))
    (update,) = plan_step(full, largest, Buckets(), PlanSpec(1, 2, 2, Packed.TOGETHER)).updates
    assert [(micro.packing, micro.shape) for micro in update] == [(None, largest)] * 4


def test_balanced_updates_have_like_many_tokens():
    lengths = np.asarray([[9], [1], [8], [2], [7], [3], [6], [4]])
    for balance, wanted in ((False, [30, 10]), (True, [20, 20])):
        spec = PlanSpec(2, 1, balance=balance)
        plan = plan_step(sizes_of(lengths), LARGEST, Buckets(), spec)
        rows = plan.rows(1)
        assert sorted(rows.ravel()) == list(range(8))
        assert [int(lengths[own].sum()) for own in rows] == wanted


def test_what_no_bucket_holds_keeps_the_batch_s_own_size():
    buckets = Buckets((10,), (2,), (8,))
    plan = plan_step(sizes_of([[9], [1]], [11, 1], [3, 1]), LARGEST, buckets, PlanSpec(1, 1))
    assert [micro.shape for micro in plan.updates[0]] == [Shape(10, 2, 8), LARGEST]
    # Nor is any larger than the batch.
    small = Shape(7, 1, 5)
    plan = plan_step(sizes_of([[2], [1]]), small, buckets, PlanSpec(1, 2))
    assert plan.length == 5 and plan.updates[0][0].shape == small


@pytest.mark.parametrize(("micro", "parts"), [(5, 1), (4, 1), (2, 4)])
def test_a_cut_that_does_not_divide_is_refused(micro, parts):
    with pytest.raises(ValueError, match=f"micro_prompts={micro}, parts={parts}: parts must"):
        plan_step(sizes_of([[1]] * 12), LARGEST, BUCKETS, PlanSpec(2, micro, parts))


@hypothesis.given(st.data())
@hypothesis.settings(deadline=None, max_examples=100)
def test_every_prompt_goes_once_and_stays_on_its_device(data):
    parts = data.draw(st.sampled_from([1, 2, 4]))
    updates, each, count = (data.draw(st.integers(1, 3)) for _ in range(3))
    own = updates * each * count
    b, balance = parts * own, data.draw(st.booleans())
    packed = data.draw(st.sampled_from(Packed))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    sizes = RowSizes(
        rng.integers(0, 65, (b, 3)), rng.integers(1, 101, b), rng.integers(1, 9, b), np.ones(b, int)
    )
    plan = plan_step(
        sizes,
        LARGEST,
        BUCKETS,
        PlanSpec(updates, parts * each, parts, packed, balance),
    )
    assert len(plan.updates) == updates
    # Prompts that share rows need fewer micro-batches, in one update more than in another.
    assert packed is Packed.TOGETHER or {len(u) for u in plan.updates} == {count}
    visited = []
    for u, update in enumerate(plan.updates):
        for micro in update:
            rows = micro.rows.reshape(parts, -1) + own * np.arange(parts)[:, None]
            rows = rows.ravel()
            assert balance or (rows % updates == u).all()
            visited.extend(rows)
            shape = micro.shape
            assert sizes.lengths[rows].max() <= shape.length
            assert sizes.prompt[rows].max() <= shape.prompt
            assert sizes.windows[rows].max() <= shape.windows
            if micro.packing is not None:
                assert (micro.packing.source >= 0).sum() == sizes.lengths[rows].sum()
    assert sorted(visited) == list(range(b))
    assert plan.rows(parts).shape == (updates, b // updates)
    found = plan.padding(sizes, patches=1)
    assert all(0 <= found[f"padding/{name}"] <= 1 for name in ("prompt", "response", "vision"))
