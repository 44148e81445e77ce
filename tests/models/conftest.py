"""Tiny policies with strong weights: default initialisation would hide errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from emor3_jax.models.qwen2_5_vl import layout, model, rope
from emor3_jax.models.qwen2_5_vl.shapes import Config
from emor3_jax.types import Images, Prompt

SPECIAL_IDS = {
    "video_token_id": 71,
    "vision_start_token_id": 72,
    "vision_end_token_id": 73,
    "bos_token_id": 74,
    "eos_token_id": 75,
    "pad_token_id": 76,
    "max_position_embeddings": 512,
}


def make_config(**changes) -> Config:
    return tiny.make_config(**(SPECIAL_IDS | changes))


def strong_params(config: Config, seed: int = 0) -> model.Params:
    """Unit-gain kernels and more, biases and norms away from 0 and 1, logits that spread."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if name == "scale":
            return 1 + 0.3 * noise
        if name == "bias":
            return 0.5 * noise
        if name == "embedding" or path[0].key == "lm_head":
            return 0.6 * noise
        return (1.3 * noise / np.sqrt(leaf.shape[-2])).astype(np.float32)

    shapes = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="session")
def config() -> Config:
    return make_config()


@pytest.fixture(scope="session")
def params(config) -> model.Params:
    return strong_params(config)


@pytest.fixture(scope="session")
def build_config():
    """The function that makes a tiny config with some fields changed."""
    return make_config


@pytest.fixture(scope="session")
def build_params():
    """The function that draws strong parameters."""
    return strong_params


@pytest.fixture(scope="session")
def image_batch(config) -> tuple[Prompt, Images, np.ndarray]:
    """Two prompts of different length, each with an image of its own grid, right padded.

    Returns:
      The prompts, their images, and int32[2], the rope position after each prompt.
    """
    rng = np.random.default_rng(1)
    grids = [(1, 4, 6), (1, 4, 4)]
    rows, layouts, following = [], [], []
    length = 11
    for i, grid in enumerate(grids):
        n = grid[1] * grid[2]
        image = layout.window_layout(
            rng.normal(size=(n, config.vision.patch_dim)).astype(np.float32), grid, config.vision
        )
        layouts.append(image)
        text = rng.permutation(60)[:4]
        tokens = np.array([*text[:2], 72, *[config.image_token_id] * (n // 4), 73, *text[2 + i :]])
        positions, next_position = rope.prompt_positions(tokens, [grid], config)
        slots = np.full(len(tokens), -1)
        slots[tokens == config.image_token_id] = image.slot_of_token + i * 8
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
    images = jax.tree.map(jnp.asarray, layout.pad_images(layouts, 2))
    return prompt, images, np.array(following, np.int32)
