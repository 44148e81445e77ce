import jax
import numpy as np
import pytest

from emor3_jax.data.batch import Example, collate, pick_prompts
from emor3_jax.data.prefix import PrefixEncoder

BUCKETS = {"prompt_lengths": (8, 16), "image_windows": (1, 2, 4)}


def example(policy, rows, columns, *, before=2, after=3, answer=1, name="a") -> Example:
    """Tokens: `before` of text, rows * columns / 4 of the image, `after` of text."""
    n_image = rows * columns // 4
    tokens = np.array(
        [5] * before + [policy.shapes.image_token_id] * n_image + [6] * (after - 1) + [7], np.int32
    )
    grid = (1, rows, columns)
    patches = np.full((rows * columns, policy.shapes.vision.patch_dim), 0.5, np.float32)
    return Example(
        tokens=tokens,
        positions=policy.layout.positions(tokens, [grid])[0],
        image=policy.layout.arrange(patches, grid),
        image_start=before,
        shared_length=before + n_image + 1,
        answer=answer,
        grades=np.eye(3, dtype=np.float32)[answer],
        id=name,
    )


def test_every_field_by_hand(policy):
    # 4 x 4 patches: one window of 2 x 2 tokens. 2 x 6 patches: 1 x 3 tokens, two windows.
    rows = [
        example(policy, 4, 4, answer=0),
        example(policy, 2, 6, before=1, answer=2, name="b"),
    ]
    batch, ids = collate(rows, policy.layout, batch_size=2, **BUCKETS)
    assert ids == ("a", "b")
    image = policy.shapes.image_token_id
    assert batch.prompt.tokens.tolist() == [
        [5, 5, image, image, image, image, 6, 6],
        [5, image, image, image, 6, 6, 0, 0],
    ]
    assert batch.prompt.mask.sum(axis=1).tolist() == [8, 6]
    assert batch.last_token.tolist() == [7, 7]
    # Slots count within the prompt; the second image's third token opens its second window.
    assert batch.prompt.image_slots.tolist() == [
        [-1, -1, 0, 1, 2, 3, -1, -1],
        [-1, 0, 1, 4, -1, -1, -1, -1],
    ]
    # Text at 0 and 1, the image takes 2 and 3, text goes on at 4; and 0, 1..3, 4.
    assert batch.prompt.positions[0, :, 0].tolist() == [0, 1, 2, 2, 2, 2, 4, 5]
    assert batch.prompt.positions[1, :6, 2].tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.next_position.tolist() == [6, 6]
    assert batch.shared_length.tolist() == [7, 5]
    assert batch.shared_position.tolist() == [5, 5]
    assert batch.answers.tolist() == [0, 2]
    assert batch.grades.tolist() == [[1, 0, 0], [0, 0, 1]]
    assert batch.weight.tolist() == [1, 1]
    assert batch.images.patches.shape == (2, 1, 2, 16, policy.shapes.vision.patch_dim)


def test_buckets_are_the_smallest_that_hold_all_rows(policy):
    small, wide = example(policy, 4, 4), example(policy, 4, 12)
    assert collate([small], policy.layout, batch_size=1, **BUCKETS)[0].prompt.tokens.shape == (1, 8)
    batch, _ = collate([small, wide], policy.layout, batch_size=2, **BUCKETS)
    assert batch.prompt.tokens.shape == (2, 16)
    assert batch.images.mask.shape[:3] == (2, 1, 4)
    # 9 tokens: the last one is not part of the padded prompt, so 8 slots do.
    nine = example(policy, 4, 4, after=3)
    assert len(nine.tokens) == 9
    assert collate([nine], policy.layout, batch_size=1, **BUCKETS)[0].prompt.tokens.shape == (1, 8)


def test_missing_rows_have_no_weight_and_no_id(policy):
    batch, ids = collate([example(policy, 4, 4)], policy.layout, batch_size=3, **BUCKETS)
    assert ids == ("a", "", "")
    assert batch.weight.tolist() == [1, 0, 0]
    assert batch.prompt.image_slots[2, 2:6].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("rows", "columns", "after", "message"),
    [(4, 4, 14, "needs 19.*prompt_lengths"), (2, 20, 3, "needs 5.*image_windows")],
)
def test_rows_that_fit_nowhere_are_refused(policy, rows, columns, after, message):
    with pytest.raises(ValueError, match=message):
        collate(
            [example(policy, rows, columns, after=after)], policy.layout, batch_size=1, **BUCKETS
        )


def test_number_of_rows_is_checked(policy):
    with pytest.raises(ValueError, match="0 rows do not make a batch of 2"):
        collate([], policy.layout, batch_size=2, **BUCKETS)
    with pytest.raises(ValueError, match="3 rows do not make a batch of 2"):
        collate([example(policy, 4, 4)] * 3, policy.layout, batch_size=2, **BUCKETS)


def test_picked_rows_are_those_of_one_batch(policy):
    """Rows of two batches of other shapes, in any order, are as if collated together."""
    few = [example(policy, 4, 4, name="a"), example(policy, 2, 6, name="b", answer=2)]
    wide = [example(policy, 4, 12, name="c", answer=0), example(policy, 4, 4, after=5, name="d")]
    first, second = (collate(rows, policy.layout, batch_size=2, **BUCKETS) for rows in (few, wide))
    assert first.batch.prompt.tokens.shape != second.batch.prompt.tokens.shape
    assert first.batch.images.mask.shape != second.batch.images.mask.shape
    for order in ([0, 2], [3, 1], [2, 3], [1, 0], [1, 1, 2]):
        found, ids = pick_prompts(first, second, np.asarray(order))
        rows = [(few + wide)[i] for i in order]
        sizes = {"prompt_lengths": (16,), "image_windows": (4,)}
        wanted, names = collate(rows, policy.layout, batch_size=len(rows), **sizes)
        assert ids == names
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
        assert [x.dtype for x in jax.tree.leaves(found)] == [
            x.dtype for x in jax.tree.leaves(wanted)
        ]


def test_picked_rows_keep_the_prefixes_of_a_judge(policy, processor, make):
    encode = PrefixEncoder(processor, (1, 2))
    rows = [
        example(policy, 4, 4, name=name)._replace(prefix=encode(make["png"](i, 16, width)))
        for i, (name, width) in enumerate((("a", 16), ("b", 16), ("c", 32), ("d", 16)))
    ]

    def batch(rows: list, windows: int):
        how = {"prefixes": encode, "prefix_windows": windows}
        return collate(rows, policy.layout, batch_size=len(rows), **BUCKETS, **how)

    first, second = batch(rows[:2], 1), batch(rows[2:], 2)
    for order in ([0, 2], [3, 1], [1, 1, 2]):
        found, _ = pick_prompts(first, second, np.asarray(order))
        wanted, _ = batch([rows[i] for i in order], 2)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
