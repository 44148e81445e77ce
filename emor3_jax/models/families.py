"""The model families that can be trained, and those that are known not to be."""

from emor3_jax.models.family import Family
from emor3_jax.models.qwen2_5_vl.family import QWEN2_5_VL
from emor3_jax.models.qwen3_vl.family import QWEN3_VL

FAMILIES: dict[str, Family] = {family.model_type: family for family in (QWEN2_5_VL, QWEN3_VL)}
"""`model_type` of `config.json` → family."""

NOT_YET = {
    "qwen2_vl": "Qwen2-VL",
    "qwen3_vl_moe": "Qwen3-VL-MoE",
    "qwen3_5": "Qwen3.5",
    "qwen3_5_moe": "Qwen3.5-MoE",
    "qwen3_omni_moe": "Qwen3-Omni",
    "qwen2_5_omni": "Qwen2.5-Omni",
}
"""`model_type` → name of relatives that users try, and that are not supported yet."""
