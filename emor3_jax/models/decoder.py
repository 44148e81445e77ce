"""The decoder of all families: one scanned stack of layers for prompts, continuations and tokens.

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

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from emor3_jax.models import rope
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
from emor3_jax.parallel.mesh import keep_rows, share_heads


class DecoderShapes(NamedTuple):
    """What the decoder is made of; hashable.

    Attributes:
      vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim:
        sizes; heads need not fill the hidden size.
      rms_norm_eps: added to the mean square in the norms.
      rope_theta: base of the rope's frequencies.
      rope_axes: which position each of the head_dim // 2 frequencies follows: 0 the temporal one, 1
        the height, 2 the width.
      qkv_bias: the projections to queries, keys and values have a bias.
      qk_norm: queries and keys are normalised, head by head, before they are rotated.
      deepstack: the image features of each slot are the embedding and so many further vectors, of
        which the i-th is added at the slot's token behind layer i.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_axes: tuple[int, ...]
    qkv_bias: bool = True
    qk_norm: bool = False
    deepstack: int = 0


class Attention(nn.Module):
    """Grouped-query attention with rope.

    Attributes:
      shapes: the decoder's.
      compute: settings of the arithmetic.
      group: how `x` is made up, if of prompts and their continuations.
    """

    shapes: DecoderShapes
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
          As `x`, and the new keys and values, as `Own` holds them unless of a group; one head for
          each part of `tensor` where it has more than there are heads.
        """
        c = self.shapes

        def project(name: str, heads: int) -> jax.Array:
            size, dtype = heads * c.head_dim, self.compute.dtype
            dense = Dense(size, use_bias=c.qkv_bias, dtype=dtype, name=f"{name}_proj")
            out = dense(x).reshape(*x.shape[:-1], heads, c.head_dim)
            out = out if name == "q" else share_heads(out)
            if not c.qk_norm or name == "v":
                return out
            return RMSNorm(c.rms_norm_eps, dtype, name=f"{name}_norm")(out)

        q = rope.rotate(project("q", c.num_heads), *table, scale=c.head_dim**-0.5)
        k = rope.rotate(project("k", c.num_kv_heads), *table)
        v = project("v", c.num_kv_heads)
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
      shapes: the decoder's.
      compute: settings of the arithmetic.
      keep_keys: return the new keys and values.
      group: how `x` is made up, see `Attention`.
    """

    shapes: DecoderShapes
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
          mine: this layer's own: its number (`layer`), keys and values of the prompts (`prefix`)
            and of the continuations so far (`cache`), unless they are in `shared`.
          shared: what all layers share: rope `table`, the masks `own`, `prefix`, `cache`, the
            `segments`, the `routing`, the `ring`, and the features to add (`deepstack`).

        Returns:
          float[B, G, S, D], and the new keys and values if they are kept.
        """
        eps = self.shapes.rms_norm_eps
        x = keep_rows(x)
        earlier: list[Source] = []
        if "ring" in shared:
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
        if "deepstack" in shared:
            x = _add_features(x, shared["deepstack"], mine["layer"])
        return keep_rows(x), keys if self.keep_keys else None


def _add_features(x: jax.Array, features: jax.Array, layer: jax.Array) -> jax.Array:
    """Adds the features of the first layers at the tokens of a prompt's images.

    Args:
      x: float[B, 1, S, D]; of S, the first P are the prompt's.
      features: float[count, B, 1, P, D], 0 at text.
      layer: int32[].
    """

    def add(x: jax.Array, features: jax.Array) -> jax.Array:
        own = jax.lax.dynamic_index_in_dim(features, layer, keepdims=False)
        seen = x[:, :, : own.shape[2]] + own
        return jax.lax.dynamic_update_slice_in_dim(x, seen, 0, axis=2)

    return jax.lax.cond(layer < len(features), add, lambda x, _: x, x, features)


class Decoder(nn.Module):
    """Embeddings in, final hidden states out.

    Attributes:
      shapes: the decoder's.
      compute: settings of the arithmetic.
      keep_keys: return the new keys and values of all layers.
      unrolled: the layers are `layers_0`, `layers_1`, …, and the cache and the new keys are tuples.
      group: the tokens are prompts, each with its continuations behind it in one row; no keys kept.
    """

    shapes: DecoderShapes
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
          image_features: float[B, N, (1 + deepstack) * D], merged slots of each prompt's images.
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
        deepstack = None
        if image_features is not None:
            features = image_features.astype(self.compute.dtype)
            # Each prompt takes from its own images, so its device needs no others.
            slots = jnp.maximum(image_slots.reshape(len(x), -1), 0)
            picked = jax.vmap(lambda own, at: own[at])(features, slots)
            # Continuations that lie behind a prompt have no images.
            text = x[:, :, : image_slots.shape[-1]]
            picked = picked.reshape(*text.shape[:-1], -1, c.hidden_size)
            is_image = image_slots[..., None] >= 0
            seen = jnp.where(is_image, picked[..., 0, :], text)
            x = x.at[:, :, : image_slots.shape[-1]].set(seen)
            if c.deepstack:
                further = jnp.where(is_image[..., None], picked[..., 1:, :], 0)
                deepstack = jnp.moveaxis(further, -2, 0)
        x = keep_rows(x)
        table = rope.text_table(positions, c.rope_axes, c.rope_theta)
        shared = {"table": table, "own": own_mask}
        of_layers: dict[str, Any] = {"layer": jnp.arange(c.num_layers)}
        if deepstack is not None:
            shared["deepstack"] = deepstack
        for name, keys in (("prefix", prefix), ("cache", cache)):
            if keys is not None:
                shared[name], of_layers[name] = keys.mask, (keys.k, keys.v)
        if ring is not None:
            # Not cut into layers: the kernel would be given copies.
            shared["ring"] = ring
        if segments is not None:
            shared["segments"] = segments
        if cache is not None and cache.routing is not None:
            shared["routing"] = cache.routing
        layer = rematerialised(DecoderLayer, self.compute.remat)
        if self.unrolled:
            found = []
            for i in range(c.num_layers):
                mine = {
                    name: value[i] if name == "layer" else (value[0][i], value[1][i])
                    for name, value in of_layers.items()
                }
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
                # It traces each layer a second time; without it, fresh parameters are others.
                check_constancy_invariants=self.is_initializing(),
            )
            layers = stack(c, self.compute, self.keep_keys, self.group, name="layers")
            x, keys = layers(x, of_layers, shared)
        if self.group is not None:
            _, x = self.group.split(x)
        return RMSNorm(c.rms_norm_eps, self.compute.dtype, name="norm")(x), keys
