"""Metrics of a run: one JSON object a step, TensorBoard events, and a progress line."""

import json
import math
import os
import resource
import time
from collections.abc import Mapping
from pathlib import Path

import jax
from tensorboardX import SummaryWriter


class MetricWriter:
    """Appends metrics to `workdir/metrics.jsonl` and to TensorBoard events.

    A run that goes on from a checkpoint first drops the lines written after it, so that each step
    stands in the file once.
    """

    def __init__(self, workdir: Path, first_step: int = 0) -> None:
        """Opens the files.

        Args:
          workdir: folder of the run.
          first_step: lines of this step and later ones are dropped.
        """
        self.path = workdir / "metrics.jsonl"
        if self.path.exists():
            kept = []
            for line in self.path.read_text().splitlines():
                try:
                    # A line that an interrupted write cut short is no loss: its step is repeated.
                    if json.loads(line)["step"] < first_step:
                        kept.append(line)
                except (ValueError, KeyError):
                    continue
            self.path.write_text("".join(line + "\n" for line in kept))
        self._file = self.path.open("a")
        self._events = SummaryWriter(str(workdir / "events"), purge_step=first_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one object: `step` and the values, a number that is not finite as null."""
        row = {k: (float(v) if math.isfinite(v) else None) for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        self.add_events(step, row)

    def add_events(self, step: int, values: Mapping[str, float | None]) -> None:
        """Writes values to TensorBoard alone."""
        for name, value in values.items():
            if value is not None:
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        self._events.close()


class Timer:
    """Splits wall time by phase: `with timer("rollout"): …` adds to `time/rollout_s`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str) -> "_Span":
        return _Span(self, name)

    def pop(self) -> dict[str, float]:
        """Returns `time/<phase>_s` in seconds since the last call and starts anew."""
        out = {f"time/{name}_s": value for name, value in self.seconds.items()}
        self.seconds = {}
        return out


class _Span:
    def __init__(self, timer: Timer, name: str) -> None:
        self.timer, self.name = timer, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        spent = time.perf_counter() - self.start
        self.timer.seconds[self.name] = self.timer.seconds.get(self.name, 0.0) + spent


def memory() -> dict[str, float]:
    """Returns `memory/host_bytes` (resident now) and, where known, `memory/device_peak_bytes`."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        host = pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    values = {"memory/host_bytes": float(host)}
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        values["memory/device_peak_bytes"] = float(stats["peak_bytes_in_use"])
    return values
