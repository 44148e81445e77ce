"""EMO-R3 on EmoSet-118K: 2,000 balanced images, tested on EmoSet and Emotion6 as wholes.

python -m emor3_jax.train --config=configs/emoset.py:v5e-8 --workdir=runs/emoset \\
    --config.data.train.path=EmoSet-118K \\
    --config.evaluate.sets.emoset.path=EmoSet-118K --config.evaluate.sets.emotion6.path=Emotion6

The paper's protocol is `configs/paper.py`, which runs on the same machines.

Behind the colon stands the machine, one of `MACHINES`; docs/train_3b.md says what fits. Another
policy of `qwen_vl.POLICIES` may follow: `--config=configs/emoset.py:v5e-64,qwen3_vl_4b`. Both
folders as their authors publish them (docs/data.md). Look at the data first, with the same flags:
python -m emor3_jax.inspect --config=configs/emoset.py …
"""

from ml_collections import ConfigDict

from configs import gpu, tpu_v4, tpu_v5e, tpu_v5p, tpu_v6e
from emor3_jax.config import dataset
from emor3_jax.errors import UserError

MACHINES = {
    "v4-8": (tpu_v4, "chips=4"),
    "v5e-8": (tpu_v5e, "lora,chips=8"),
    "v5e-64": (tpu_v5e, "chips=64"),
    "v5p-8": (tpu_v5p, "chips=4"),
    "v6e-8": (tpu_v6e, "chips=8"),
    "h100-1": (gpu, "gpus=1"),
    "h100-8": (gpu, "gpus=8"),
    "h200-1": (gpu, "gpus=1,memory=141"),
}
"""Name of a topology, as `emor3_jax.compile` knows it → config of the machine, and its options.
"h100" stands for any GPU of 80 GB, "h200" for one of 141."""


def get_config(options: str = "v5p-8") -> ConfigDict:
    """Returns the config for a machine.

    Args:
      options: one of `MACHINES`, and behind a comma one of `qwen_vl.POLICIES`; "3b" by default.

    Raises:
      UserError: if there is no such machine or policy.
    """
    machine, _, policy = options.partition(",")
    if machine not in MACHINES:
        raise UserError(f"machine {machine!r}: must be one of {', '.join(MACHINES)}")
    module, options = MACHINES[machine]
    config = module.get_config(",".join(filter(None, (options, policy))))
    config.data.train = dataset(kind="emoset", split="train", subset=2000)
    config.data.sort_by_size = True
    config.evaluate.sets = ConfigDict()
    config.evaluate.sets.emoset = dataset(kind="emoset", split="test")
    config.evaluate.sets.emotion6 = dataset(kind="emotion6", split="whole")
    return config
