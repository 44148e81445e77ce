"""The pieces of the vision towers of all families."""

import abc
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from emor3_jax.models import rope
from emor3_jax.models.attention import Own, attend, slots_last
from emor3_jax.models.checks import check_sizes
from emor3_jax.models.errors import ShapesError
from emor3_jax.models.layers import Compute, Dense

TOWER_FIELDS = (
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "patch_size",
    "temporal_patch_size",
    "spatial_merge_size",
    "out_hidden_size",
)
"""Fields of `VisionShapes` that every `vision_config` has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionShapes(abc.ABC):
    """Sizes of a tower; a family adds its own.

    Attributes:
      depth: number of layers.
      hidden_size: `C`, width of a layer.
      intermediate_size, num_heads: of a layer.
      patch_size: side of a patch in pixels.
      temporal_patch_size: frames of a patch; a still image is repeated.
      spatial_merge_size: m; m * m neighbouring patches become one token of the decoder.
      out_hidden_size: width of the decoder.
      in_channels: colours of a pixel.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int
    in_channels: int = 3

    def __post_init__(self) -> None:
        check_sizes(self, "vision ")
        if self.hidden_size % (4 * self.num_heads):
            raise ShapesError(
                f"vision hidden_size={self.hidden_size} over num_heads={self.num_heads} must give "
                "heads of a multiple of 4: two coordinates, each rotated in pairs"
            )

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers of one flattened patch."""
        return self.temporal_patch_size * self.frame_dim

    @property
    def frame_dim(self) -> int:
        """Numbers of one frame of a patch; the frames of a still image are equal."""
        return self.in_channels * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches of one token."""
        return self.spatial_merge_size**2

    @property
    def mergers(self) -> tuple[str, ...]:
        """Names of the tower's modules that map its features to the decoder's width."""
        return ("merger",)

    @property
    @abc.abstractmethod
    def window_patches(self) -> int:
        """`L`, patches of one window, the unit in which images are padded."""

    @abc.abstractmethod
    def linear_flops(self, patches: float) -> float:
        """Returns the FLOPs of all products with parameters, for one image of N patches."""

    @abc.abstractmethod
    def layer_flops(self, patches: float, *, last_product: bool = True) -> float:
        """Returns the part of `linear_flops` that the layers have.

        Args:
          patches: N of the image.
          last_product: False leaves out the last product of each layer.
        """

    @abc.abstractmethod
    def attention_flops(self, patches: float) -> float:
        """Returns the attention FLOPs of all layers, for one image of N patches."""


def _split(qkv: jax.Array, heads: int) -> jax.Array:
    """Returns queries, keys and values, float[3, I, W, L, heads, head_dim], of [I, W, L, 3 * C].

    They come head by head: cut over `tensor`, a device has all three of its own heads.
    """
    return jnp.moveaxis(qkv.reshape(*qkv.shape[:-1], heads, 3, -1), -2, 0)


class VisionAttention(nn.Module):
    """Attention of one layer, inside windows or over the whole image.

    Attributes:
      num_heads: number of heads, which fill the width of `x`.
      compute: settings of the arithmetic.
    """

    num_heads: int
    compute: Compute

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        table: tuple[jax.Array, jax.Array],
        mask: jax.Array,
        full: jax.Array | None = None,
    ) -> jax.Array:
        """Attends.

        Args:
          x: float[I, W, L, C].
          table: cosine and sine, float32[I, W, L, head_dim // 2].
          mask: bool[I, W, L].
          full: bool[], whether over the whole image; None for windows alone.

        Returns:
          float[I, W, L, C].
        """
        width = x.shape[-1]
        qkv = Dense(3 * width, dtype=self.compute.dtype, name="qkv")(x)
        q, k, v = _split(qkv, self.num_heads)
        q = rope.rotate(q, *table, scale=q.shape[-1] ** -0.5)
        k = rope.rotate(k, *table)

        # The scores are recomputed in the backward pass: kept, those of the branch not taken would
        # be kept too, and over a whole image they are the largest arrays of the tower.
        @jax.checkpoint
        def windowed(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
            return attend(q, [Own(*slots_last(k, v), mask)], self.compute.attention)

        @jax.checkpoint
        def whole(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
            flat = [a.reshape(a.shape[0], 1, -1, *a.shape[3:]) for a in (q, k, v, mask)]
            return windowed(*flat).reshape(q.shape)

        if full is None or x.shape[1] == 1:
            out = windowed(q, k, v, mask)
        else:
            out = jax.lax.cond(full, whole, windowed, q, k, v, mask)
        out = out.reshape(x.shape)
        return Dense(width, dtype=self.compute.dtype, name="proj")(out)


def all_frames(patches: jax.Array, shapes: VisionShapes) -> jax.Array:
    """Returns patches with all their frames, (channel, time, row, column) flattened.

    Args:
      patches: float[..., C], whole, or one frame of a still image (channel, row, column), which is
        repeated.
      shapes: the tower's.
    """
    if patches.shape[-1] == shapes.patch_dim:
        return patches
    *rows, _ = patches.shape
    frame = patches.reshape(*rows, shapes.in_channels, 1, shapes.patch_size**2)
    frames = jnp.repeat(frame, shapes.temporal_patch_size, axis=-2)
    # As an array of its own, so that the product that follows is compiled as that of whole patches.
    return jax.lax.optimization_barrier(frames.reshape(*rows, shapes.patch_dim))
