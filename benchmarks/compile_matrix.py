"""What fits where: the programs of a step, compiled for many TPU slices; writes a page of tables.

    make compile-matrix
    python -m benchmarks.compile_matrix [--sizes=3b] [--only=decode,update] [v4-8 …]
    python -m benchmarks.compile_matrix --before=2026-11-29 v4-8

A program that was compiled before is not compiled again; with `--before` it is, if that was before
the date. Each result is a line of `docs/results/compile.jsonl` as soon as it is there, with its
date and commit, and replaces the earlier one; the page says what has not been run.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs.qwen_vl import POLICIES
from emor3_jax.compiler.verdict import LEARNING
from emor3_jax.parallel import topology

RESULTS = Path("docs/results/compile.jsonl")
PAGE = Path("docs/results/compile.md")
NOTES = Path("benchmarks/compile_notes.md")

SLICES = (
    *("v4-8", "v4-16", "v4-32", "v4-64", "v4-128"),
    *("v5e-16", "v5e-64", "v5e-256", "2xv5e-16"),
    *("v5p-8", "v5p-32", "v6e-8", "v6e-16", "v6e-64", "tpu7x-8"),
)
SIZES = tuple(POLICIES)
PROGRAMS = (
    *("weight_sync", "decode", "resize_ring", "shrink", "admit", "take_out"),
    *("update", "update_packed", "apply", "prefill", "coherence", "consistency", "reference"),
)
"""Those that take memory, the most telling first; `emor3_jax.compile` has the others too."""

SHOWN = ("slots", "lanes", "micro", "GiB")
"""Columns in front of the programs: sizes of today's config, and HBM of a device."""

CONFIGS = {"v4": "v4", "v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "tpu7x": "v7x"}

Results = dict[tuple[str, str], dict[str, dict[str, Any]]]
"""(size, slice) → program → what `emor3_jax.compile --json` says of it, with its cell's fields."""


def load() -> Results:
    """Reads what has been compiled."""
    found: Results = {}
    for line in RESULTS.read_text().splitlines() if RESULTS.exists() else ():
        row = json.loads(line)
        found.setdefault((row["size"], row["topology"]), {})[row["name"]] = row
    return found


def _config(size: str, name: str) -> tuple[str, str]:
    """Returns the name of a cell's config in `configs`, and its options."""
    slices = topology.parse(name)
    options = f"{size},chips={slices.chips * slices.slices},slices={slices.slices}"
    return f"tpu_{CONFIGS[slices.kind]}", options


def config_of(size: str, name: str) -> ConfigDict:
    """Returns the config of a cell, as it is today."""
    module, options = _config(size, name)
    return importlib.import_module(f"configs.{module}").get_config(options)


def is_older(row: dict[str, Any], config: ConfigDict) -> bool:
    """Recognises a program that was compiled for other sizes than its config has today.

    Args:
      row: of the results.
      config: of its cell.
    """
    rollout, now = dict(row["rollout"]), config.rollout
    # Until there were lanes, each response of a slot had one.
    rollout.setdefault("lanes", rollout["slots"] * now.responses)
    names = ["prompts"]
    if row["name"] not in (*LEARNING, "apply", "weight_sync"):
        names += ["slots", "refill", "lanes"]
    then = row["mesh"], row["micro_prompts"], *(rollout[name] for name in names)
    today = config.mesh.to_dict(), config.policy_update.micro_prompts, *(now[x] for x in names)
    return then != today


def compile_cell(size: str, name: str, programs: list[str]) -> None:
    """Compiles programs of a cell, and adds a line for each to the results."""
    module, options = _config(size, name)
    config = f"configs/{module}.py:{options}"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-m", "emor3_jax.compile", f"--config={config}"]
        command += [f"--topology={name}", f"--only={','.join(programs)}", f"--json={out}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not out.exists():
            lines = done.stderr.strip().splitlines()
            # A check of the compiler's own that fails ends its process, with a trace behind it.
            crash = [x for x in lines if x.startswith("compiling ") or "Check failed" in x][-2:]
            print(f"{size} {name}: {crash if done.returncode < 0 else lines[-1:]}", flush=True)
            return
        cell = json.loads(out.read_text())
    programs_found = cell.pop("programs")
    made = {"date": str(date.today()), "commit": _commit()}
    _keep([{"size": size, **made, **cell, **row} for row in programs_found])


def _keep(rows: list[dict[str, Any]]) -> None:
    """Writes rows at the end of the results, in the place of earlier ones of the same programs."""
    anew = {(row["size"], row["topology"], row["name"]) for row in rows}
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    there = [json.loads(line) for line in lines]
    kept = [x for x in there if (x["size"], x["topology"], x["name"]) not in anew]
    # In one move: what stops it in the middle must not cost the results of days.
    new = RESULTS.with_suffix(".new")
    new.write_text("".join(json.dumps(row) + "\n" for row in (*kept, *rows)))
    new.replace(RESULTS)


def _commit() -> str:
    """Returns the last commit that changed the package or a config; "unknown" outside of git."""
    command = ["git", "log", "-1", "--format=%h", "--abbrev=10", "--", "emor3_jax", "configs"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def page(found: Results) -> str:
    """Returns the page of tables."""
    notes = NOTES.read_text().strip().replace("COMPILED", _compiled(found))
    return "\n".join([notes, "", *_fit_table(found), "", *_traffic_table(found)]) + "\n"


def _compiled(found: Results) -> str:
    """Returns when, and from which commits, the programs were compiled."""
    rows = [row for cell in found.values() for row in cell.values()]
    if not rows:
        return "No program has been compiled"
    dates = sorted({row["date"] for row in rows})
    commits = sorted({row["commit"] for row in rows})
    span = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return f"{len(rows)} programs, compiled {span} at {', '.join(commits)}"


def _fit_table(found: Results) -> list[str]:
    lines = [
        "## HBM of a device",
        "",
        "GiB while each program runs, with all that lies there meanwhile; **bold** is over what",
        "the device has. *Italics*: compiled for another mesh, or other numbers of slots, lanes or",
        "prompts, than the config has today, which the row shows. An empty cell has not been run.",
        "",
        f"| policy | slice | mesh | {' | '.join((*SHOWN, *PROGRAMS))} | verdict |",
        f"|---|---|---|{'---:|' * (len(SHOWN) + len(PROGRAMS))}---|",
    ]
    for size in SIZES:
        for name in SLICES:
            cell = found.get((size, name), {})
            if not cell:
                continue
            config, any_ = config_of(size, name), next(iter(cell.values()))
            tensor, data = config.mesh.tensor, config.mesh.data
            shown = f"{data}×{any_['devices'] // (tensor * data)}×{tensor}"
            older = {program for program, row in cell.items() if is_older(row, config)}
            sizes = [_needed(cell[p], p in older) if p in cell else "" for p in PROGRAMS]
            lines.append(
                f"| {size.upper()} | {name} | {shown} | {config.rollout.slots} "
                f"| {config.rollout.lanes} "
                f"| {config.policy_update.micro_prompts} | {any_['usable'] / 2**30:.2f} "
                f"| {' | '.join(sizes)} | {_verdict(cell, older)} |"
            )
    for size in SIZES:
        if missing := [name for name in SLICES if not found.get((size, name))]:
            lines += ["", f"Not run of {size.upper()}: {', '.join(missing)}."]
    return lines


def _verdict(cell: dict[str, dict[str, Any]], older: set[str]) -> str:
    """Returns what the programs of a cell say, some of which are older than its sizes."""
    if not all(row["fits"] for row in cell.values()):
        return "does not fit"
    said = ["fits"]
    if older:
        said.append("by older sizes" if older >= cell.keys() else "in part by older sizes")
    if not cell.keys() >= set(PROGRAMS):
        said.append("as far as run")
    return ", ".join(said)


def _needed(row: dict[str, Any], is_of_other_sizes: bool) -> str:
    mark = "*" * (is_of_other_sizes + 2 * (not row["fits"]))
    return f"{mark}{row['needed'] / 2**30:.1f}{mark}"


def _marked(figure: str, is_of_other_sizes: bool) -> str:
    return f"*{figure}*" if figure and is_of_other_sizes else figure


def _traffic_table(found: Results) -> list[str]:
    kinds = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
    lines = [
        "## What collectives move",
        "",
        "GiB that each device receives in all updates of a step, and in a weight sync;",
        "TFLOP of a device in the updates of a step. Empty: refused for its size, not counted.",
        "*Italics* as above.",
        "",
        f"| policy | slice | devices | {' | '.join(kinds)} | all | weight_sync | TFLOP |",
        f"|---|---|---:|{'---:|' * len(kinds)}---:|---:|---:|",
    ]
    for size in SIZES:
        for name in SLICES:
            cell = found.get((size, name), {})
            if "update" not in cell or "weight_sync" not in cell:
                continue
            row = cell["update"]
            # Nothing is known of a program that does not fit: it has no compiled text.
            moved, total = [""] * len(kinds), ""
            if row["moved"]:
                sizes = [row["calls"] * row["moved"].get(kind, 0) / 2**30 for kind in kinds]
                moved, total = [f"{x:,.1f}" for x in sizes], f"{sum(sizes):,.0f}"
            config, sync = config_of(size, name), cell["weight_sync"]
            handed = sum(sync["moved"].values()) / 2**30
            figures = [
                *(_marked(x, is_older(row, config)) for x in (*moved, total)),
                _marked(f"{handed:.1f}" if handed else "", is_older(sync, config)),
                f"{row['flops_a_step'] / 1e12:,.0f}",
            ]
            lines.append(f"| {size.upper()} | {name} | {row['devices']} | {' | '.join(figures)} |")
    return lines


def a_slice(name: str) -> str:
    """Returns the name of a slice that the page shows.

    Raises:
      argparse.ArgumentTypeError: for any other, whose results no table would show.
    """
    if name not in SLICES:
        raise argparse.ArgumentTypeError(f"{name!r}: must be one of {', '.join(SLICES)}")
    return name


def several(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Returns a reader of known names, joined by commas."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            rule = f"must be of {', '.join(known)}, joined by commas"
            raise argparse.ArgumentTypeError(f"{unknown[0]!r}: {rule}")
        return names

    return read


def main() -> None:
    """Compiles what is asked for and not there yet, and writes the page after each cell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slices", nargs="*", default=SLICES, type=a_slice)
    parser.add_argument("--sizes", default=",".join(SIZES), type=several(SIZES))
    parser.add_argument("--only", default=",".join(PROGRAMS), type=several(PROGRAMS))
    before = "compile anew what is older than this date, as 2026-11-29"
    parser.add_argument("--before", default=date.min, type=date.fromisoformat, help=before)
    parser.add_argument("--page", action="store_true", help="only write the page")
    given = parser.parse_args()
    for size in given.sizes:
        for name in () if given.page else given.slices:
            there = load().get((size, name), {})
            made = {program: date.fromisoformat(row["date"]) for program, row in there.items()}
            if missing := [p for p in given.only if p not in made or made[p] < given.before]:
                print(f"{size} {name}: {', '.join(missing)}", flush=True)
                compile_cell(size, name, missing)
                PAGE.write_text(page(load()))
    PAGE.write_text(page(load()))


if __name__ == "__main__":
    main()
