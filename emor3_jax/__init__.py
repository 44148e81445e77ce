"""EMO-R3 in JAX: reflective reinforcement learning for visual emotion reasoning."""

# So that a Python that is too old reads this file, and can say so.
from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterable

_ACTIVATE = "`. .venv/bin/activate` takes the environment that `make demo` made"
_NEEDED = ("absl", "flax", "jax", "ml_collections", "transformers")


def _way_out(version: Iterable[int], missing: Iterable[str]) -> str:
    """Returns why a Python cannot run the package, and what to do; "" where it can."""
    wanted = "this package needs Python 3.11 or later"
    if tuple(version) < (3, 11):
        found = ".".join(map(str, version))
        return f"{wanted}, and {sys.executable} is {found}: {_ACTIVATE}"
    if names := ", ".join(missing):
        return (
            f"{sys.executable} lacks packages that this one needs ({names}): {_ACTIVATE}, or "
            "install into this environment by `pip install -e .`"
        )
    return ""


def _check() -> None:
    """Ends a program with one line, or raises ImportError, where this Python cannot run it."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if told := _way_out(sys.version_info[:2], missing):
        # As long as `python -m` looks for the module.
        if sys.argv[:1] == ["-m"]:
            print(f"error: {told}", file=sys.stderr)
            sys.exit(2)
        raise ImportError(told)


_check()


def _is_needed(record: logging.LogRecord) -> bool:
    # The models are this package's own: only tokenizers are wanted of transformers.
    return "PyTorch was not found" not in record.getMessage()


logging.getLogger("transformers").addFilter(_is_needed)
