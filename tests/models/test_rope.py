import jax.numpy as jnp
import numpy as np
import pytest

from emor3_jax.models import rope


def test_positions_around_two_images(policy):
    image = policy.shapes.image_token_id
    # Two words; 2 x 3 merged tokens; a word; 1 x 1; a word.
    tokens = np.array([1, 2, *[image] * 6, 3, image, 4])
    positions, following = rope.prompt_positions(tokens, [(1, 4, 6), (1, 2, 2)], image, 2)
    assert positions.tolist() == [
        [0, 0, 0],
        [1, 1, 1],
        [2, 2, 2],
        [2, 2, 3],
        [2, 2, 4],
        [2, 3, 2],
        [2, 3, 3],
        [2, 3, 4],
        [5, 5, 5],
        [6, 6, 6],
        [7, 7, 7],
    ]
    assert following == 8


def test_positions_of_text_count_up():
    positions, following = rope.prompt_positions(np.array([5, 6, 7]), [], 70, 2)
    assert positions.tolist() == [[0] * 3, [1] * 3, [2] * 3]
    assert following == 3


@pytest.mark.parametrize(
    ("count", "grids", "message"),
    [
        (3, [(1, 4, 4)], "needs 4 image tokens"),
        (5, [(1, 4, 4)], "already placed"),
        (4, [(1, 4, 4), (1, 4, 4)], "1 images have no"),
        (4, [(2, 4, 4)], "only still images"),
    ],
)
def test_images_that_do_not_fit_the_tokens_are_refused(policy, count, grids, message):
    tokens = np.array([1, *[policy.shapes.image_token_id] * count, 2])
    with pytest.raises(ValueError, match=message):
        rope.prompt_positions(tokens, grids, policy.shapes.image_token_id, 2)


def test_each_frequency_follows_the_axis_of_its_section(policy):
    # mrope_section (1, 1, 2) of a head of 8: frequencies 1, 10^-1.5, 10^-3, 10^-4.5.
    cos, sin = rope.text_table(jnp.array([[2, 30, 500]]), policy.shapes.decoder.rope_axes, 1e6)
    angles = np.array([2, 30 * 1e6**-0.25, 500 * 1e6**-0.5, 500 * 1e6**-0.75])
    np.testing.assert_allclose(cos[0], np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin[0], np.sin(angles), atol=1e-6)


def test_rows_turn_the_first_half_and_columns_the_second():
    cos, _ = rope.vision_table(jnp.array([[3, 7]]), 8)
    np.testing.assert_allclose(cos[0], np.cos([3, 0.03, 7, 0.07]), atol=1e-6)


def test_rotation_pairs_component_i_with_i_plus_half():
    quarter = jnp.array([0.0, 1.0]), jnp.array([1.0, 0.0])
    turned = rope.rotate(jnp.array([[1.0, 2.0, 3.0, 4.0]]), *quarter)
    # The pair (1, 3) turns by a quarter, the pair (2, 4) stays.
    assert turned.tolist() == [[-3.0, 2.0, 1.0, 4.0]]
