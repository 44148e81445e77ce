"""Figures show the numbers that they are given, read back from their axes."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_hex

from emor3_jax.evaluation.records import Evaluation
from emor3_jax.io import plots


def _accuracy(low: float, middle: float, high: float) -> Evaluation:
    return Evaluation({"accuracy_low": low, "accuracy": middle, "accuracy_high": high}, [])


def test_intervals_before_and_after() -> None:
    before = {"scenes": _accuracy(0.125, 0.25, 0.5), "gone": _accuracy(0, 0, 0)}
    after = {"scenes": _accuracy(0.5, 0.75, 0.875), "<b> $x$": _accuracy(0, 0.5, 1)}
    figure = plots.accuracy_intervals(before, after)
    (axes,) = figure.axes
    lines = [(to_hex(line.get_color()), *line.get_xdata()) for line in axes.lines]
    grey, blue = "#999999", "#4477aa"
    assert lines == [
        (grey, 12.5, 50),
        (grey, 25),
        (blue, 50, 87.5),
        (blue, 75),
        (blue, 0, 100),
        (blue, 50),
    ]
    assert [text.get_text() for text in axes.texts] == ["25.0", "75.0", "50.0"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["scenes", "<b> $x$"]
    assert axes.get_xlim() == (0, 100)
    # Names are text: no markup and no formula.
    svg = plots.to_svg(figure, 'a "plot"')
    assert ">&lt;b&gt; $x$</text>" in svg and 'aria-label="a &#34;plot&#34;"' in svg
    assert plots.accuracy_intervals({}, {"scenes": Evaluation({"accuracy": 1.0}, [])}) is None


def test_confusion_is_as_opaque_as_its_share() -> None:
    figure = plots.confusion_heatmap(("joy", "<fear>"), ((5, 0, 1), (1, 1, 0)))
    (axes,) = figure.axes
    (mesh,) = axes.collections
    cells = mesh.get_array()
    np.testing.assert_allclose(cells[..., 3], [[5 / 6, 0, 1 / 6], [0.5, 0.5, 0]])
    right, wrong = to_hex(cells[0, 0]), to_hex(cells[0, 2])
    assert [[to_hex(x) for x in row] for row in cells] == [
        [right, wrong, wrong],
        [wrong, right, wrong],
    ]
    counts = {text.get_position(): text.get_text() for text in axes.texts}
    assert counts == {
        **{(0.5, 0.5): "5", (1.5, 0.5): "0", (2.5, 0.5): "1"},
        **{(0.5, 1.5): "1", (1.5, 1.5): "1", (2.5, 1.5): "0"},
    }
    assert [x.get_text() for x in axes.get_xticklabels()] == ["joy", "<fear>", "no label"]
    # The first label is on top.
    assert axes.get_ylim() == (2, 0)


def test_bars_have_their_values() -> None:
    figure = plots.bars(["joy", "fear"], [200 / 3, 40], "F1, %", "label", 100)
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([200 / 3, 40])
    assert [text.get_text() for text in axes.texts] == ["66.7", "40.0"]
    assert axes.get_xlim() == (0, 100) and axes.yaxis_inverted()
    assert (axes.get_xlabel(), axes.get_title(loc="left")) == ("F1, %", "label")


def test_matplotlib_is_imported_on_first_use() -> None:
    script = (
        "import sys; from emor3_jax.io import plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "svg = plots.to_svg(plots.bars(['a'], [1], 'x', 'y'), 'bars')\n"
        "assert 'matplotlib.pyplot' not in sys.modules; print(svg)"
    )
    printed = subprocess.check_output([sys.executable, "-c", script], text=True)
    # Another process gives the same text, without a date.
    assert printed.strip() == str(plots.to_svg(plots.bars(["a"], [1], "x", "y"), "bars")).strip()
    assert printed.startswith("<svg role=") and "date" not in printed.lower()
