"""EMO-R3 on Qwen2.5-VL-3B, one TPU v6e-8 (8 chips of 32 GB).

python -m emor3_jax.train --config=configs/tpu_v6e.py --workdir=DIR \\
    --config.policy.path=FOLDER --config.data.train.path=TRAIN.parquet \\
    --config.evaluate.sets.validation.path=VALIDATION.parquet

Not compiled for this hardware yet, so whether it fits in memory is not known;
configs/qwen2_5_vl_3b.py has the counts by hand. Of the release's settings, prompts a step (512),
response length (2048) and picture size differ.
"""

from ml_collections import ConfigDict

from configs.qwen2_5_vl_3b import single_host


def get_config() -> ConfigDict:
    """Returns the config."""
    config = single_host(prompts=64, max_tokens=1024)
    config.mesh.fsdp = 8
    return config
