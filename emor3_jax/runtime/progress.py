"""What a run tells of its progress: phases, time left, evaluations, a trace for the profiler."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from emor3_jax.evaluation.records import Evaluation
from emor3_jax.io.console import duration, fitted
from emor3_jax.io.metrics import Lap, PhaseClock
from emor3_jax.rewards.questions import QUESTIONS

_UNDER_WAY = ("update",)
"""Phases after which a step is not given up: the state before it is gone."""


class StepClock(PhaseClock):
    """A clock of phases that lets something look between them, and tells which one is at work."""

    def __init__(
        self, look: Callable[[], None], tell: Callable[[str], None] = lambda _: None
    ) -> None:
        """Starts.

        Args:
          look: called after each phase but the update; what it raises ends the step.
          tell: is told, from another thread, the phase that the device is in.
        """
        super().__init__()
        self._look, self._tell = look, tell
        self._last_marked = ""
        # A phase is marked when all of it was launched, which may be near its end: the order of the
        # step before says which one has begun.
        self._following: dict[str, str] = {}

    def mark(self, phase: str, arrays: Any) -> None:
        """Marks the end of a phase, then looks."""
        if phase != self._last_marked:
            self._following[self._last_marked], self._last_marked = phase, phase
        super().mark(phase, arrays)
        if phase not in _UNDER_WAY:
            self._look()

    def _wait(self, phase: str, arrays: Any, lap: Lap) -> None:
        self._tell(phase)
        super()._wait(phase, arrays, lap)
        self._tell(self._following.get(phase, ""))

    def restart(self) -> None:
        """Begins a phase now."""
        super().restart()
        self._tell(self._following.get(self._last_marked, "compiling"))


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


def evaluation_lines(results: dict[str, Evaluation], width: int | None = None) -> list[str]:
    """Returns a line for each data set: its main metrics, with rows and a 95 % interval.

    Args:
      results: data set → evaluation.
      width: columns that a line may take; None leaves out nothing.
    """
    shown = ("format", *QUESTIONS, "decoupling")
    lines = []
    for name, result in results.items():
        metrics = result.metrics
        first = f"{name}: accuracy {metrics['accuracy']:.3f}{_certainty(metrics)}"
        rest = (f"{metric} {metrics[metric]:.3f}" for metric in shown if metric in metrics)
        lines.append(fitted([first, *rest], width))
    return lines


def _certainty(metrics: dict[str, float]) -> str:
    """Returns the interval of the accuracy and the rows behind it, as far as they are there."""
    said = []
    if "accuracy_low" in metrics:
        said.append(f"95 % {metrics['accuracy_low']:.3f} to {metrics['accuracy_high']:.3f}")
    if "rows" in metrics:
        said.append(f"{metrics['rows']:.0f} rows")
    return f" ({', '.join(said)})" if said else ""
