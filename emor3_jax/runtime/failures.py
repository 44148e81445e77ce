"""Errors of the file system that end a run."""

from pathlib import Path

from emor3_jax.errors import LASTING, RunError, UserError, os_error_number, os_error_text


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
