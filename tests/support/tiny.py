"""The tiny policy that most tests build on."""

import dataclasses
from typing import Any

import jax
import numpy as np

from emor3_jax.models import Policy, parse_config
from emor3_jax.models.params import Params
from emor3_jax.models.quantisation import SCALE

_CONFIG = {
    "model_type": "qwen2_5_vl",
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
    "image_token_id": 70,
    "video_token_id": 71,
    "vision_start_token_id": 72,
    "vision_end_token_id": 73,
    "bos_token_id": 74,
    "eos_token_id": 75,
    "pad_token_id": 76,
    "vision_config": {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "out_hidden_size": 32,
    },
}
"""16 patches a window, 4 tokens; the second of the tower's two layers sees whole images."""


_IDS = {name: value for name, value in _CONFIG.items() if name.endswith("token_id")}
_ROPE = {"rope_type": "default", "mrope_section": [4, 2, 2]}
_QWEN3_VL = {
    "model_type": "qwen3_vl",
    **_IDS,
    "tie_word_embeddings": True,
    "text_config": {
        **{name: value for name, value in _CONFIG.items() if not name.endswith("config")},
        "head_dim": 16,
        "rope_scaling": _ROPE,
    },
    "vision_config": {
        **_CONFIG["vision_config"],
        "num_position_embeddings": 25,
        "deepstack_visual_indexes": [0],
    },
}
"""Heads wider than the hidden size holds; the features of the first of two layers reach the decoder
as well."""

FAMILIES = {"qwen2_5_vl": _CONFIG, "qwen3_vl": _QWEN3_VL}


def make_policy(family: str = "qwen2_5_vl", **changes: Any) -> Policy:
    """Returns a policy of two layers of width 32, 80 ids of which the first special one is 70.

    Args:
      family: of `FAMILIES`.
      **changes: fields of the family's shapes.
    """
    policy = parse_config(FAMILIES[family])
    return dataclasses.replace(policy, shapes=dataclasses.replace(policy.shapes, **changes))


VISION = make_policy().shapes.vision
"""The shapes of its vision tower, to be changed by `dataclasses.replace`."""


def strong_params(policy: Policy, seed: int = 0) -> Params:
    """Draws parameters that hide no error, as those of a default initialisation would.

    Kernels have unit gain and more, biases and norms lie away from 0 and 1, logits spread.
    """
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if name == "scale":
            return 1 + 0.3 * noise
        if name == "bias":
            return 0.5 * noise
        if name == "embedding" or path[0].key == "lm_head":
            return 0.6 * noise
        return (1.3 * noise / np.sqrt(leaf.shape[-2])).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, policy.param_shapes())


def dequantised(params: Params) -> Params:
    """Returns parameters with the weights that int8 kernels stand for in their place."""
    if SCALE in params:
        rest = {name: x for name, x in params.items() if name != SCALE}
        scale = np.asarray(params[SCALE])[..., None, :]
        return {**rest, "kernel": np.float32(params["kernel"]) * scale}
    return {k: dequantised(v) if isinstance(v, dict) else v for k, v in params.items()}
