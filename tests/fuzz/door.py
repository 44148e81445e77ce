"""One door under atheris: `python -m fuzz.door NAME FOLDER [options of libFuzzer]`."""

import contextlib
import logging
import sys
import warnings

import atheris

from emor3_jax.errors import UserError

_READ = ["emor3_jax.data", "emor3_jax.files", "emor3_jax.evaluation.comparison"]
# Its decoders in Python; instrumenting them takes a minute.
_READ += ["PIL"] if sys.argv[1:2] == ["image"] else []

with atheris.instrument_imports(include=_READ):
    from fuzz.doors import BYTES


def main() -> None:
    """Runs the program; ends with it."""
    door = BYTES[sys.argv.pop(1)]

    def one(data: bytes) -> None:
        with contextlib.suppress(UserError, FileNotFoundError):
            door(data)

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
