"""What a step of the demo takes beside what its arithmetic needs, and what settings change.

    python -m benchmarks.demo_step [--steps 12]

Prints the rate of a large float32 product on this machine; then the start of a run with an empty
compile cache up to its first step, and the median seconds of its later steps by phase: without and
with XLA's flags of the `Makefile`, and with these where glibc gives back what is freed beyond half
a gigabyte, as the `Makefile` once let it. Each is a run of `configs/cpu_demo.py` by the public
program, without an evaluation before training. The environment of the `Makefile` should be set.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.options import whole
from emor3_jax.io.metrics import PHASES

SIDE = 2048
_SKIPPED = 3
"""Steps at the beginning, which compile."""

GIVEN_BACK = {"MALLOC_TRIM_THRESHOLD_": str(2**29)}
"""By which glibc gives back what is freed beyond half a gigabyte."""


def product_rate() -> float:
    """Returns the FLOP/s of the best of nine products of two float32[SIDE, SIDE]."""
    x = jnp.ones((SIDE, SIDE), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(9):
        started = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2 * SIDE**3 / min(seconds)


def flags_of_makefile() -> str:
    """Returns the flags that `make demo` gives to XLA."""
    text = Path("Makefile").read_text()
    return re.search(r"^demo: export XLA_FLAGS \?= (.*)$", text, re.M)[1]


def run(settings: dict[str, str], steps: int, data: Path) -> list[dict[str, float]]:
    """Runs the demo; returns the metrics of each step, in which `start` is that of the run.

    Args:
      settings: of the environment.
      steps: to take.
      data: folder of drawn scenes, shared by runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        command = [sys.executable, "-m", "emor3_jax.train", "--config=configs/cpu_demo.py"]
        command += [f"--workdir={workdir}", f"--config.steps={steps}", "--config.evaluate.before=0"]
        command += [f"--config.log.compile_cache={folder}/cache", f"--config.data.folder={data}"]
        command += [f"--config.evaluate.sets.{name}.subset=8" for name in ("emoscenes", "shifted")]
        command += ["--config.evaluate.every=1000"]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"} | settings
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        printed = subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True
        ).stdout
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    minutes, seconds = re.search(r"^\[train (\d+):(\d+)\] step 1/", printed, re.M).groups()
    start = {"start": 60.0 * int(minutes) + int(seconds)}
    return [row | start for row in rows if "time/step_s" in row]


def line(name: str, rows: list[dict[str, float]]) -> str:
    """Returns a row of the table: the start, then medians of the steps that compile nothing."""
    rows, start = rows[_SKIPPED:], rows[0]["start"]
    found = [statistics.median(row[f"time/{phase}_s"] for row in rows) for phase in _phases(rows)]
    whole_step = statistics.median(row["time/step_s"] for row in rows)
    cells = [name, f"{start:.0f}", f"{whole_step:.2f}", *(f"{value:.2f}" for value in found)]
    return f"| {' | '.join(cells)} |"


def _phases(rows: list[dict[str, float]]) -> list[str]:
    return [phase for phase in PHASES if all(f"time/{phase}_s" in row for row in rows)]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=whole(_SKIPPED + 1), default=12)
    options = parser.parse_args()
    rate = product_rate()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        flags = {"XLA_FLAGS": flags_of_makefile()}
        runs = {
            "XLA's own flags": run({"XLA_FLAGS": ""}, options.steps, data),
            "flags of the Makefile": run(flags, options.steps, data),
            "these, memory given back": run(flags | GIVEN_BACK, options.steps, data),
        }
    rows = runs["flags of the Makefile"][_SKIPPED:]
    work = statistics.median(
        1e12 * row["throughput/tflops_per_s"] * row["time/step_s"] for row in rows
    )
    print(f"float32 product of {SIDE} x {SIDE}: {rate / 1e9:.0f} GFLOP/s, best of 9")
    print(f"a step needs {work / 1e12:.3f} TFLOP, which are {work / rate:.2f} s at that rate\n")
    print(f"| settings | start s | step s | {' | '.join(_phases(rows))} |")
    print("|---|---:|---:|" + "---:|" * len(_phases(rows)))
    for name, found in runs.items():
        print(line(name, found))


if __name__ == "__main__":
    main()
