"""EMO-R3 and its rivals on real faces: parquet files in the release's schema, a small policy.

First a base policy, which starts with vision pretraining on faces; then training from it, by
EMO-R3, or by GRPO (`:grpo`) or SFT on labels (`:sft`) as in `configs/table.py`:

python -m emor3_jax.embedded.base_policy --config=configs/fer2013.py:base --workdir=runs/fer_base \\
    --config.data.path=fer2013_train.parquet
python -m emor3_jax.train --config=configs/fer2013.py --workdir=runs/fer \\
    --config.policy.path=runs/fer_base --config.data.train.path=fer2013_train.parquet \\
    --config.evaluate.sets.fer2013.path=fer2013_validation.parquet
"""

from ml_collections import ConfigDict

from configs import cpu_demo, table
from emor3_jax.config import base_policy, dataset
from emor3_jax.errors import UserError


def get_config(row: str = "emo_r3") -> ConfigDict:
    """Returns the config of a row of `table.ROWS`; for "base", that of the base policy itself.

    Raises:
      UserError: if there is no such row.
    """
    if row == "base":
        config = base_policy()
        config.data.kind = "faces"
        config.data.limit = 28709
        config.data.size = 48
        config.data.warp = 0.8
        config.model.patch = 8
        config.model.window = 48
        config.model.vision_layers = 4
        config.model.vision_heads = 8
        config.model.width = 128
        config.model.heads = 4
        # 37 epochs.
        config.look.steps = 4000
        config.look.mix = 0.2
        config.look.erase = 0.2
        config.steps = 900
        config.learning_rate = 1.5e-3
        # Training on QA examples must not undo vision pretraining.
        config.rates.tower = 0.1
        return config
    if row not in table.ROWS:
        raise UserError(f"row {row!r}: must be one of {', '.join(table.ROWS)}")
    config = cpu_demo.get_config()
    config.steps = 600
    # Named on the command line: the embedded policy knows drawn scenes, not faces.
    config.policy.path = ""
    config.data.prompt_lengths = (128,)
    config.data.train = dataset(kind="parquet", labels="fer7")
    config.rollout.max_tokens = 72
    config.policy_update.response_lengths = (56, 64, 72)
    config.evaluate.sets = ConfigDict()
    config.evaluate.sets.fer2013 = dataset(kind="parquet", labels="fer7")
    config.evaluate.every = 100
    config.evaluate.during = 500
    config.evaluate.reflect = True
    config.evaluate.likelihood = False
    table.ROWS[row](config)
    return config
