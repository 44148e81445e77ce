"""EMO-R3 on Qwen2.5-VL-3B or 7B at the release's settings, on TPU v6e slices (32 GB a chip).

python -m emor3_jax.train --config=configs/tpu_v6e.py --workdir=DIR \\
    --config.data.train.path=TRAIN.parquet \\
    --config.evaluate.sets.validation.path=VALIDATION.parquet

`--config=configs/tpu_v6e.py:7b,chips=32` takes the 7B on 32 chips.

By the TPU's compiler the 3B fits a v6e-8, where the update needs the most, 22.3 of 31.24 GiB a
device; the 7B a v6e-16, and at the sizes of until 2026-11-30 not a v6e-8, where weight sync and
update were over. Memory by program, and what has not been compiled since sizes here changed:
docs/results/compile.md, docs/train_3b.md.
"""

from ml_collections import ConfigDict

from configs.qwen_vl import Layout, on_slice

LAYOUTS = {
    "3b": Layout(chips=8, most=4, micro=2),
    "7b": Layout(chips=16, tensor=4, most=4, slots=8, lanes=16),
    "qwen3_vl_2b": Layout(chips=8, micro=2),
    "qwen3_vl_4b": Layout(chips=8, slots=8, lanes=16),
    "qwen3_vl_8b": Layout(chips=16, tensor=4, slots=4, lanes=8),
}


def get_config(options: str = "3b") -> ConfigDict:
    """Returns the config; options as of `on_slice`."""
    return on_slice(options, LAYOUTS)
