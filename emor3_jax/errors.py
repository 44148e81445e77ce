"""The base of every error that a user's input causes, and of those that end a run from outside."""

import errno
import os
import re


class UserError(ValueError):
    """Input that the package cannot use: a config, a file, data, a policy, an image or a mesh.

    Each part of the package derives its own error from this one. The message names the input, its
    value, the rule that it breaks and the way out; it is all that a user needs, so programs print
    it without a traceback (`emor3_jax.runtime.cli`).
    """


class RunError(RuntimeError):
    """What lies outside of a program has ended it: a full disk, a file that is gone.

    The message names the folder, the reason and the way out. Programs end with it and status 1: a
    start again may do better, as it cannot after a `UserError`, whose status is 2.
    """


LASTING = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
}
"""Errors of a path that a start again would meet again."""

_OS_ERROR = re.compile(r"os[ _]error(?:_code='| )(\d+)")


def os_error_number(error: BaseException) -> int | None:
    """Returns the operating system's number of an error, None if it is not the system's.

    Libraries in C++ and Rust, such as tensorstore and safetensors, tell it in their text alone.
    """
    if isinstance(error, OSError):
        return error.errno
    found = _OS_ERROR.search(str(error))
    return int(found[1]) if found else None


def os_error_text(number: int | None) -> str:
    """Returns the message of an operating system's error, with the way out.

    Args:
      number: `errno`; None for one without.
    """
    said = "an input or output error" if number is None else os.strerror(number)
    full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return f"{said}; make room" if full else f"{said}; mend that"
