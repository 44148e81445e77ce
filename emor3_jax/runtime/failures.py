"""Errors of the file system that end a run, and those of its end."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from emor3_jax.errors import LASTING, RunError, UserError, os_error_number, os_error_text
from emor3_jax.runtime.stopping import Stopped

logger = logging.getLogger(__name__)


def raise_failure(error: BaseException | None, workdir: Path, step: int, *, begun: bool) -> None:
    """Raises what a user reads in place of an error of the file system; returns for any other.

    Args:
      error: what ended the run; None for nothing.
      workdir: folder of the run.
      step: the last one that was finished.
      begun: whether its first step has begun. Before it, a file that is not there, or a folder that
        may not be written, is one that the user named.

    Raises:
      UserError: before the first step, if a start again would meet the same.
      RunError: otherwise.
    """
    users = (UserError,) if begun else (UserError, FileNotFoundError)
    if error is None or isinstance(error, users):
        return
    if (number := os_error_number(error)) is not None:
        named = getattr(error, "filename", None) or str(error).splitlines()[0][:300]
        if number in LASTING and not begun:
            raise UserError(
                f"--workdir={str(workdir)!r}: {os_error_text(number)} ({named}), or give "
                "another folder"
            ) from error
        raise RunError(
            f"{workdir}: the run was ended after step {step} by "
            f"{os_error_text(number)} ({named}), and start again with this workdir to go on"
        ) from error


def close_all(closers: Iterable[Callable[[], None]], error: BaseException | None = None) -> None:
    """Calls all functions, whichever of them fail.

    Raises the first error of theirs: a full disk is told by the checkpoint that could not be
    written, not by the events behind it. Later ones are logged.

    Args:
      closers: functions without arguments.
      error: what ended the run, and is told in place of theirs unless it was asked to stop.
    """
    told = None if isinstance(error, Stopped) else error
    for close in closers:
        try:
            close()
        except BaseException as failed:
            # A second Ctrl-C is no failure.
            if told is None or not isinstance(failed, Exception):
                told = failed
            else:
                logger.warning("%s", failed)
    if told is not None and told is not error:
        raise told
