"""How often responses to faces answer and describe rightly, and answer as they describe.

    python -m benchmarks.first_steps [--shared=DIR/inspect.json] [--against=OTHER.jsonl]
        RUN/predictions/fer2013.jsonl …

reads what `emor3_jax.evaluate` and `emor3_jax.train` leave, for policies that learned from
`emor3_jax.embedded.faces.tasks`. With `--shared`, it leaves out the rows whose images
`emor3_jax.inspect` found in another set too, as it does with FER-2013's parts. With
`--against`, it counts the rows that are right in one file alone.
"""

import argparse
import json
from collections.abc import Set
from pathlib import Path
from typing import NamedTuple

import numpy as np

from emor3_jax.embedded.faces import tasks
from emor3_jax.evaluation.metrics import wilson


class FirstSteps(NamedTuple):
    """What was counted.

    Attributes:
      count: responses.
      answered: share whose answer is the label.
      described: share whose first step describes the label.
      followed: share whose answer is what the first step describes.
    """

    count: int
    answered: float
    described: float
    followed: float


def first_steps(path: Path, left_out: Set[str] = frozenset()) -> FirstSteps:
    """Returns what first steps describe, and what is made of it.

    Args:
      path: JSON lines as `evaluation.records` writes them.
      left_out: ids of rows that do not count.

    Raises:
      ValueError: if none is left to count.
    """
    found = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if row["id"] in left_out:
            continue
        for each in row["responses"]:
            said = tasks.described(each["response"].split("</step1>")[0])
            answer, label = each["answer"], row["label"]
            found.append((answer == label, said == label, said is not None and said == answer))
    if not found:
        raise ValueError(f"{path}: no response is left to count; are all of its rows shared?")
    return FirstSteps(len(found), *(float(x) for x in np.mean(found, axis=0)))


def right_alone(path: Path, other: Path, left_out: Set[str] = frozenset()) -> tuple[int, int]:
    """Returns how many rows only the one file answers rightly, and how many only the other.

    Args:
      path, other: predictions on the same rows.
      left_out: as of `first_steps`.

    Raises:
      ValueError: if they are not on the same rows.
    """
    ours, theirs = (
        {row["id"]: row["right"] for row in map(json.loads, each.read_text().splitlines())}
        for each in (path, other)
    )
    if ours.keys() != theirs.keys():
        raise ValueError(f"{path} and {other} are not on the same rows; evaluate both on one set")
    pairs = [(ours[row], theirs[row]) for row in ours.keys() - left_out]
    return pairs.count((True, False)), pairs.count((False, True))


def shared_rows(path: Path) -> set[str]:
    """Returns the ids of rows whose image another set has too, as `inspect.json` tells them."""
    pairs = json.loads(path.read_text())["shared"].values()
    return {row for found in pairs for pair in found for row in pair}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("predictions", type=Path, nargs="+")
    args = parser.parse_args()
    left_out = shared_rows(args.shared) if args.shared else set()
    for name in args.predictions:
        found = first_steps(name, left_out)
        low, high = wilson(round(found.answered * found.count), found.count)
        print(
            f"{name}: {found.count} responses, answered rightly {found.answered:.3f} ({low:.3f} to "
            f"{high:.3f}), described {found.described:.3f}, answered so {found.followed:.3f}"
        )
        if args.against:
            here, there = right_alone(name, args.against, left_out)
            print(f"  rows right here alone {here}, in {args.against} alone {there}")
