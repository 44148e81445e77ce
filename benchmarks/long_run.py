"""Does a long run grow? python -m benchmarks.long_run [--steps N] [--every N]

Trains a tiny policy for many steps in a process of its own, with checkpoints and evaluations as a
real run has them, and looks at that process from outside: resident memory, open files, threads, and
the time of a step, by intervals.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import NamedTuple

from benchmarks import small_policy

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "vision_config": {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [0],
        "out_hidden_size": 64,
    },
}
"""A policy of which a step takes milliseconds."""

CONFIG = """
from emor3_jax.config import dataset, default

def get_config():
    config = default()
    config.policy.path, config.policy.dtype = "{folder}/policy", "float32"
    rows = dict(kind="parquet", path="{folder}/rows.parquet")
    config.data.train = dataset(**rows)
    config.data.min_pixels = config.data.max_pixels = 112**2
    config.data.prompt_lengths, config.data.image_windows = (128, 256), (1,)
    for name in ("set", "coherence", "consistency"):
        config.data.templates[name] = "tiny"
    config.rollout.prompts, config.rollout.responses, config.rollout.max_tokens = 4, 2, 8
    config.reflect.max_tokens, config.reflect.text_lengths = 8, (8,)
    config.policy_update.prompts = config.policy_update.micro_prompts = 4
    config.policy_update.response_lengths = (8,)
    config.evaluate.sets.rows = dataset(**rows)
    config.evaluate.prompts, config.evaluate.every, config.evaluate.during = 4, 200, 8
    config.steps, config.checkpoint.every = {steps}, 100
    config.log.every = config.log.samples_every = 100
    config.log.compile_cache = "{cache}"
    # A random policy never earns a reward: runs of this kind are what guards end.
    config.guard.warn_after = config.guard.stop_after = 0
    return config
"""
"""As a real run has them: checkpoints, evaluations, samples, events and reflections."""


class Seen(NamedTuple):
    """A process at a moment.

    Attributes:
      step: the last that was logged.
      memory: resident, in MiB.
      files, threads: open, and running.
    """

    step: int
    memory: float
    files: int
    threads: int


def watch(process: subprocess.Popen, metrics: Path, seconds: float = 0.5) -> Iterator[Seen]:
    """Yields a process as it is, again and again until it ends."""
    proc, page = Path(f"/proc/{process.pid}"), os.sysconf("SC_PAGE_SIZE")
    while process.poll() is None:
        time.sleep(seconds)
        try:
            pages = int((proc / "statm").read_text().split()[1])
            files, threads = (len(list((proc / name).iterdir())) for name in ("fd", "task"))
        except (OSError, IndexError):
            continue
        lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        yield Seen(max(lines - 1, 0), pages * page / 2**20, files, threads)


def table(seen: list[Seen], rows: list[dict[str, float]], every: int) -> Iterator[str]:
    """Yields the lines of a table by intervals of steps."""
    yield "| steps | step, median ms | longest ms | memory, mean MiB | highest | files | threads |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for start in range(1, len(rows), every):
        part = [1000 * row["time/step_s"] for row in rows if start <= row["step"] < start + every]
        there = [each for each in seen if start <= each.step < start + every]
        if not part or not there:
            continue
        memory = [each.memory for each in there]
        files, threads = (max(getattr(x, name) for x in there) for name in ("files", "threads"))
        last = start + len(part) - 1
        yield (
            f"| {start}–{last} | {statistics.median(part):.0f} | {max(part):.0f} | "
            f"{statistics.mean(memory):.0f} | {max(memory):.0f} | {files} | {threads} |"
        )


def main() -> None:
    """Runs and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_run")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=200, help="steps of an interval")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, root = Path(name), Path(__file__).parents[1]
        small_policy.write_policy(folder / "policy", changes=TINY)
        small_policy.write_rows(folder / "rows.parquet", 112, 32)
        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", folder / "compiled")
        text = CONFIG.format(folder=folder, steps=given.steps, cache=cache)
        (folder / "config.py").write_text(text)
        command = [sys.executable, "-m", "emor3_jax.train", f"--config={folder / 'config.py'}"]
        command.append(f"--workdir={folder / 'run'}")
        started = time.monotonic()
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(command, cwd=root, stdout=log, stderr=subprocess.STDOUT)
            metrics = folder / "run" / "metrics.jsonl"
            seen = list(watch(process, metrics))
        if process.returncode:
            raise SystemExit((folder / "log").read_text()[-3000:])
        rows = [json.loads(line) for line in metrics.open()]
    for line in table(seen, rows[1:], given.every):
        print(line)
    took = time.monotonic() - started
    print(f"\n{os.cpu_count()} cores, {platform.machine()}, {date.today()}, {took:.0f} s")


if __name__ == "__main__":
    main()
