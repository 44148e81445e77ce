import collections
import pickle

import numpy as np

from emor3_jax.data.order import (
    BATCHES_OF_WINDOW,
    ShuffleGroup,
    WholeBatches,
    Windows,
    make_groups,
    shuffled,
)


def first(order, count: int) -> list[int]:
    return [int(order[i]) for i in range(count)]


def test_groups_by_part_and_label():
    # Rows 0 to 5 in the first part, 6 to 9 in the second; row 2 and row 7 are not usable.
    indices = np.array([0, 1, 3, 4, 5, 6, 8, 9])
    answers = [0, 1, 1, 0, 0, 2, 2, 1]
    groups = make_groups(indices, answers, (0, 6, 10), (1.0, 3.0), (True, False))
    assert [(g.indices.tolist(), g.weight) for g in groups] == [
        ([0, 4, 5], 0.5),
        ([1, 3], 0.5),
        ([6, 8, 9], 3.0),
    ]


def test_one_group_has_every_row_once_an_epoch_in_new_orders():
    order = shuffled([ShuffleGroup(np.arange(10, 17), 1.0)], seed=3)
    rows = first(order, 21)
    epochs = [rows[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(10, 17)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_groups_take_turns_by_their_weights():
    groups = [ShuffleGroup(np.arange(4), 1.0), ShuffleGroup(np.arange(100, 130), 3.0)]
    rows = first(shuffled(groups, seed=0), 400)
    small = [row for row in rows if row < 100]
    assert len(small) == 100
    # Spread evenly, not only on the whole.
    assert all(sum(row < 100 for row in rows[i : i + 40]) == 10 for i in range(0, 400, 40))
    # Within a group every epoch has every row once.
    assert all(sorted(small[i : i + 4]) == [0, 1, 2, 3] for i in range(0, 100, 4))


def test_groups_of_equal_rows_are_shuffled_apart():
    groups = [ShuffleGroup(np.arange(20), 1.0), ShuffleGroup(np.arange(20), 1.0)]
    rows = first(shuffled(groups, seed=0), 40)
    assert rows[::2] != rows[1::2]


def test_windows_have_the_same_rows_sorted_by_size():
    keys = np.random.default_rng(0).integers(0, 5, 1000)
    order = shuffled([ShuffleGroup(np.arange(1000), 1.0)], seed=1)
    windows = Windows(order, keys, batch_size=4, seed=1)
    size = BATCHES_OF_WINDOW * 4
    rows = [windows[i] for i in range(3 * size)]
    for start in range(0, 3 * size, size):
        part = rows[start : start + size]
        assert collections.Counter(part) == collections.Counter(
            int(order[i]) for i in range(start, start + size)
        )
        batches = [tuple(keys[part[i : i + 4]]) for i in range(0, size, 4)]
        # Most batches are of one size, and they do not come in the order of sizes.
        assert sum(len(set(batch)) == 1 for batch in batches) >= BATCHES_OF_WINDOW - 4
        assert batches != sorted(batches)
    # Any position by itself, and in another process.
    assert pickle.loads(pickle.dumps(windows))[size + 7] == rows[size + 7]
    assert [windows[i] for i in (5, 2 * size + 1, 0)] == [rows[5], rows[2 * size + 1], rows[0]]


def test_the_last_batch_of_an_epoch_is_dropped():
    # 10 rows in batches of 4: 8 rows an epoch, another 2 of them left out each time.
    order = WholeBatches(shuffled([ShuffleGroup(np.arange(10), 1.0)], seed=0), 10, 4)
    rows = first(pickle.loads(pickle.dumps(order)), 40)
    epochs = [rows[i : i + 8] for i in range(0, 40, 8)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert set(rows) == set(range(10))


def test_the_release_takes_sixty_steps_in_twenty_epochs():
    # 2,000 rows, 512 prompts: step 60, from 0 on, is the first of epoch 20.
    order = WholeBatches(range(20 * 2000 + 1), 2000, 512)
    assert order[60 * 512] == 20 * 2000
    assert order[3 * 512 - 1] == 1535 and order[3 * 512] == 2000


def test_whole_batches_fit_without_a_rest():
    order = shuffled([ShuffleGroup(np.arange(8), 1.0)], seed=0)
    assert first(WholeBatches(order, 8, 4), 24) == first(order, 24)
