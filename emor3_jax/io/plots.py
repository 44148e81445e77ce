"""Plots of the HTML pages: matplotlib figures, inlined as SVG.

matplotlib is imported on first use, because most programs never draw. `pyplot` and its global state
stay unused.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, product
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup, escape

from emor3_jax.evaluation.confidence import Calibration
from emor3_jax.evaluation.records import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.8
"""Width of a figure in inches; at 96 pixels an inch it nearly fits a phone."""

_MIN_SCALE = 0.7
"""A page shrinks a figure down to this scale; a larger one then scrolls."""

_BEFORE, _AFTER = "#999999", "#4477aa"
_RIGHT, _WRONG = (0.09, 0.45, 0.27), (0.70, 0.15, 0.12)
# Points of a curve up to which each is marked.
_FEW = 20
COLOURS = ("#4477aa", "#228833", "#ee6677", "#aa8800", "#2299bb", "#aa3377")
LINES = ("solid", "dashed", "dotted", "dashdot")


def accuracy_intervals(
    before: Mapping[str, Evaluation], after: Mapping[str, Evaluation]
) -> "Figure | None":
    """Draws each data set's accuracy with its 95 % interval, `before` in grey.

    Args:
      before, after: data set → evaluation.

    Returns:
      The figure, None if no evaluation has an interval.
    """
    rows, middles, y = [], {}, 0.0
    for name in after:
        start = y
        for each, colour in ((before.get(name), _BEFORE), (after[name], _AFTER)):
            if each is not None and "accuracy_low" in each.metrics:
                rows.append((y, each.metrics, colour))
                y += 1
        if y > start:
            middles[name] = (start + y - 1) / 2
            y += 0.5
    if not rows:
        return None
    figure, axes = new_figure(WIDTH, 0.8 + 0.26 * y)
    for y, metrics, colour in rows:
        low, middle, high = (
            100 * metrics[key] for key in ("accuracy_low", "accuracy", "accuracy_high")
        )
        axes.plot([low, high], [y, y], color=colour, linewidth=3)
        axes.plot([middle], [y], "o", color=colour)
        axes.annotate(f"{middle:.1f}", (high, y), (6, 0), textcoords="offset points", va="center")
    axes.set_yticks(list(middles.values()), list(middles), parse_math=False)
    axes.set_ylim(y + 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy, % of rows")
    axes.grid(axis="x", color="#dddddd")
    return figure


def confusion_heatmap(labels: Sequence[str], confusion: Sequence[Sequence[int]]) -> "Figure":
    """Draws a confusion matrix; a cell is as opaque as its share of the true label's rows.

    Args:
      labels: the label set, K of them.
      confusion: int[K][K + 1], rows by true label and by answer; the last column is no label.
    """
    counts = np.asarray(confusion)
    k = len(labels)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axes = new_figure(1.4 + 0.38 * (k + 1), 1.4 + 0.38 * k)
    axes.set_aspect("equal")
    colours = np.empty((k, k + 1, 4))
    colours[..., :3], colours[..., 3] = _WRONG, share
    colours[np.arange(k), np.arange(k), :3] = _RIGHT
    axes.pcolormesh(colours, edgecolor="white", linewidth=1)
    for (i, j), count in np.ndenumerate(counts):
        ink = "white" if share[i, j] > 0.5 else "#222222"
        axes.text(j + 0.5, i + 0.5, str(count), ha="center", va="center", color=ink, fontsize=9)
    axes.invert_yaxis()
    axes.set_yticks(np.arange(k) + 0.5, labels, parse_math=False)
    axes.set_xticks(
        np.arange(k + 1) + 0.5,
        [*labels, "no label"],
        rotation=45,
        ha="left",
        rotation_mode="anchor",
        parse_math=False,
    )
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_ylabel("true label, rows")
    axes.set_xlabel("answer, rows")
    return figure


def bars(
    labels: Sequence[str],
    values: Sequence[float],
    xlabel: str,
    ylabel: str,
    limit: float | None = None,
) -> "Figure":
    """Draws horizontal bars, from top to bottom.

    Args:
      labels: of the bars.
      values: their lengths.
      xlabel, ylabel: titles of the axes, with the unit.
      limit: end of the value axis; None fits it to the values.
    """
    figure, axes = new_figure(WIDTH, 0.8 + 0.26 * len(labels))
    drawn = axes.barh(range(len(labels)), values, color=_AFTER)
    whole = all(float(value).is_integer() for value in values)
    axes.bar_label(drawn, fmt="{:.0f}" if whole else "{:.1f}", padding=3)
    axes.set_yticks(range(len(labels)), labels, parse_math=False)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(0, limit)
    axes.set_xlabel(xlabel)
    if whole:
        axes.xaxis.get_major_locator().set_params(integer=True)
    # Above the axis, since a figure of one bar is too low for a rotated label.
    axes.set_title(ylabel, loc="left", fontsize=10)
    return figure


def reliability_diagram(calibrations: Mapping[str, Calibration]) -> "Figure":
    """Draws accuracy against confidence in bins, one line a source; equal is calibrated.

    Args:
      calibrations: source of confidence → its curves.
    """
    figure, axes = new_figure(WIDTH, 3.4)
    axes.plot([0, 1], [0, 1], color=_BEFORE, linewidth=1, linestyle="dotted")
    most = max(each.rows for curves in calibrations.values() for each in curves.bins)
    for (source, curves), (line, colour) in zip(calibrations.items(), styles(), strict=False):
        there = [each for each in curves.bins if each.rows]
        x, y = [each.confidence for each in there], [each.accuracy for each in there]
        axes.plot(x, y, color=colour, linestyle=line, label=source)
        # Rows of a bin are the area of its point.
        axes.scatter(x, y, [10 + 90 * each.rows / max(most, 1) for each in there], colour)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_aspect("equal")
    axes.set_xlabel("mean confidence of the bin")
    axes.set_ylabel("accuracy of the bin")
    axes.grid(color="#eeeeee")
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    return figure


def coverage_curves(calibrations: Mapping[str, Calibration]) -> "Figure":
    """Draws the accuracy of the surest rows against their share of all, one line a source.

    Args:
      calibrations: source of confidence → its curves.
    """
    figure, axes = new_figure(WIDTH, 3.4)
    for (source, curves), (line, colour) in zip(calibrations.items(), styles(), strict=False):
        coverage, accuracy = zip(*curves.coverage, strict=True)
        coverage, accuracy = ([100 * x for x in each] for each in (coverage, accuracy))
        marker = "o" if len(coverage) <= _FEW else None
        axes.plot(coverage, accuracy, color=colour, linestyle=line, marker=marker, label=source)
    axes.set_xlim(0, 102)
    axes.set_ylim(0, 102)
    axes.set_xlabel("coverage, % of rows that are answered")
    axes.set_ylabel("accuracy of those, %")
    axes.grid(color="#eeeeee")
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    return figure


def styles() -> Iterator[tuple[str, str]]:
    """Yields line style and colour of curves without end."""
    return cycle(product(LINES, COLOURS))


def to_svg(figure: "Figure", description: str) -> Markup:
    """Returns a figure as an `<svg>` element; equal figures give equal text.

    Args:
      figure: is drawn.
      description: read out by screen readers; unique in its page, since the ids of the element's
        parts derive from it.
    """
    import matplotlib
    from matplotlib.text import Text

    # Text stays text, so that a page can be searched and is small.
    for text in figure.findobj(Text):
        # A name may hold dollars.
        text.set_parse_math(False)
    style = {"svg.fonttype": "none", "svg.hashsalt": f"emor3_jax: {description}"}
    out = io.StringIO()
    with matplotlib.rc_context(style):
        figure.savefig(
            out,
            format="svg",
            metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
            transparent=True,
            bbox_inches="tight",
            pad_inches=0.05,
        )
    svg = out.getvalue()
    # Without the XML prologue, and without the names of groups, which every figure repeats.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])
    width = _MIN_SCALE * float(re.search(r'width="([\d.]+)pt"', svg)[1])
    named = f'<svg role="img" aria-label="{escape(description)}" style="min-width: {width:.0f}pt"'
    return Markup(svg.replace("<svg", named, 1))


def new_figure(width: float, height: float) -> "tuple[Figure, Axes]":
    """Returns a figure of so many inches and its axes."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
