"""Curves of a run over its training steps, drawn from the lines of its metrics."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from emor3_jax.evaluation.records import Evaluation
from emor3_jax.io.metrics import PHASES
from emor3_jax.io.plots import COLOURS, WIDTH, new_figure, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
Points = list[tuple[float, float]]

_HEIGHT = 2.9
_TOTAL = "#222222"
_MOST = 400
"""Points of a curve; of longer runs, neighbours are averaged."""

_FEW = 20
"""Points of a curve up to which each is marked."""

_NAME = 44
"""Letters of a group's name, of which the last ones are shown."""

_GIB = 2**30
_CUT = 2.5
"""Height of the time of steps, as a multiple of their median."""


class Drawn(NamedTuple):
    """A figure with the text below it.

    Attributes:
      name: of the figure, unique in its page.
      figure: it.
      caption: what it shows beyond its axes.
    """

    name: str
    figure: "Figure"
    caption: str = ""


def training_curves(
    rows: Rows, after: Mapping[str, Evaluation], questions: Sequence[str]
) -> Iterator[Drawn]:
    """Yields the curves of a run; none of what was not logged.

    Args:
      rows: lines of metrics.jsonl.
      after: data set → evaluation after the last step.
      questions: names of the reflections.
    """
    trained = [row for row in rows if "time/step_s" in row]
    last = max((row["step"] for row in rows), default=0)
    if figure := reward_curves(rows, questions):
        steps = "1 step" if last == 1 else f"{last} steps"
        caption = f"Mean reward terms over {steps}; the legend gives their last values."
        yield Drawn("reward terms over training steps", figure, caption)
    if figure := accuracy_curves(rows, after):
        caption = "Held-out accuracy with its 95 % interval; during training of fewer rows."
        yield Drawn("held-out accuracy over training steps", figure, caption)
    for metric, name, unit in (
        ("policy/loss", "loss", "loss"),
        ("policy/perplexity", "perplexity", "perplexity of a token"),
        ("policy/kl", "KL to the reference", "KL, nats a token"),
        ("policy/entropy", "entropy", "entropy, nats a token"),
        ("response/length_mean", "response length", "response, tokens"),
    ):
        # The loss of reinforcement learning says nothing of progress.
        if metric == "policy/loss" and any("reward/overall" in row for row in rows):
            continue
        if points := points_of(trained, metric):
            figure, axes = _over_steps(unit)
            _line(axes, points, "", COLOURS[0])
            yield Drawn(f"{name} over training steps", figure)
    if drawn := time_by_phase(trained):
        yield drawn
    if figure := memory_curves(trained):
        yield Drawn("memory over training steps", figure)


def points_of(rows: Rows, metric: str, scale: float = 1.0) -> Points:
    """Returns (step, value) of a metric, where it was logged and finite; few of many steps.

    Args:
      rows: lines of metrics.jsonl.
      metric: its name.
      scale: factor of the values.
    """
    return _thinned(
        [(row["step"], scale * row[metric]) for row in rows if row.get(metric) is not None]
    )


def _thinned(points: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """Returns at most `_MOST` points, each the mean of neighbours."""
    size = -(-len(points) // _MOST)
    parts = (points[i : i + size] for i in range(0, len(points), max(size, 1)))
    return [tuple(sum(x) / len(part) for x in zip(*part, strict=True)) for part in parts]


def reward_curves(rows: Rows, questions: Sequence[str]) -> "Figure | None":
    """Draws the mean reward terms over the training steps.

    Custom reward terms are left out, since they may be of any size.

    Args:
      rows: lines of metrics.jsonl.
      questions: names of the reflections.

    Returns:
      The figure, its legend with the last values; None if no training step was logged.
    """
    names = ("overall", "format", "accuracy", *questions)
    curves = {name: points_of(rows, f"reward/{name}") for name in names}
    if not any(curves.values()):
        return None
    figure, axes = _over_steps("mean reward")
    # By position, so that a term keeps its colour where another one is missing.
    drawn = zip(curves.items(), chain([("solid", _TOTAL)], styles()), strict=False)
    for (name, points), (line, colour) in drawn:
        if points:
            _line(axes, points, f"{name} {_last(rows, f'reward/{name}'):.2f}", colour, line)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0), max(high, 1.05))
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    return figure


def accuracy_curves(rows: Rows, after: Mapping[str, Evaluation]) -> "Figure | None":
    """Draws the accuracy of each evaluation set over the training steps, with its interval.

    Args:
      rows: lines of metrics.jsonl, which lack the evaluation after the last step.
      after: data set → that evaluation.

    Returns:
      The figure; None if no set was evaluated twice.
    """
    last = max((row["step"] for row in rows), default=0)
    curves = {}
    for name, evaluation in after.items():
        keys = [f"eval/{name}/accuracy{end}" for end in ("", "_low", "_high")]
        points = {
            row["step"]: [100 * row[key] for key in keys]
            for row in rows
            if all(row.get(key) is not None for key in keys)
        }
        found = [evaluation.metrics.get(key.rpartition("/")[2]) for key in keys]
        if None not in found:
            points[last] = [100 * value for value in found]
        if len(points) > 1:
            curves[name] = [(step, *values) for step, values in sorted(points.items())]
    if not curves:
        return None
    figure, axes = _over_steps("accuracy, % of rows")
    for (name, points), (line, colour) in zip(curves.items(), styles(), strict=False):
        steps, middle, low, high = zip(*points, strict=True)
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        label, marker = f"{name} {middle[-1]:.1f}", "o" if len(steps) <= _FEW else None
        axes.plot(steps, middle, marker=marker, color=colour, linestyle=line, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    return figure


def time_by_phase(rows: Rows) -> Drawn | None:
    """Draws the seconds of each step, stacked by phase; None if none were logged.

    Steps that compile are cut off, so that the others can be seen.

    Args:
      rows: lines of metrics.jsonl, of training steps.
    """
    curves = {name: points_of(rows, f"time/{name}_s") for name in PHASES}
    steps = sorted({step for points in curves.values() for step, _ in points})
    shown = [name for name, points in curves.items() if points]
    if not shown:
        return None
    seconds = [[dict(curves[name]).get(step, 0.0) for step in steps] for name in shown]
    figure, axes = _over_steps("seconds of a step")
    colours = [COLOURS[PHASES.index(name)] for name in shown]
    if len(steps) > 1:
        axes.stackplot(steps, seconds, labels=shown, colors=colours, linewidth=0)
    else:
        floor = 0.0
        for name, (value,), colour in zip(shown, seconds, colours, strict=True):
            axes.bar(steps, [value], bottom=floor, label=name, color=colour, width=0.5)
            floor += value
        # Else the bar fills the axes, with marks between the steps.
        axes.set_xlim(steps[0] - 1, steps[0] + 1)
    totals = [sum(each) for each in zip(*seconds, strict=True)]
    caption, most = "Time of each phase on the device.", _CUT * statistics.median(totals)
    if (longest := max(totals)) > most:
        axes.set_ylim(0, most)
        caption += f" Steps that compile are cut off; the longest took {longest:.0f} seconds."
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    return Drawn("time of a step by phase", figure, caption)


def memory_curves(rows: Rows) -> "Figure | None":
    """Draws the memory of host and device in GiB; None if none was logged.

    Args:
      rows: lines of metrics.jsonl, of training steps.
    """
    names = {
        "memory/host_bytes": "host, resident",
        "memory/host_peak_bytes": "host, peak",
        "memory/device_peak_bytes": "device, peak",
    }
    curves = {name: points_of(rows, metric, 1 / _GIB) for metric, name in names.items()}
    if not any(curves.values()):
        return None
    figure, axes = _over_steps("memory, GiB")
    for (name, points), (line, colour) in zip(curves.items(), styles(), strict=False):
        if points:
            _line(axes, points, name, colour, line)
    # Values that are almost equal have no margin of their own above them.
    highest = max(value for points in curves.values() for _, value in points)
    axes.set_ylim(0, 1.05 * highest)
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    return figure


class RunGroup(NamedTuple):
    """Runs whose configs differ in their seed alone.

    Attributes:
      name: of the group.
      rows: lines of metrics.jsonl, of each run.
    """

    name: str
    rows: Sequence[Rows]


def learning_curves(groups: Sequence[RunGroup], data_sets: Sequence[str]) -> Iterator[Drawn]:
    """Yields curves of several runs, one a group; none of what no run has logged.

    Args:
      groups: of runs.
      data_sets: whose held-out accuracy is drawn.
    """
    held_out = ((f"eval/{x}/accuracy", f"accuracy of {x}", "% of rows", 100.0) for x in data_sets)
    for metric, name, unit, scale in (
        *held_out,
        ("reward/overall", "reward", "mean of the step", 1.0),
        ("policy/kl", "KL to the reference", "nats a token", 1.0),
        ("policy/entropy", "entropy", "nats a token", 1.0),
        ("response/length_mean", "response length", "tokens", 1.0),
    ):
        if figure := group_curves(groups, metric, unit, scale):
            figure.axes[0].set_title(name, loc="left", fontsize=10, parse_math=False)
            yield Drawn(f"{name} of each run", figure)


def group_curves(
    groups: Sequence[RunGroup], metric: str, ylabel: str, scale: float = 1.0
) -> "Figure | None":
    """Draws a metric of several runs; a group is its mean, in a band from minimum to maximum.

    A group is drawn at the steps that all its runs have.

    Args:
      groups: of runs.
      metric: its name.
      ylabel: title of its axis.
      scale: factor of the values.

    Returns:
      The figure; None if no run has logged the metric.
    """
    figure, axes = _over_steps(ylabel)
    for group, (line, colour) in zip(groups, styles(), strict=False):
        runs = [
            {row["step"]: scale * row[metric] for row in rows if row.get(metric) is not None}
            for rows in group.rows
        ]
        shared = sorted(set(runs[0]).intersection(*runs[1:]))
        points = [(step, *_band([run[step] for run in runs])) for step in shared]
        if not points:
            continue
        steps, mean, low, high = zip(*_thinned(points), strict=True)
        if len(runs) > 1:
            axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        name = group.name if len(group.name) <= _NAME else f"…{group.name[-_NAME:]}"
        _line(axes, list(zip(steps, mean, strict=True)), name, colour, line)
    if not axes.lines:
        return None
    figure.legend(loc="outside upper left", frameon=False, fontsize=9)
    return figure


def _band(values: Sequence[float]) -> tuple[float, float, float]:
    return sum(values) / len(values), min(values), max(values)


def _over_steps(ylabel: str) -> "tuple[Figure, Axes]":
    figure, axes = new_figure(WIDTH, _HEIGHT)
    axes.set_xlabel("training step")
    axes.set_ylabel(ylabel)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(color="#eeeeee")
    return figure, axes


def _line(axes: "Axes", points: Points, label: str, colour: str, line: str = "solid") -> None:
    steps, values = zip(*points, strict=True)
    # One point alone makes no line.
    marker = "o" if len(points) == 1 else None
    axes.plot(steps, values, marker=marker, color=colour, linestyle=line, label=label or "_unnamed")
    axes.set_xlim(left=0)


def _last(rows: Rows, metric: str) -> float:
    return next(row[metric] for row in reversed(rows) if row.get(metric) is not None)
