"""The vision tower over images in window layout.

Windowed layers attend inside each window, never over the whole image; the few full layers over all
windows of an image with the padding masked. One scanned stack; a flag per layer chooses.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from emor3_jax.models import rope
from emor3_jax.models.layers import DEFAULT, Compute, Dense, Dtype, Mlp, RMSNorm, rematerialised
from emor3_jax.models.qwen2_5_vl.shapes import Qwen25VLVisionShapes
from emor3_jax.models.vision import VisionAttention, all_frames
from emor3_jax.parallel.mesh import keep_rows
from emor3_jax.types import Images

_EPS = 1e-6


class Qwen25VLBlock(nn.Module):
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
        """Applies the layer; the arguments are those of `VisionAttention`."""
        x = keep_rows(x)
        normed = RMSNorm(_EPS, self.compute.dtype, name="norm1")(x)
        attention = VisionAttention(self.shapes.num_heads, self.compute, name="attn")
        x = x + attention(normed, table, mask, full)
        normed = RMSNorm(_EPS, self.compute.dtype, name="norm2")(x)
        x = x + Mlp(self.shapes.intermediate_size, True, self.compute.dtype, name="mlp")(normed)
        return keep_rows(x), None


class Qwen25VLMerger(nn.Module):
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


class Qwen25VLTower(nn.Module):
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
        block = rematerialised(Qwen25VLBlock, self.compute.remat)
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=c.depth,
            # It traces each layer a second time; without it, fresh parameters are others.
            check_constancy_invariants=self.is_initializing(),
        )
        x, _ = stack(c, self.compute, name="blocks")(
            keep_rows(embed(all_frames(images.patches.astype(self.compute.dtype), c))),
            jnp.asarray(full),
            rope.vision_table(images.coords, c.head_dim),
            images.mask,
        )
        features = keep_rows(Qwen25VLMerger(c, self.compute.dtype, name="merger")(x))
        return features.reshape(prompts, -1, features.shape[-1])
