"""Does a run grow? python -m benchmarks.growth WORKDIR

Prints host memory and the number of compiled programs along a run, from its metrics.jsonl.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    """Prints the table."""
    path = Path(sys.argv[1]) / "metrics.jsonl"
    rows = [json.loads(line) for line in path.open()]
    rows = [row for row in rows if "memory/host_bytes" in row]
    size = max(len(rows) // 10, 1)
    print("| steps | host memory, mean MiB | highest MiB | programs compiled |")
    print("|---|---|---|---|")
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        memory = [row["memory/host_bytes"] / 2**20 for row in part]
        steps = f"{part[0]['step']}–{part[-1]['step']}"
        compiled = int(part[-1]["compile/count"])
        print(f"| {steps} | {sum(memory) / len(memory):.0f} | {max(memory):.0f} | {compiled} |")


if __name__ == "__main__":
    main()
