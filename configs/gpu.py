"""EMO-R3 on Qwen2.5-VL-3B on one machine with GPUs: 8 or 1 of 80 GB, or 1 of 141 GB.

python -m emor3_jax.train --config=configs/gpu.py:gpus=1 --workdir=DIR \\
    --config.data.train.path=TRAIN.parquet \\
    --config.evaluate.sets.validation.path=VALIDATION.parquet

| behind the colon | trains | prompts a step |
|---|---|---:|
| `gpus=8`, the default | all parameters | 128 |
| `gpus=1` | adapters: the optimizer of all parameters alone would take 30 of 80 GB | 64 |
| `gpus=1,memory=141` | all parameters; of Qwen2.5-VL-7B and Qwen3-VL-8B adapters (1) | 64 |

1. Their training would take 18 bytes a parameter: 149 and 158 GB.

`lora` behind a comma takes adapters anyway. Of the release's settings, prompts a step (512) and
image size differ. What XLA's compiler for GPUs says of the memory is in docs/train_3b.md; nothing
has been run on these machines.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from configs.qwen_vl import POLICIES, choose_policy, read_options, single_host, use_adapters
from emor3_jax.errors import UserError


class InFlight(NamedTuple):
    """Prompts and responses that one GPU has in flight.

    Attributes:
      slots: prompts.
      lanes: responses.
      refill: prompts that are admitted together, and whose responses are judged together.
    """

    slots: int
    lanes: int
    refill: int


IN_FLIGHT = {
    "7b": InFlight(slots=16, lanes=128, refill=4),
    "qwen3_vl_2b": InFlight(slots=16, lanes=96, refill=4),
    "qwen3_vl_4b": InFlight(slots=16, lanes=64, refill=2),
    "qwen3_vl_8b": InFlight(slots=16, lanes=48, refill=2),
}
"""Of the policies whose weights, or cache for a token, leave less room than the 3B's."""


def get_config(options: str = "gpus=8") -> ConfigDict:
    """Returns the config.

    Args:
      options: see the module.

    Raises:
      UserError: if an option is unknown.
    """
    chosen, numbers = read_options(options, ("lora", *POLICIES), {"gpus": 8, "memory": 80})
    gpus = numbers["gpus"]
    if gpus not in (1, 8) or numbers["memory"] not in (80, 141):
        raise UserError(f"--config=…:{options}: gpus must be 1 or 8, memory 80 or 141")
    config = single_host(prompts=128 if gpus == 8 else 64, max_tokens=2048)
    policy = next((name for name in POLICIES if name in chosen), "3b")
    choose_policy(config, policy)
    config.data.image_windows = (32, 48)
    config.mesh.fsdp = gpus
    config.rollout.lanes = 128 * gpus
    if policy in IN_FLIGHT:
        for name, size in IN_FLIGHT[policy]._asdict().items():
            config.rollout[name] = size * gpus
    elif gpus == 1:
        config.rollout.slots, config.rollout.refill = 32, 8
    if gpus == 1:
        config.policy_update.micro_prompts = 2
        config.evaluate.prompts = 8
        if numbers["memory"] == 80 or policy in ("7b", "qwen3_vl_8b"):
            chosen.add("lora")
    if "lora" in chosen:
        use_adapters(config)
    return config
