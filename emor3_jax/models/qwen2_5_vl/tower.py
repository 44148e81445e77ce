"""The vision tower over images in window layout.

Windowed layers attend inside each window, never over the whole image; the few full layers over all
windows of an image with the padding masked. One scanned stack; a flag per layer chooses.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from emor3_jax.models.attention import Own, attend, slots_last
from emor3_jax.models.layers import DEFAULT, Compute, Dense, Dtype, Mlp, RMSNorm, rematerialised
from emor3_jax.models.qwen2_5_vl import rope
from emor3_jax.models.qwen2_5_vl.shapes import Qwen25VLVisionShapes
from emor3_jax.parallel.mesh import keep_rows
from emor3_jax.types import Images

_EPS = 1e-6


def _split(qkv: jax.Array, heads: int) -> jax.Array:
    """Returns queries, keys and values, float[3, I, W, L, heads, head_dim], of [I, W, L, 3 * C].

    They come head by head: cut over `tensor`, a device has all three of its own heads.
    """
    return jnp.moveaxis(qkv.reshape(*qkv.shape[:-1], heads, 3, -1), -2, 0)


class VisionAttention(nn.Module):
    """Attention of one layer, inside windows or over the image.

    Attributes:
      shapes: the tower's shapes.
      compute: settings of the arithmetic.
    """

    shapes: Qwen25VLVisionShapes
    compute: Compute

    @nn.compact
    def __call__(
        self, x: jax.Array, full: jax.Array, table: tuple[jax.Array, jax.Array], mask: jax.Array
    ) -> jax.Array:
        """Attends.

        Args:
          x: float[I, W, L, C].
          full: bool[], whether over the whole image.
          table: cosine and sine, float32[I, W, L, head_dim // 2].
          mask: bool[I, W, L].

        Returns:
          float[I, W, L, C].
        """
        c = self.shapes
        qkv = Dense(3 * c.hidden_size, dtype=self.compute.dtype, name="qkv")(x)
        q, k, v = _split(qkv, c.num_heads)
        q = rope.rotate(q, *table, scale=c.head_dim**-0.5)
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

        if x.shape[1] == 1:
            out = windowed(q, k, v, mask)
        else:
            out = jax.lax.cond(full, whole, windowed, q, k, v, mask)
        out = out.reshape(x.shape)
        return Dense(c.hidden_size, dtype=self.compute.dtype, name="proj")(out)


class VisionBlock(nn.Module):
    """One layer of the tower.

    Attributes:
      shapes: the tower's shapes.
      compute: settings of the arithmetic.
    """

    shapes: Qwen25VLVisionShapes
    compute: Compute

    @nn.compact
    def __call__(
        self, x: jax.Array, full: jax.Array, table: tuple[jax.Array, jax.Array], mask: jax.Array
    ) -> tuple[jax.Array, None]:
        """Applies the layer; arguments as of `VisionAttention`."""
        x = keep_rows(x)
        normed = RMSNorm(_EPS, self.compute.dtype, name="norm1")(x)
        attention = VisionAttention(self.shapes, self.compute, name="attn")
        x = x + attention(normed, full, table, mask)
        normed = RMSNorm(_EPS, self.compute.dtype, name="norm2")(x)
        x = x + Mlp(self.shapes.intermediate_size, True, self.compute.dtype, name="mlp")(normed)
        return keep_rows(x), None


class Merger(nn.Module):
    """Joins the m * m patches of a slot into one vector of the decoder's width.

    Attributes:
      shapes: the tower's shapes.
      dtype: compute type.
    """

    shapes: Qwen25VLVisionShapes
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float[I, W, L, C] to float[I, W * L / m**2, D]."""
        c = self.shapes
        width = c.hidden_size * c.merge_unit
        x = RMSNorm(_EPS, self.dtype, name="ln_q")(x).reshape(x.shape[0], -1, width)
        x = Dense(width, dtype=self.dtype, name="mlp_0")(x).astype(jnp.float32)
        x = nn.gelu(x, approximate=False).astype(self.dtype)
        return Dense(c.out_hidden_size, dtype=self.dtype, name="mlp_2")(x)


def all_frames(patches: jax.Array, shapes: Qwen25VLVisionShapes) -> jax.Array:
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


class VisionTower(nn.Module):
    """Images in, one feature for each merged slot out.

    Attributes:
      shapes: the tower's shapes.
      compute: settings of the arithmetic.
    """

    shapes: Qwen25VLVisionShapes
    compute: Compute = DEFAULT

    @nn.compact
    def __call__(self, images: Images) -> jax.Array:
        """Returns float[B, I * W * L / m**2, D]; slots of padding are undefined."""
        c, prompts = self.shapes, len(images.mask)
        # The tower knows no prompts: it works on [B * I] images.
        images = jax.tree.map(lambda x: jnp.asarray(x).reshape(-1, *x.shape[2:]), images)
        embed = Dense(c.hidden_size, use_bias=False, dtype=self.compute.dtype, name="patch_embed")
        full = np.isin(np.arange(c.depth), c.fullatt_block_indexes)
        block = rematerialised(VisionBlock, self.compute.remat)
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=c.depth,
        )
        x, _ = stack(c, self.compute, name="blocks")(
            keep_rows(embed(all_frames(images.patches.astype(self.compute.dtype), c))),
            jnp.asarray(full),
            rope.vision_table(images.coords, c),
            images.mask,
        )
        features = keep_rows(Merger(c, self.compute.dtype, name="merger")(x))
        return features.reshape(prompts, -1, features.shape[-1])
