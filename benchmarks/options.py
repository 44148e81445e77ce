"""Whole numbers on the command line of a benchmark."""

import argparse
from collections.abc import Callable


def whole(least: int) -> Callable[[str], int]:
    """Returns a reader of whole numbers that argparse refuses where they are under `least`."""

    def read(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {least}")
        return int(text)

    return read
