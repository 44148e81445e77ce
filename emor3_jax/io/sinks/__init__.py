"""Sinks of a run's metrics, each in a file of its own; a new one is a row of `SINKS`."""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from emor3_jax.io.sinks.jsonl import JsonLinesSink


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


# Imported where a run writes to them: their libraries take seconds, and trackers are optional.


def _open_tensorboard(workdir: Path, first_step: int) -> Sink:
    from emor3_jax.io.sinks.tensorboard import TensorBoardSink

    return TensorBoardSink(workdir, first_step)


def _open_wandb(workdir: Path, first_step: int) -> Sink:
    from emor3_jax.io.sinks.wandb import WandbSink

    return WandbSink(workdir, first_step)


def _open_mlflow(workdir: Path, first_step: int) -> Sink:
    from emor3_jax.io.sinks.mlflow import MlflowSink

    return MlflowSink(workdir, first_step)


SINKS: dict[str, Callable[[Path, int], Sink]] = {
    "jsonl": JsonLinesSink,
    "tensorboard": _open_tensorboard,
    "wandb": _open_wandb,
    "mlflow": _open_mlflow,
}
"""Name in `log.sinks` → sink."""


def missing_library(name: str) -> str | None:
    """Returns the package that a sink lacks, None if it can be opened."""
    packages = {"wandb": "wandb", "mlflow": "mlflow-skinny"}
    if name in packages and importlib.util.find_spec(name) is None:
        return packages[name]
    return None
