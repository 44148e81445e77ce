"""The shapes of the published policies, for programs that need no weights.

As in the `config.json` of Qwen/Qwen2.5-VL-{3B,7B,32B,72B}-Instruct.
"""

from emor3_jax.models.qwen2_5_vl.config import Config, ShapesError, VisionConfig

# hidden_size, intermediate_size, layers, heads, kv_heads, vocab_size, tied, vision's intermediate.
_SHAPES = {
    "3B": (2048, 11008, 36, 16, 2, 151_936, True, 3420),
    "7B": (3584, 18944, 28, 28, 4, 152_064, False, 3420),
    "32B": (5120, 27648, 64, 40, 8, 152_064, False, 3456),
    "72B": (8192, 29568, 80, 64, 8, 152_064, False, 3456),
}


def published(size: str) -> Config:
    """Returns the shapes of a published policy.

    Args:
      size: "3B", "7B", "32B" or "72B".

    Raises:
      ShapesError: if there is no such policy.
    """
    if size not in _SHAPES:
        raise ShapesError(f"size={size!r}: must be one of {', '.join(_SHAPES)}")
    width, hidden, layers, heads, kv_heads, vocabulary, tied, vision_hidden = _SHAPES[size]
    return Config(
        vision=VisionConfig(
            depth=32,
            hidden_size=1280,
            intermediate_size=vision_hidden,
            num_heads=16,
            patch_size=14,
            temporal_patch_size=2,
            spatial_merge_size=2,
            window_size=112,
            fullatt_block_indexes=(7, 15, 23, 31),
            out_hidden_size=width,
        ),
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width // heads,
        tie_word_embeddings=tied,
    )
