"""Metrics as TensorBoard events in `workdir/events`."""

from collections.abc import Mapping
from pathlib import Path

from tensorboardX import SummaryWriter


class TensorBoardSink:
    """Writes TensorBoard scalars; values that are None are left out."""

    def __init__(self, workdir: Path, first_step: int) -> None:
        """Opens a new events file.

        Args:
          workdir: folder of the run.
          first_step: events of this step and later ones in earlier files are purged.
        """
        self._events = SummaryWriter(str(workdir / "events"), purge_step=first_step)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Writes one scalar for each value."""
        for name, value in values.items():
            if value is not None:
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the events file."""
        self._events.close()
