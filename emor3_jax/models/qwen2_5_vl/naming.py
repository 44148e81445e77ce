"""Names and shapes of the hub's tensors that make up each parameter.

A scanned stack of layers is one parameter here and one tensor a layer there; a kernel is [in, out]
here and [out, in] there. The tower's fused projection goes head by head here, each with its query,
key and value, so that a device may have some of the heads; there all queries come first, then all
keys, then all values. Two naming schemes occur (`visual.*`, `model.layers.*` as on the hub;
`model.visual.*`, `model.language_model.*` as some versions of transformers write).
"""

from collections.abc import Iterator

from emor3_jax.models.naming import HubTensor, is_kernel
from emor3_jax.models.qwen2_5_vl.shapes import Qwen25VLShapes

_LAYERS = {"visual/blocks": "visual.blocks", "model/layers": "model.layers"}


def hub_tensors(path: str, shape: tuple[int, ...], shapes: Qwen25VLShapes) -> Iterator[HubTensor]:
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
                yield HubTensor(f"{name}.{layer}.{inner}.{suffix}", layer, on_disk, heads)
            return
    name = base.replace("/", ".").replace("mlp_", "mlp.").replace("patch_embed", "patch_embed.proj")
    on_disk = shape[::-1] if is_kernel(path) else shape
    if path == "visual/patch_embed/kernel":
        v = shapes.vision
        on_disk = (shape[1], v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    yield HubTensor(f"{name}.{suffix}", None, on_disk)


def hub_name(key: str) -> str:
    """Returns the hub's name of a tensor named in either scheme."""
    key = key.replace("model.language_model.", "model.", 1)
    return key.removeprefix("model.") if key.startswith("model.visual.") else key
