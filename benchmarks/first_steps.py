"""How often responses to faces describe the label in their first step, and answer as they describe.

    python -m benchmarks.first_steps RUN/predictions/fer2013.jsonl …

reads what `emor3_jax.evaluate` and `emor3_jax.train` leave, for policies that learned from
`emor3_jax.embedded.faces`.
"""

import json
import sys
from pathlib import Path

import numpy as np

from emor3_jax.embedded import faces


def first_steps(path: Path) -> tuple[int, float, float]:
    """Returns how many responses there are; the shares that describe the label, and follow it.

    Args:
      path: JSON lines as `io.evaluation` writes them.
    """
    right, followed = [], []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        for each in row["responses"]:
            said = faces.described(each["response"].split("</step1>")[0])
            right.append(said == row["label"])
            followed.append(said is not None and said == each["answer"])
    return len(right), float(np.mean(right)), float(np.mean(followed))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        count, right, followed = first_steps(Path(name))
        print(f"{name}: {count} responses, described {right:.3f}, answered so {followed:.3f}")
