import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emor3_jax.models.layout import pad_images
from emor3_jax.models.qwen2_5_vl import layout


def _patches(rows: int, columns: int) -> np.ndarray:
    """Patches that carry their row and column, in the order of transformers' image processor."""
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
    blocks = grid.reshape(rows // 2, 2, columns // 2, 2, 2).swapaxes(1, 2)
    return blocks.reshape(-1, 2).astype(np.float32)


def test_tokens_of_a_small_image_fall_into_their_windows(policy):
    # 2 x 3 merged tokens, windows of 2 x 2: the third column lies in a second window.
    result = layout.window_layout(_patches(4, 6), (1, 4, 6), policy.shapes.vision)
    assert result.slot_of_token.tolist() == [0, 1, 4, 2, 3, 6]
    assert result.mask.sum(axis=1).tolist() == [16, 8]
    third = result.coords.reshape(-1, 4, 2)[4]
    assert third.tolist() == [[0, 4], [0, 5], [1, 4], [1, 5]]


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 7), columns=st.integers(1, 7))
def test_every_patch_is_kept_once_with_its_coordinates(policy, rows, columns):
    grid = (1, 2 * rows, 2 * columns)
    patches = _patches(*grid[1:])
    result = layout.window_layout(patches, grid, policy.shapes.vision)
    assert len(result.mask) == layout.count_windows(grid, policy.shapes.vision)
    assert (result.patches == result.coords)[result.mask].all()
    assert len(np.unique(result.coords[result.mask], axis=0)) == len(patches)
    assert not result.patches[~result.mask].any()
    by_slot = result.patches.reshape(-1, 4, 2)
    assert (by_slot[result.slot_of_token] == patches.reshape(-1, 4, 2)).all()
    # A window spans 4 x 4 patches.
    for window in range(len(result.mask)):
        corner = result.coords[window][result.mask[window]] // 4
        assert (corner == corner[0]).all()


def test_padding_adds_masked_windows_and_stacks(policy):
    small = layout.window_layout(_patches(4, 4), (1, 4, 4), policy.shapes.vision)
    large = layout.window_layout(_patches(4, 6), (1, 4, 6), policy.shapes.vision)
    images = pad_images([small, large], 3)
    assert images.patches.shape == (2, 3, 16, 2)
    assert images.mask.sum(axis=(1, 2)).tolist() == [16, 24]
    with pytest.raises(ValueError, match="more than the bucket of 1"):
        pad_images([small, large], 1)


@pytest.mark.parametrize(
    ("grid", "message"),
    [((2, 4, 4), "only still images"), ((1, 4, 8), "does not fit 16"), ((1, 1, 16), "merged")],
)
def test_grids_that_do_not_fit_are_refused(policy, grid, message):
    with pytest.raises(ValueError, match=message):
        layout.window_layout(np.zeros((16, 96), np.float32), grid, policy.shapes.vision)
