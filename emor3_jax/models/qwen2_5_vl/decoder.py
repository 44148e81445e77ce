"""The decoder: one scanned stack of layers for prompts, continuations and single tokens.

A prompt is a continuation of nothing (G = 1); a decoded token is a continuation of length one that
also sees its cache. So there is one layer and one attention, with up to three sources of keys. A
prompt with all its continuations may also pass through the layers as one row (`Group`), each weight
read, gathered and given its gradient once for all of them.

The cache is read-only inside the layer loop: each layer returns the keys it computed, and the
caller writes those of all layers at once. A cache carried through the loop and updated in it was a
quarter slower on CPU.

Parameters and cache may also come layer by layer (`params.unroll`), for decoding on CPU: XLA copies
what a loop reads of a layer, in bfloat16 by way of float32.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from emor3_jax.models.attention import InRing, Own, Shared, Source, attend, slots_last
from emor3_jax.models.cache import KV, Cache
from emor3_jax.models.decode_attention import Ring
from emor3_jax.models.layers import (
    DEFAULT,
    Compute,
    Dense,
    GroupRow,
    Mlp,
    RMSNorm,
    TokenEmbedding,
    rematerialised,
)
from emor3_jax.models.qwen2_5_vl import rope
from emor3_jax.models.qwen2_5_vl.shapes import Qwen25VLShapes
from emor3_jax.parallel.mesh import keep_rows


class Attention(nn.Module):
    """Grouped-query attention with rope.

    Attributes:
      shapes: the policy's shapes.
      compute: settings of the arithmetic.
      group: how `x` is made up, if of prompts and their continuations.
    """

    shapes: Qwen25VLShapes
    compute: Compute
    group: GroupRow | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        table: tuple[jax.Array, jax.Array],
        own_mask: jax.Array,
        earlier: list[Source],
        segments: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Attends to earlier keys and to the keys of `x` itself.

        Args:
          x: float[B, G, S, D]; of a group [B, 1, P + G * S, D], as are the next two.
          table: cosine and sine, float32[B, G, S, head_dim // 2].
          own_mask: bool[B, G, S], which of these tokens may be seen by those after them.
          earlier: keys of the prompt and of the cache; none of a group.
          segments: int32[B, G, S], tokens of one see nothing of the others; None for one segment.

        Returns:
          As `x`, and the new keys and values, as `Own` holds them unless of a group.
        """
        c = self.shapes

        def project(name: str, heads: int) -> jax.Array:
            dense = Dense(heads * c.head_dim, dtype=self.compute.dtype, name=name)
            return dense(x).reshape(*x.shape[:-1], heads, c.head_dim)

        q = rope.rotate(project("q_proj", c.num_heads), *table, scale=c.head_dim**-0.5)
        k = rope.rotate(project("k_proj", c.num_kv_heads), *table)
        v = project("v_proj", c.num_kv_heads)
        if self.group is None:
            k, v = slots_last(k, v)
            out = attend(q, [*earlier, Own(k, v, own_mask, True, segments)], self.compute.attention)
        else:
            out = _attend_group(self.group, q, k, v, own_mask, segments, self.compute.attention)
        out = out.reshape(*x.shape[:-1], -1)
        out = Dense(c.hidden_size, use_bias=False, dtype=self.compute.dtype, name="o_proj")(out)
        return out, (k, v)


def _attend_group(
    group: GroupRow,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    segments: jax.Array | None,
    backend: str,
) -> jax.Array:
    """`attend` of prompts to themselves, and of their continuations to them and to themselves."""
    (q, qs), (k, ks), (v, vs), (mask, masks) = (group.split(x) for x in (q, k, v, mask))
    of_prompt = owners = None
    if group.prompts > 1:
        size = group.prompt // group.prompts
        of_prompt = jnp.broadcast_to(jnp.arange(group.prompt) // size, mask.shape)
        owners = jnp.maximum(segments, 0) // group.responses
    prompt = Own(*slots_last(k, v), mask, True, of_prompt)
    prefix = Shared(prompt.k[:, 0], prompt.v[:, 0], mask[:, 0], group.prompts)
    own = Own(*slots_last(ks, vs), masks, True, segments, owners)
    return group.join(attend(q, [prompt], backend), attend(qs, [prefix, own], backend))


class DecoderLayer(nn.Module):
    """One layer of the decoder.

    Attributes:
      shapes: the policy's shapes.
      compute: settings of the arithmetic.
      keep_keys: return the new keys and values.
      group: how `x` is made up, see `Attention`.
    """

    shapes: Qwen25VLShapes
    compute: Compute
    keep_keys: bool
    group: GroupRow | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mine: dict[str, Any],
        shared: dict[str, Any],
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Applies the layer.

        Args:
          x: float[B, G, S, D].
          mine: this layer's own: keys and values of the prompts (`prefix`) and of the
            continuations so far (`cache`); or its number (`layer`), if they are in `shared`.
          shared: what all layers share: rope `table`, the masks `own`, `prefix`, `cache`, the
            `segments`, the `routing` and the `ring`.

        Returns:
          float[B, G, S, D], and the new keys and values if they are kept.
        """
        eps = self.shapes.rms_norm_eps
        x = keep_rows(x)
        earlier: list[Source] = []
        if "layer" in mine:
            interpret = self.compute.decode_attention.endswith("interpret")
            earlier.append(InRing(shared["ring"], mine["layer"], interpret))
        if "prefix" in mine:
            earlier.append(Shared(*mine["prefix"], shared["prefix"], routing=shared.get("routing")))
        if "cache" in mine:
            earlier.append(Own(*mine["cache"], shared["cache"]))
        normed = RMSNorm(eps, self.compute.dtype, name="input_layernorm")(x)
        out, keys = Attention(self.shapes, self.compute, self.group, name="self_attn")(
            normed, shared["table"], shared["own"], earlier, shared.get("segments")
        )
        x = x + out
        normed = RMSNorm(eps, self.compute.dtype, name="post_attention_layernorm")(x)
        x = x + Mlp(self.shapes.intermediate_size, False, self.compute.dtype, name="mlp")(normed)
        return keep_rows(x), keys if self.keep_keys else None


class Decoder(nn.Module):
    """Embeddings in, final hidden states out.

    Attributes:
      shapes: the policy's shapes.
      compute: settings of the arithmetic.
      keep_keys: return the new keys and values of all layers.
      unrolled: the layers are `layers_0`, `layers_1`, …, and the cache and the new keys are tuples.
      group: the tokens are prompts, each with its continuations behind it in one row; no keys kept.
    """

    shapes: Qwen25VLShapes
    compute: Compute = DEFAULT
    keep_keys: bool = False
    unrolled: bool = False
    group: GroupRow | None = None

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        own_mask: jax.Array,
        *,
        image_features: jax.Array | None = None,
        image_slots: jax.Array | None = None,
        prefix: KV | None = None,
        cache: Cache | None = None,
        ring: Ring | None = None,
        segments: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Runs the decoder.

        Args:
          tokens: int32[B, G, S]; of a group [B, 1, P + G * S], as are the next two.
          positions: int32[B, G, S, 3].
          own_mask: bool[B, G, S], which of the tokens may be seen by those after them.
          image_features: float[B, N, D], merged slots of each prompt's images.
          image_slots: int32[B, 1, P], index of the feature that replaces the token's embedding; -1
            for none.
          prefix: keys and values of the prompts.
          cache: keys and values of the continuations so far.
          ring: in the place of both, for the kernel of decoded tokens; S = 1.
          segments: int32[B, G, S], tokens of one see nothing of the others; None for one segment.

        Returns:
          float[B, G, S, D] after the final norm (of a group, of the continuations), and the new
          keys and values, as `Cache` holds them, if they are kept.
        """
        c = self.shapes
        size = c.vocab_size, c.hidden_size
        x = TokenEmbedding(*size, dtype=self.compute.dtype, name="embed_tokens")(tokens)
        if image_features is not None:
            features = image_features.astype(self.compute.dtype)
            # Each prompt takes from its own images, so its device needs no others.
            slots = jnp.maximum(image_slots.reshape(len(x), -1), 0)
            picked = jax.vmap(lambda own, at: own[at])(features, slots)
            # Continuations that lie behind a prompt have no images.
            text = x[:, :, : image_slots.shape[-1]]
            seen = jnp.where(image_slots[..., None] >= 0, picked.reshape(text.shape), text)
            x = x.at[:, :, : image_slots.shape[-1]].set(seen)
        x = keep_rows(x)
        shared = {"table": rope.text_table(positions, c), "own": own_mask}
        of_layers: dict[str, Any] = {}
        for name, keys in (("prefix", prefix), ("cache", cache)):
            if keys is not None:
                shared[name], of_layers[name] = keys.mask, (keys.k, keys.v)
        if ring is not None:
            # Not cut into layers: the kernel would be given copies.
            shared["ring"], of_layers["layer"] = ring, jnp.arange(c.num_layers)
        if segments is not None:
            shared["segments"] = segments
        if cache is not None and cache.routing is not None:
            shared["routing"] = cache.routing
        layer = rematerialised(DecoderLayer, self.compute.remat)
        if self.unrolled:
            found = []
            for i in range(c.num_layers):
                mine = {name: (k[i], v[i]) for name, (k, v) in of_layers.items()}
                one = layer(c, self.compute, self.keep_keys, self.group, name=f"layers_{i}")
                x, new = one(x, mine, shared)
                found.append(new)
            keys = tuple(zip(*found, strict=True)) if self.keep_keys else None
        else:
            stack = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),
                length=c.num_layers,
            )
            layers = stack(c, self.compute, self.keep_keys, self.group, name="layers")
            x, keys = layers(x, of_layers, shared)
        if self.group is not None:
            _, x = self.group.split(x)
        return RMSNorm(c.rms_norm_eps, self.compute.dtype, name="norm")(x), keys
