"""The paper's table in miniature, on EmoScenes: every row and seed, one budget, one base policy.

    python -m benchmarks.paper_table [--seeds 0 1 2] [--rows grpo emo_r3 …] [--config.key=value …]
    python -m benchmarks.paper_table --page

A cell is one row with one seed: it runs in a process of its own, by the public programs, with
`configs/table.py:ROW`. A finished cell is a line of `FOLDER/cells.jsonl` and is not run again; one
that was stopped goes on from its checkpoint. After each cell the page is written anew, from what is
there; what has not been run says so. Seed 0 of all rows comes first, then the next seed.

Options that begin with `--config.` are passed on to every program, such as `--config.policy.path`
of another base policy than that of the package. A folder belongs to one set
of such options.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.options import whole
from emor3_jax.runtime import cli

PAGE = Path("docs/results/paper_table.md")
NOTES = Path("benchmarks/paper_table_notes.md")

ROWS = {
    "base": "base policy",
    "cold_start": "Cold-Start-Emo alone",
    "sft": "SFT",
    "grpo": "GRPO",
    "dapo": "DAPO",
    "grpo_set": "GRPO + SET",
    "grpo_set_coherence": "GRPO + SET + coherence",
    "grpo_set_consistency": "GRPO + SET + consistency",
    "emo_r3": "EMO-R3",
    "grpo_cold": "GRPO, with Cold-Start-Emo",
    "emo_r3_cold": "EMO-R3, with Cold-Start-Emo",
    "emo_r3_gdpo": "EMO-R3 with GDPO",
    "emo_r3_cispo": "EMO-R3 with CISPO",
    "emo_r3_sapo": "EMO-R3 with SAPO",
    "emo_r3_judge": "EMO-R3, judged by the reference",
    "emo_r3_gdpo_judge": "EMO-R3 with GDPO, judged by the reference",
    "grpo_long": "GRPO, 200 steps",
    "emo_r3_long": "EMO-R3, 200 steps",
    "emo_r3_gdpo_judge_long": "EMO-R3 with GDPO, judged by the reference, 200 steps",
}
"""Name of a row → what the page calls it, in the page's order."""

ORDER = (
    *("base", "sft", "grpo", "emo_r3", "grpo_set", "cold_start", "emo_r3_cold", "dapo"),
    *("emo_r3_gdpo_judge", "emo_r3_judge", "emo_r3_gdpo", "emo_r3_cispo", "emo_r3_sapo"),
    *("grpo_set_coherence", "grpo_set_consistency", "grpo_cold"),
    *("grpo_long", "emo_r3_long", "emo_r3_gdpo_judge_long"),
)
"""In which rows of a seed are run: the most telling first."""

PROGRAMS = {"base": "evaluate", "cold_start": "sft", "sft": "sft"}
"""Row → program; all others are of `train`."""

SETS = {"emoscenes": "in domain", "shifted": "out of domain"}

SCORES = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "boxed": "boxed",
    "set_format": "format",
    "coherence": "coherence",
    "consistency": "consistency",
    "decoupling": "decoupling",
    "response_length": "length",
}
"""Name in a cell → heading. All but the length are shares, shown in percent."""

PAIRS = (
    ("sft", "base"),
    ("grpo", "base"),
    ("dapo", "grpo"),
    ("grpo_set", "grpo"),
    ("grpo_set_coherence", "grpo_set"),
    ("grpo_set_consistency", "grpo_set"),
    ("emo_r3", "grpo_set"),
    ("emo_r3", "grpo"),
    ("emo_r3", "sft"),
    ("grpo_cold", "grpo"),
    ("emo_r3_cold", "emo_r3"),
    ("emo_r3_cold", "grpo_cold"),
    ("emo_r3_gdpo", "grpo"),
    ("emo_r3_cispo", "grpo"),
    ("emo_r3_sapo", "grpo"),
    ("emo_r3_judge", "grpo"),
    ("emo_r3_gdpo_judge", "grpo"),
    ("emo_r3_gdpo", "emo_r3"),
    ("emo_r3_cispo", "emo_r3"),
    ("emo_r3_sapo", "emo_r3"),
    ("emo_r3_judge", "emo_r3"),
    ("emo_r3_gdpo_judge", "emo_r3"),
    ("emo_r3_long", "grpo_long"),
    ("emo_r3_gdpo_judge_long", "grpo_long"),
    ("emo_r3_gdpo_judge_long", "emo_r3_long"),
)
"""What is compared, seed by seed: a row with another, which it builds on or competes with."""

_COMPARISON = """\
Change in points: **mean** (each seed that both rows have). Less decoupling is better, more of all
others."""

COMPARED = ("accuracy", "coherence", "consistency", "decoupling")
"""Scores by which rows are compared."""

_SPACES = re.compile(r"\s*([<>/])\s*")
_FORMAT = re.compile(
    r"<step1>.*</step1>.*<step2>.*</step2>.*<step3>.*</step3>.*\\boxed\{.*\}.*", re.DOTALL
)

Cell = dict[str, Any]
Cells = dict[tuple[str, int], Cell]
"""(row, seed) → what is kept of a finished cell."""


def order(rows: Iterable[str], seeds: Iterable[int]) -> list[tuple[str, int]]:
    """Returns the cells as they are run: seed by seed, each row after the one it starts from.

    Args:
      rows: names of `ROWS`; a row with a cold start brings that along.
      seeds: of the runs.
    """
    wanted = set(rows)
    if any(row.endswith("_cold") for row in wanted):
        wanted.add("cold_start")
    return [(row, seed) for seed in seeds for row in ORDER if row in wanted]


def load(folder: Path) -> Cells:
    """Reads the finished cells."""
    path = folder / "cells.jsonl"
    lines = path.read_text().splitlines() if path.exists() else ()
    return {(cell["row"], cell["seed"]): cell for cell in map(json.loads, lines)}


def commands(row: str, seed: int, folder: Path, options: Sequence[str]) -> list[list[str]]:
    """Returns the programs of a cell, by their arguments after `python -m`.

    Args:
      row, seed: of the cell.
      folder: of all cells.
      options: passed on.
    """
    workdir, common = folder / row / str(seed), [f"--config.seed={seed}", *options]
    if row.endswith("_cold"):
        common += _from(folder / "cold_start" / str(seed))
    if row.endswith("_long"):
        common += ["--config.steps=200", "--config.evaluate.every=50"]
    config = f"--config=configs/table.py:{row.removesuffix('_cold').removesuffix('_long')}"
    program = f"emor3_jax.{PROGRAMS.get(row, 'train')}"
    found = [[program, config, f"--workdir={workdir}", *common]]
    if row == "cold_start":
        # It learns from the plain question; what it starts others from is asked for SET.
        asked = ["emor3_jax.evaluate", "--config=configs/table.py:base"]
        asked += [f"--workdir={workdir / 'asked_for_set'}", *common, *_from(workdir)]
        found.append(asked)
    return found


def _from(workdir: Path) -> list[str]:
    """Returns the option that starts from the policy of a run; the last of its kind counts."""
    return [f"--config.policy.path={workdir / 'policy'}"]


def run(row: str, seed: int, folder: Path, options: Sequence[str]) -> bool:
    """Runs a cell and adds its line; returns whether it came to its end.

    A signal that stops the program stops this one too; started again, it goes on from there.
    """
    workdir = folder / row / str(seed)
    resumed, started = workdir.exists(), time.time()
    for command in commands(row, seed, folder, options):
        status = subprocess.run([sys.executable, "-m", *command], check=False).returncode
        if status == cli.STOPPED or status < 0 or status > 128:
            # A program that is evaluating ends by the signal itself, or says so by its status.
            sys.exit(cli.STOPPED)
        if status:
            print(f"{row}, seed {seed}: exit status {status}", flush=True)
            return False
    # What came before the last start of a cell was not measured.
    seconds = None if resumed else time.time() - started
    cell = read_cell(workdir) | {"row": row, "seed": seed, "seconds": seconds}
    with (folder / "cells.jsonl").open("a") as file:
        file.write(json.dumps(cell | {"date": str(date.today())}) + "\n")
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    return True


def read_cell(workdir: Path) -> Cell:
    """Reads what is kept of a run that ended: scores, curve, budget.

    Returns:
      "scores": data set → name of `SCORES` → value; "curve": [step, accuracy in domain] of each
      evaluation; "step_seconds": of all steps; "drawn", "learned": images; "responses": sampled
      in training.
    """
    if not (workdir / "metrics.jsonl").exists():
        budget = {"curve": [], "step_seconds": 0.0, "learned": 0, "drawn": 0, "responses": 0}
        return {"scores": _read_evaluation(workdir), **budget}

    _, found = json.loads((workdir / "evaluations.json").read_text())
    config = json.loads((workdir / "config.json").read_text())
    steps, rollout, seen = config["steps"], config["rollout"], "eval/emoscenes/accuracy"
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    curve = [[line["step"], line[seen]] for line in logged if seen in line]
    logged = [line for line in logged if "time/step_s" in line]
    drawn = int(sum(line.get("resample/rounds", 1) for line in logged)) * rollout["prompts"]
    samples = any("time/rollout_s" in line for line in logged)
    scores = _read_scores(found, workdir / "predictions" / f"{steps:06d}")
    asked = workdir / "asked_for_set"
    return {
        "scores": _read_evaluation(asked) if asked.exists() else scores,
        "curve": [*curve, [steps, found["emoscenes"]["accuracy"]]],
        "step_seconds": sum(line["time/step_s"] for line in logged),
        "learned": steps * rollout["prompts"],
        "drawn": drawn,
        "responses": drawn * rollout["responses"] * samples,
    }


def _read_evaluation(workdir: Path) -> dict[str, dict[str, float]]:
    """Returns what the page shows of what `emor3_jax.evaluate` wrote."""
    found = json.loads((workdir / "evaluation.json").read_text())
    found = {name: each["metrics"] for name, each in found.items()}
    return _read_scores(found, workdir / "predictions")


def _read_scores(found: dict[str, dict[str, float]], folder: Path) -> dict[str, dict[str, float]]:
    """Returns what the page shows of an evaluation, with two scores from its predictions."""
    scores = {}
    for name, metrics in found.items():
        lines = map(json.loads, (folder / f"{name}.jsonl").open())
        said = [response for line in lines for response in line["responses"]]
        metrics = metrics | {
            "boxed": statistics.fmean(bool(response["answer"]) for response in said),
            "set_format": statistics.fmean(has_steps(response["response"]) for response in said),
        }
        scores[name] = {score: metrics[score] for score in SCORES if score in metrics}
    return scores


def has_steps(response: str) -> bool:
    """Returns whether a response has SET's format, whatever its own reward asked for."""
    return _FORMAT.fullmatch(_SPACES.sub(r"\1", response)) is not None


def page(cells: Cells, seeds: Sequence[int], notes: str) -> str:
    """Returns the page.

    Args:
      cells: what has been run.
      seeds: that the page has a place for.
      notes: what stands above the tables; DATE is the last day that a cell was run.
    """
    last = max((cell["date"] for cell in cells.values()), default="not run")
    lines = [notes.strip().replace("DATE", last), ""]
    for name, title in SETS.items():
        lines += [f"## {name}: {title}", "", *_scores(cells, seeds, name), ""]
    lines += ["## Row against row", "", _COMPARISON, ""]
    for name, title in SETS.items():
        lines += [f"### {name}: {title}, compared", "", *_comparison(cells, seeds, name), ""]
    lines += ["## Learning curves", "", *_curves(cells, seeds), ""]
    lines += ["## What it cost", "", *_costs(cells, seeds), ""]
    lines += ["## Each seed", "", *_each_seed(cells, seeds)]
    return "\n".join(lines) + "\n"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> list[str]:
    """Returns the lines of a table whose first `words` columns are text."""
    rule = ["---"] * words + ["---:"] * (len(heads) - words)
    return [f"| {' | '.join(each)} |" for each in (heads, rule, *rows)]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Returns mean ± sample standard deviation; of one value, that value."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _value(cell: Cell, name: str, score: str) -> list[float]:
    """Returns a score as it is shown, or nothing where the cell has none."""
    of_set = cell["scores"].get(name, {})
    if score not in of_set:
        return []
    return [of_set[score] * (1 if score == "response_length" else 100)]


def _of_row(cells: Cells, seeds: Sequence[int], row: str) -> list[Cell]:
    return [cells[row, seed] for seed in seeds if (row, seed) in cells]


def _scores(cells: Cells, seeds: Sequence[int], name: str) -> list[str]:
    def line(row: str) -> list[str]:
        found = _of_row(cells, seeds, row)
        if not found:
            return [ROWS[row], "not run", *[""] * len(SCORES)]
        means = (spread([v for c in found for v in _value(c, name, score)]) for score in SCORES)
        return [ROWS[row], str(len(found)), *means]

    return _table(["row", "seeds", *SCORES.values()], map(line, ROWS))


def _comparison(cells: Cells, seeds: Sequence[int], name: str) -> list[str]:
    """Returns differences within a seed on a data set, in points, as mean and each seed."""

    def line(after: str, before: str) -> list[str]:
        both = [s for s in seeds if (after, s) in cells and (before, s) in cells]
        if not both:
            return [f"{ROWS[after]} − {ROWS[before]}", "not run", *[""] * (len(COMPARED) - 1)]
        found = []
        for score in COMPARED:
            pairs = [
                (_value(cells[after, s], name, score), _value(cells[before, s], name, score))
                for s in both
            ]
            changes = [new[0] - old[0] for new, old in pairs if new and old]
            each = ", ".join(f"{change:+.1f}" for change in changes)
            found.append(f"**{statistics.fmean(changes):+.1f}** ({each})" if changes else "–")
        return [f"{ROWS[after]} − {ROWS[before]}", *found]

    return _table(["rows", *(SCORES[score] for score in COMPARED)], (line(*pair) for pair in PAIRS))


def _curves(cells: Cells, seeds: Sequence[int]) -> list[str]:
    curves = {
        row: [dict(map(tuple, cell["curve"])) for cell in _of_row(cells, seeds, row)]
        for row in ROWS
        if row not in ("base", "cold_start")
    }
    steps = sorted({step for found in curves.values() for curve in found for step in curve})
    text = [
        "Accuracy in % on emoscenes by step, mean over the seeds. The last of a row is of all its",
        "images, those before of its first 100.",
        "",
    ]

    def line(row: str) -> list[str]:
        found = curves[row]
        if not found:
            return [ROWS[row], "not run", *[""] * (len(steps) - 1)]
        at = ([100 * curve[step] for curve in found if step in curve] for step in steps)
        return [ROWS[row], *(f"{statistics.fmean(v):.1f}" if v else "" for v in at)]

    return text + _table(["row", *(map(str, steps) if steps else ["step"])], map(line, curves))


def _costs(cells: Cells, seeds: Sequence[int]) -> list[str]:
    def line(row: str) -> list[str]:
        found = _of_row(cells, seeds, row)
        if not found:
            return [ROWS[row], "not run", *[""] * 4]
        counts = (
            f"{statistics.fmean(cell[k] for cell in found):,.0f}"
            for k in ("learned", "drawn", "responses")
        )
        steps = spread([cell["step_seconds"] for cell in found], 0)
        whole = [cell["seconds"] for cell in found if cell["seconds"] is not None]
        return [ROWS[row], *counts, steps, spread(whole, 0)]

    heads = ["row", "images learned from", "images drawn", "responses sampled"]
    heads += ["seconds of steps", "seconds of programs"]
    return _table(heads, map(line, ROWS))


def _each_seed(cells: Cells, seeds: Sequence[int]) -> list[str]:
    def line(row: str, seed: int) -> list[str]:
        cell = cells.get((row, seed))
        if cell is None:
            return [ROWS[row], str(seed), "not run", *[""] * (len(SCORES) * len(SETS))]
        values = [
            "".join(f"{v:.1f}" for v in _value(cell, name, score)) or "–"
            for name in SETS
            for score in SCORES
        ]
        seconds = "–" if cell["seconds"] is None else f"{cell['seconds']:.0f}"
        return [ROWS[row], str(seed), *values, seconds]

    heads = [f"{title}, {name}" for name in SETS for title in SCORES.values()]
    rows = (line(row, seed) for row in ROWS for seed in seeds)
    return _table(["row", "seed", *heads, "seconds"], rows)


def main() -> None:
    """Runs the cells that are not there yet, and writes the page after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=whole(0), nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--folder", type=Path, default=Path("runs/paper_table"))
    parser.add_argument("--hours", type=float, default=3.0, help="begin no cell after so many")
    parser.add_argument("--page", action="store_true", help="only write the page")
    given, options = parser.parse_known_args()
    if odd := [option for option in options if not option.startswith("--config.")]:
        parser.error(f"unknown: {' '.join(odd)}; only --config.key=value is passed on")

    def write() -> None:
        cells = load(given.folder)
        seeds = sorted({0, 1, 2} | {seed for _, seed in cells})
        PAGE.write_text(page(cells, seeds, NOTES.read_text()))

    given.folder.mkdir(parents=True, exist_ok=True)
    failed = []
    ended = time.time() + 3600 * given.hours
    for row, seed in () if given.page else order(given.rows, given.seeds):
        if time.time() > ended:
            print(f"{given.hours} hours are over; started again, it goes on", flush=True)
            break
        if (row, seed) in load(given.folder):
            continue
        print(f"{row}, seed {seed}", flush=True)
        if not run(row, seed, given.folder, options):
            failed.append((row, seed))
        write()
    write()
    if failed:
        sys.exit(f"failed: {', '.join(f'{row} seed {seed}' for row, seed in failed)}")


if __name__ == "__main__":
    main()
