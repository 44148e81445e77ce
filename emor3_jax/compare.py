"""Compare runs on the same held-out rows.

    python -m emor3_jax.compare RUN RUN … [--workdir=runs/compare] [--match=exact|lenient]
        [--seed=0] [--noimages]

RUN is the folder of a run or of an evaluation, or one of its `predictions/<step>`. Each run is
compared with the first one: scores with bootstrap intervals of their change, McNemar's exact test,
the same by label, and the rows that only one of the two gets right. Rows that are not in both are
named. Prints the numbers; `workdir/compare.json` has all of them, with the ids of rows, and
`workdir/compare.html` shows rows with their images, which are read by the config beside the
predictions, and the learning curves of runs that were trained: runs whose configs differ in the
seed alone are one, with a band.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from emor3_jax.config import dataset, default
from emor3_jax.data.errors import DataError
from emor3_jax.data.sources import Source
from emor3_jax.errors import UserError
from emor3_jax.evaluation.comparison import (
    MATCHES,
    compare,
    find_predictions,
    read_predictions,
    step_of,
    to_json,
)
from emor3_jax.files import printable, read_json
from emor3_jax.io import comparison
from emor3_jax.io.comparison import Compared
from emor3_jax.io.console import Console
from emor3_jax.io.curves import RunGroup
from emor3_jax.io.report import read_metrics
from emor3_jax.prepare import open_source
from emor3_jax.runtime import cli, job

_NO_RESULT = "seed", "log", "checkpoint"
"""Settings that a group of runs may differ in."""


def main(
    runs: Sequence[str],
    workdir: str | Path,
    *,
    match: str = "exact",
    seed: int = 0,
    images: bool = True,
) -> list[dict[str, Any]]:
    """Prints and writes the comparisons; see the module's docstring.

    Args:
      runs: folders, at least two.
      workdir: for compare.json and compare.html, made if needed.
      match: "exact", the boxed label, or "lenient", the label that is named first.
      seed: of the bootstrap.
      images: show the images of rows.

    Returns:
      As written to compare.json: one entry a data set and pair.

    Raises:
      DataError: if there are fewer than two runs, or they have no data set or no row in common.
    """
    if len(runs) < 2:
        raise DataError(f"runs={', '.join(runs)!r}: give the folders of at least two runs")
    workdir = Path(workdir)
    say = Console("compare")
    files = [find_predictions(Path(run)) for run in runs]
    found: list[Compared] = []
    for run, theirs in zip(runs[1:], files[1:], strict=True):
        shared = [name for name in files[0] if name in theirs]
        for name in sorted({*files[0], *theirs} - set(shared)):
            say(f"{name} was evaluated in {runs[0] if name in files[0] else run} alone")
        for name in shared:
            paths = files[0][name], theirs[name]
            rows = tuple(read_predictions(path, match) for path in paths)
            image = _images(paths, name, say) if images else _no_image
            pair = runs[0], run
            steps = step_of(paths[0]), step_of(paths[1])
            found.append(Compared(name, pair, rows, compare(*rows, seed), image, steps))
    if not found:
        sets = "; ".join(f"{run}: {', '.join(x)}" for run, x in zip(runs, files, strict=True))
        raise DataError(f"the runs have no data set in common ({sets}); evaluate them on one")
    if not any(each.found.rows for each in found):
        raise DataError(
            f"runs={', '.join(runs)!r}: no row of {', '.join(sorted({x.data_set for x in found}))} "
            "is in two of them, by id and label; evaluate them on the same data"
        )
    for each in found:
        names = f"first: {each.names[0]}, second: {each.names[1]}"
        for line in ("", names, *comparison.lines(each)[1:]):
            print(printable(line))
    data = [
        {
            "data_set": each.data_set,
            "runs": list(each.runs),
            "steps": list(each.steps),
            "match": match,
            **to_json(each.found),
        }
        for each in found
    ]
    workdir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, indent=1, ensure_ascii=False)
    (workdir / "compare.json").write_text(text + "\n", encoding="utf-8")
    page = workdir / "compare.html"
    comparison.write_page(page, "Comparison of runs", found, _groups(runs))
    say(f"numbers: {workdir / 'compare.json'}   curves and rows: {page}")
    return data


def _no_image(_: str) -> None:
    return None


def _groups(runs: Sequence[str]) -> list[RunGroup]:
    """Returns the runs that were trained, those together whose configs differ in the seed alone."""
    found: dict[str, list[str]] = {}
    seen: set[Path] = set()
    for run in runs:
        folder = _trained(run)
        # Two steps of one run are one run, not two seeds.
        if folder is None or folder.resolve() in seen:
            continue
        seen.add(folder.resolve())
        config = read_json(folder / "config.json", DataError, dict, finite=False)
        kept = {key: value for key, value in config.items() if key not in _NO_RESULT}
        found.setdefault(json.dumps(kept, sort_keys=True), []).append(run)
    return [
        RunGroup(
            each[0] if len(each) == 1 else f"{each[0]} and {len(each) - 1} of other seeds",
            [_read_rows(_trained(run)) for run in each],
        )
        for each in found.values()
    ]


def _trained(run: str) -> Path | None:
    """Returns the folder of a training run, which may be given by a folder within it."""
    path = Path(run)
    return next(
        (
            x
            for x in (path, *path.parents[:2])
            if (x / "metrics.jsonl").is_file() and _has_config(x)
        ),
        None,
    )


def _read_rows(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's metrics, with the evaluation after its last step."""
    rows = read_metrics(folder / "metrics.jsonl")
    ended = folder / "evaluations.json"
    if rows and ended.is_file():
        found = read_json(ended, DataError, list, finite=False)
        try:
            _, after = found
            values = {
                f"eval/{name}/{metric}": float(value)
                for name, metrics in after.items()
                for metric, value in metrics.items()
            }
        except (AttributeError, TypeError, ValueError) as error:
            rule = "delete it; compare then draws what metrics.jsonl has"
            raise DataError(f"{ended} does not hold evaluations ({error}): {rule}") from error
        rows[-1] = rows[-1] | values
    return rows


def _images(
    paths: Sequence[Path], name: str, say: Callable[[str], None]
) -> Callable[[str], bytes | None]:
    """Returns a function from a row id to its image, by the first config that opens the data."""
    why = "no config.json beside the predictions"
    for path in paths:
        config = next((x / "config.json" for x in path.parents[:3] if _has_config(x)), None)
        if config is None:
            continue
        try:
            # The package's own file, which may hold what strict JSON has not: Infinity.
            return _finder(_open(read_json(config, DataError, dict, finite=False), name))
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"{config}: {error}"
    say(f"images of {name} are not shown: {why}")
    return _no_image


def _finder(source: Source) -> Callable[[str], bytes | None]:
    def find(row_id: str) -> bytes | None:
        try:
            return source[source.find(row_id)].images[0]
        except (KeyError, IndexError):
            return None

    return find


def _has_config(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _open(saved: dict[str, Any], name: str) -> Source:
    """Returns the rows of an evaluation set, as the config of a run describes it."""
    config, described = default(), dataset()
    fields = saved["evaluate"]["sets"][name]
    described.update({key: value for key, value in fields.items() if key in described})
    config.seed = saved["seed"]
    config.data.folder = saved["data"]["folder"]
    config.data.scene_size = saved["data"]["scene_size"]
    return open_source(config, f"evaluate.sets.{name}", described)[0]


FLAGS = flags.FLAGS


def _program(arguments: list[str]) -> None:
    job.start_jax("", devices=False)
    with cli.errors_told():
        main(
            arguments[1:],
            cli.local_folder(FLAGS.workdir),
            match=FLAGS.match,
            seed=FLAGS.seed,
            images=FLAGS.images,
        )


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/compare", "Folder of compare.json and compare.html.")
    flags.DEFINE_enum("match", "exact", list(MATCHES), "The boxed label, or the first one named.")
    flags.DEFINE_integer("seed", 0, "Of the bootstrap.", lower_bound=0)
    flags.DEFINE_bool("images", True, "Show images; --noimages opens no data.")
    app.run(_program)
