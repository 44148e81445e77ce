"""Where the embedded base policy lies."""

from pathlib import Path

from ml_collections import ConfigDict

SHIPPED_POLICY = Path(__file__).parents[1] / "embedded" / "policy"
"""The base policy that comes with the package, in bfloat16; `configs/base_policy.py` remakes it."""


def embedded_folder(config: ConfigDict) -> Path:
    """Returns the folder of the embedded base policy, which need not be there yet."""
    family, size = config.policy.embedded_family, config.data.scene_size
    if config.policy.embedded_folder:
        return Path(config.policy.embedded_folder)
    if (family, size) == ("qwen2_5_vl", 112):
        return SHIPPED_POLICY
    return Path(f"runs/base_policy_{family}_{size}px")
