"""Tiny policies with strong weights: default initialisation would hide errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from emor3_jax.models import Policy
from emor3_jax.models.params import Params
from emor3_jax.types import Images, Prompt


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny.make_policy()


@pytest.fixture(scope="module")
def params(policy) -> Params:
    return tiny.strong_params(policy)


@pytest.fixture(scope="module")
def image_batch(policy) -> tuple[Prompt, Images, np.ndarray]:
    """Two prompts of different length, each with an image of its own grid, right padded.

    Returns:
      The prompts, their images, and int32[2], the rope position after each prompt.
    """
    rng = np.random.default_rng(1)
    layout = policy.layout
    grids = [(1, 4, 6), (1, 4, 4)]
    rows, encoded, following = [], [], []
    length = 11
    for i, grid in enumerate(grids):
        n = grid[1] * grid[2]
        patch_dim = policy.shapes.vision.patch_dim
        image = layout.arrange(rng.normal(size=(n, patch_dim)).astype(np.float32), grid)
        encoded.append(image.image)
        text = rng.permutation(60)[:4]
        image_token = policy.shapes.image_token_id
        tokens = np.array([*text[:2], 72, *[image_token] * (n // 4), 73, *text[2 + i :]])
        positions, next_position = layout.positions(tokens, [grid])
        slots = np.full(len(tokens), -1)
        slots[tokens == image_token] = image.slots
        pad = length + 1 - len(tokens)
        rows.append(
            (
                np.pad(tokens, (0, pad)),
                np.pad(positions, ((0, pad), (0, 0))),
                np.arange(length + 1) < len(tokens),
                np.pad(slots, (0, pad), constant_values=-1),
            )
        )
        following.append(next_position)
    prompt = Prompt(*(jnp.asarray(np.stack(column)) for column in zip(*rows, strict=True)))
    images = jax.tree.map(jnp.asarray, layout.collate(encoded, 2))
    return prompt, images, np.array(following, np.int32)
