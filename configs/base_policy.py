"""The tiny base policy on EmoScenes: about three minutes on 2 cores.

python -m emor3_jax.embedded.base_policy --config=configs/base_policy.py --workdir=runs/base_policy
"""

from ml_collections import ConfigDict

from emor3_jax.config import base_policy


def get_config() -> ConfigDict:
    """Returns the config."""
    return base_policy()
