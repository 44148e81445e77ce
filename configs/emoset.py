"""EMO-R3 on EmoSet-118K as the paper trains: 2,000 balanced images, tested at home and abroad.

python -m emor3_jax.train --config=configs/emoset.py --workdir=runs/emoset \\
    --config.policy.path=Qwen/Qwen2.5-VL-3B-Instruct --config.data.train.path=EmoSet-118K \\
    --config.evaluate.sets.emoset.path=EmoSet-118K --config.evaluate.sets.emotion6.path=Emotion6

Both folders as their authors publish them (docs/data.md). Look at the data first, with the same
flags: python -m emor3_jax.inspect --config=configs/emoset.py …

For one machine with 4 chips or GPUs of 95 GB; not compiled for any yet, so whether it fits in
memory is not known (configs/qwen2_5_vl_3b.py).
"""

from ml_collections import ConfigDict

from configs.qwen2_5_vl_3b import single_host
from emor3_jax.config import dataset


def get_config() -> ConfigDict:
    """Returns the config."""
    config = single_host(prompts=64, max_tokens=2048)
    config.mesh.fsdp = 4
    config.data.train = dataset(kind="emoset", split="train", subset=2000)
    config.data.sort_by_size = True
    config.evaluate.sets = ConfigDict()
    config.evaluate.sets.emoset = dataset(kind="emoset", split="test")
    config.evaluate.sets.emotion6 = dataset(kind="emotion6", split="whole")
    return config
