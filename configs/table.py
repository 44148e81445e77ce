"""The rows of the paper's table, each a config of its own, on EmoScenes at one budget.

python -m emor3_jax.train --config=configs/table.py:grpo --workdir=runs/table/grpo
python -m emor3_jax.evaluate --config=configs/table.py:base --workdir=runs/table/base

A row is named behind the colon; `ROWS` says what each changes. Rows build on cpu_demo, with half of
its prompts and 60 steps, so that a run takes about three minutes on two cores, and are evaluated
alike: on both test sets, with both reflections wherever the prompt asks for steps, which the base
policy judges, whatever the row trained. `python -m benchmarks.paper_table` runs all of them.

| row | program | what it is |
|---|---|---|
| base | evaluate | the base policy before training, asked for SET |
| sft | sft | labels alone: the boxed label to the image's question, no SET |
| cold_start | sft | Cold-Start-Emo: 8 steps of it, on 128 of 256 images |
| grpo | train | GRPO: the box alone is rewarded, no SET, no reflection |
| dapo | train | the same with DAPO's clip, dynamic sampling and over-long penalty, no KL |
| grpo_set | train | GRPO on SET: its format is rewarded too |
| grpo_set_coherence, grpo_set_consistency | train | and one of the two reflections |
| emo_r3 | train | EMO-R3: SET and both reflections |
| emo_r3_gdpo | train | and each term of its reward normalised by itself (GDPO) |
| emo_r3_cispo, emo_r3_sapo | train | and another surrogate |
| emo_r3_judge | train | and the frozen reference as the judge of the reflections in training |
| emo_r3_gdpo_judge | train | both: GDPO, and the reference as judge |

"With Cold-Start-Emo" is a row that starts from another policy:

python -m emor3_jax.sft --config=configs/table.py:cold_start --workdir=runs/table/cold_start
python -m emor3_jax.train --config=configs/table.py:emo_r3 --workdir=runs/table/emo_r3_cold \\
    --config.policy.path=runs/table/cold_start/policy
"""

import math
from collections.abc import Callable

from ml_collections import ConfigDict

from configs import cpu_demo
from emor3_jax.config import EMBEDDED
from emor3_jax.errors import UserError


def _sft(config: ConfigDict) -> None:
    _labels(config)
    # A label says more than a reward. The best on the validation images of 2e-4 (53 %), 6e-4
    # (62 %) and 1.5e-3 (59 %).
    config.policy_update.learning_rate = 6e-4


def _cold_start(config: ConfigDict) -> None:
    _labels(config)
    # A light touch. Learned as the answer to SET's question, so many labels would unlearn all
    # steps; a learning rate of 1e-3 does so even with a question of their own.
    config.data.train.subset = 256
    config.steps = 8


def _labels(config: ConfigDict) -> None:
    # Labels have no steps: the question asks for none, and nothing is there to reflect on.
    config.data.templates.set = "tiny_direct"
    config.reward.format = "boxed"
    config.reflect.enabled = False
    config.evaluate.reflect = False
    config.sft.target = "label"
    config.policy_update.response_lengths = (8, 64)
    config.policy_update.entropy = False


def _grpo(config: ConfigDict) -> None:
    # The base policy never learned another question than SET's: asked for the box alone, it boxes
    # a label in 38 % of its responses. So the question stays, as the free thinking of a large
    # policy would, and what is written before the box is not rewarded.
    config.reward.format = "boxed"
    config.reflect.enabled = False


def _dapo(config: ConfigDict) -> None:
    _grpo(config)
    learning = config.policy_update
    learning.clip_low, learning.clip_high, learning.clip_dual = 0.2, 0.28, math.inf
    learning.kl = "off"
    learning.mean = "token"
    config.rollout.resample = 3
    # A fifth of the longest response, as in the paper.
    config.reward.overlong = config.rollout.max_tokens // 5


def _grpo_set(config: ConfigDict) -> None:
    config.reflect.enabled = False


def _coherence(config: ConfigDict) -> None:
    config.reward.reflection = "coherence"


def _consistency(config: ConfigDict) -> None:
    config.reward.reflection = "consistency"


def _gdpo(config: ConfigDict) -> None:
    config.policy_update.advantage = "gdpo"


def _cispo(config: ConfigDict) -> None:
    # The KL stays, so that the surrogate alone differs.
    config.policy_update.surrogate = "cispo"
    config.policy_update.clip_low, config.policy_update.clip_high = 1.0, 4.0


def _sapo(config: ConfigDict) -> None:
    config.policy_update.surrogate, config.policy_update.mean = "sapo", "seq"
    config.policy_update.sapo_positive, config.policy_update.sapo_negative = 1.0, 1.05


def _judge(config: ConfigDict) -> None:
    config.reflect.judge = "reference"


def _gdpo_judge(config: ConfigDict) -> None:
    _gdpo(config)
    _judge(config)


def _nothing(config: ConfigDict) -> None:
    del config


ROWS: dict[str, Callable[[ConfigDict], None]] = {
    "base": _nothing,
    "sft": _sft,
    "cold_start": _cold_start,
    "grpo": _grpo,
    "dapo": _dapo,
    "grpo_set": _grpo_set,
    "grpo_set_coherence": _coherence,
    "grpo_set_consistency": _consistency,
    "emo_r3": _nothing,
    "emo_r3_gdpo": _gdpo,
    "emo_r3_cispo": _cispo,
    "emo_r3_sapo": _sapo,
    "emo_r3_judge": _judge,
    "emo_r3_gdpo_judge": _gdpo_judge,
}
"""Name of a row → what it changes of EMO-R3."""


def get_config(row: str = "emo_r3") -> ConfigDict:
    """Returns the config of a row.

    Args:
      row: one of `ROWS`.

    Raises:
      UserError: if there is no such row.
    """
    if row not in ROWS:
        raise UserError(f"row {row!r}: must be one of {', '.join(ROWS)}")
    config = cpu_demo.get_config()
    config.steps = 60
    config.rollout.prompts = 16
    config.policy_update.prompts = 8
    config.evaluate.every = 20
    config.evaluate.during = config.evaluate.before = 100
    config.checkpoint.every = 20
    config.evaluate.reflect = True
    # A yardstick that does not move: the policy that all rows begin with.
    config.evaluate.judge = EMBEDDED
    config.evaluate.likelihood = False
    ROWS[row](config)
    return config
