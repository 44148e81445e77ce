"""The shapes of the published dense policies, for programs that need no weights.

As in the `config.json` of Qwen/Qwen3-VL-{2B,4B,8B,32B}-{Instruct,Thinking}.
"""

from typing import NamedTuple

from emor3_jax.models.qwen3_vl.shapes import Qwen3VLShapes, Qwen3VLVisionShapes


class _Size(NamedTuple):
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    tied: bool
    large_tower: bool


_SIZES = {
    "2B": _Size(2048, 6144, 28, 16, tied=True, large_tower=False),
    "4B": _Size(2560, 9728, 36, 32, tied=True, large_tower=False),
    "8B": _Size(4096, 12288, 36, 32, tied=False, large_tower=True),
    "32B": _Size(5120, 25600, 64, 64, tied=False, large_tower=True),
}


def _published(size: _Size) -> Qwen3VLShapes:
    large = size.large_tower
    return Qwen3VLShapes(
        vision=Qwen3VLVisionShapes(
            depth=27 if large else 24,
            hidden_size=1152 if large else 1024,
            intermediate_size=4304 if large else 4096,
            num_heads=16,
            patch_size=16,
            temporal_patch_size=2,
            spatial_merge_size=2,
            num_position_embeddings=48 * 48,
            deepstack_visual_indexes=(8, 16, 24) if large else (5, 11, 17),
            out_hidden_size=size.hidden_size,
        ),
        vocab_size=151_936,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        num_kv_heads=8,
        head_dim=128,
        tie_word_embeddings=size.tied,
    )


PUBLISHED = {
    f"Qwen/Qwen3-VL-{name}-{kind}": _published(size)
    for name, size in _SIZES.items()
    for kind in ("Instruct", "Thinking")
}
"""Id on the hub → shapes."""
