"""Qwen2.5-VL as a family of policies, see `models.family.Family`."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from emor3_jax.models.layers import Compute
from emor3_jax.models.naming import HubTensor
from emor3_jax.models.params import Params
from emor3_jax.models.qwen2_5_vl import naming
from emor3_jax.models.qwen2_5_vl.decoder import Decoder
from emor3_jax.models.qwen2_5_vl.layout import Qwen25VLLayout
from emor3_jax.models.qwen2_5_vl.published import PUBLISHED
from emor3_jax.models.qwen2_5_vl.rope import vision_table
from emor3_jax.models.qwen2_5_vl.shapes import Qwen25VLShapes
from emor3_jax.models.qwen2_5_vl.tower import VisionTower
from emor3_jax.types import Images


@dataclasses.dataclass(frozen=True)
class Qwen25VL:
    """The family; all of its objects are equal."""

    model_type = "qwen2_5_vl"
    published = PUBLISHED

    def shapes(self, data: dict[str, Any]) -> Qwen25VLShapes:
        """Reads the contents of a `config.json`; raises ShapesError."""
        return Qwen25VLShapes.from_hf(data)

    def layout(self, shapes: Qwen25VLShapes) -> Qwen25VLLayout:
        """Returns the layout of images and positions."""
        return Qwen25VLLayout(shapes)

    def init_tower(self, shapes: Qwen25VLShapes, key: jax.Array) -> Params:
        """Returns fresh parameters of the vision tower."""
        vision = shapes.vision
        shape = (1, 1, 1, vision.window_patches)
        images = Images(
            patches=jnp.zeros((*shape, vision.patch_dim)),
            coords=jnp.zeros((*shape, 2), jnp.int32),
            mask=jnp.ones(shape, bool),
        )
        return VisionTower(vision).init(key, images)["params"]

    def encode_images(
        self, shapes: Qwen25VLShapes, compute: Compute, params: Params, images: Images
    ) -> jax.Array:
        """Runs the vision tower: float[B, N, D]."""
        return VisionTower(shapes.vision, compute).apply({"params": params["visual"]}, images)

    def vision_table(
        self, shapes: Qwen25VLShapes, coords: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns cosine and sine of the tower's rope at rows and columns int32[..., 2]."""
        return vision_table(coords, shapes.vision)

    def decoder(self, shapes: Qwen25VLShapes, compute: Compute, **options: Any) -> Decoder:
        """Returns the decoder."""
        return Decoder(shapes, compute, **options)

    def hub_tensors(
        self, path: str, shape: tuple[int, ...], shapes: Qwen25VLShapes
    ) -> Iterator[HubTensor]:
        """Yields the tensors that make up the parameter of a path."""
        return naming.hub_tensors(path, shape, shapes)

    def hub_name(self, key: str) -> str:
        """Returns the canonical name of a tensor of a checkpoint."""
        return naming.hub_name(key)


QWEN2_5_VL = Qwen25VL()
