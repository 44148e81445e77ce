"""Model families: all that the rest of the program may know of an architecture.

To add one, write a folder with a `Family`, and a row of `families.FAMILIES`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from emor3_jax.models.decoder import Decoder
from emor3_jax.models.layers import Compute
from emor3_jax.models.layout import ImageLayout
from emor3_jax.models.naming import HubTensor
from emor3_jax.models.params import Params
from emor3_jax.models.shapes import Shapes, SmallSizes
from emor3_jax.types import Images


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture; hashable.

    Attributes:
      model_type: of `config.json`.
      shapes: reads the contents of a `config.json`; raises ShapesError.
      layout: of images and positions, from the shapes.
      tower: the vision tower, a module made of its shapes and `Compute`, which maps `Images` to
        float[B, N, F], as the decoder reads them.
      hub_tensors: yields the tensors that make up a parameter, from its path and shape and the
        policy's shapes.
      hub_name: returns the canonical name of a tensor of a checkpoint.
      small_config: returns the `config.json` of a small policy, without ids, from its sizes.
      published: id on the hub → shapes of the policies that are published.
    """

    model_type: str
    shapes: Callable[[dict[str, Any]], Shapes]
    layout: Callable[[Shapes], ImageLayout]
    tower: Callable[..., nn.Module]
    hub_tensors: Callable[[str, tuple[int, ...], Any], Iterator[HubTensor]]
    hub_name: Callable[[str], str]
    small_config: Callable[[SmallSizes], dict[str, Any]]
    published: Mapping[str, Shapes] = dataclasses.field(compare=False, repr=False)

    def init_tower(self, shapes: Shapes, key: jax.Array) -> Params:
        """Returns fresh parameters of the vision tower."""
        vision = shapes.vision
        shape = (1, 1, 1, vision.window_patches)
        images = Images(
            patches=jnp.zeros((*shape, vision.patch_dim)),
            coords=jnp.zeros((*shape, 2), jnp.int32),
            mask=jnp.ones(shape, bool),
        )
        return self.tower(vision, Compute()).init(key, images)["params"]

    def encode_images(
        self, shapes: Shapes, compute: Compute, params: Params, images: Images
    ) -> jax.Array:
        """Runs the vision tower: float[B, N, F], as the decoder of the family reads them."""
        return self.tower(shapes.vision, compute).apply({"params": params["visual"]}, images)

    def decoder(self, shapes: Shapes, compute: Compute, **options: Any) -> nn.Module:
        """Returns the decoder, see `decoder.Decoder` for its options and arguments."""
        return Decoder(shapes.decoder, compute, **options)
