"""Layouts of tensors in checkpoints of the hub.

A scanned stack of layers is one parameter here and one tensor a layer there; a kernel is [in, out]
here and [out, in] there. A fused projection goes head by head here, each with its query, key and
value, so that a device may have some of the heads; there all queries come first, then all keys,
then all values.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from emor3_jax.models.shapes import Shapes


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


def hub_tensors(
    path: str,
    shape: tuple[int, ...],
    shapes: Shapes,
    stacks: Mapping[str, str],
    rename: Callable[[str], str],
) -> Iterator[HubTensor]:
    """Yields the tensors that make up one parameter.

    Args:
      path: keys of the parameter, joined by "/".
      shape: of the parameter.
      shapes: the policy's shapes.
      stacks: path of a scanned stack of layers → its name on the hub.
      rename: from the path of a parameter outside of the stacks, without its last key, to its name.
    """
    base, kind = path.rsplit("/", 1)
    suffix = "bias" if kind == "bias" else "weight"
    for stack, name in stacks.items():
        if base.startswith(stack + "/"):
            inner = base.removeprefix(stack + "/").replace("/", ".")
            heads = shapes.vision.num_heads if inner.endswith("qkv") else 0
            for layer in range(shape[0]):
                on_disk = shape[1:][::-1] if is_kernel(path) else shape[1:]
                yield HubTensor(f"{name}.{layer}.{inner}.{suffix}", layer, on_disk, heads)
            return
    on_disk = shape[::-1] if is_kernel(path) else shape
    if path == "visual/patch_embed/kernel":
        v = shapes.vision
        on_disk = (shape[1], v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    yield HubTensor(f"{rename(base)}.{suffix}", None, on_disk)
