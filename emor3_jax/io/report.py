"""Results for people to read: the before → after table, sample galleries, `report.html`."""

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from emor3_jax.errors import UserError
from emor3_jax.evaluation.gallery import faults, watch
from emor3_jax.evaluation.metrics import class_scores
from emor3_jax.evaluation.records import Evaluation, Sample, question_names, to_json
from emor3_jax.io import curves, pages, plots

logger = logging.getLogger(__name__)

SAMPLES = 12
"""Number of samples in a gallery; of held-out rows, further ones of rare kinds."""

WATCHED = 6
"""Number of held-out rows that are shown over time."""

_MEANS = {"response_length": 1, "rows": 0}
"""Scores that are not shares, and their digits behind the point."""

_FIRST = (
    *("accuracy", "lenient_accuracy", "graded_accuracy", "polarity_accuracy", "response_accuracy"),
    *("uar", "macro_f1", "weighted_f1", "format"),
)
"""Shares that come first in the tables."""

_FAULTS = "wrong", "incoherent", "inconsistent", "malformed"
"""Faults in the order of the buttons; others follow."""

_DISTANCES = ("kl", "chebyshev", "clark", "canberra", "cosine", "intersection")
_AGREEMENTS = ("mae", "plcc", "srcc", "ccc")


class _Score(NamedTuple):
    """A score of a data set before and after; shares in percent."""

    data_set: str
    score: str
    is_share: bool
    before: float | None
    after: float
    interval: str
    digits: int = 1

    @property
    def spec(self) -> str:
        return f".{self.digits}f"

    @property
    def change(self) -> float | None:
        return None if self.before is None else self.after - self.before


class _Shown(NamedTuple):
    """A sample with the URL of its image, None if it is gone, and the lines of its response."""

    sample: Sample
    image: str | None
    lines: list[str]
    faults: list[str]


class _WatchedRow(NamedTuple):
    """A held-out row with the URL of its image, and its responses by step."""

    label: str
    id: str
    image: str | None
    answers: dict[int, _Shown]


def before_after_table(before: Mapping[str, Evaluation], after: Mapping[str, Evaluation]) -> str:
    """Returns a text table: one line a data set and score, before → after, in percent.

    Behind the scores stand the rows of `after`, behind those of `before` where they are others, and
    the 95 % interval of its accuracy.

    Args:
      before, after: data set → evaluation; a set missing from `before` shows a dash.
    """
    scores = list(_scores(before, after, _shares(after)))
    # Questions and data sets may have names of any length.
    wide = max([10, *(len(each.data_set) + 2 for each in scores)])
    width = max([14, *(len(each.score) + 2 for each in scores)])
    rows = {name: _rows(before.get(name), each) for name, each in after.items()}
    count = max([7, *(len(each) + 1 for each in rows.values())])
    head = f"{'before':>8}{'after':>8}{'change':>8}{'rows':>{count}}  {'95 % interval':<14}"
    lines = [f"{'data set':<{wide}}{'score':<{width}}{head}"]
    for each in scores:
        if each.change is None:
            numbers = f"{'–':>8}{each.after:>8.1f}{'–':>8}"
        else:
            numbers = f"{each.before:>8.1f}{each.after:>8.1f}{each.change:>+8.1f}"
        line = f"{each.data_set:<{wide}}{each.score:<{width}}{numbers}"
        line += f"{rows[each.data_set]:>{count}}"
        lines.append(f"{line}  {each.interval:<14}")
    return "\n".join(lines)


def _rows(before: Evaluation | None, after: Evaluation) -> str:
    """Returns the rows of an evaluation, "100→400" where those before training are others."""
    was, now = (each.metrics.get("rows") if each else None for each in (before, after))
    if now is None:
        return "–"
    return f"{now:.0f}" if was in (None, now) else f"{was:.0f}→{now:.0f}"


def write_samples(
    path: Path,
    step: int,
    samples: Sequence[Sample],
    image: Callable[[str], bytes | None],
    judge: str = "policy",
) -> None:
    """Writes a gallery of samples of one training step.

    Args:
      path: the HTML file.
      step: the step.
      samples: the samples, in order.
      image: returns the encoded image of a row id, None if it is gone.
      judge: who was asked about them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"Samples of step {step}{judged_by(judge)}"
    page = pages.render("samples.html.j2", title=title, samples=_shown(samples, image))
    path.write_text(page, encoding="utf-8")


def judged_by(evaluation: str, training: str = "") -> str:
    """Returns who was asked about responses, behind a title; "" where the policy alone was.

    Args:
      evaluation, training: as the config names the judge; "" where none was asked.
    """
    told = {"policy": "the policy"}
    first, last = (told.get(name, name) for name in (training or evaluation, evaluation))
    if {first, last} <= {"", "the policy"}:
        return ""
    if first == last:
        return f", reflections asked of {first}"
    return f", reflections asked of {first} in training, of {last} in evaluation"


def write_report(
    workdir: Path,
    title: str,
    before: Mapping[str, Evaluation],
    after: Mapping[str, Evaluation],
    images: Mapping[str, Callable[[str], bytes | None]],
) -> Path:
    """Writes `workdir/report.html`: tables, plots, curves, held-out rows over time, a gallery.

    `evaluation.md` beside it has the same numbers, `evaluation.json` those of `after`.

    Args:
      workdir: folder of the run, with its metrics.jsonl and predictions.
      title: of the page.
      before, after: data set → evaluation.
      images: data set → function that returns the encoded image of a row id, or None.

    Returns:
      The file.
    """
    rows = read_metrics(workdir / "metrics.jsonl")
    intervals = plots.accuracy_intervals(before, after)
    sets = {name: each for name, each in after.items() if not each.members}
    gallery = [(name, x) for name, each in sets.items() for x in _shown(each.samples, images[name])]
    found = {fault for _, x in gallery for fault in x.faults}
    page = pages.render(
        "report.html.j2",
        title=title,
        scores=list(_scores(before, after, _shares(after))),
        numbers=list(_scores(before, after, _numbers(after))),
        rows={name: _rows(before.get(name), each) for name, each in after.items()},
        groups={name: each.members for name, each in after.items() if each.members},
        intervals=intervals and plots.to_svg(intervals, "accuracy of each data set"),
        data_sets=[{**_classes(name, each), **_plots(name, each)} for name, each in sets.items()],
        curves=[
            {"svg": plots.to_svg(each.figure, each.name), "caption": each.caption}
            for each in curves.training_curves(rows, after, question_names(after))
        ],
        watched=_watched(workdir, next(iter(sets), ""), images),
        gallery=gallery,
        faults=[name for name in _FAULTS if name in found] + sorted(found - {*_FAULTS}),
        labels=list(dict.fromkeys(label for each in sets.values() for label in each.labels))
        or sorted({x.sample.label for _, x in gallery}),
    )
    workdir.mkdir(parents=True, exist_ok=True)
    data = json.dumps(to_json(after), indent=2, ensure_ascii=False)
    (workdir / "evaluation.json").write_text(data + "\n", encoding="utf-8")
    text = f"# {pages.cell(title)}\n\n{markdown(before, after)}"
    (workdir / "evaluation.md").write_text(text, encoding="utf-8")
    path = workdir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Returns the lines of a run's metrics; what is none, after a full disk, is passed over."""
    rows = []
    for line in path.read_text("utf-8", "replace").split("\n") if path.exists() else ():
        try:
            row = json.loads(line) if line else None
        except (ValueError, RecursionError):
            logger.warning("%s: passed over a line that is no JSON: %r", path, line[:80])
            continue
        if _are_metrics(row):
            rows.append(row)
        elif line:
            logger.warning("%s: passed over a line without metrics: %r", path, line[:80])
    return rows


def _are_metrics(row: object) -> bool:
    """Recognises a step and its values, None for a number that was not finite."""
    return (
        isinstance(row, dict)
        and isinstance(row.get("step"), int)
        and all(value is None or isinstance(value, int | float) for value in row.values())
    )


def markdown(before: Mapping[str, Evaluation], after: Mapping[str, Evaluation]) -> str:
    """Returns the numbers as Markdown: scores, then classes and confusion of each data set.

    Args:
      before, after: data set → evaluation; a set missing from `before` shows a dash.
    """
    return pages.render(
        "evaluation.md.j2",
        scores=list(_scores(before, after, (*_shares(after), *_numbers(after), *_MEANS))),
        data_sets=[_classes(name, each) for name, each in after.items()],
        groups={name: each.members for name, each in after.items() if each.members},
    )


def score_table(before: Mapping[str, Evaluation], after: Mapping[str, Evaluation]) -> str:
    """Returns the scores alone as Markdown; arguments as of `markdown`."""
    return pages.render(
        "evaluation.md.j2",
        scores=list(_scores(before, after, (*_shares(after), *_numbers(after), *_MEANS))),
        data_sets=[],
        groups={name: each.members for name, each in after.items() if each.members},
    )


def _shares(evaluations: Mapping[str, Evaluation]) -> tuple[str, ...]:
    """Returns the scores that are shares, in the order of the tables."""
    return (*_FIRST, *question_names(evaluations), "decoupling")


def _numbers(evaluations: Mapping[str, Evaluation]) -> dict[str, int]:
    """Returns the scores that are neither shares nor counts → digits, as they come."""
    calibration = ("covered", "ece", "brier", "auroc", "aurc")
    endings = (*calibration, *_DISTANCES, *_AGREEMENTS)
    known = {name: 3 for each in evaluations.values() for name in each.metrics}
    return {
        name: digits
        for name, digits in known.items()
        if name == "wheel_distance" or (name.partition("_")[2] in endings)
    }


def _scores(
    before: Mapping[str, Evaluation], after: Mapping[str, Evaluation], names: Iterable[str]
) -> Iterator[_Score]:
    numbers = _numbers(after) | _MEANS
    names = tuple(names)
    for data_set, evaluation in after.items():
        old, new = before[data_set].metrics if data_set in before else {}, evaluation.metrics
        for name in (name for name in names if name in new):
            is_share = name not in numbers
            scale = 100 if is_share else 1
            bounds = [100 * new[key] for key in (f"{name}_low", f"{name}_high") if key in new]
            yield _Score(
                data_set,
                name,
                is_share,
                scale * old[name] if name in old else None,
                scale * new[name],
                "{:.1f} to {:.1f}".format(*bounds) if bounds else "",
                numbers.get(name, 1),
            )


def _classes(name: str, evaluation: Evaluation) -> dict[str, Any]:
    """Returns a data set's tables by label, as the templates take them."""
    labels, confusion = evaluation.labels, evaluation.confusion
    return {
        "name": name,
        "labels": labels,
        "classes": class_scores(labels, confusion) if labels else [],
        "confusion": list(zip(labels, confusion, strict=True)) if labels else [],
        "calibrations": evaluation.calibrations,
    }


def _plots(name: str, evaluation: Evaluation) -> dict[str, Any]:
    """Returns a data set's plots as SVG: by label, if it has labels, and of its confidences."""
    labels, confusion, found = evaluation.labels, evaluation.confusion, evaluation.calibrations
    if found:
        diagram, curves = plots.reliability_diagram(found), plots.coverage_curves(found)
        sure = {
            "reliability": plots.to_svg(diagram, f"reliability diagram, {name}"),
            "coverage": plots.to_svg(curves, f"accuracy by coverage, {name}"),
        }
    else:
        sure = {"reliability": "", "coverage": ""}
    if not labels:
        return sure
    f1 = [100 * each.f1 for each in class_scores(labels, confusion)]
    bars, heatmap = (
        plots.bars(labels, f1, "F1, %", "label", 100),
        plots.confusion_heatmap(labels, confusion),
    )
    return sure | {
        "f1_plot": plots.to_svg(bars, f"F1 by label, {name}"),
        "confusion_plot": plots.to_svg(heatmap, f"confusion matrix, {name}"),
    }


def _shown(samples: Sequence[Sample], image: Callable[[str], bytes | None]) -> list[_Shown]:
    return [_show(sample, _url(image, sample.id)) for sample in samples]


def _show(sample: Sample, image: str | None) -> _Shown:
    # Each later step of the response starts a line of its own.
    lines = re.split(r"(?=<step2>|<step3>|\\boxed\{)", sample.response)
    return _Shown(sample, image, lines, faults(sample))


def _url(image: Callable[[str], bytes | None], row_id: str) -> str | None:
    encoded = image(row_id)
    return None if encoded is None else pages.data_url(pages.thumbnail(encoded))


def _watched(
    workdir: Path, data_set: str, images: Mapping[str, Callable[[str], bytes | None]]
) -> list[_WatchedRow]:
    """Returns rows of a data set over time; what cannot be read does not end a run at its end."""
    try:
        found = watch(workdir / "predictions", data_set, WATCHED)
    except UserError as error:
        logger.warning("the report shows no rows over time: %s", error)
        return []
    return [
        _WatchedRow(
            row.label,
            row.id,
            _url(images[data_set], row.id),
            {step: _show(sample, None) for step, sample in row.answers.items()},
        )
        for row in found
    ]
