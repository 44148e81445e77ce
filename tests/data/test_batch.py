import jax
import numpy as np
import pytest

from emor3_jax.data.batch import Example, collate, pick_rows
from emor3_jax.models.qwen2_5_vl.layout import window_layout
from emor3_jax.models.qwen2_5_vl.rope import prompt_positions

BUCKETS = {"prompt_lengths": (8, 16), "image_windows": (1, 2, 4)}


def example(config, rows, columns, *, before=2, after=3, answer=1, name="a") -> Example:
    """Tokens: `before` of text, rows * columns / 4 of the image, `after` of text."""
    n_image = rows * columns // 4
    tokens = np.array(
        [5] * before + [config.image_token_id] * n_image + [6] * (after - 1) + [7], np.int32
    )
    grid = (1, rows, columns)
    patches = np.full((rows * columns, config.vision.patch_dim), 0.5, np.float32)
    return Example(
        tokens=tokens,
        positions=prompt_positions(tokens, [grid], config)[0],
        image=window_layout(patches, grid, config.vision),
        image_start=before,
        shared_length=before + n_image + 1,
        answer=answer,
        grades=np.eye(3, dtype=np.float32)[answer],
        id=name,
    )


def test_every_field_by_hand(config):
    # 4 x 4 patches: one window of 2 x 2 tokens. 2 x 6 patches: 1 x 3 tokens, two windows.
    rows = [
        example(config, 4, 4, answer=0),
        example(config, 2, 6, before=1, answer=2, name="b"),
    ]
    batch, ids = collate(rows, batch_size=2, **BUCKETS)
    assert ids == ("a", "b")
    image = config.image_token_id
    assert batch.prompt.tokens.tolist() == [
        [5, 5, image, image, image, image, 6, 6],
        [5, image, image, image, 6, 6, 0, 0],
    ]
    assert batch.prompt.mask.sum(axis=1).tolist() == [8, 6]
    assert batch.last_token.tolist() == [7, 7]
    # The second picture's windows begin at slot 2 windows * 4 slots = 8; its third token opens
    # the second window.
    assert batch.prompt.image_slots.tolist() == [
        [-1, -1, 0, 1, 2, 3, -1, -1],
        [-1, 8, 9, 12, -1, -1, -1, -1],
    ]
    # Text at 0 and 1, the picture takes 2 and 3, text goes on at 4; and 0, 1..3, 4.
    assert batch.prompt.positions[0, :, 0].tolist() == [0, 1, 2, 2, 2, 2, 4, 5]
    assert batch.prompt.positions[1, :6, 2].tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.next_position.tolist() == [6, 6]
    assert batch.shared_length.tolist() == [7, 5]
    assert batch.shared_position.tolist() == [5, 5]
    assert batch.answers.tolist() == [0, 2]
    assert batch.grades.tolist() == [[1, 0, 0], [0, 0, 1]]
    assert batch.weight.tolist() == [1, 1]
    assert batch.images.patches.shape == (2, 2, 16, config.vision.patch_dim)


def test_buckets_are_the_smallest_that_hold_all_rows(config):
    small, wide = example(config, 4, 4), example(config, 4, 12)
    assert collate([small], batch_size=1, **BUCKETS)[0].prompt.tokens.shape == (1, 8)
    batch, _ = collate([small, wide], batch_size=2, **BUCKETS)
    assert batch.prompt.tokens.shape == (2, 16)
    assert batch.images.mask.shape[:2] == (2, 4)
    # 9 tokens: the last one is not part of the padded prompt, so 8 slots do.
    nine = example(config, 4, 4, after=3)
    assert len(nine.tokens) == 9
    assert collate([nine], batch_size=1, **BUCKETS)[0].prompt.tokens.shape == (1, 8)


def test_missing_rows_have_no_weight_and_no_id(config):
    batch, ids = collate([example(config, 4, 4)], batch_size=3, **BUCKETS)
    assert ids == ("a", "", "")
    assert batch.weight.tolist() == [1, 0, 0]
    assert batch.prompt.image_slots[2, 2:6].tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize(
    ("rows", "columns", "after", "message"),
    [(4, 4, 14, "needs 19.*prompt_lengths"), (2, 20, 3, "needs 5.*image_windows")],
)
def test_rows_that_fit_nowhere_are_refused(config, rows, columns, after, message):
    with pytest.raises(ValueError, match=message):
        collate([example(config, rows, columns, after=after)], batch_size=1, **BUCKETS)


def test_number_of_rows_is_checked(config):
    with pytest.raises(ValueError, match="0 rows do not make a batch of 2"):
        collate([], batch_size=2, **BUCKETS)
    with pytest.raises(ValueError, match="3 rows do not make a batch of 2"):
        collate([example(config, 4, 4)] * 3, batch_size=2, **BUCKETS)


def test_picked_rows_are_those_of_one_batch(config):
    """Rows of two batches of other shapes, in any order, are as if collated together."""
    few = [example(config, 4, 4, name="a"), example(config, 2, 6, name="b", answer=2)]
    wide = [example(config, 4, 12, name="c", answer=0), example(config, 4, 4, after=5, name="d")]
    first, second = (collate(rows, batch_size=2, **BUCKETS)[0] for rows in (few, wide))
    assert first.prompt.tokens.shape != second.prompt.tokens.shape
    assert first.images.mask.shape != second.images.mask.shape
    merge = config.vision.merge_unit
    for order in ([0, 2], [3, 1], [2, 3], [1, 0], [1, 1, 2]):
        found = pick_rows(first, second, np.asarray(order), merge)
        rows = [(few + wide)[i] for i in order]
        sizes = {"prompt_lengths": (16,), "image_windows": (4,)}
        wanted, _ = collate(rows, batch_size=len(rows), **sizes)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
        assert [x.dtype for x in jax.tree.leaves(found)] == [
            x.dtype for x in jax.tree.leaves(wanted)
        ]
