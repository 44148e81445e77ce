"""The fields of a config as JSON holds it."""

from collections.abc import Iterator
from typing import Any


def fields_of(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted name and the value of each field; a section without fields has none.

    Args:
      tree: nested dicts.
      path: name of the tree itself.
    """
    if not isinstance(tree, dict):
        yield path, tree
        return
    for key, value in tree.items():
        yield from fields_of(value, f"{path}.{key}" if path else key)
