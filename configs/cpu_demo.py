"""The main job on a laptop: EMO-R3 on EmoScenes with the embedded base policy, no download.

python -m emor3_jax.train --config=configs/cpu_demo.py --workdir=runs/cpu_demo

`--config=configs/cpu_demo.py:qwen3_vl` takes a base policy of Qwen3-VL's architecture,
which is trained first.
"""

from ml_collections import ConfigDict

from emor3_jax.config import dataset, default


def get_config(family: str = "qwen2_5_vl") -> ConfigDict:
    """Returns the config for a family of policies."""
    config = default()
    config.policy.embedded_family = family
    config.steps = 64
    config.policy.dtype = "float32"

    config.data.prompt_lengths = (80,)
    config.data.image_windows = (1,)
    for name in ("set", "coherence", "consistency"):
        config.data.templates[name] = "tiny"

    config.rollout.prompts = 32
    config.rollout.responses = 8
    config.rollout.max_tokens = 64
    config.rollout.block = 64
    config.reflect.max_tokens = 3
    config.reflect.text_lengths = (40, 64)

    config.policy_update.prompts = 16
    config.policy_update.micro_prompts = 8
    config.policy_update.learning_rate = 3e-4
    config.policy_update.warmup_steps = 5
    # A rate this high, kept to the end, would wear down the policy's judgement of its own steps;
    # so would a weaker pull to the reference than this, three times the release's.
    config.policy_update.schedule = "linear"
    config.policy_update.kl_coef = 0.03
    config.policy_update.remat = "none"
    config.policy_update.entropy = True
    config.policy_update.response_lengths = (48, 64)

    config.evaluate.sets.emoscenes = dataset(split="test", subset=400)
    config.evaluate.sets.shifted = dataset(split="shifted_test", subset=300, labels="emotion6")
    # As in training: how often the policy does the right thing, not only its likeliest response.
    config.evaluate.temperature = 1.0
    # A confidence of each answer, before and after training.
    config.evaluate.likelihood = True
    config.evaluate.every = 16
    config.evaluate.during = 200
    config.evaluate.prompts = 100
    config.checkpoint.every = 32
    return config
