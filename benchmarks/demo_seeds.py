"""The main job over several seeds: python -m benchmarks.demo_seeds --seeds 0 1 2

Each seed runs `configs/cpu_demo.py` in its own process from the same base policy, then the table
below is printed, to be kept under docs/results. Finished runs are not repeated, whoever began them:
`make demo SEED=1 WORKDIR=runs/demo_seeds/seed_1` makes one too.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from benchmarks.options import whole

SCORES = ("accuracy", "macro_f1", "format", "coherence", "consistency", "decoupling")


def run(seed: int, folder: Path, arguments: list[str]) -> tuple[dict, dict, float | None, int]:
    """Returns evaluations before and after, seconds if known, and peak memory in bytes of a seed.

    Args:
      seed: of the run.
      folder: of all runs.
      arguments: passed on to the program.
    """
    workdir = folder / f"seed_{seed}"
    took = workdir / "seconds.json"
    if not (workdir / "report.html").exists():
        started = time.time()
        command = [sys.executable, "-m", "emor3_jax.train", "--config=configs/cpu_demo.py"]
        command += [f"--workdir={workdir}", f"--config.seed={seed}", *arguments]
        subprocess.run(command, check=True)
        took.write_text(json.dumps(time.time() - started))
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    peak = max(row.get("memory/host_bytes", 0) for row in rows)
    before, after = json.loads((workdir / "evaluations.json").read_text())
    return before, after, json.loads(took.read_text()) if took.exists() else None, peak


def main() -> None:
    """Runs the seeds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=whole(0), nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/demo_seeds"))
    options, rest = parser.parse_known_args()
    runs = {seed: run(seed, options.folder, rest) for seed in options.seeds}
    print(f"\n{date.today()}, {os.cpu_count()} cores ({platform.machine()}); before → after in %\n")
    names = next(iter(runs.values()))[1]
    print(
        "| data set | score | " + " | ".join(f"seed {seed}" for seed in runs) + " | mean change |"
    )
    print("|---|---|" + "---|" * (len(runs) + 1))
    for name in names:
        for score in SCORES:
            pairs = [(100 * b[name][score], 100 * a[name][score]) for b, a, _, _ in runs.values()]
            cells = " | ".join(f"{b:.1f} → {a:.1f}" for b, a in pairs)
            change = sum(a - b for b, a in pairs) / len(pairs)
            print(f"| {name} | {score} | {cells} | {change:+.1f} |")
    minutes = " | ".join(
        "–" if seconds is None else f"{seconds / 60:.1f} min" for _, _, seconds, _ in runs.values()
    )
    memory = " | ".join(f"{peak / 2**30:.2f} GiB" for *_, peak in runs.values())
    print(f"| | time | {minutes} | |")
    print(f"| | host memory, highest step | {memory} | |")


if __name__ == "__main__":
    main()
