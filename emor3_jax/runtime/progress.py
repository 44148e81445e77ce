"""What a run tells of its progress: phases, time left, evaluations, a trace for the profiler."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from emor3_jax.evaluation.records import Evaluation
from emor3_jax.io.console import duration
from emor3_jax.io.metrics import PhaseClock
from emor3_jax.rewards.questions import QUESTIONS

_UNDER_WAY = ("update",)
"""Phases after which a step is not given up: the state before it is gone."""


class StepClock(PhaseClock):
    """A clock of phases that lets something look between them."""

    def __init__(self, look: Callable[[], None]) -> None:
        """Starts.

        Args:
          look: called after each phase but the update; what it raises ends the step.
        """
        super().__init__()
        self._look = look

    def mark(self, phase: str, arrays: Any) -> None:
        """Marks the end of a phase, then looks."""
        super().mark(phase, arrays)
        if phase not in _UNDER_WAY:
            self._look()


def start_trace(folder: Path) -> None:
    """Begins a trace for the JAX profiler.

    Without Python's own calls: of a few seconds they are the million events that a trace can hold.

    Args:
      folder: to write it to.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    jax.profiler.start_trace(str(folder), profiler_options=options)


class Pace:
    """Estimates the remaining time by the mean of the steps after the first, which compiles."""

    def __init__(self, last: int) -> None:
        """Waits for the first step.

        Args:
          last: the step that the run ends with.
        """
        self._last, self._first = last, 0
        self._started: float | None = None

    def left(self, step: int) -> str:
        """Returns the time that is left after a step, for people to read; "?" after the first."""
        now = time.perf_counter()
        if self._started is None:
            self._first, self._started = step, now
            return "?" if step < self._last else duration(0)
        return duration((now - self._started) / (step - self._first) * (self._last - step))


def evaluation_metrics(results: dict[str, Evaluation]) -> dict[str, float]:
    """Returns `eval/<data set>/<metric>` → value."""
    return {
        f"eval/{name}/{metric}": value
        for name, result in results.items()
        for metric, value in result.metrics.items()
    }


def evaluation_line(results: dict[str, Evaluation]) -> str:
    """Returns the main metrics of each data set in one line."""
    shown = ("accuracy", "format", *QUESTIONS, "decoupling")
    return "; ".join(
        f"{name}: " + "  ".join(f"{m} {r.metrics[m]:.3f}" for m in shown if m in r.metrics)
        for name, r in results.items()
    )
