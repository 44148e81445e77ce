"""Names of the tensors in a Qwen2.5-VL checkpoint.

Two naming schemes occur: `visual.*`, `model.layers.*` as on the hub; `model.visual.*`,
`model.language_model.*` as some versions of transformers write. For the rest see `models.naming`.
"""

from collections.abc import Iterator

from emor3_jax.models import naming
from emor3_jax.models.qwen2_5_vl.shapes import Qwen25VLShapes

_STACKS = {"visual/blocks": "visual.blocks", "model/layers": "model.layers"}


def hub_tensors(
    path: str, shape: tuple[int, ...], shapes: Qwen25VLShapes
) -> Iterator[naming.HubTensor]:
    """Yields the tensors that make up one parameter; see `naming.hub_tensors`."""
    return naming.hub_tensors(path, shape, shapes, _STACKS, _rename)


def _rename(base: str) -> str:
    name = base.replace("/", ".").replace("mlp_", "mlp.")
    return name.replace("patch_embed", "patch_embed.proj")


def hub_name(key: str) -> str:
    """Returns the hub's name of a tensor named in either scheme."""
    key = key.replace("model.language_model.", "model.", 1)
    return key.removeprefix("model.") if key.startswith("model.visual.") else key
