"""Lets something happen in the middle of a program."""

from collections.abc import Callable
from typing import Any


def before(owner: Any, name: str, call: int, action: Callable[[], None]) -> None:
    """Lets something happen right before a method is called for the n-th time, from 1 on."""
    method, calls = getattr(owner, name), [0]

    def wrapped(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            action()
        return method(*args, **options)

    setattr(owner, name, wrapped)
