"""Model families: all that the rest of the program may know of an architecture.

To add one, write a folder with an object that has these methods, and a row of `FAMILIES`.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax

from emor3_jax.models.layers import Compute
from emor3_jax.models.params import Params
from emor3_jax.models.processor import ImageLayout
from emor3_jax.models.qwen2_5_vl.family import QWEN2_5_VL
from emor3_jax.types import Images


class Shapes(Protocol):
    """Sizes and special ids of a policy, read from and written to `config.json`; hashable.

    Attributes:
      vision: of the tower.
      vocab_size: `V`, rows of the embedding.
      hidden_size: `D`.
      intermediate_size, num_layers, num_heads, num_kv_heads, head_dim: of the decoder.
      tie_word_embeddings: whether the head is the embedding.
      image_token_id: id that stands for a feature of an image.
      merge_unit: patches of one image token.
      cut_by_tensor, cut_by_fsdp: names in `config.json` → sizes that a mesh axis must divide.
    """

    vision: Any
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tie_word_embeddings: bool
    image_token_id: int

    @property
    def merge_unit(self) -> int: ...

    @property
    def cut_by_tensor(self) -> dict[str, int]: ...

    @property
    def cut_by_fsdp(self) -> dict[str, int]: ...

    def to_hf(self) -> dict[str, Any]:
        """Returns the contents of a `config.json`."""


class Family(Protocol):
    """An architecture; hashable.

    Attributes:
      model_type: of `config.json`.
      published: id on the hub → shapes of the policies that are published.
    """

    model_type: str
    published: Mapping[str, Shapes]

    def shapes(self, data: dict[str, Any]) -> Shapes:
        """Reads the contents of a `config.json`; raises ShapesError."""

    def layout(self, shapes: Shapes) -> ImageLayout:
        """Returns the layout of images and positions."""

    def init_tower(self, shapes: Shapes, key: jax.Array) -> Params:
        """Returns fresh parameters of the vision tower."""

    def encode_images(
        self, shapes: Shapes, compute: Compute, params: Params, images: Images
    ) -> jax.Array:
        """Runs the vision tower: float[B, N, D]."""

    def vision_table(self, shapes: Shapes, coords: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns cosine and sine of the tower's rope at rows and columns int32[..., 2]."""

    def decoder(self, shapes: Shapes, compute: Compute, **options: Any) -> nn.Module:
        """Returns the decoder, see `qwen2_5_vl.decoder.Decoder` for its options and arguments."""

    def hub_tensors(self, path: str, shape: tuple[int, ...], shapes: Shapes) -> Iterator[Any]:
        """Yields the `weights.HubTensor`s that make up the parameter of a path."""

    def hub_name(self, key: str) -> str:
        """Returns the canonical name of a tensor of a checkpoint."""


FAMILIES: dict[str, Family] = {family.model_type: family for family in (QWEN2_5_VL,)}
"""`model_type` of `config.json` → family."""
