"""Metrics of a run: the sinks that they are written to, time by phase, and memory."""

import dataclasses
import math
import os
import resource
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from emor3_jax.io.sinks import SINKS
from emor3_jax.parallel import hosts

PHASES = ("rollout", "reflect", "reward", "reference", "old", "update")
"""Phases of a step on the device, whose seconds are `time/<phase>_s`, in their order."""


class MetricWriter:
    """Writes metrics to sinks.

    A run that goes on from a checkpoint first drops what was written after it. The last step is
    written twice: its own metrics, then those of the evaluation after training (`add_events`). Of
    several processes only the first writes.
    """

    def __init__(self, workdir: Path, sinks: Sequence[str], first_step: int = 0) -> None:
        """Opens the sinks, which drop what is to be written again.

        Args:
          workdir: folder of the run.
          sinks: names in `SINKS`.
          first_step: metrics of this step and later ones are dropped.
        """
        names = sinks if hosts.is_first() else ()
        self._sinks = {name: SINKS[name](workdir, first_step) for name in names}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of a step, a number that is not finite as None."""
        for sink in self._sinks.values():
            sink.write(step, _row(values))

    def amend(self, step: int, values: Mapping[str, float]) -> None:
        """Adds values to those of the step that was written last, maybe before this start."""
        for sink in self._sinks.values():
            sink.amend(step, _row(values))

    def add_events(self, step: int, values: Mapping[str, float | None]) -> None:
        """Writes further values of a step; not to the JSON lines, which hold each step once."""
        for name, sink in self._sinks.items():
            if name != "jsonl":
                sink.write(step, values)

    def close(self) -> None:
        """Closes the sinks."""
        for sink in self._sinks.values():
            sink.close()


def _row(values: Mapping[str, float]) -> dict[str, float | None]:
    return {k: (float(v) if math.isfinite(v) else None) for k, v in values.items()}


class PhaseClock:
    """Splits the device's time by phase while the program runs ahead of it.

    `mark("rollout", arrays)` says that the phase ends when these arrays are there, and returns at
    once: a thread waits for them. A phase lasts from the end of the one before it, so time in which
    the device had nothing to do counts for the phase that follows.
    """

    def __init__(self) -> None:
        self._waiter = ThreadPoolExecutor(1)
        self._lap = Lap()
        self._last = time.perf_counter()

    def mark(self, phase: str, arrays: Any) -> None:
        """Says what ends a phase; a phase may have several parts."""
        self._lap.marks.append(self._waiter.submit(self._wait, phase, arrays, self._lap))

    def _wait(self, phase: str, arrays: Any, lap: "Lap") -> None:
        jax.block_until_ready(arrays)
        now = time.perf_counter()
        lap.seconds[phase] = lap.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def restart(self) -> None:
        """Begins a phase now: what was done since the last mark counts for none."""
        self._last = time.perf_counter()

    def lap(self) -> "Lap":
        """Returns what was marked since the last call, which may not have ended yet."""
        lap, self._lap = self._lap, Lap()
        return lap

    def close(self) -> None:
        """Ends the thread."""
        self._waiter.shutdown()


@dataclasses.dataclass
class Lap:
    """The phases of one step, as `PhaseClock.lap` returns them."""

    marks: list[Future[None]] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def read(self) -> dict[str, float]:
        """Returns phase → seconds; waits until all have ended.

        Raises:
          Exception: whatever went wrong in computing the arrays.
        """
        for mark in self.marks:
            mark.result()
        return self.seconds


def memory() -> dict[str, float]:
    """Returns the memory of the process, in bytes.

    `memory/host_bytes` is resident now, `memory/host_peak_bytes` the most that was, and
    `memory/device_peak_bytes` is there where the device tells it.
    """
    # Linux counts kibibytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        host = pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        host = peak
    values = {"memory/host_bytes": float(host), "memory/host_peak_bytes": float(max(host, peak))}
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        values["memory/device_peak_bytes"] = float(stats["peak_bytes_in_use"])
    return values
