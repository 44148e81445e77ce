"""The programs that a run compiles are those that its objects foretell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import compiler_flags

ROOT = Path(__file__).parents[2]

BUILT_IN = {
    # Weights and adapters of a run's start, one tensor at a time (models/weights.py).
    "<lambda>",
    "_normal",
    "true_divide",
    "write_layer",
    "copy",
    "_are_finite",
    # One response to each label, at the start (prepare/reachable.py).
    "ideal_scores",
    # Of a checkpoint: one number an array.
    "checksums",
    # Eager operations on keys and scalars.
    "_threefry_fold_in",
    "_threefry_seed",
    "_threefry_split",
    "broadcast_in_dim",
    "convert_element_type",
    "dynamic_slice",
    "gather",
    "slice",
    "squeeze",
    "stage",
    "unstack",
}
"""Programs that are no part of a step, or that hold no more than a key or a scalar."""


@pytest.mark.parametrize(
    "case", ["everything_else", pytest.param("adapters", marks=pytest.mark.long)]
)
def test_every_program_of_a_real_step_is_foretold(case: str, tmp_path: Path) -> None:
    environment = os.environ | {
        "XLA_FLAGS": compiler_flags.on_devices(8),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    command = [sys.executable, "-m", "support.real_step", str(tmp_path), case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    compiled, foretold = set(found["compiled"]), set(found["foretold"])
    assert compiled - foretold <= BUILT_IN
    # The step was one of those that shrink, admit and take out.
    assert {"shrink", "admit", "take_out", "resize_ring", "decode_block"} <= compiled
    assert {"add_micro_batch", "apply_update"} <= compiled
