"""EMO-R3 on Qwen2.5-VL-3B or 7B at the release's settings, on TPU v5p slices (95 GB a chip).

python -m emor3_jax.train --config=configs/tpu_v5p.py --workdir=DIR \\
    --config.data.train.path=TRAIN.parquet \\
    --config.evaluate.sets.validation.path=VALIDATION.parquet

`--config=configs/tpu_v5p.py:7b,chips=32` takes the 7B on 32 chips.

By the TPU's compiler 3B and 7B fit a v5p-8 (4 chips). Memory by program, and what has not been
compiled since sizes here changed: docs/results/compile.md.
"""

from ml_collections import ConfigDict

from configs.qwen_vl import Layout, on_slice

LAYOUTS = {
    "3b": Layout(chips=4, tensor=1, most=4, slots=64, lanes=128, refill=4, micro=2),
    "7b": Layout(chips=4, tensor=1, most=4, slots=32, lanes=64, refill=4),
    "qwen3_vl_2b": Layout(chips=4, tensor=1, slots=64, lanes=128, refill=4, micro=2),
    "qwen3_vl_4b": Layout(chips=4, tensor=1, slots=32, lanes=64, refill=4),
    "qwen3_vl_8b": Layout(chips=4, slots=16, lanes=32, refill=4),
}


def get_config(options: str = "3b") -> ConfigDict:
    """Returns the config; options as of `on_slice`."""
    return on_slice(options, LAYOUTS)
