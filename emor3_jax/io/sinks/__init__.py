"""Sinks of a run's metrics, each in a file of its own; a new one is a row of `SINKS`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from emor3_jax.io.sinks.jsonl import JsonLinesSink
from emor3_jax.io.sinks.tensorboard import TensorBoardSink


class Sink(Protocol):
    """Destination of metrics, opened by `(workdir, first_step)`.

    A run that resumes writes the steps from `first_step` on again, so a sink drops those it holds.
    """

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Writes the values of a step; None stands for a number that is not finite."""

    def amend(self, step: int, values: Mapping[str, float | None]) -> None:
        """Adds values to those of the step that was written last, maybe by an earlier start."""

    def close(self) -> None:
        """Releases what is open."""


SINKS: dict[str, Callable[[Path, int], Sink]] = {
    "jsonl": JsonLinesSink,
    "tensorboard": TensorBoardSink,
}
"""Name in `log.sinks` → sink."""
