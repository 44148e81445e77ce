"""Layouts of tensors in checkpoints of the hub.

A scanned stack of layers is one parameter here and one tensor a layer there; a kernel is [in, out]
here and [out, in] there. A fused projection goes head by head here, each with its query, key and
value, so that a device may have some of the heads; there all queries come first, then all keys,
then all values.
"""

from typing import NamedTuple

import numpy as np


class HubTensor(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
      name: on the hub.
      layer: its index in a parameter that is stacked over layers, else None.
      shape: on disk.
      heads: of a fused projection of queries, keys and values, else 0.
    """

    name: str
    layer: int | None
    shape: tuple[int, ...]
    heads: int = 0


def by_head(x: np.ndarray, heads: int) -> np.ndarray:
    """Orders the rows of a fused projection head by head, [3 * heads * d, …] as on the hub."""
    return x.reshape(3, heads, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)


def by_part(x: np.ndarray, heads: int) -> np.ndarray:
    """Orders them as the hub does: undoes `by_head`."""
    return x.reshape(heads, 3, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)


def is_kernel(path: str) -> bool:
    """Returns whether a parameter is the kernel of a product, which the hub keeps transposed."""
    return path.endswith("kernel")
