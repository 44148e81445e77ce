"""Types and ranges of the sizes in a `config.json`, checked before they are used."""

import dataclasses
import numbers
import sys
from collections.abc import Mapping
from typing import Any

from emor3_jax.models.errors import ShapesError

MAX_SIZE = 2**31
MAX_LAYERS = 10_000


def check_sizes(shapes: Any, what: str, names: Mapping[str, str] | None = None) -> None:
    """Checks the fields of a dataclass by their types.

    Args:
      shapes: whole numbers are sizes, 1 or more, but those named `…_id`, 0 or more; others finite
        and over 0; tuples hold whole numbers, 0 or more.
      what: names it in errors.
      names: field → its name in the file, where that is another.

    Raises:
      ShapesError: naming the field, its value and the rule.
    """
    for field in dataclasses.fields(shapes):
        value, kind = getattr(shapes, field.name), field.type
        where = f"{what}{(names or {}).get(field.name, field.name)}={value!r}"
        if kind is int or kind == int | None:
            least = 0 if field.name.endswith("_id") else 1
            most = MAX_LAYERS if field.name in ("num_layers", "depth") else MAX_SIZE
            if kind is not int and value in (None, -1):
                continue
            if not _is_whole(value) or not least <= value < most:
                raise ShapesError(f"{where[:200]} must be a whole number of {least} to {most - 1}")
        elif kind is float:
            known = isinstance(value, numbers.Real) and not isinstance(value, bool)
            # A comparison, since no function takes an integer of 400 digits.
            if not known or not 0 < value <= sys.float_info.max:
                raise ShapesError(f"{where[:200]} must be a finite number over 0")
        elif isinstance(value, tuple) and not all(_is_whole(x) and x >= 0 for x in value):
            raise ShapesError(f"{where[:200]} must be whole numbers of 0 or more")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
