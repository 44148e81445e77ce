"""The shapes of the tiny policy that most tests build on; weights are each test's own matter."""

from typing import Any

from emor3_jax.models.qwen2_5_vl.shapes import Config, VisionConfig

VISION = VisionConfig(
    depth=2,
    hidden_size=16,
    intermediate_size=24,
    num_heads=2,
    patch_size=4,
    temporal_patch_size=2,
    spatial_merge_size=2,
    window_size=16,
    fullatt_block_indexes=(1,),
    out_hidden_size=32,
)
"""16 patches a window, 4 tokens; the second of its two layers sees whole pictures."""


def make_config(**changes: Any) -> Config:
    """Returns a policy of two layers of width 32, 80 ids of which the first special one is 70."""
    fields = {
        "vision": VISION,
        "vocab_size": 80,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "mrope_section": (1, 1, 2),
        "tie_word_embeddings": True,
        "image_token_id": 70,
    }
    return Config(**(fields | changes))
