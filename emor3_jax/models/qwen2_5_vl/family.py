"""Qwen2.5-VL as a family of policies."""

from emor3_jax.models.family import Family
from emor3_jax.models.qwen2_5_vl import naming
from emor3_jax.models.qwen2_5_vl.layout import Qwen25VLLayout
from emor3_jax.models.qwen2_5_vl.published import PUBLISHED
from emor3_jax.models.qwen2_5_vl.shapes import Qwen25VLShapes, small_config
from emor3_jax.models.qwen2_5_vl.tower import Qwen25VLTower

QWEN2_5_VL = Family(
    "qwen2_5_vl",
    Qwen25VLShapes.from_hf,
    Qwen25VLLayout,
    Qwen25VLTower,
    naming.hub_tensors,
    naming.hub_name,
    small_config,
    PUBLISHED,
)
