"""EMO-R3 on Qwen2.5-VL-3B at the release's settings: what the configs of real accelerators share.

Give the policy and the data on the command line:

python -m emor3_jax.train --config=configs/tpu_v5p.py --workdir=runs/emoset \\
    --config.policy.path=Qwen/Qwen2.5-VL-3B-Instruct \\
    --config.data.train.path=emoset_train.parquet \\
    --config.evaluate.sets.validation.path=emoset_validation.parquet

The release scales images to 262,144 to 4,194,304 pixels, and cuts prompts at 2048 tokens,
which an image of 1.5 million pixels fills by itself. The files for one machine stop at 401,408
pixels (512 image tokens).

`on_slice` makes the configs of TPU slices, for `python -m emor3_jax.compile`; what fits where is in
docs/results/compile.md. `single_host` makes smaller runs, of which nothing has been compiled. By
hand: policy, reference, AdamW's two moments and gradients take 18 bytes for each of 3.75 billion
parameters over all devices, and each token in flight 36,864 bytes of bfloat16 cache.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from emor3_jax.config import dataset, default


def get_config() -> ConfigDict:
    """Returns the config: the defaults, which are the release's settings, on parquet files."""
    config = default()
    # 20 epochs over about 2,000 training images.
    config.steps = 78
    config.policy.path = ""
    config.data.min_pixels = 262_144
    config.data.max_pixels = 4_194_304
    config.data.train = dataset(kind="parquet", labels="mikels8")
    config.data.workers = 8
    config.rollout.slots, config.rollout.refill = 64, 16
    # All images of the next step: 2.4 MB each at 401,408 pixels, 25 MB at the largest size.
    config.data.read_ahead = 512
    config.evaluate.sets.validation = dataset(kind="parquet", labels="mikels8")
    # A step takes minutes, and spot machines are gone half a minute after the notice.
    config.checkpoint.minutes = 5.0
    return config


def single_host(prompts: int, max_tokens: int) -> ConfigDict:
    """Returns the config for one machine: fewer prompts a step, shorter responses and prompts.

    Args:
      prompts: B, prompts of a rollout; an update takes half of them, as in the release.
      max_tokens: T, at most 2048.
    """
    config = get_config()
    config.steps = 20 * 2000 // prompts
    config.data.max_pixels = 401_408
    config.data.prompt_lengths = (640, 896)
    config.data.image_windows = (32, 48)
    config.rollout.prompts = prompts
    config.rollout.slots = config.rollout.refill = 0
    config.rollout.max_tokens = max_tokens
    config.reflect.text_lengths = tuple(s for s in (128, 256, 512, 1024) if s <= max_tokens)
    config.policy_update.prompts = prompts // 2
    config.policy_update.micro_prompts = 8
    config.policy_update.response_lengths = tuple(
        s for s in (256, 512, 1024, 2048) if s <= max_tokens
    )
    config.evaluate.prompts = prompts
    return config


FSDP = 16
"""Parts that a matrix is cut into at most; more chips hold copies (mesh.data). Where 2048 columns
were cut into 64 parts, much narrower than a TPU's vector of 128, the compiler did not gather them
but summed whole matrices, and twice as much was moved."""


class Layout(NamedTuple):
    """How a policy lies on slices of a kind.

    Attributes:
      chips: of the smallest slice that the compiler says it fits, the default.
      tensor: mesh.tensor; the rest of a slice is mesh.fsdp, up to `FSDP`, then mesh.data.
      slots, refill, micro: prompts in flight, let in at once, and of a micro-batch, for each part
        that the mesh cuts a batch into.
      devices: XLA's devices of a chip.
    """

    chips: int
    tensor: int = 1
    slots: int = 4
    refill: int = 2
    micro: int = 1
    devices: int = 1


def on_slice(options: str, layouts: dict[str, Layout]) -> ConfigDict:
    """Returns the release's run on TPU slices: 512 prompts a step, 2048 + 2048 tokens, G = 8.

    Images are scaled to 262,144 to 4,194,304 pixels as in the release; one whose prompt is over
    2048 tokens (about 1.5 million pixels), or that has over 144 windows, is dropped and counted.

    Args:
      options: "3b" or "7b", "chips=16", "slices=2" (chips are those of all slices), joined by
        commas.
      layouts: size of the policy → how it lies.

    Raises:
      ValueError: if an option is unknown, or the prompts do not divide over so many chips.
    """
    size, numbers = "3b", {"slices": 1}
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        if option in layouts:
            size = option
        elif key in ("chips", "slices") and value.isdigit() and int(value):
            numbers[key] = int(value)
        else:
            known = ", ".join([*layouts, "chips=16", "slices=2"])
            raise ValueError(f"--config=…:{option}: must be of {known}, joined by commas")
    layout = layouts[size]
    devices = numbers.get("chips", layout.chips) * layout.devices
    parts = devices // layout.tensor
    config = get_config()
    if parts < 1 or config.policy_update.prompts % parts:
        raise ValueError(
            f"chips={devices // layout.devices}: {parts} parts must divide the "
            f"{config.policy_update.prompts} prompts of an update; take a power of two"
        )
    config.policy.path = f"Qwen/Qwen2.5-VL-{size.upper()}-Instruct"
    config.data.image_windows = (64, 96, 144)
    copies = max(parts // numbers["slices"] // FSDP, 1)
    config.mesh.data, config.mesh.fsdp = numbers["slices"] * copies, -1
    config.mesh.tensor = layout.tensor
    config.rollout.slots = min(layout.slots * parts, config.rollout.prompts)
    config.rollout.refill = min(layout.refill * parts, config.rollout.slots)
    config.policy_update.micro_prompts = min(layout.micro * parts, config.policy_update.prompts)
    # All of an evaluation's batch is prefilled and judged at once.
    config.evaluate.prompts = config.rollout.refill
    return config
