"""The vision tower: every layer attends to the whole image.

Positions enter twice: a learned square table, resampled to the grid of each image, is added to the
patches, and rope turns queries and keys. The results of some layers reach the decoder beside those
of the last (DeepStack, arXiv:2406.04334), each through a merger of its own.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from emor3_jax.models import rope
from emor3_jax.models.layers import DEFAULT, Compute, Dense, Dtype, LayerNorm, rematerialised
from emor3_jax.models.qwen3_vl.shapes import Qwen3VLVisionShapes
from emor3_jax.models.vision import VisionAttention, all_frames
from emor3_jax.parallel.mesh import keep_rows
from emor3_jax.types import Images

_EPS = 1e-6


class Qwen3VLMlp(nn.Module):
    """The feed-forward layer; its activation is computed in float32.

    Attributes:
      width: of the hidden units.
      out: width of the result.
      approximate: take the tanh approximation of GELU, as the layers do; the mergers do not.
      dtype: compute type.
    """

    width: int
    out: int
    approximate: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float[..., C] to float[..., out]."""
        x = Dense(self.width, dtype=self.dtype, name="linear_fc1")(x).astype(jnp.float32)
        x = nn.gelu(x, approximate=self.approximate).astype(self.dtype)
        return Dense(self.out, dtype=self.dtype, name="linear_fc2")(x)


class Qwen3VLBlock(nn.Module):
    """One layer of the tower.

    Attributes:
      shapes: the tower's shapes.
      compute: settings of the arithmetic.
    """

    shapes: Qwen3VLVisionShapes
    compute: Compute

    @nn.compact
    def __call__(
        self, x: jax.Array, table: tuple[jax.Array, jax.Array], mask: jax.Array
    ) -> jax.Array:
        """Applies the layer; the arguments are those of `VisionAttention`."""
        c, dtype = self.shapes, self.compute.dtype
        x = keep_rows(x)
        normed = LayerNorm(_EPS, dtype, name="norm1")(x)
        x = x + VisionAttention(c.num_heads, self.compute, name="attn")(normed, table, mask)
        normed = LayerNorm(_EPS, dtype, name="norm2")(x)
        x = x + Qwen3VLMlp(c.intermediate_size, c.hidden_size, True, dtype, name="mlp")(normed)
        return keep_rows(x)


class Qwen3VLMerger(nn.Module):
    """Joins the m * m patches of a slot into one vector of the decoder's width.

    Attributes:
      shapes: the tower's shapes.
      dtype: compute type.
      joined_norm: normalise the joined patches, not each.
    """

    shapes: Qwen3VLVisionShapes
    dtype: Dtype
    joined_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float[I, 1, N, C] to float[I, N / m**2, D]."""
        c = self.shapes
        width = c.hidden_size * c.merge_unit
        norm = LayerNorm(_EPS, self.dtype, name="norm")
        x = norm(x.reshape(len(x), -1, width)) if self.joined_norm else norm(x)
        mlp = Qwen3VLMlp(width, c.out_hidden_size, False, self.dtype, name="mlp")
        # Shares this module's names, as on the hub.
        nn.share_scope(self, mlp)
        return mlp(x.reshape(len(x), -1, width))


def resample(table: jax.Array, coords: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the positions of patches: a square table, stretched over each image's grid.

    Corners fall on corners, and between the rows and columns of the table it is linear.

    Args:
      table: float[side * side, C], row by row.
      coords: int32[I, N, 2], row and column of each patch.
      mask: bool[I, N], True where a patch is real.

    Returns:
      float32[I, N, C].
    """
    side = round(len(table) ** 0.5)
    last = jnp.max(jnp.where(mask[..., None], coords, 0), axis=1, keepdims=True)
    at = coords.astype(jnp.float32) * (side - 1) / jnp.maximum(last, 1).astype(jnp.float32)
    low = jnp.floor(at)
    high_share = at - low
    low = low.astype(jnp.int32)
    high = jnp.minimum(low + 1, side - 1)
    total = 0.0
    for rows, row_share in ((low, 1 - high_share), (high, high_share)):
        for columns, column_share in ((low, 1 - high_share), (high, high_share)):
            index = rows[..., 0] * side + columns[..., 1]
            share = row_share[..., 0] * column_share[..., 1]
            row = jnp.take(table, index, axis=0, mode="clip")
            total += share[..., None] * row.astype(jnp.float32)
    return total


class PositionTable(nn.Module):
    """The learned table of positions.

    Attributes:
      shapes: the tower's shapes.
    """

    shapes: Qwen3VLVisionShapes

    @nn.compact
    def __call__(self, coords: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns float32[I, N, C], see `resample`."""
        shape = (self.shapes.num_position_embeddings, self.shapes.hidden_size)
        table = self.param("embedding", nn.initializers.normal(0.02), shape, jnp.float32)
        return resample(table, coords, mask)


class Qwen3VLTower(nn.Module):
    """Images in; for each merged slot the features of the last layer and of the chosen ones out.

    Attributes:
      shapes: the tower's shapes.
      compute: settings of the arithmetic.
    """

    shapes: Qwen3VLVisionShapes
    compute: Compute = DEFAULT

    @nn.compact
    def __call__(self, images: Images) -> jax.Array:
        """Returns float[B, I * N / m**2, (1 + deepstack) * D]; slots of padding are undefined."""
        c, dtype, prompts = self.shapes, self.compute.dtype, len(images.mask)
        # The tower knows no prompts and no windows: it works on [B * I, 1, W * L] patches.
        count = int(np.prod(images.mask.shape[:2]))
        patches, coords, mask = (jnp.asarray(x).reshape(count, 1, -1, *x.shape[4:]) for x in images)
        embed = Dense(c.hidden_size, dtype=dtype, name="patch_embed")
        x = embed(all_frames(patches.astype(dtype), c)).astype(jnp.float32)
        x = x + PositionTable(c, name="pos_embed")(coords[:, 0], mask[:, 0])[:, None]
        x = keep_rows(x.astype(dtype))

        layers = c.deepstack_visual_indexes
        # Where each layer's result goes; all that nobody asks for overwrite each other.
        place = np.full(c.depth, len(layers))
        place[list(layers)] = np.arange(len(layers))
        kept = jnp.zeros((count, len(layers) + 1, *x.shape[1:]), dtype)

        def step(
            block: nn.Module,
            carry: tuple[jax.Array, jax.Array],
            place: jax.Array,
            table: tuple[jax.Array, jax.Array],
            mask: jax.Array,
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            x, kept = carry
            x = block(x, table, mask)
            # Outside of what is rematerialised: being linear, it keeps nothing for the backward
            # pass.
            kept = jax.lax.dynamic_update_index_in_dim(kept, x, place, 1)
            return (x, keep_rows(kept)), None

        block = rematerialised(Qwen3VLBlock, self.compute.remat)(c, self.compute, name="blocks")
        stack = nn.scan(
            step,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=c.depth,
            # It traces each layer a second time; without it, fresh parameters are others.
            check_constancy_invariants=self.is_initializing(),
        )
        table = rope.vision_table(coords, c.head_dim)
        (x, kept), _ = stack(block, (x, keep_rows(kept)), jnp.asarray(place), table, mask)
        last, *deepstack = c.mergers
        features = [Qwen3VLMerger(c, dtype, name=last)(x)]
        for i, name in enumerate(deepstack):
            features.append(Qwen3VLMerger(c, dtype, joined_norm=True, name=name)(kept[:, i]))
        joined = keep_rows(jnp.concatenate(features, axis=-1))
        return joined.reshape(prompts, -1, joined.shape[-1])
