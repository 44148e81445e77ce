"""Names of the tensors in a Qwen3-VL checkpoint.

The hub's names are `model.visual.*`, `model.language_model.*` and `lm_head.weight`; names without
the first `model.`, as other programs write them, are read too. For the rest see `models.naming`.
"""

import re
from collections.abc import Iterator

from emor3_jax.models.naming import HubTensor, is_kernel
from emor3_jax.models.qwen3_vl.shapes import Qwen3VLShapes

_LAYERS = {"visual/blocks": "visual.blocks", "model/layers": "language_model.layers"}


def hub_tensors(path: str, shape: tuple[int, ...], shapes: Qwen3VLShapes) -> Iterator[HubTensor]:
    """Yields the tensors that make up one parameter.

    Args:
      path: keys of the parameter, joined by "/".
      shape: of the parameter.
      shapes: the policy's shapes.
    """
    base, kind = path.rsplit("/", 1)
    suffix = "bias" if kind == "bias" else "weight"
    for stack, name in _LAYERS.items():
        if base.startswith(stack + "/"):
            inner = base.removeprefix(stack + "/").replace("/", ".")
            heads = shapes.vision.num_heads if inner.endswith("qkv") else 0
            for layer in range(shape[0]):
                on_disk = shape[1:][::-1] if is_kernel(path) else shape[1:]
                full = f"model.{name}.{layer}.{inner}.{suffix}"
                yield HubTensor(full, layer, on_disk, heads)
            return
    if base == "lm_head":
        name = "lm_head"
    else:
        name = re.sub(r"^model/", "language_model/", base).replace("/", ".")
        name = re.sub(r"deepstack_(\d+)", r"deepstack_merger_list.\1", name)
        name = "model." + name.replace("patch_embed", "patch_embed.proj")
    on_disk = shape[::-1] if is_kernel(path) else shape
    if path == "visual/patch_embed/kernel":
        v = shapes.vision
        on_disk = (shape[1], v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    yield HubTensor(f"{name}.{suffix}", None, on_disk)


def hub_name(key: str) -> str:
    """Returns the hub's name of a tensor, with or without its first `model.`."""
    if re.match(r"(visual|language_model)\.", key):
        return f"model.{key}"
    return re.sub(r"^model\.(?=layers|embed_tokens|norm)", "model.language_model.", key)
