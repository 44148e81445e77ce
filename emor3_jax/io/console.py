"""Output of a run to its user: stages and progress on standard output, what it hears on error."""

import contextlib
import io
import os
import sys
import time

from emor3_jax.parallel import hosts


class Console:
    """Announces stages, each line with the minutes and seconds since the start; on one host."""

    def __init__(self, name: str) -> None:
        """Starts the clock.

        Args:
          name: of the program, in front of each line.
        """
        self._name, self._start = name, time.perf_counter()

    def __call__(self, line: str) -> None:
        """Prints a line at once, where this is the process that writes."""
        if not hosts.is_first():
            return
        seconds = int(time.perf_counter() - self._start)
        _print("stdout", f"[{self._name} {seconds // 60:02d}:{seconds % 60:02d}] {line}")


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
