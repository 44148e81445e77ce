"""Output of a run to its user: stages and progress on standard output, what it hears on error.

On a terminal, bars of what is under way stay below the lines; elsewhere, as in a log, there are
lines alone.
"""

import contextlib
import io
import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from emor3_jax.parallel import hosts

if TYPE_CHECKING:
    from rich.progress import Progress

_REFRESHES = 2
"""How often a second bars are drawn: the host has other work."""


class Console:
    """Announces stages, each line with the minutes and seconds since the start; on one host.

    Attributes:
      width: columns that a line may take, None where it may be of any length.
    """

    def __init__(self, name: str) -> None:
        """Starts the clock.

        Args:
          name: of the program, in front of each line.
        """
        self._name, self._start = name, time.perf_counter()
        self._bars = _bars() if hosts.is_first() else None

    def __call__(self, line: str) -> None:
        """Prints a line at once, where this is the process that writes."""
        if not hosts.is_first():
            return
        _print("stdout", self._head() + line)

    def block(self, text: str) -> None:
        """Prints lines that belong together; on a terminal from its edge on, where more fits."""
        for line in text.splitlines():
            if self._bars is None:
                self(line)
            else:
                _print("stdout", line)

    @property
    def width(self) -> int | None:
        if self._bars is None:
            return None
        return shutil.get_terminal_size().columns - len(self._head())

    def task(self, name: str, total: int, unit: str, done: int = 0) -> "ProgressTask":
        """Begins a task, whose bar is shown until it is closed.

        Args:
          name: in front of the bar.
          total: units of the whole task.
          unit: of its progress, such as "rows".
          done: units that are done already.
        """
        return ProgressTask(self._bars, name, (done, total), unit)

    def _head(self) -> str:
        seconds = int(time.perf_counter() - self._start)
        return f"[{self._name} {seconds // 60:02d}:{seconds % 60:02d}] "


class ProgressTask:
    """A task under way, with its bar where there is a terminal."""

    def __init__(
        self, bars: "Progress | None", name: str, done_of: tuple[int, int], unit: str
    ) -> None:
        """Shows the bar.

        Args:
          bars: those of the terminal, None without one.
          name: in front of it.
          done_of: units that are done, and all of them.
          unit: their name.
        """
        self._bars = bars
        if bars is None:
            return
        done, total = done_of
        self._id = bars.add_task(name, total=total, completed=done, unit=unit, note="")
        bars.start()
        # A process that is killed would leave the terminal without one.
        bars.console.show_cursor(True)

    def advance(self, units: int = 1) -> None:
        """Says that so many more units are done."""
        if (bars := self._bars) is not None:
            bars.update(self._id, advance=units, refresh=True)

    def note(self, text: str) -> None:
        """Shows a text behind the bar, such as the phase that is at work."""
        if (bars := self._bars) is not None:
            bars.update(self._id, note=text)

    def close(self) -> None:
        """Takes the bar away."""
        bars, self._bars = self._bars, None
        if bars is None:
            return
        bars.remove_task(self._id)
        if not bars.task_ids:
            bars.stop()

    def __enter__(self) -> Self:
        """Returns the task."""
        return self

    def __exit__(self, *_: object) -> None:
        """Takes the bar away."""
        self.close()


def _bars() -> "Progress | None":
    """Returns the bars of the terminal that standard output is; None if it is none."""
    if not _is_terminal(sys.stdout):
        return None
    # Most programs never draw.
    import rich.console
    from rich import progress

    console = rich.console.Console(file=_Terminal(sys.stdout))
    if console.is_dumb_terminal:
        return None
    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(24),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[unit]}", markup=False),
        # Of the units after the first one, which compiles.
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[note]}", markup=False, style="dim"),
        console=console,
        transient=True,
        refresh_per_second=_REFRESHES,
        speed_estimate_period=float("inf"),
        # Where the stream of errors goes to a file, it shall.
        redirect_stderr=_is_terminal(sys.stderr),
    )


def _is_terminal(stream: object) -> bool:
    return isinstance(stream, io.TextIOBase) and not stream.closed and stream.isatty()


class _Terminal(io.TextIOBase):
    """A terminal that may be closed: what can no longer be shown is given up."""

    def __init__(self, stream: io.TextIOBase) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:
        return self._stream.encoding or "utf-8"

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def fitted(parts: Sequence[str], width: int | None) -> str:
    """Returns parts in one line, as many of the first ones as fit a width; None fits all."""
    line = parts[0]
    for part in parts[1:]:
        longer = f"{line}  {part}"
        if width is not None and len(longer) > width:
            break
        line = longer
    return line


def escape_what_cannot_be_shown() -> None:
    """Lets standard output write out letters that its encoding has not, as errors' stream does.

    Such are bytes in a file's name that are no UTF-8, and any but ASCII on some machines.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A pipe that was put in the place of a file refuses the position that this asks for.
        with contextlib.suppress(OSError):
            sys.stdout.reconfigure(errors="backslashreplace")


def tell(line: str) -> None:
    """Prints a line on standard error."""
    _print("stderr", line)


def _print(stream: str, line: str) -> None:
    """Prints to a stream of `sys`; what is gone, as a closed terminal's, is given up for good.

    A run does not end for it, and what is left in the stream would change the exit status.
    """
    try:
        print(line, file=getattr(sys, stream), flush=True)
    except OSError:
        setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115


def duration(seconds: float) -> str:
    """Returns seconds as `1h02m`, `3m05s` or `42s`."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    if seconds >= 60:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds}s"
