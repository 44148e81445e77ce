"""Where each parameter lies on the hub: names and shapes of its tensors.

A scanned stack of layers is one parameter here and one tensor a layer there; a kernel is [in, out]
here and [out, in] there. The tower's fused projection goes head by head here, each with its query,
key and value, so that a device may have some of the heads; there all queries come first, then all
keys, then all values. Two naming schemes occur (`visual.*`, `model.layers.*` as on the hub;
`model.visual.*`, `model.language_model.*` as some versions of transformers write).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from emor3_jax.models.qwen2_5_vl.config import Config

_LAYERS = {"visual/blocks": "visual.blocks", "model/layers": "model.layers"}


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


def hub_tensors(path: str, shape: tuple[int, ...], config: Config) -> Iterator[HubTensor]:
    """Yields the tensors that make up one parameter.

    Args:
      path: keys of the parameter, joined by "/".
      shape: of the parameter.
      config: the policy's shapes.
    """
    base, kind = path.rsplit("/", 1)
    suffix = "bias" if kind == "bias" else "weight"
    for stack, name in _LAYERS.items():
        if base.startswith(stack + "/"):
            inner = base.removeprefix(stack + "/").replace("/", ".")
            heads = config.vision.num_heads if inner.endswith("qkv") else 0
            for layer in range(shape[0]):
                on_disk = shape[1:][::-1] if is_kernel(path) else shape[1:]
                yield HubTensor(f"{name}.{layer}.{inner}.{suffix}", layer, on_disk, heads)
            return
    name = base.replace("/", ".").replace("mlp_", "mlp.").replace("patch_embed", "patch_embed.proj")
    on_disk = shape[::-1] if is_kernel(path) else shape
    if path == "visual/patch_embed/kernel":
        v = config.vision
        on_disk = (shape[1], v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    yield HubTensor(f"{name}.{suffix}", None, on_disk)


def by_head(x: np.ndarray, heads: int) -> np.ndarray:
    """Orders the rows of a fused projection head by head, [3 * heads * d, …] as on the hub."""
    return x.reshape(3, heads, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)


def by_part(x: np.ndarray, heads: int) -> np.ndarray:
    """Orders them as the hub does: undoes `by_head`."""
    return x.reshape(heads, 3, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)


def is_kernel(path: str) -> bool:
    """Returns whether a parameter is the kernel of a product, which the hub keeps transposed."""
    return path.endswith("kernel")


def hub_name(key: str) -> str:
    """Returns the hub's name of a tensor named in either scheme."""
    key = key.replace("model.language_model.", "model.", 1)
    return key.removeprefix("model.") if key.startswith("model.visual.") else key


def leaves(tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the path and the value of each parameter."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield "/".join(key.key for key in path), leaf
