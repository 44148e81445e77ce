"""Reward tables on disk, so that a run with the same tokenizer and labels need not build them.

A file is named by a hash of everything that the tables follow from: byte strings of the tokens,
labels, further rules, and the code that builds them. It carries a hash of its own contents: a torn
or changed file is built anew, and so is one whose name no longer fits because the code has changed.
The profile is not in it, since tables read and profiles weigh.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

logger = logging.getLogger(__name__)

_CODE = ("automaton.py", "rules.py", "spans.py", "patterns.py", "questions.py")


def key(
    tokens: Sequence[bytes], labels: Sequence[str], patterns: Sequence[str] = (), kind: str = ""
) -> str:
    """Returns the hash that names the tables.

    Args:
      tokens: byte string of each token.
      labels: the label set, in order.
      patterns: further rules, as text.
      kind: of the tables; "" for all rules.
    """
    found = hashlib.sha256()

    def add(data: bytes) -> None:
        # With its length, so that no two lists read alike.
        found.update(len(data).to_bytes(8, "little") + data)

    folder = Path(__file__).parent
    for part in (
        *((folder / name).read_bytes() for name in _CODE if (folder / name).exists()),
        b"tokens",
        *tokens,
        b"labels",
        *(label.encode() for label in labels),
        b"patterns",
        *(pattern.encode() for pattern in patterns),
        *(word.encode() for word in ("kind", kind) if kind),
    ):
        add(part)
    return found.hexdigest()


def load_or_build(folder: str | Path, name: str, like: Any, build: Callable[[], Any]) -> Any:
    """Returns tables from a file, or builds and keeps them.

    Args:
      folder: where files are kept; made if needed. "" keeps none.
      name: from `key`.
      like: a tree of the structure that the tables have.
      build: makes the tables.
    """
    if not str(folder):
        return build()
    path = Path(folder) / f"{name}.npz"
    if path.exists():
        try:
            return _read(path, like)
        except Exception as error:
            # Whatever is wrong with the file, the remedy is the same.
            logger.warning("%s cannot be used (%s); building the tables again", path, error)
    tables = build()
    try:
        _write(path, tables)
    except OSError as error:
        logger.warning("the reward tables are not kept: %s", error)
    return tables


def _read(path: Path, like: Any) -> Any:
    structure = jax.tree.structure(like)
    with np.load(path, allow_pickle=False) as file:
        arrays = [file[f"table{i}"] for i in range(structure.num_leaves)]
        if str(file["digest"]) != _digest(arrays):
            raise ValueError("its contents are not what was written")
    return jax.tree.unflatten(structure, arrays)


def _write(path: Path, tables: Any) -> None:
    arrays = [np.asarray(x) for x in jax.tree.leaves(tables)]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whole or absent, also when two runs write it at the same time.
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".npz")
    try:
        with os.fdopen(handle, "wb") as file:
            named = {f"table{i}": array for i, array in enumerate(arrays)}
            np.savez(file, digest=np.asarray(_digest(arrays)), **named)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _digest(arrays: Sequence[np.ndarray]) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()
