"""Names of the tensors in a Qwen3-VL checkpoint.

The hub's names are `model.visual.*`, `model.language_model.*` and `lm_head.weight`; names without
the first `model.`, as other programs write them, are read too. For the rest see `models.naming`.
"""

import re
from collections.abc import Iterator

from emor3_jax.models import naming
from emor3_jax.models.qwen3_vl.shapes import Qwen3VLShapes

_STACKS = {
    "visual/blocks": "model.visual.blocks",
    "model/layers": "model.language_model.layers",
}


def hub_tensors(
    path: str, shape: tuple[int, ...], shapes: Qwen3VLShapes
) -> Iterator[naming.HubTensor]:
    """Yields the tensors that make up one parameter; see `naming.hub_tensors`."""
    return naming.hub_tensors(path, shape, shapes, _STACKS, _rename)


def _rename(base: str) -> str:
    if base == "lm_head":
        return base
    name = re.sub(r"^model/", "language_model/", base).replace("/", ".")
    name = re.sub(r"deepstack_(\d+)", r"deepstack_merger_list.\1", name)
    return "model." + name.replace("patch_embed", "patch_embed.proj")


def hub_name(key: str) -> str:
    """Returns the hub's name of a tensor, with or without its first `model.`."""
    if re.match(r"(visual|language_model)\.", key):
        return f"model.{key}"
    return re.sub(r"^model\.(?=layers|embed_tokens|norm)", "model.language_model.", key)
