"""The tiny base policy on EmoScenes, which the package holds already as this config makes it.

python -m emor3_jax.embedded.base_policy --config=configs/base_policy.py --workdir=runs/base_policy

`--config=configs/base_policy.py:qwen3_vl` makes one of Qwen3-VL's architecture.
"""

from ml_collections import ConfigDict

from emor3_jax.config import base_policy


def get_config(family: str = "qwen2_5_vl") -> ConfigDict:
    """Returns the config for a family of policies."""
    config = base_policy()
    config.model.family = family
    return config
