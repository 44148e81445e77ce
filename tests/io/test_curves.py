"""Curves show what was logged, read back from their axes."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from emor3_jax.evaluation.records import Evaluation
from emor3_jax.io import curves


def test_curves_leave_out_what_was_not_measured() -> None:
    rows = [{"step": 0, "eval/scenes/accuracy": 0.25}]
    rows += [{"step": s, "reward/overall": -0.25 * s, "reward/format": None} for s in (1, 2, 3)]
    rows[2]["reward/accuracy"] = 0.5
    figure = curves.reward_curves(rows, ("coherence",))
    (axes,) = figure.axes
    overall, accuracy = axes.lines
    assert overall.get_xdata().tolist() == [1, 2, 3]
    assert overall.get_ydata().tolist() == [-0.25, -0.5, -0.75]
    # A single point shows too.
    assert accuracy.get_marker() == "o" and overall.get_marker() == "None"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["overall -0.75", "accuracy 0.50"]
    low, high = axes.get_ylim()
    assert low < -0.75 and high == 1.05
    assert curves.reward_curves(rows[:1], ()) is None


def test_each_question_has_a_curve_of_its_own() -> None:
    """Also where there are more questions than colours; a custom term has none."""
    questions = [f"question {i}" for i in range(9)]
    rows = [
        {"step": s, "reward/overall": 0.5, "reward/letters": 80.0}
        | {f"reward/{name}": (s + i) / 20 for i, name in enumerate(questions)}
        for s in (1, 2)
    ]
    figure = curves.reward_curves(rows, questions)
    (axes,) = figure.axes
    labels = [line.get_label() for line in axes.lines]
    assert labels == ["overall 0.50", *(f"{q} {(2 + i) / 20:.2f}" for i, q in enumerate(questions))]
    styles = {(to_hex(line.get_color()), line.get_linestyle()) for line in axes.lines}
    assert len(styles) == 10
    # The third colour is the first question's, though neither format nor accuracy was measured.
    assert to_hex(axes.lines[1].get_color()) == "#ee6677"


def test_long_runs_are_averaged_to_a_few_points() -> None:
    rows = [{"step": s, "policy/kl": float(s % 3) if s % 100 else None} for s in range(1, 1001)]
    points = curves.points_of(rows, "policy/kl", 2.0)
    # 990 values, three at a time.
    assert len(points) == 330
    assert points[0] == (2.0, 2.0)
    assert curves.points_of(rows[:2], "policy/kl", 2.0) == [(1, 2.0), (2, 4.0)]
    assert curves.points_of(rows, "policy/entropy") == []


def test_held_out_accuracy_has_its_interval_at_each_evaluation() -> None:
    def values(name: str, *shares: float) -> dict[str, float]:
        ends = "", "_low", "_high"
        return {f"{name}accuracy{end}": x for end, x in zip(ends, shares, strict=True)}

    rows = [
        {"step": 0} | values("eval/a/", 0.25, 0.125, 0.5) | values("eval/b/", 0.5, 0.25, 0.75),
        {"step": 1},
        {"step": 2} | values("eval/a/", 0.5, 0.375, 0.625),
        {"step": 3},
    ]
    after = {
        "a": Evaluation(values("", 0.75, 0.625, 0.875), []),
        "b": Evaluation(values("", 0.25, 0.125, 0.5), []),
        "c": Evaluation({"accuracy": 1.0}, []),
    }
    (axes,) = curves.accuracy_curves(rows, after).axes
    first, second = axes.lines
    assert (first.get_xdata().tolist(), first.get_ydata().tolist()) == ([0, 2, 3], [25, 50, 75])
    assert (second.get_xdata().tolist(), second.get_ydata().tolist()) == ([0, 3], [50, 25])
    assert [line.get_label() for line in axes.lines] == ["a 75.0", "b 25.0"]
    band = axes.collections[0].get_paths()[0].vertices
    assert {tuple(x) for x in band.tolist()} >= {(0, 12.5), (0, 50), (2, 37.5), (3, 87.5)}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("training step", "accuracy, % of rows")
    assert curves.accuracy_curves(rows[1:2], after) is None


def test_time_is_stacked_by_phase_and_compiles_are_cut_off() -> None:
    rows = [
        {"step": s, "time/rollout_s": 100.0 if s == 1 else 2.0, "time/update_s": 3.0}
        for s in (1, 2, 3)
    ]
    drawn = curves.time_by_phase(rows)
    (axes,) = drawn.figure.axes
    assert [each.get_label() for each in axes.collections] == ["rollout", "update"]
    assert axes.get_ylim() == (0, 12.5)
    assert "the longest took 103 seconds" in drawn.caption
    top = axes.collections[1].get_paths()[0].vertices
    assert [2, 5] in top.tolist() and [1, 103] in top.tolist()
    # One step has bars.
    one = curves.time_by_phase(rows[1:2])
    assert [bar.get_height() for bar in one.figure.axes[0].patches] == [2, 3]
    assert "cut off" not in one.caption
    assert one.figure.axes[0].get_xlim() == (1, 3)
    assert curves.time_by_phase([{"step": 1}]) is None


def test_memory_is_in_gib() -> None:
    rows = [
        {"step": s, "memory/host_bytes": s * 2**29, "memory/device_peak_bytes": 2**31}
        for s in (1, 2)
    ]
    (axes,) = curves.memory_curves(rows).axes
    assert {line.get_label(): line.get_ydata().tolist() for line in axes.lines} == {
        "host, resident": [0.5, 1.0],
        "device, peak": [2.0, 2.0],
    }
    # A point of one step lies within the axes.
    (axes,) = curves.memory_curves(rows[:1]).axes
    assert axes.get_ylim() == pytest.approx((0, 2.1))


@pytest.mark.parametrize("reward", [True, False])
def test_each_figure_of_a_run_has_a_name_of_its_own(reward: bool) -> None:
    row = {"time/step_s": 1.0, "time/update_s": 1.0, "policy/loss": 0.5, "memory/host_bytes": 1e9}
    row |= {"reward/overall": 0.5, "policy/kl": 0.1, "policy/entropy": 0.2} if reward else {}
    rows = [{"step": s, "response/length_mean": 9.0} | row for s in (1, 2)]
    drawn = list(curves.training_curves(rows, {}, ()))
    names = [each.name.removesuffix(" over training steps") for each in drawn]
    told = ["reward terms", "KL to the reference", "entropy"] if reward else ["loss"]
    assert names == [*told, "response length", "time of a step by phase", "memory"]
    assert all(each.figure.axes[0].get_ylabel() for each in drawn)
    assert np.isfinite(drawn[0].figure.axes[0].lines[0].get_ydata()).all()
    assert list(curves.training_curves([], {}, ())) == []


def test_runs_of_other_seeds_are_a_mean_in_a_band() -> None:
    def run(*values: float | None) -> list[dict]:
        return [{"step": s, "policy/kl": x} for s, x in enumerate(values)]

    groups = [
        curves.RunGroup("x" * 50, [run(1.0, 2.0, 6.0), run(3.0, None, 2.0, 9.0)]),
        curves.RunGroup("one", [run(0.5)]),
        curves.RunGroup("none", [[{"step": 1}]]),
    ]
    (axes,) = curves.group_curves(groups, "policy/kl", "nats", 2.0).axes
    mean, single = axes.lines
    # At the steps that both have.
    assert (mean.get_xdata().tolist(), mean.get_ydata().tolist()) == ([0, 2], [4, 8])
    (band,) = axes.collections
    assert {tuple(x) for x in band.get_paths()[0].vertices.tolist()} == {
        (0, 2),
        (0, 6),
        (2, 4),
        (2, 12),
    }
    assert single.get_ydata().tolist() == [1] and single.get_marker() == "o"
    assert mean.get_label() == "…" + "x" * 44 and axes.get_ylabel() == "nats"
    assert [each.name for each in curves.learning_curves(groups, ["a"])] == [
        "KL to the reference of each run"
    ]
