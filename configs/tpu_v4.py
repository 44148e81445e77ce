"""EMO-R3 on Qwen2.5-VL-3B or 7B at the release's settings, on TPU v4 slices (32 GB a chip).

python -m emor3_jax.train --config=configs/tpu_v4.py --workdir=DIR \\
    --config.data.train.path=TRAIN.parquet \\
    --config.evaluate.sets.validation.path=VALIDATION.parquet

`--config=configs/tpu_v4.py:7b,chips=32` takes the 7B on 32 chips.

What the compiler reported (python -m emor3_jax.compile, libtpu 0.0.52, 2026-11-27): the 3B fits a
v4-8 (4 chips), where growing the cache needs the most of all its programs, 28.63 of 30.75 GiB a
device; the 7B a v4-32 (16 chips), where the reflection on consistency does, 22.61. It does not fit
a v4-16 (the weight sync needs 31.38). More: docs/results/compile.md.
"""

from ml_collections import ConfigDict

from configs.qwen_vl import Layout, on_slice

LAYOUTS = {
    "3b": Layout(chips=4),
    "7b": Layout(chips=16, tensor=2),
    "qwen3_vl_2b": Layout(chips=4, tensor=2),
    "qwen3_vl_4b": Layout(chips=8, tensor=2),
    "qwen3_vl_8b": Layout(chips=16, tensor=4),
}


def get_config(options: str = "3b") -> ConfigDict:
    """Returns the config; options as of `on_slice`."""
    return on_slice(options, LAYOUTS)
