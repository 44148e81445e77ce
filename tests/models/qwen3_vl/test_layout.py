import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny

LAYOUT = tiny.make_policy("qwen3_vl").layout


def _patches(rows: int, columns: int) -> np.ndarray:
    """Patches that carry their row and column, in the order of transformers' image processor."""
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
    blocks = grid.reshape(rows // 2, 2, columns // 2, 2, 2).swapaxes(1, 2)
    return blocks.reshape(-1, 2).astype(np.float32)


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9))
def test_patches_keep_their_order_and_know_their_coordinates(rows, columns):
    grid = (1, 2 * rows, 2 * columns)
    patches = _patches(*grid[1:])
    found = LAYOUT.arrange(patches, grid)
    assert found.bucket == LAYOUT.bucket(grid) == -(-4 * rows * columns // 64)
    assert found.image.mask.sum() == 4 * rows * columns
    flat = found.image.patches.reshape(-1, 2)
    assert (flat[: len(patches)] == patches).all() and not flat[len(patches) :].any()
    assert (found.image.coords.reshape(-1, 2)[: len(patches)] == patches).all()
    assert found.slots.tolist() == list(range(rows * columns))


def test_a_batch_is_padded_to_the_bucket():
    small = LAYOUT.arrange(_patches(4, 4), (1, 4, 4))
    large = LAYOUT.arrange(_patches(10, 8), (1, 10, 8))
    images = LAYOUT.collate([small.image, large.image], 3)
    assert images.patches.shape == (2, 1, 3, 64, 2)
    assert images.mask.sum(axis=(1, 2, 3)).tolist() == [16, 80]
    assert LAYOUT.slots(3) == 48
    with pytest.raises(ValueError, match="more than the bucket of 1"):
        LAYOUT.collate([large.image], 1)


@pytest.mark.parametrize(
    ("grid", "message"),
    [((2, 4, 4), "only still images"), ((1, 4, 8), "does not fit 16"), ((1, 1, 16), "merged")],
)
def test_grids_that_do_not_fit_are_refused(grid, message):
    with pytest.raises(ValueError, match=message):
        LAYOUT.arrange(np.zeros((16, 96), np.float32), grid)
