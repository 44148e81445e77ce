"""EMO-R3 on Qwen2.5-VL-3B or 7B at the release's settings, on TPU 7x slices (192 GB a chip).

python -m emor3_jax.train --config=configs/tpu_v7x.py --workdir=DIR \\
    --config.data.train.path=TRAIN.parquet \\
    --config.evaluate.sets.validation.path=VALIDATION.parquet

`--config=configs/tpu_v7x.py:7b,chips=32` takes the 7B on 32 chips.

Laid out by hand after the 3B on v4; what has been compiled is in docs/results/compile.md, and
`python -m emor3_jax.compile --config=configs/tpu_v7x.py --topology=tpu7x-8` compiles the rest.
"""

from ml_collections import ConfigDict

from configs.qwen2_5_vl_3b import Layout, on_slice

LAYOUTS = {
    "3b": Layout(chips=4, slots=16, refill=4, micro=2, devices=2),
    "7b": Layout(chips=4, slots=8, refill=4, devices=2),
}


def get_config(options: str = "3b") -> ConfigDict:
    """Returns the config; options as of `on_slice`."""
    return on_slice(options, LAYOUTS)
