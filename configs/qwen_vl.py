"""EMO-R3 on published policies at the release's settings: what configs of accelerators share.

Give the policy and the data on the command line:

python -m emor3_jax.train --config=configs/tpu_v5p.py --workdir=runs/emoset \\
    --config.policy.path=Qwen/Qwen2.5-VL-3B-Instruct \\
    --config.data.train.path=emoset_train.parquet \\
    --config.evaluate.sets.validation.path=emoset_validation.parquet

The release scales images to 262,144 to 4,194,304 pixels, and cuts prompts at 2048 tokens,
which an image of 1.5 million pixels fills by itself. The files for one machine stop at 401,408
pixels (512 image tokens).

`on_slice` makes the configs of TPU slices, for `python -m emor3_jax.compile`; what fits where is in
docs/results/compile.md. `single_host` makes smaller runs, those of `configs/gpu.py`; see
docs/train_3b.md. By hand: policy, reference, AdamW's two moments and gradients take 18 bytes for
each of 3.75 billion parameters over all devices, and each token in flight 36,864 bytes of bfloat16
cache.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from ml_collections import ConfigDict

from emor3_jax.config import dataset, default
from emor3_jax.errors import UserError


def get_config() -> ConfigDict:
    """Returns the config: the defaults, which are the release's settings, on parquet files."""
    config = default()
    # 20 epochs over about 2,000 training images; profile="release" has them after 60 steps.
    config.steps = 78
    config.policy.path = ""
    config.data.min_pixels = 262_144
    config.data.max_pixels = 4_194_304
    config.data.train = dataset(kind="parquet", labels="mikels8")
    config.data.workers = 8
    config.rollout.slots, config.rollout.refill, config.rollout.lanes = 64, 16, 128
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
"""Parts that mesh.fsdp cuts a matrix into at most; more parts hold copies (mesh.data). Where 2048
columns were cut into 64 parts, much narrower than a TPU's vector of 128, the compiler did not
gather them but summed whole matrices, and twice as much was moved."""


def use_adapters(config: ConfigDict) -> None:
    """Trains adapters of rank 64 in all layers of the decoder in the place of all parameters.

    Their learning rate is ten times that of all parameters, and their scale stays near 1, by the
    rule of thumb of https://thinkingmachines.ai/blog/lora; nothing of it has been tuned here.
    """
    config.policy.lora_rank, config.policy.lora_alpha = 64, 64.0
    config.policy.lora_modules = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )
    config.policy_update.learning_rate *= 10


def read_options(
    options: str, words: Iterable[str], numbers: dict[str, int]
) -> tuple[set[str], dict[str, int]]:
    """Returns the options behind the colon of a config: the words, and all numbers.

    Args:
      options: joined by commas, such as "7b,chips=16".
      words: that are known.
      numbers: known keys → what they are by default.

    Raises:
      UserError: if an option is unknown, given twice, or there are several policies.
    """
    chosen, found, given = set(), dict(numbers), []
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        kind = "the policy" if option in POLICIES else key
        if kind in given:
            raise UserError(f"--config=…:{option}: {kind} is given twice; give it once")
        given.append(kind)
        if option in words:
            chosen.add(option)
        elif key in numbers and re.fullmatch("[1-9][0-9]{0,8}", value):
            found[key] = int(value)
        else:
            known = ", ".join([*words, *(f"{key}=…" for key in numbers)])
            raise UserError(f"--config=…:{option}: must be of {known}, joined by commas")
    return chosen, found


POLICIES = {
    "3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen3_vl_2b": "Qwen/Qwen3-VL-2B-Instruct",
    "qwen3_vl_4b": "Qwen/Qwen3-VL-4B-Instruct",
    "qwen3_vl_8b": "Qwen/Qwen3-VL-8B-Instruct",
}
"""Option behind the colon of a config → id on the hub."""


def choose_policy(config: ConfigDict, name: str) -> None:
    """Sets the policy of an option of `POLICIES`, and the sizes of its images.

    A window holds 64 patches, of 14 x 14 pixels in Qwen2.5-VL and 16 x 16 in Qwen3-VL, whose
    windows have no gaps: the largest image of a prompt of 2048 tokens takes 144 of those and 128 of
    these.
    """
    config.policy.path = POLICIES[name]
    config.data.image_windows = (64, 96, 128) if name.startswith("qwen3") else (64, 96, 144)


class Layout(NamedTuple):
    """How a policy lies on slices of a kind.

    Attributes:
      chips: of the smallest slice that the compiler says it fits, the default.
      tensor: mesh.tensor, on slices of up to `FSDP` parts; the rest of a slice is mesh.fsdp.
      most: mesh.tensor at the most: on larger slices it is doubled until there are `FSDP` parts.
      slots, lanes: prompts and responses in flight, for each device. A prompt stays until the
        longest of its responses ends, about four times as long as one response takes: so there are
        four times as many slots as G lanes each would fill.
      refill, micro: prompts that are admitted at once, and prompts of a micro-batch, for each part
        that the mesh cuts a batch into.
      devices: XLA's devices of a chip.
    """

    chips: int
    tensor: int = 2
    most: int = 8
    slots: int = 16
    lanes: int = 32
    refill: int = 2
    micro: int = 1
    devices: int = 1

    def tensor_on(self, devices: int, slices: int = 1) -> int:
        """Returns mesh.tensor on so many devices of all slices; it stays within a slice.

        A decoded token reads all weights, of which a device has the part that `tensor` leaves it,
        and all parts decode until the one with the most tokens has ended: of 32 parts of a v5e-64
        the lanes sampled in 66 % of the steps, of 16 in 77 (`python -m benchmarks.simulate`).
        """
        tensor, within = self.tensor, max(devices // slices, 1)
        while tensor > within:
            tensor //= 2
        while devices // tensor > FSDP and 2 * tensor <= min(self.most, within):
            tensor *= 2
        return tensor


def on_slice(options: str, layouts: dict[str, Layout]) -> ConfigDict:
    """Returns the release's run on TPU slices: 512 prompts a step, 2048 + 2048 tokens, G = 8.

    Images are scaled to 262,144 to 4,194,304 pixels as in the release; one whose prompt is over
    2048 tokens (about 1.5 million pixels), or that has over 144 windows, is dropped and counted.

    Args:
      options: one of `POLICIES`, "lora" for adapters in the place of all parameters, "chips=16",
        "slices=2" (chips are those of all slices), joined by commas.
      layouts: size of the policy → how it lies.

    Raises:
      UserError: if an option is unknown, chips or slices are no power of two, or the prompts do not
        divide over so many chips.
    """
    chosen, numbers = read_options(options, (*layouts, "lora"), {"chips": 0, "slices": 1})
    size = next((size for size in layouts if size in chosen), "3b")
    layout = layouts[size]
    chips, slices = numbers["chips"] or layout.chips, numbers["slices"]
    devices = chips * layout.devices
    tensor = layout.tensor_on(devices, slices)
    parts = devices // tensor
    config = get_config()
    if devices % tensor or config.policy_update.prompts % parts:
        raise UserError(
            f"chips={chips}: must be a power of two whose parts (devices over mesh.tensor={tensor})"
            f" divide the {config.policy_update.prompts} prompts of an update"
        )
    if chips % slices:
        raise UserError(
            f"slices={slices}: must be a power of two that divides the {chips} chips of all slices "
            f"together, as in chips={2 * layout.chips},slices=2"
        )
    choose_policy(config, size)
    copies = max(parts // slices // FSDP, 1)
    config.mesh.data, config.mesh.fsdp = slices * copies, -1
    config.mesh.tensor = tensor
    config.rollout.slots = min(layout.slots * devices, config.rollout.prompts)
    config.rollout.refill = min(layout.refill * parts, config.rollout.slots)
    config.rollout.lanes = layout.lanes * devices
    config.policy_update.micro_prompts = min(layout.micro * parts, config.policy_update.prompts)
    # Many parts wait for the one with the most tokens.
    config.policy_update.balance = True
    # One response to a row, so as many lanes as slots.
    config.evaluate.refill = config.rollout.refill
    config.evaluate.prompts = max(256, config.rollout.refill)
    config.evaluate.slots = min(config.rollout.slots, config.evaluate.prompts)
    if "lora" in chosen:
        use_adapters(config)
    return config
