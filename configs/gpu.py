"""EMO-R3 on Qwen2.5-VL-3B, one machine with 8 GPUs of 80 GB.

python -m emor3_jax.train --config=configs/gpu.py --workdir=DIR \\
    --config.policy.path=FOLDER --config.data.train.path=TRAIN.parquet \\
    --config.evaluate.sets.validation.path=VALIDATION.parquet

Not compiled for this hardware yet, so whether it fits in memory is not known;
configs/qwen2_5_vl_3b.py has the counts by hand. Of the release's settings, prompts a step (512) and
image size differ.
"""

from ml_collections import ConfigDict

from configs.qwen2_5_vl_3b import single_host


def get_config() -> ConfigDict:
    """Returns the config."""
    config = single_host(prompts=128, max_tokens=2048)
    config.mesh.fsdp = 8
    return config
