"""TensorBoard events in `workdir/events`, one event a step, each on the disk when it is written.

tensorboardX's own writer hands events to a thread: a run that is killed would lack the last ones
for good, and wait for ever for a thread that a full disk has ended.
"""

import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

_HEADER, _CHECKSUM = struct.Struct("<Q4x"), 4
"""Of a record: its length and the length's checksum; after it, its own checksum."""


class TensorBoardSink:
    """Writes TensorBoard scalars; values that are None are left out."""

    def __init__(self, workdir: Path, first_step: int) -> None:
        """Opens a new events file.

        Args:
          workdir: folder of the run.
          first_step: events of this step and later ones in earlier files are purged. Values that
            these hold of the step before are not written again.
        """
        folder = workdir / "events"
        folder.mkdir(parents=True, exist_ok=True)
        self._last, self._closed = first_step - 1, False
        self._written = _names(folder, self._last)
        number = len(list(folder.iterdir()))
        self._events = EventsWriter(str(folder / "events"), f".{number:04d}")
        if number:
            start = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(step=first_step, session_log=start))
        self._events.flush()

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Writes the values of a step, to the disk."""
        known = self._written if step == self._last else ()
        scalars = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in values.items()
            if value is not None and name not in known
        ]
        if scalars:
            summary = Summary(value=scalars)
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=summary))
            self._events.flush()

    def amend(self, step: int, values: Mapping[str, float | None]) -> None:
        """Writes further values of a step, but for those that are there."""
        self.write(step, values)

    def close(self) -> None:
        """Closes the events file; what is closed stays so."""
        if not self._closed:
            self._closed = True
            self._events.close()


def read_events(folder: Path) -> Iterator[Event]:
    """Yields the events of a folder's files in their order; what is cut short ends its file."""
    for path in sorted(folder.glob("*tfevents*")):
        with path.open("rb") as file:
            while len(header := file.read(_HEADER.size)) == _HEADER.size:
                size = _HEADER.unpack(header)[0]
                data = file.read(size)
                if len(data) < size or len(file.read(_CHECKSUM)) < _CHECKSUM:
                    break
                yield Event.FromString(data)


def _names(folder: Path, step: int) -> set[str]:
    """Returns the names of the values that were written of a step, and not purged since."""
    found: set[str] = set()
    for event in read_events(folder):
        if event.HasField("session_log") and event.step <= step:
            found.clear()
        elif event.step == step:
            found |= {value.tag for value in event.summary.value}
    return found
