"""Qwen3-VL, dense, as a family of policies."""

from emor3_jax.models.family import Family
from emor3_jax.models.qwen3_vl import naming
from emor3_jax.models.qwen3_vl.layout import Qwen3VLLayout
from emor3_jax.models.qwen3_vl.published import PUBLISHED
from emor3_jax.models.qwen3_vl.shapes import Qwen3VLShapes, small_config
from emor3_jax.models.qwen3_vl.tower import Qwen3VLTower

QWEN3_VL = Family(
    "qwen3_vl",
    Qwen3VLShapes.from_hf,
    Qwen3VLLayout,
    Qwen3VLTower,
    naming.hub_tensors,
    naming.hub_name,
    small_config,
    PUBLISHED,
)
